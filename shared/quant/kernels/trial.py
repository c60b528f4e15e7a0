"""Try a kernel on the device itself, before a picture depends on it: does it run, is it right, is it faster.

Published figures for the same kernel contradict each other from one card to the next (comfy-kitchen's int8 product is
1.8 times as fast as bf16 on an A10G, slower than it on a GB200; docs/compute.md), so on a GPU none of them is believed.
A layer's product is taken TIMES times in turns with the bf16 kernel that would serve it otherwise; the least time of
each counts. A layer of 20480 x 3840 and 1024 tokens takes a few milliseconds on a current GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.quant.kernels import FAULTS, Kernel, available, first_line

if TYPE_CHECKING:
    from shared.quant.linear import PackedLinear

TOKENS = 1024  # half of a 768x768 picture's: a kernel that wins with few wins with more, weights being read once
TIMES = 5
WARM_UP = 2

# Relative error of a product on normally distributed activations, against the unpacked weight's. Rounding these to 8
# bits costs 0.9 % (int8) to 2.7 % (float), to 4 bits 9 to 15 %; twice that is a kernel that does something else.
# Without that a weight rounded to bfloat16 once instead of twice makes 0.3 %.
LARGEST_ERROR = {"bf16": 0.02, "int8": 0.05, "fp8": 0.06, "native": 0.3}


def try_out(kernel: Kernel, layer: PackedLinear, device: torch.device) -> tuple[str | None, str]:
    """(why not, None if the kernel is right and, where that matters, no slower; what was found, in words)."""
    there = layer.twin(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, layer.in_features, generator=generator).to(device, layer.weight.dtype)
    reference = next(k for k in available(layer.packing.name) if _is_reference(k, there, device))
    mine, there = there.twin(device, kernel), there.twin(device, reference)
    try:
        with torch.inference_mode():
            expected = reference.run(there, x).float()
            error = float((kernel.run(mine, x).float() - expected).norm() / expected.norm())
            limit = LARGEST_ERROR[kernel.compute]
            if not error <= limit:  # NaN too
                return f"gives wrong products here (relative error {error:.2g}, at most {limit:g} is right)", ""
            ours, theirs = _race(lambda: kernel.run(mine, x), lambda: reference.run(there, x), device)
    except FAULTS as fault:
        return f"fails here ({first_line(fault)})", ""
    found = f"{ours * 1e3:.2f} ms against {theirs * 1e3:.2f} ms of {reference.name} on this device"
    if kernel.tried and ours > theirs:
        return f"slower: {found}", ""
    if layer.compute == "auto" and ours > theirs:
        return f"slower: {found}; --compute {kernel.compute} takes it all the same", ""
    return None, found


def _is_reference(kernel: Kernel, layer: PackedLinear, device: torch.device) -> bool:
    return not (kernel.rounds_activations or kernel.tried) and kernel.refuse(layer, device) is None


def _race(first: Callable[[], Tensor], second: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """The least seconds of each, taken in turns."""
    least = [float("inf"), float("inf")]
    for turn in range(WARM_UP + TIMES):
        for place, product in enumerate((first, second)):
            _wait(device)
            began = time.perf_counter()
            product()
            _wait(device)
            if turn >= WARM_UP:
                least[place] = min(least[place], time.perf_counter() - began)
    return least[0], least[1]


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
