"""`doctor`: what this machine has, what is wrong with it, which preset to use, and whether a picture can be drawn.

    examine(ctx)          facts, problems and advice; imports torch and nothing heavier
    examine(..., self_test=True)   draws one picture with the weights that come with the program, too

Everything is a frozen dataclass of plain values; `Report.as_dict()` is the JSON.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from shared.app.advice import Advice, advise
from shared.app.context import DEFAULT_PRESET
from shared.app.device import (
    ATTENTION_PACKAGES,
    DeviceInfo,
    choose_attention,
    choose_dtype,
    detect,
    ram_bytes,
)
from shared.app.kernel_report import KernelChoice, kernel_choices
from shared.app.plan import choose_compute, requested_device
from shared.quant.errors import UserError

if TYPE_CHECKING:
    import torch

    from shared.app.context import AppContext

PYTHONS = ((3, 11), (3, 13))  # oldest and newest, as in pyproject.toml
_INSTALL = "Run: python run.py (it installs what is missing), or: pip install -r requirements.txt"

# Distribution -> (whether the program needs it, what it is for).
LIBRARIES = {
    "transformers": (True, "text encoder and tokenizer"),
    "tokenizers": (True, "tokenizer"),
    "diffusers": (True, "VAE"),
    "safetensors": (True, "weights files"),
    "numpy": (True, "pictures"),
    "pillow": (True, "pictures"),
    "psutil": (True, "memory sizes"),
    "huggingface_hub": (True, "downloads"),
    "mmgp": (False, "streams weights through a small GPU"),
    "optimum-quanto": (False, "int8 files as mmgp makes them"),
    "gguf": (False, "GGUF files"),
    "comfy-kitchen": (False, "kernels for packed weights"),
    "triton": (False, "fused kernels on NVIDIA GPUs; comes with torch for CUDA"),
    "numba": (False, "fused kernels on CPUs"),
    "gradio": (False, "the web page"),
    "bitsandbytes": (False, "writes nf4 files; reading them needs nothing"),
}

ENGINE_RELEASES = "https://github.com/nunchaku-tech/nunchaku/releases"

SELF_TEST_SIZE = "256x256"
SELF_TEST_SEED = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong. broken: pictures cannot be drawn until it is mended; else a warning."""

    what: str
    to_do: str
    broken: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemFacts:
    """Memory and disk in bytes, None where the system does not tell. checkpoints: where downloads go."""

    python: str
    os: str
    ram: int | None
    checkpoints: str
    disk_free: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFacts:
    """build: "CPU", "CUDA 13.0", "ROCm 7.0" or "Metal". driver: NVIDIA's, "" without one."""

    version: str
    build: str
    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What is computed on. capability: "8.9", "" where there is none. memory: bytes.

    between: what computes between matrix products, and why not something faster.
    """

    kind: str
    name: str
    capability: str
    memory: int | None
    reason: str
    dtype: str
    dtype_reason: str
    between: str


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """One way to compute attention, and why it can or cannot be used here."""

    name: str
    usable: bool
    reason: str


@dataclass(frozen=True, slots=True)
class LibraryFacts:
    """version: "" where the library is not installed."""

    name: str
    version: str
    needed: bool
    purpose: str


@dataclass(frozen=True, slots=True)
class NunchakuFacts:
    """Whether the package called nunchaku is the SVDQuant engine or the unrelated one of the same name."""

    state: Literal["absent", "engine", "impostor"]
    version: str
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """The picture drawn to see whether drawing works. seconds: with loading; words: what came out, or what failed."""

    passed: bool
    seconds: float
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings. device and what follows from it are None or empty when torch cannot be used."""

    system: SystemFacts
    torch: TorchFacts | None
    device: DeviceFacts | None
    kernels: tuple[KernelChoice, ...] = ()
    attention: tuple[AttentionFacts, ...] = ()
    libraries: tuple[LibraryFacts, ...] = ()
    nunchaku: NunchakuFacts
    advice: Advice | None = None
    self_test: SelfTest | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether nothing is broken."""
        return not any(problem.broken for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with `usable`."""
        return {"usable": self.usable} | asdict(self)


def examine(ctx: AppContext, *, self_test: bool = False) -> Report:
    """Look at this machine. self_test: draw a picture as well.

    Raises UserError for a device, an attention or a kind of compute that was asked for and is unknown or absent;
    everything else that is wrong is in the report.
    """
    libraries = tuple(_libraries())
    torch_facts, torch_problem = _torch()
    nunchaku = nunchaku_facts(torch_facts)
    system = _system(ctx.files.roots[0])
    report = Report(system=system, torch=torch_facts, device=None, libraries=libraries, nunchaku=nunchaku)
    if torch_facts is not None:
        report = _on_device(ctx, report)
    if self_test and torch_facts is not None:
        report = replace(report, self_test=draw_self_test(ctx))
    found = [torch_problem] if torch_problem else []
    return replace(report, problems=(*found, *_problems(ctx, report)))


