"""Whether the CPU's compiled kernels can run here, found out once: the answer is a reason why not, or None."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

SWITCH = "ZIMAGE_NUMBA"  # environment variable: 0 leaves everything to torch, to see whether a kernel is at fault

# How numba fails where it is installed and does not work: a numpy or an LLVM that it does not fit, no place that it may
# write to, a processor that LLVM has no code for. Its own errors are RuntimeErrors or TypeErrors.
_FAULTS = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, AssertionError, SystemError)


@cache
def why_not() -> str | None:
    """Why kernels are not compiled; None when they are. Loads and tries them when first asked."""
    if os.environ.get(SWITCH, "").strip() == "0":
        return f"turned off by {SWITCH}=0"
    if importlib.util.find_spec("numba") is None:
        return "the package numba is not installed"
    try:
        from shared.ops import compiled

        wrong = compiled.wrong_operations()
    except _FAULTS as fault:
        lines = str(fault).strip().splitlines()
        return f"numba does not work here ({lines[0] if lines else type(fault).__name__})"
    return f"numba gives wrong numbers here: {', '.join(wrong)}" if wrong else None
