"""What the kernels of the library comfy-kitchen have in common: is it here, can it do this, on which of its backends.

The library chooses a backend for each call and goes on to its slow one in silence when the fast one cannot. Here the
fast one is insisted on: what it cannot do is an error.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BACKEND = "cuda"


def refuse(operations: tuple[str, ...], capability: tuple[int, int], device: torch.device) -> str | None:
    """Why the library's own code cannot compute these operations on a device; None if it can.

    capability: of the GPU, at least, as the library declares it or as its product needs it.
    """
    import torch

    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, the device is {device.type}"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        return f"needs compute capability {capability[0]}.{capability[1]}, this GPU has {found[0]}.{found[1]}"
    if importlib.util.find_spec("comfy_kitchen") is None:
        return "comfy-kitchen is not installed"
    return _missing(operations)


@cache
def _missing(operations: tuple[str, ...]) -> str | None:
    """Why the backend has not got these operations. Asked once: what is installed does not change in a process."""
    import comfy_kitchen  # type: ignore[import-untyped]

    state = comfy_kitchen.list_backends().get(BACKEND, {})
    if not state.get("available"):
        return f"comfy-kitchen cannot use its CUDA code ({state.get('unavailable_reason') or 'no reason given'})"
    absent = [name for name in operations if name not in state["capabilities"]]
    if absent:
        return f"comfy-kitchen has no CUDA code for {', '.join(absent)} here (it needs cuBLASLt 13)"
    return None


def insisted() -> AbstractContextManager[Any]:
    """Within this, the library computes with BACKEND or raises."""
    import comfy_kitchen  # type: ignore[import-untyped]

    insisted: AbstractContextManager[Any] = comfy_kitchen.use_backend(BACKEND)
    return insisted


def flat(x: Tensor) -> Tensor:
    """Tokens (T, K) of activations (..., K), contiguous, as the library wants them."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def as_output(result: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product (T or more, N) as activations (..., N), without the rows that tokens were padded by, and biased."""
    result = result[: x.numel() // x.shape[-1]]
    if bias is not None:
        result = result + bias
    return result.reshape(*x.shape[:-1], result.shape[-1])