def nunchaku_facts(torch_facts: TorchFacts | None, search: Sequence[str] | None = None) -> NunchakuFacts:
    """Look for the package `nunchaku` without importing it. search: folders instead of sys.path, and no metadata.

    The engine is a compiled module `_C`; the package of that name on the package index, a statistics library, has none.
    """
    spec = PathFinder.find_spec("nunchaku", search)
    version = _version("nunchaku") if search is None else ""
    if not version and (spec is None or spec.loader is None):  # a folder that merely has the name is no package
        return NunchakuFacts("absent", "", f"not installed, and not needed; {engine_words(torch_facts)}")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if places and PathFinder.find_spec("nunchaku._C", places) is not None:
        return NunchakuFacts("engine", version, "the SVDQuant engine is installed")
    words = (
        "the installed package nunchaku is an unrelated statistics package (it fits straight lines to curves), "
        f"not the SVDQuant engine; {engine_words(torch_facts)}"
    )
    return NunchakuFacts("impostor", version, words)


def engine_words(torch_facts: TorchFacts | None) -> str:
    """Where the genuine engine comes from, and how the file for this Python, torch and CUDA is named."""
    if torch_facts is None or not torch_facts.build.startswith("CUDA "):
        return "the engine needs a CUDA build of torch"
    torch_version = ".".join(torch_facts.version.split(".")[:2])
    cuda = torch_facts.build.removeprefix("CUDA ")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return (
        f"the engine's wheels are at {ENGINE_RELEASES}: the one for this machine, if there is one, is named like "
        f"nunchaku-<version>+cu{cuda}torch{torch_version}-{tag}-{tag}-{_wheel_platform()}.whl"
    )


def draw_self_test(ctx: AppContext) -> SelfTest:
    """Draw one small picture with the weights that come with the program, into a temporary folder."""
    started = time.monotonic()

    def outcome(words: str, *, passed: bool = False) -> SelfTest:
        return SelfTest(passed=passed, seconds=round(time.monotonic() - started, 2), words=words)

    try:
        return outcome(_draw(ctx), passed=True)
    except UserError as error:
        return outcome(str(error))
    # Whatever fails here is what the test was to find out: it belongs into the report, not above it.
    except Exception as error:  # noqa: BLE001
        return outcome(f"{type(error).__name__}: {error}")
    finally:
        ctx.session.release()


def _draw(ctx: AppContext) -> str:
    """What was drawn, in words. Raises UserError, or whatever the libraries raise, when it cannot be."""
    from PIL import Image

    from shared.app.settings import GenerationSettings
    from shared.quant.errors import RunError

    preset = ctx.presets.get(DEFAULT_PRESET)
    wishes = {"resolution": SELF_TEST_SIZE, "seed": SELF_TEST_SEED, "batch_size": 1}
    settings = GenerationSettings.build(preset, {}, wishes)
    with TemporaryDirectory() as folder:
        # The session itself refuses a picture that holds NaN or infinity.
        result = ctx.session.generate(preset, settings, output=Path(folder) / "self_test.png")
        with Image.open(result.images[0].path) as picture:
            size = picture.size
            ranges: Any = picture.convert("RGB").getextrema()  # (least, most) of each colour
    if all(low == high for low, high in ranges):
        raise RunError(f"The picture has one colour only, {[low for low, _ in ranges]}.", "Its weights are damaged.")
    seconds = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in result.seconds.items())
    return f"{preset.id}, {size[0]}x{size[1]}, {result.forwards} steps, all pixels finite ({seconds})"


def _on_device(ctx: AppContext, report: Report) -> Report:
    """The report with everything that depends on the device."""
    import torch

    device = detect(requested_device(ctx))
    dtype, dtype_reason = choose_dtype(device)
    dtype_name = str(dtype).removeprefix("torch.")
    kernels = tuple(kernel_choices(torch.device(device.kind), dtype, compute=choose_compute(ctx).value))
    # SVDQuant's INT4 and FP4 are one packing: a card that multiplies one of them does not take the other's files.
    expanding = {k.packing for k in kernels if k.expands} - {k.packing for k in kernels if k.kernel and not k.expands}
    return replace(
        report,
        device=DeviceFacts(
            kind=device.kind,
            name=device.name,
            capability="" if device.capability is None else f"{device.capability // 10}.{device.capability % 10}",
            memory=device.total_memory,
            reason=device.reason,
            dtype=dtype_name,
            dtype_reason=dtype_reason,
            between=_between(torch.device(device.kind)),
        ),
        kernels=kernels,
        attention=tuple(_attention(name, device) for name in ("auto", *ATTENTION_PACKAGES)),
        advice=advise(ctx, device, dtype_name, report.system.ram, expanding),
    )


