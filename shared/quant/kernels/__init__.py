"""Which code multiplies by a packed weight: a table of kernels, asked once per layer and device.

A kernel says which packing it serves, and refuses a layer in words ("needs compute capability 8.0, this GPU has
7.5"). What it multiplies is its `compute`:

    bf16    the activations as they come, in their own float type: the reference; the weight is expanded for it
    int8    activations rounded to 8-bit integers, token by token
    fp8     activations rounded to 8-bit floats, token by token
    native  activations rounded as the weight is: 4-bit, or blocks of 8-bit floats with a power of two

`dequantize` (expand, then torch's own linear) serves everything everywhere and comes last, so every layer has a kernel.
Kernels that round activations come first, but "auto" takes one only where it is known to be no slower than the bf16
kernel it replaces: by a figure that is written down (`Kernel.known`), or by a trial on the device itself (trial.py).

A new kernel is one module here that calls register() when imported, named in _MODULES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from shared.quant.errors import RunError, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.ops.rounding import Kind, Rounded, Sums
    from shared.quant.linear import PackedLinear
    from shared.quant.packing import Packed

_MODULES = (
    "nunchaku", "comfy_svdq", "comfy_nvfp4", "comfy_mxfp8", "comfy_int8", "triton_8bit", "torch_int8", "torch_fp8",
    "triton_4bit", "compiled_expand", "widened", "cast", "scale_after", "svdq", "dequantize",
)  # fmt: skip
ANY = "*"
Answer = TypeVar("Answer")

Compute = Literal["auto", "bf16", "fp8", "int8", "native"]
COMPUTES: tuple[Compute, ...] = get_args(Compute)
REFERENCE = "bf16"

# How kernels fail: torch and its libraries, comfy-kitchen's and nunchaku's checks, a library that does not load.
FAULTS = (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError, ImportError, OSError)


def _nothing(_layer: PackedLinear, _device: torch.device) -> str | None:
    return None


def _never(_layer: PackedLinear) -> bool:
    return False


def _as_they_are(_layer: PackedLinear) -> Kind | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One way to compute y = x W^T + b.

    packing: the name of the packing served, or ANY. compute: see above. priority: among kernels of the same standing
    the higher is asked first. refuse: why not for this layer on this device, None if it can. run: the product,
    (..., in) -> (..., out). known: the figure by which it is no slower than expanding there, None where there is none.
    arrange: the same numbers laid out as the kernel reads them; None: as they are. PackedLinear says when.
    laid_out: whether a layer lies so already, where there is an `arrange`; without it this is never known.
    takes: in which 8 bits `run` takes activations of this layer that are rounded already, None where it does not.
    sums: the product of int8 codes before its scales, for an operation that applies them in its own pass; None where
        `run` gives nothing of the kind. Leaves the bias to the caller.
    expands: makes the weight wider in memory at every call, which is better shared by many tokens.
    tried: rounds no activations and yet has to win a trial on the device, because it may not run or not pay there.
    """

    name: str
    packing: str
    compute: str
    priority: int
    refuse: Callable[[PackedLinear, torch.device], str | None]
    run: Callable[[PackedLinear, Any], Tensor]
    known: Callable[[PackedLinear, torch.device], str | None] = _nothing
    arrange: Callable[[Packed], Packed] | None = None
    laid_out: Callable[[PackedLinear], bool] = _never
    takes: Callable[[PackedLinear], Kind | None] = _as_they_are
    sums: Callable[[PackedLinear, Any], Sums] | None = None
    expands: bool = False
    tried: bool = False

    @property
    def rounds_activations(self) -> bool:
        return self.compute != REFERENCE

    def reads(self, layer: PackedLinear) -> bool:
        """Whether `run` reads the weight as it lies now."""
        return self.arrange is None or self.laid_out(layer)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A kernel that does not serve a layer, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The kernel for a layer, why it, and what every better placed one said."""

    kernel: Kernel
    reason: str
    refusals: tuple[Refusal, ...]


# Tries a kernel on a device: (why not, None if it passes; what was found, in words).
Trial = Callable[[Kernel, "PackedLinear", "torch.device"], tuple[str | None, str]]

_registry: list[Kernel] = []


def register(kernel: Kernel) -> None:
    """Add a kernel to the table; called by the modules here when they are imported."""
    _registry.append(kernel)


def available(packing: str) -> list[Kernel]:
    """The kernels for a packing, first choice first: those that round activations before those that do not."""
    _load_modules()
    kernels = (k for k in _registry if k.packing in (packing, ANY))
    return sorted(kernels, key=lambda k: (not k.rounds_activations, -k.priority))


@cache
def _load_modules() -> None:
    """Have every kernel register itself, once."""
    for name in _MODULES:
        import_module(f"{__name__}.{name}")


def select(layer: PackedLinear, device: torch.device, trial: Trial | None = None) -> Selection:
    """The kernel for a layer on a device, by the layer's `compute`. bf16 kernels serve whatever was asked for.

    trial: tries kernels that round activations; without it "auto" takes only those whose figure is written down.
    """
    refusals: list[Refusal] = []
    for kernel in available(layer.packing.name):
        reason, why = _judge(kernel, layer, device, trial)
        if reason is None:
            return Selection(kernel, why, tuple(refusals))
        refusals.append(Refusal(kernel.name, reason))
    raise AssertionError(f"no kernel takes {layer.packing.name}: dequantize refuses nothing")


def run(kernel: Kernel, layer: PackedLinear, x: Tensor | Rounded) -> Tensor:
    """The product. x is rounded only as kernel.takes says.

    Raises RunError when a kernel that rounds activations fails; torch's own errors pass as they are.
    """
    if not kernel.rounds_activations:
        return kernel.run(layer, x)
    return _guarded(kernel.run, kernel, layer, x)


def run_unscaled(kernel: Kernel, layer: PackedLinear, x: Tensor | Rounded) -> Sums | Tensor:
    """The same, before its scales where the kernel can and no bias follows."""
    if kernel.sums is None or layer.bias is not None:
        return run(kernel, layer, x)
    return _guarded(kernel.sums, kernel, layer, x)


def _guarded(work: Callable[[PackedLinear, Any], Answer], kernel: Kernel, layer: PackedLinear, x: Any) -> Answer:
    try:
        return work(layer, x)
    except FAULTS as fault:
        if is_out_of_memory(fault):  # no fault of the kernel's; whoever draws knows what to do
            raise
        raise RunError(
            f"The kernel {kernel.name} failed on a {layer.packing.name} layer of {layer.out_features} x "
            f"{layer.in_features} with {_tokens(x, layer)} tokens: {first_line(fault)}.",
            "--compute bf16 draws without it.",
        ) from fault


def _tokens(x: Tensor | Rounded, layer: PackedLinear) -> int:
    numbers: Any = getattr(x, "codes", x)  # type: ignore[arg-type]  # mypy wants a Tensor for the default
    return int(numbers.numel()) // layer.in_features


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _judge(kernel: Kernel, layer: PackedLinear, device: torch.device, trial: Trial | None) -> tuple[str | None, str]:
    """(why not, None if it is taken; why it is taken)."""
    asked = layer.compute
    if kernel.rounds_activations and asked not in ("auto", kernel.compute):
        return f"computes in {kernel.compute}, {asked} was asked for", ""
    refusal = kernel.refuse(layer, device)
    if refusal is not None:
        return refusal, ""
    if kernel.tried:
        return ("not tried on this device", "") if trial is None else trial(kernel, layer, device)
    if not kernel.rounds_activations:
        return None, "serves every device"
    if asked == "auto":
        if layer.weight.dtype.itemsize > 2:
            return "would round activations that are kept in float32 here", ""
        figure = kernel.known(layer, device)
        if figure is not None:
            return None, figure
        if trial is None or device.type == "cpu":
            return f"not known to be faster here; --compute {kernel.compute} takes it all the same", ""
    if trial is None or device.type == "cpu":  # on a CPU a wrong kernel shows in the tests, and a trial takes seconds
        return None, "asked for"
    return trial(kernel, layer, device)
