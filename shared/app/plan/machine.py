"""The device to compute on and the number type to compute in: asked of torch, or without it where that can be."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.app.device import DeviceInfo, choose_dtype, detect, ram_bytes
from shared.app.plan.requested import Choice
from shared.app.presets import Preset

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
VAE_DTYPE = "float32"  # half precision shows as banding in smooth skies, and float16 overflows in some VAEs
_PRESET_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
# Where a GPU driver shows itself on Linux: NVIDIA, NVIDIA under WSL, AMD.
_GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
_BF16_CPU_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


@dataclass(frozen=True, slots=True)
class Machine:
    """The device to compute on and the number type to compute in."""

    device: DeviceInfo
    dtype: Choice  # "float32", "bfloat16" or "float16"


def find_machine(preset: Preset, prefer: str = "") -> Machine:
    """Ask torch for the device and the number type. prefer: as for `device.detect`."""
    device = detect(prefer)
    demanded = preset.model_def.get("dtype")
    if demanded and device.kind == "cuda":
        return Machine(device, Choice(_PRESET_DTYPES[demanded], f"the preset demands {demanded}"))
    dtype, reason = choose_dtype(device)
    return Machine(device, Choice(str(dtype).removeprefix("torch."), reason))


def find_machine_quickly(preset: Preset, prefer: str = "") -> Machine:
    """The same without torch (whose import takes seconds) where that is possible: on Linux without a GPU driver."""
    no_gpu = prefer == "cpu" or not any(Path(file).exists() for file in _GPU_DEVICE_FILES)
    listing = Path("/proc/cpuinfo")
    if "torch" in sys.modules or prefer not in ("", "auto", "cpu") or not (no_gpu and listing.is_file()):
        return find_machine(preset, prefer)
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
    facts = dict(line.replace("\t", "").split(":", 1) for line in reversed(lines) if ":" in line)
    name = facts.get("model name", "CPU").strip()
    device = DeviceInfo("cpu", name, None, ram_bytes(), "asked for" if prefer == "cpu" else "no GPU driver found")
    has_bf16 = set(_BF16_CPU_FLAGS) & set((facts.get("flags") or facts.get("Features") or "").split())
    if has_bf16:
        return Machine(
            device,
            Choice("bfloat16", f"this CPU multiplies bfloat16 natively ({', '.join(sorted(has_bf16))})"),
        )
    return Machine(device, Choice("float32", "this CPU has no bfloat16 arithmetic, float32 is faster"))


def safer_type(machine: Machine) -> str | None:
    """The number type to take when float16 was too narrow; None when the type is as wide as another already."""
    if machine.dtype.value != "float16":
        return None
    # Half as large as float32, and though some cards only imitate bfloat16, every CUDA card knows it.
    return "bfloat16" if machine.device.kind == "cuda" else "float32"


def in_safer_type(machine: Machine, remembered: Mapping[str, str]) -> Machine:
    """The machine as it is to compute where float16 was too narrow before. remembered: why, by what was changed."""
    wider = safer_type(machine) if "dtype" in remembered else None
    return machine if wider is None else Machine(machine.device, Choice(wider, remembered["dtype"]))
