"""Whether Triton's kernels can run on a device, found out once for each: the answer is a reason why not, or None."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SWITCH = "ZIMAGE_TRITON"  # environment variable: 0 leaves everything to torch, to see whether a kernel is at fault
CAPABILITY = (8, 0)  # below there is no bfloat16, and Triton 3.4 and later have no code for most of these cards
_INTERPRETED_AS = 89

# How Triton fails where it is installed and does not work: no C compiler for its launcher, a driver too old for its
# assembler, a torch it does not fit, no code for the card.
_FAULTS = (RuntimeError, OSError, ImportError, AttributeError, TypeError, ValueError, AssertionError)


def why_not(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`; None when they can. Loads and tries Triton when first asked."""
    if os.environ.get(SWITCH, "").strip() == "0":
        return f"turned off by {SWITCH}=0"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, the device is {device.type}"
    import torch

    if torch.version.hip:
        return "needs an NVIDIA GPU, this torch is built for AMD's"
    return _why_not_on_card(device)


def interpreted() -> bool:
    """Whether kernels run on Triton's interpreter: on the CPU, slowly, to check numbers."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def capability(device: torch.device) -> int:
    """Compute capability, major * 10 + minor; 0 where there is no card. The interpreter counts as a card with FP8."""
    if device.type != "cuda":
        return _INTERPRETED_AS if interpreted() else 0
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@cache
def _why_not_on_card(device: torch.device) -> str | None:
    found = capability(device)
    if found < CAPABILITY[0] * 10 + CAPABILITY[1]:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, this GPU has {found // 10}.{found % 10}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return _trial(device)


@contextmanager
def launching() -> Iterator[None]:
    """Around kernels: what Triton raises, which is no kind of RuntimeError, becomes one."""
    from triton.errors import TritonError  # type: ignore[import-untyped, import-not-found, unused-ignore]

    try:
        yield
    except TritonError as fault:
        raise RuntimeError(f"Triton: {fault}") from fault


def _trial(device: torch.device) -> str | None:
    """Compile and run the operations, and compare: what is wrong, None when nothing is."""
    try:
        from shared.ops import fused

        with launching():
            wrong = fused.wrong_operations(device)
    except _FAULTS as fault:
        lines = str(fault).strip().splitlines()
        return f"Triton does not work here ({lines[0] if lines else type(fault).__name__})"
    return f"Triton gives wrong numbers here: {', '.join(wrong)}" if wrong else None
