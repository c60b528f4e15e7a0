"""Which device, number type and attention this machine gets, each with its reason in words."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shared.quant.errors import UserError

if TYPE_CHECKING:
    import torch

DeviceKind = Literal["cuda", "mps", "cpu"]

# Tensor cores multiply bfloat16 from compute capability 8.0 (Ampere) on; Wan2GP draws the line at the same place.
BF16_CAPABILITY = 80

GIB = 2**30

# Wan2GP's names for attention and two more, and the Python package behind each that torch does not bring along.
ATTENTION_PACKAGES: Mapping[str, str | None] = {
    "sdpa": None,
    "cudnn": None,
    "flash": "flash_attn",
    "flash3": "flash_attn_interface",
    "xformers": "xformers",
    "sage": "sageattention",
    "sage2": "sageattention",
}
# Compute capabilities that each has code for: oldest and newest, None for no end.
_ATTENTION_CAPABILITIES: Mapping[str, tuple[int, int | None]] = {
    "cudnn": (80, None),
    "flash": (80, None),
    "flash3": (90, 90),
    "xformers": (75, None),
    "sage": (80, None),
    "sage2": (80, None),
}
# Round queries and keys to 8 bits: never taken by themselves.
_ROUNDING_ATTENTION = ("sage", "sage2")


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One place to compute on. `reason` says in words why it was chosen."""

    kind: DeviceKind
    name: str
    capability: int | None  # NVIDIA compute capability, major * 10 + minor: 89 is 8.9
    total_memory: int | None  # bytes; a GPU's own memory, or the machine's RAM for "mps" and "cpu"
    reason: str


def detect(prefer: str = "") -> DeviceInfo:
    """Find the device to compute on: the NVIDIA GPU, else Apple's GPU, else the CPU.

    prefer: "" or "auto" takes the best there is; "cuda", "mps" or "cpu" insists on that one.
    Raises UserError when the wanted device is unknown, absent, or not served by this torch build.
    """
    wanted = prefer.strip().lower() or "auto"
    if wanted.startswith("cuda:"):
        raise UserError(
            f"A GPU is not chosen by number here (got {prefer!r}).",
            f'Set the environment variable CUDA_VISIBLE_DEVICES={wanted[5:]} and ask for "cuda".',
        )
    if wanted not in ("auto", "cuda", "mps", "cpu"):
        raise UserError(f"Unknown device {prefer!r}.", 'Choose "auto", "cuda", "mps" or "cpu".')
    if wanted == "cpu":
        return _cpu("asked for")

    no_cuda = _why_no_cuda()
    if wanted in ("auto", "cuda") and no_cuda is None:
        return _cuda()
    if wanted == "cuda":
        raise UserError(f"No usable NVIDIA GPU: {no_cuda}.", 'Use "auto" or "cpu", or a torch that fits the GPU.')

    no_mps = _why_no_mps()
    if no_mps is None:
        return _mps()
    if wanted == "mps":
        raise UserError(f"No usable Apple GPU: {no_mps}.", 'Use "auto" or "cpu".')
    return _cpu(f"no GPU: {no_cuda}")


def choose_dtype(device: DeviceInfo) -> tuple[torch.dtype, str]:
    """The type to compute in on `device`, and why: bfloat16 where it is fast, else what is fast and safe instead."""
    import torch

    if device.kind == "cuda":
        if device.capability is not None and device.capability < BF16_CAPABILITY:
            return (
                torch.float16,
                f"compute capability {_dotted(device.capability)} multiplies bfloat16 slowly",
            )
        return torch.bfloat16, "the GPU multiplies bfloat16 natively"
    if device.kind == "mps":
        if torch.backends.mps.is_macos_or_newer(14, 0):
            return torch.bfloat16, "macOS 14 or newer has bfloat16 on Apple GPUs"
        return torch.float16, "bfloat16 on Apple GPUs needs macOS 14"
    unit = _bf16_unit(_cpu_features())
    if unit is not None:
        return torch.bfloat16, f"this CPU multiplies bfloat16 natively ({unit})"
    return (
        torch.float32,
        "this CPU has no bfloat16 arithmetic (AVX512-BF16, AMX or Arm BF16), float32 is faster",
    )


