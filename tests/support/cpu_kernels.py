"""Which kernels a CPU has in this version of torch."""

from __future__ import annotations

import pytest

from shared.quant.kernels import torch_fp8


def skip_where_cpus_lack(kernel: str) -> None:
    """torch 2.11's CPUs have no FP8 product by rows; the kernel says so, and is then tested on GPUs only."""
    if kernel == "torch-fp8" and (reason := torch_fp8._refusal_of_cpus()):
        pytest.skip(reason)