def _between(device: torch.device) -> str:
    from shared.ops import compiled_ready, triton_ready

    fast, reason = (
        ("compiled by numba", compiled_ready.why_not())
        if device.type == "cpu"
        else ("fused by Triton", triton_ready.why_not(device))
    )
    return fast if reason is None else f"torch's own operations ({reason})"


def _attention(name: str, device: DeviceInfo) -> AttentionFacts:
    try:
        mode, reason = choose_attention(name, None, device)
    except UserError as error:
        return AttentionFacts(name, False, error.message.partition(": ")[2].rstrip(".") or error.message)
    return AttentionFacts(name, True, f"{mode}: {reason}" if name == "auto" else "usable")


def _system(checkpoints: Path) -> SystemFacts:
    existing = next((folder for folder in (checkpoints, *checkpoints.parents) if folder.is_dir()), None)
    return SystemFacts(
        python=platform.python_version(),
        os=f"{platform.system()} {platform.release()} ({platform.machine()})",
        ram=_or_none(ram_bytes),
        checkpoints=str(checkpoints),
        disk_free=_or_none(lambda: shutil.disk_usage(existing or checkpoints).free),
    )


def _or_none(ask: Callable[[], int]) -> int | None:
    try:
        return ask()
    except (ImportError, OSError):  # psutil is missing; a folder on a drive that is gone
        return None


def _libraries() -> list[LibraryFacts]:
    return [LibraryFacts(name, _version(name), needed, purpose) for name, (needed, purpose) in LIBRARIES.items()]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution) or "unknown version"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch() -> tuple[TorchFacts | None, Problem | None]:
    """torch and its build, or why it cannot be used."""
    if importlib.util.find_spec("torch") is None:
        return None, Problem("torch is not installed.", _INSTALL)
    try:
        import torch
    # A damaged or mismatched installation fails in any of these ways.
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return None, Problem(f"torch does not load: {error}.", "Install it again: delete .venv, then python run.py")
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    else:
        build = "Metal" if torch.backends.mps.is_built() else "CPU"
    return TorchFacts(version=str(torch.__version__), build=build, driver=_driver()), None


def _driver() -> str:
    """The version of NVIDIA's driver, "" when nvidia-smi is absent or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(answer.stdout.split()), "")


def _problems(ctx: AppContext, report: Report) -> list[Problem]:
    """What is wrong, broken things first."""
    system, device, test = report.system, report.device, report.self_test
    found = []
    oldest, newest = PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        wanted = f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
        found.append(Problem(f"Python {system.python} is not one of {wanted}.", f"Install Python {newest[0]}.12."))
    missing = [library.name for library in report.libraries if library.needed and not library.version]
    if missing:
        found.append(Problem(f"Not installed: {', '.join(missing)}.", _INSTALL))
    if test is not None and not test.passed:
        found.append(Problem(f"The self-test failed: {test.words}", "--verbose 2 with `generate` shows where."))
    for kernel in report.kernels:
        if kernel.problem:
            what = f"{kernel.label} weights cannot be used: {kernel.problem}."
            found.append(Problem(what, "Take a preset in another format.", broken=False))
    if device is not None and report.torch is not None and report.torch.driver and device.kind == "cpu":
        what = f"There is an NVIDIA driver ({report.torch.driver}), but the CPU is used: {device.reason}."
        to_do = "Delete .venv and run python run.py: it installs the torch that fits the driver."
        found.append(Problem(what, to_do, broken=False))
    if report.nunchaku.state == "impostor":
        to_do = "Run: pip uninstall nunchaku. This program draws SVDQuant files without the engine."
        found.append(Problem(_sentence(report.nunchaku.words), to_do, broken=False))
    if report.advice is not None and system.disk_free is not None and report.advice.to_download > system.disk_free:
        what = f"{report.advice.preset} needs a download of {report.advice.to_download / 1e9:.1f} GB"
        what += f", and {system.disk_free / 1e9:.1f} GB are free at {system.checkpoints}."
        found.append(Problem(what, "Make room there.", broken=False))
    if report.torch is not None and report.advice is None:
        to_do = "Get the program's own files back: git checkout models defaults"
        found.append(Problem("No preset can be used.", to_do))
    found += [Problem(line, "Mend or remove that file.", broken=False) for line in ctx.presets.problems]
    return sorted(found, key=lambda problem: not problem.broken)


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _wheel_platform() -> str:
    if sys.platform == "win32":
        return "win_amd64"
    return f"{sys.platform}_{platform.machine()}"
