"""What a measurement was taken on: the machine, the versions of everything that computes, the state of the code."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Packages whose version changes a figure.
_PACKAGES = (
    "torch",
    "triton",
    "numba",
    "diffusers",
    "transformers",
    "optimum-quanto",
    "comfy-kitchen",
    "mmgp",
    "safetensors",
)
_UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_GPU_STATE = "clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """cpu: its name; units: its vector units; gpu: name, "" without CUDA; ram_gb, gpu_gb: 10^9 bytes."""

    cpu: str
    cores: int
    ram_gb: float
    units: tuple[str, ...] = ()
    gpu: str = ""
    gpu_gb: float = 0.0

    @property
    def slug(self) -> str:
        """For file names: "nvidia-h200", "amd-epyc-2-cores"."""
        words = self.gpu or f"{self.cpu} {self.cores} cores"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"units": list(self.units)}

    def __str__(self) -> str:
        units = f" ({', '.join(u for u in self.units if u != 'avx2')})" if len(self.units) > 1 else ""
        cpu = f"{self.cores} cores of {self.cpu}{units}, {self.ram_gb:.0f} GB"
        return f"{self.gpu} {self.gpu_gb:.0f} GB, {cpu}" if self.gpu else cpu


def this_machine() -> Machine:
    import psutil  # type: ignore[import-untyped]
    import torch

    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    gpu, gpu_bytes = "", 0
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu, gpu_bytes = str(properties.name), int(properties.total_memory)
    return Machine(
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        ram_gb=round(psutil.virtual_memory().total / 1e9, 1),
        units=tuple(name for name in _UNITS if features.get(name)),
        gpu=gpu,
        gpu_gb=round(gpu_bytes / 1e9, 1),
    )


def versions() -> dict[str, str]:
    """Python and the packages that compute, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path) -> str:
    """The commit of the code at `root`, with "+" behind it when tracked files differ from it; "" outside git."""
    head = _output(["git", "rev-parse", "--short=9", "HEAD"], root)
    if not head:
        return ""
    return head + ("+" if _output(["git", "status", "--porcelain", "--untracked-files=no"], root) else "")


def state() -> dict[str, Any]:
    """How busy the machine is and, of a GPU, its clocks (MHz), power (W), temperature and load: before and after."""
    found: dict[str, Any] = {}
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    gpu = _output(["nvidia-smi", f"--query-gpu={_GPU_STATE}", "--format=csv,noheader,nounits", "--id=0"], None)
    if gpu:
        found |= dict(zip(_GPU_STATE.split(","), (field.strip() for field in gpu.split(",")), strict=False))
    return found


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")


def _output(command: list[str], folder: Path | None) -> str:
    """What a program prints; "" when it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
