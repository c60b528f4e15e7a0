"""The system, torch and the libraries that are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from shared.app.device import ram_bytes
from shared.app.doctor.report import LibraryFacts, Problem, SystemFacts, TorchFacts

INSTALL = "Run: python run.py (it installs what is missing), or: pip install -r requirements.txt"

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


def look_at_system(checkpoints: Path) -> SystemFacts:
    """Python, memory and disk. checkpoints: where downloads go."""
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


def list_libraries() -> list[LibraryFacts]:
    """What the program needs or can use, and which version is here."""
    return [LibraryFacts(name, version_of(name), needed, purpose) for name, (needed, purpose) in LIBRARIES.items()]


def version_of(distribution: str) -> str:
    """Of an installed distribution, "" where it is not."""
    try:
        return importlib.metadata.version(distribution) or "unknown version"
    except importlib.metadata.PackageNotFoundError:
        return ""


def look_at_torch() -> tuple[TorchFacts | None, Problem | None]:
    """torch and its build, or why it cannot be used."""
    if importlib.util.find_spec("torch") is None:
        return None, Problem("torch is not installed.", INSTALL)
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