def choose_attention(
    requested: str, preset_rule: str | None, device: DeviceInfo, unsafe: Sequence[str] = ()
) -> tuple[str, str]:
    """The attention to compute with, and why. "auto" on an NVIDIA GPU: a race when the model is loaded decides.

    requested: "auto" (or ""), or one of ATTENTION_PACKAGES. unsafe: those that spoil this model's pictures.
    preset_rule: what the preset prescribes for this GPU (its `attention` entry), or None. A prescription wins over
        the request, because presets ship it where a faster attention spoils the picture; one that cannot be used
        here is passed over, as Wan2GP does.
    Raises UserError for an unknown request, or one that cannot be used here.
    """
    mode = requested.strip().lower() or "auto"
    if mode != "auto" and mode not in ATTENTION_PACKAGES:
        close = difflib.get_close_matches(mode, ATTENTION_PACKAGES, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        known = ", ".join(("auto", *ATTENTION_PACKAGES))
        raise UserError(f"Unknown attention {requested!r}.", f"{hint}Choose from: {known}.")
    refused = None if preset_rule is None else why_no_attention(preset_rule, device, unsafe)
    if preset_rule is not None and refused is None:
        instead = f", instead of {mode}" if mode not in ("auto", preset_rule) else ""
        return preset_rule, f"the preset prescribes it on this device{instead}"
    passed_over = f"; the preset's {preset_rule} cannot be used: {refused}" if preset_rule else ""
    if mode == "auto":
        racing = attention_candidates(device)
        if len(racing) > 1:
            return mode, f"the fastest of {', '.join(racing)} when the model is loaded{passed_over}"
        return "sdpa", f"torch's own attention, which picks the fastest of its kernels{passed_over}"
    if (reason := why_no_attention(mode, device, unsafe)) is not None:
        raise UserError(f"Attention {mode!r} cannot be used: {reason}.", "Use --attention auto or sdpa.")
    return mode, f"asked for{passed_over}"


def attention_candidates(device: DeviceInfo) -> tuple[str, ...]:
    """What "auto" chooses among on this device: whatever rounds no more than torch's own does."""
    exact = (mode for mode in ATTENTION_PACKAGES if mode not in _ROUNDING_ATTENTION)
    return tuple(mode for mode in exact if why_no_attention(mode, device) is None)


def why_no_attention(mode: str, device: DeviceInfo, unsafe: Sequence[str] = ()) -> str | None:
    """Why this attention cannot be used on the device; None when it can, as far as it shows without trying it."""
    if mode == "sdpa":
        return None
    if mode not in ATTENTION_PACKAGES:
        return "there is no such attention"
    if mode in unsafe:
        return "it spoils this model's pictures"
    if device.kind != "cuda":
        return f"it needs an NVIDIA GPU, and the device is {device.kind}"
    oldest, newest = _ATTENTION_CAPABILITIES[mode]
    found = device.capability or 0
    if found < oldest or (newest is not None and found > newest):
        wanted = f"{_dotted(oldest)} or newer" if newest is None else _dotted(oldest)
        return f"it needs compute capability {wanted}, this GPU has {_dotted(found)}"
    package = ATTENTION_PACKAGES[mode]
    if package is not None and importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    if package == "sageattention" and mode != _sage_of(version := _version_of(package)):
        return f"sageattention {version} is installed, which is {_sage_of(version)}"
    return None


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # beside the path without its metadata
        return ""


def _sage_of(version: str) -> str:
    return "sage" if version.startswith(("0.", "1.")) else "sage2"


def ram_bytes() -> int:
    """The machine's main memory in bytes."""
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    return int(psutil.virtual_memory().total)


def _cuda() -> DeviceInfo:
    import torch

    properties = torch.cuda.get_device_properties(0)
    capability = properties.major * 10 + properties.minor
    memory = int(properties.total_memory)
    reason = f"{properties.name}, {memory / GIB:.1f} GiB, compute capability {_dotted(capability)}"
    return DeviceInfo("cuda", properties.name, capability, memory, reason)


def _mps() -> DeviceInfo:
    memory = ram_bytes()
    return DeviceInfo("mps", "Apple GPU", None, memory, f"Apple GPU sharing {memory / GIB:.1f} GiB with the CPU")


def _cpu(reason: str) -> DeviceInfo:
    import platform

    name = str(_cpu_features().get("cpu_name") or platform.processor() or platform.machine())
    return DeviceInfo("cpu", name, None, ram_bytes(), reason)


def _why_no_cuda() -> str | None:
    """Why CUDA cannot be used, or None when it can."""
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            driver = ", though an NVIDIA driver is installed" if shutil.which("nvidia-smi") else ""
            return f"this torch build ({torch.__version__}) is for the CPU only{driver}"
        return f"torch {torch.__version__} finds no GPU, or its driver is too old"
    capability = _capability_of_first_gpu()
    if not _binary_serves(capability, torch.cuda.get_arch_list()):
        name = torch.cuda.get_device_name(0)
        return f"torch {torch.__version__} holds no code for {name} (compute capability {_dotted(capability)})"
    return None


def _capability_of_first_gpu() -> int:
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    return major * 10 + minor


def _binary_serves(capability: int, architectures: Sequence[str]) -> bool:
    """Whether a torch build runs on a GPU: machine code of the same major version, or older portable PTX.

    Without this check an old card is found, loads 12 GB, and fails with "no kernel image" at the first product.
    architectures: torch.cuda.get_arch_list(), such as ["sm_75", "sm_90", "compute_120"]; AMD's are "gfx...".
    """
    kinds = [a.rstrip("af").split("_") for a in architectures if a.startswith(("sm_", "compute_"))]
    if not kinds:
        return True
    numbers = [(kind, int(number)) for kind, number in kinds]
    return any(
        number <= capability and (kind == "compute" or number // 10 == capability // 10) for kind, number in numbers
    )


def _why_no_mps() -> str | None:
    import torch

    if torch.backends.mps.is_available():
        return None
    if torch.backends.mps.is_built():
        return "it needs a Mac with Apple silicon and macOS 14"
    return f"this torch build ({torch.__version__}) is not for Macs"


def _cpu_features() -> Mapping[str, Any]:
    """Names of what the CPU can do, as torch's cpuinfo spells them; older torch: read from /proc/cpuinfo."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    listing = Path("/proc/cpuinfo")
    if not listing.is_file():
        return {}
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return dict.fromkeys(flags.split(), True)


def _bf16_unit(features: Mapping[str, Any]) -> str | None:
    """The instructions that multiply bfloat16, by their public name; None when the CPU has none."""
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}
    return next((name for key, name in units.items() if features.get(key)), None)


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"
