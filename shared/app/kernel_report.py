"""Which code would multiply each kind of packed weight on a device: asked of the kernel table, and tried once.

For each way of packing, a small layer is quantized, read back and multiplied, so that a kernel that is chosen but does
not run on this machine is found here and not in the middle of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shared.quant.kernels import FAULTS, REFERENCE, Refusal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.linear import PackedLinear
    from shared.quant.packing import Packed

# Rows and columns of the layer that is tried: SVDQuant's tile, a multiple of all the others' blocks; and where the size
# matters, as it does for every kind on a GPU, where kernels race, about those of a layer of a real model.
SIZE = 128
REAL_SIZE = 2048
TOKENS = 16

# A kernel may also round the activations to 4 bits, which costs about 15 % on random numbers. More is a wrong result.
LARGEST_ERROR = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One kind of packed weight: what people call it, the module of formats/ that writes it, and how.

    size: rows and columns of the layer to be tried on a CPU.
    """

    label: str
    format: str
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int = SIZE


PROBES = (
    Probe(label="int8", format="comfy_int8", size=REAL_SIZE),
    Probe(label="int8 ConvRot", format="comfy_int8", options={"rotation": 64}, size=REAL_SIZE),
    Probe(label="FP8 with scales", format="fp8_scaled", size=REAL_SIZE),
    Probe(label="FP8 without scales", format="fp8_plain", size=REAL_SIZE),
    Probe(label="MXFP8", format="mxfp8", size=REAL_SIZE),
    Probe(label="NVFP4", format="nvfp4", size=REAL_SIZE),
    Probe(label="SVDQuant INT4", format="svdq", options={"kind": "int4", "rank": 16, "iterations": 0}, size=REAL_SIZE),
    Probe(label="SVDQuant FP4", format="svdq", options={"kind": "fp4", "rank": 16, "iterations": 0}, size=REAL_SIZE),
    Probe(label="GGUF Q8_0", format="gguf", options={"type": "Q8_0"}, size=REAL_SIZE),
    Probe(label="GGUF Q4_0", format="gguf", options={"type": "Q4_0"}, size=REAL_SIZE),
    Probe(label="bitsandbytes nf4", format="bitsandbytes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """What multiplies one kind of weight. kernel: "" when nothing does. compute: as in kernels.Kernel.

    waiting: kernels that could do it too and come after the chosen one. error: relative error of a product against the
    unpacked weight's, None where it could not be computed. problem: what is wrong, "" when nothing is. reason: why this
    kernel.
    """

    label: str
    packing: str
    kernel: str
    compute: str
    refused: tuple[Refusal, ...]
    waiting: tuple[str, ...]
    error: float | None
    problem: str
    reason: str = ""

    @property
    def expands(self) -> bool:
        """Whether the weight is unpacked for every product: that saves memory and no time."""
        return self.compute == REFERENCE


def kernel_choices(
    device: torch.device, dtype: torch.dtype, probes: Sequence[Probe] = PROBES, *, compute: str = "auto"
) -> list[KernelChoice]:
    """One answer per probe on `device`, with activations in `dtype`. Never raises for what a kernel does wrong.

    compute: one of kernels.COMPUTES.
    """
    import torch

    weight = torch.randn(REAL_SIZE, REAL_SIZE, generator=torch.Generator().manual_seed(0)) * 0.02
    with TemporaryDirectory() as folder:
        choices = []
        for probe in probes:
            size = REAL_SIZE if device.type == "cuda" else probe.size
            part = weight[:size, :size].contiguous()
            choices.append(_choice(probe, part, device, dtype, compute, Path(folder)))
        return choices


def _choice(
    probe: Probe, weight: Tensor, device: torch.device, dtype: torch.dtype, compute: str, folder: Path
) -> KernelChoice:
    from shared.quant.errors import UserError
    from shared.quant.kernels import available, select
    from shared.quant.kernels.trial import try_out
    from shared.quant.linear import PackedLinear

    try:
        packed = _packed(probe, weight, folder)
        layer = PackedLinear(packed, None, dtype, compute=compute)
        selection = select(layer, device, try_out)
        layer.use(selection.kernel, device)
        layer.to(device)
    # A library that is absent or damaged, no room for the temporary file, a device without the number type.
    except (ImportError, OSError, RuntimeError, UserError) as fault:
        return _unknown(probe, f"no such layer could be made ({_first_line(fault)})")
    order = available(packed.packing.name)
    behind = order[order.index(selection.kernel) + 1 :]
    error, problem = _try(layer, packed, device, dtype)
    return KernelChoice(
        label=probe.label,
        packing=layer.packing.name,
        kernel=selection.kernel.name,
        compute=selection.kernel.compute,
        refused=selection.refusals,
        waiting=tuple(kernel.name for kernel in behind if kernel.refuse(layer, device) is None),
        error=error,
        problem=problem,
        reason=selection.reason,
    )


def _unknown(probe: Probe, problem: str) -> KernelChoice:
    return KernelChoice(
        label=probe.label,
        packing="",
        kernel="",
        compute="",
        refused=(),
        waiting=(),
        error=None,
        problem=problem,
    )


def _try(layer: PackedLinear, packed: Packed, device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """The relative error of a product on the device against the unpacked weight's in float32, and what is wrong."""
    import torch

    from shared.quant.errors import UserError

    x = torch.randn(TOKENS, layer.in_features, generator=torch.Generator().manual_seed(1))
    expected = x @ packed.dequantize(torch.float32).t()
    try:
        with torch.inference_mode():
            got = layer(x.to(device, dtype)).float().cpu()
    except (*FAULTS, UserError) as fault:
        return None, f"the product fails ({_first_line(fault)})"
    error = float((got - expected).norm() / expected.norm())
    if not error <= LARGEST_ERROR:  # NaN too
        return None if error != error else error, f"the product is wrong (relative error {error:.2g})"
    return error, ""


def _packed(probe: Probe, weight: Tensor, folder: Path) -> Packed:
    """`weight` in the probe's packing: written as a file of that format and read back, where a file is needed."""
    import torch

    size = len(weight)
    if probe.format == "bitsandbytes":  # read only: there is nothing here that writes it
        from shared.quant.packing import Packed
        from shared.quant.packings.bitsandbytes import TableBlocks

        codes = torch.arange(size * size // 2).to(torch.uint8).view(size, size // 2)
        tensors = {"codes": codes, "absmax": torch.ones(size, size // 64), "table": torch.linspace(-1, 1, 16)}
        return Packed(TableBlocks("nf4"), (size, size), tensors)
    module = import_module(f"shared.quant.formats.{probe.format}")
    tensors = module.quantize(weight, **probe.options)
    if probe.format == "gguf":
        from shared.quant.packing import Packed
        from shared.quant.packings.gguf import GgufBlocks

        return Packed(GgufBlocks(probe.options["type"], size), (size, size), {"blocks": tensors["weight"]})

    from safetensors.torch import save

    from shared.quant.checkpoint import Checkpoint
    from shared.quant.formats import format_of, layers_of, read_checked

    file = folder / f"{probe.label}.safetensors"
    file.write_bytes(save({f"probe.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}))
    checkpoint = Checkpoint.open(file)
    layer = layers_of(checkpoint, checkpoint.tensors)["probe"]
    found = format_of(layer)
    if found is None:
        raise RuntimeError(f"a layer written as {probe.label} is taken for plain numbers")
    packed = read_checked(found, layer)
    # What is read stays mapped from the file, which is deleted in a moment.
    return type(packed)(packed.packing, packed.shape, {name: t.clone() for name, t in packed.tensors.items()})


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
