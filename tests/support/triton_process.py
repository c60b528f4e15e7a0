"""Runs test files of Triton kernels in a process of their own: interpreted, which Triton decides on import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it comes with CUDA builds of torch)"
)


def _cannot_loop() -> bool:
    """Triton 3.6's interpreter converts arrays of one number in a way that NumPy 2.4 refuses; its compiler is sound."""
    try:
        return [int(part) for part in version("triton").split(".")[:2]] < [3, 7]
    except PackageNotFoundError:
        return False


needs_loops = pytest.mark.skipif(_cannot_loop(), reason="loops on Triton's interpreter need Triton 3.7 with NumPy 2.4")


def run_interpreted(file: Path) -> None:
    """Fail with what failed in `file`, on Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        pytest.fail(done.stdout[-6000:] + done.stderr[-2000:], pytrace=False)
