"""Fill a model built without weights from a checkpoint's layers, whatever each is packed in, by row blocks.

A family says where each layer of a file belongs (layer_plan.py, which checks that every parameter is filled exactly
once by something of the right shape); this module puts it there: plain numbers as parameters, packed ones as
PackedLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shared.quant.checkpoint import torch_types
from shared.quant.formats import Format, check_of, format_of
from shared.quant.layer_plan import NameMissing, Part, Plan, check, join_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from shared.quant.linear import JoinedLinear, PackedLinear
    from shared.quant.number_checks import NumberChecks
    from shared.quant.packing import Packed

# Bytes of a file. The linears of a smaller one are better copied: each is one product then, of its own numbers.
MAPPED_FROM = 2**30
# Packings whose numbers are multiplied from where they lie in the file, by the beginnings of their names.
_READ_AS_THEY_LIE = ("int8", "fp8", "nvfp4", "mxfp8", "gguf", "nf4", "fp4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How weights are kept: plain numbers in `dtype`, on the CPU.

    compute: how packed layers are multiplied (kernels/__init__.py).
    join: False leaves also those linears mapped whose rows stand apart in the file, plain or of _READ_AS_THEY_LIE: each
    becomes a JoinedLinear, which costs a copy of its outputs instead of one of its weight.
    stack: such rows are to be laid one behind the other on the way to a GPU, and until then stay mapped: plain ones as
    a JoinedLinear, packed ones that can be laid so as a StackedLinear.
    checks: takes the looking through of packed numbers, to be done later (number_checks.py); None: done at once.
    cast_later: linears of plain numbers of another type than `dtype` stay mapped until they are first used.
    widen: with float32 as `dtype`, linears whose numbers have 16 bits in the file keep them, mapped, and widen them for
    each product.
    """

    dtype: torch.dtype
    compute: str = "auto"
    join: bool = True
    stack: bool = False
    widen: bool = False
    cast_later: bool = False
    checks: NumberChecks | None = None


def fill(
    model: nn.Module,
    plan: Plan,
    storage: Storage,
    *,
    source: str,
    name_missing: NameMissing | None = None,
    hint: Callable[[Sequence[str]], str] | None = None,
) -> None:
    """Put every layer of `plan` into `model` (built on the meta device).

    source, name_missing, hint: as for check(), whose errors it raises, besides UnknownFormatError and CheckpointError
    as the formats do; what their check() finds is raised later where `storage.checks` takes it. Plain tensors of the
    right type and layout stay mapped from disk; what has to be copied is, layer by layer, without its source staying in
    memory.
    """
    from torch import nn

    wanted = check(model, plan, source=source, name_missing=name_missing, hint=hint)
    for module, parameters in wanted.items():
        parts = plan[module]
        is_linear = "weight" in parameters and isinstance(model.get_submodule(module), nn.Linear)
        if any(format_of(p.layer) for p in parts):
            if is_linear:
                _replace(model, module, _packed_linear(parts, "bias" in parameters, storage))
            else:  # an embedding table, say: nothing multiplies it, so it is unpacked once
                table = _packed_linear(parts, "bias" in parameters, replace(storage, checks=None))
                _set_parameter(model, f"{module}.weight", table.dequantize())
        elif is_linear and storage.widen and (halves := _halves(parts, "bias" in parameters, storage)):
            _replace(model, module, halves)
        elif is_linear and storage.cast_later and (later := _other_type(parts, "bias" in parameters, storage)):
            _replace(model, module, later)
        elif (
            is_linear
            and (storage.stack or not storage.join)
            and (apart := _apart(parts, "bias" in parameters, storage.dtype))
        ):
            _replace(model, module, apart)
        else:
            for suffix, shape in parameters.items():
                _set_parameter(model, join_name(module, suffix), _plain(parts, suffix, storage.dtype).reshape(shape))


def _plain(parts: Sequence[Part], suffix: str, dtype: torch.dtype) -> Tensor:
    """A parameter's blocks in our order and in `dtype`; one whole tensor of that type is passed through."""
    import torch

    loaded = [part.layer.load(suffix)[0] for part in parts]
    if len(parts) == 1 and parts[0].in_order:
        return loaded[0].to(dtype)
    return torch.cat(_in_order(parts, loaded)).to(dtype)


def _types(parts: Sequence[Part]) -> set[torch.dtype]:
    """In which a plain matrix's numbers are stored."""
    return {torch_types()[part.layer.tensors["weight"].dtype] for part in parts}


def _in_order(parts: Sequence[Part], loaded: Sequence[Tensor]) -> list[Tensor]:
    """The blocks of rows of a parameter, each where it lies, in our order. loaded: what each part holds."""
    blocks = {
        block: rows
        for part, tensor in zip(parts, loaded, strict=True)
        for block, rows in zip(part.blocks, tensor.chunk(len(part.blocks)), strict=True)
    }
    return [blocks[i] for i in sorted(blocks)]


def _apart(parts: Sequence[Part], has_bias: bool, dtype: torch.dtype) -> JoinedLinear | None:
    """A linear whose blocks of rows stay where the file has them; None where they lie as wanted, or must be copied."""
    from shared.quant.linear import JoinedLinear

    if (len(parts) == 1 and parts[0].in_order) or _types(parts) != {dtype}:
        return None
    loaded = [part.layer.load("weight")[0] for part in parts]
    blocks = _in_order(parts, loaded)
    biases = _plain(parts, "bias", dtype).chunk(len(blocks)) if has_bias else [None] * len(blocks)
    return JoinedLinear([_plain_linear(rows, bias) for rows, bias in zip(blocks, biases, strict=True)])


def _halves(parts: Sequence[Part], has_bias: bool, storage: Storage) -> PackedLinear | JoinedLinear | None:
    """A linear that keeps 16-bit numbers where they lie; None where there are none, or they are wanted as they are."""
    import torch

    from shared.quant.linear import JoinedLinear, PackedLinear
    from shared.quant.packing import Packed
    from shared.quant.packings.half import Half

    if storage.dtype != torch.float32 or not _types(parts) <= {torch.bfloat16, torch.float16}:
        return None
    loaded = [part.layer.load("weight")[0] for part in parts]
    blocks = _in_order(parts, loaded)
    if len(parts) == 1 and parts[0].in_order:
        blocks = loaded
    biases = list(_plain(parts, "bias", storage.dtype).chunk(len(blocks))) if has_bias else [None] * len(blocks)
    linears = [
        PackedLinear(
            Packed(Half(), (rows.shape[0], rows.shape[1]), {"numbers": rows}),
            bias,
            storage.dtype,
            compute=storage.compute,
        )
        for rows, bias in zip(blocks, biases, strict=True)
    ]
    return linears[0] if len(linears) == 1 else JoinedLinear(linears)


def _other_type(parts: Sequence[Part], has_bias: bool, storage: Storage) -> PackedLinear | None:
    """A linear whose numbers are cast when it is first used; None where they are of the type that is computed in."""
    from shared.quant.linear import PackedLinear
    from shared.quant.packing import Packed
    from shared.quant.packings.other_type import OtherType

    if _types(parts) == {storage.dtype}:
        return None
    loaded = [part.layer.load("weight")[0] for part in parts]
    pieces = loaded if len(parts) == 1 and parts[0].in_order else _in_order(parts, loaded)
    bias = _plain(parts, "bias", storage.dtype) if has_bias else None
    shape = sum(len(piece) for piece in pieces), pieces[0].shape[1]
    packed = Packed(OtherType(storage.dtype), shape, OtherType.of(pieces))
    return PackedLinear(packed, bias, storage.dtype, compute=storage.compute)


def _packed_linear(parts: Sequence[Part], has_bias: bool, storage: Storage) -> PackedLinear | JoinedLinear:
    """One PackedLinear where the parts can (and are to) be joined, else a JoinedLinear of one layer per block."""
    from shared.quant.linear import JoinedLinear, PackedLinear
    from shared.quant.packing import Packed, join_rows
    from shared.quant.pieces import stack_rows
    from shared.quant.stacked_linear import StackedLinear

    dtype, compute = storage.dtype, storage.compute
    bias = _plain(parts, "bias", dtype) if has_bias else None
    blocks: dict[int, Packed | Tensor] = {}
    for part in parts:
        packed_format: Format | None = format_of(part.layer)
        if packed_format is None:
            whole: Packed | Tensor = part.layer.load("weight")[0].to(dtype)
        else:
            whole = packed_format.read(part.layer)
            _check(packed_format, part, whole, storage.checks)
        if len(parts) == 1 and part.in_order and isinstance(whole, Packed):
            return PackedLinear(whole, bias, dtype, compute=compute)
        height = whole.shape[0] // len(part.blocks)
        for i, block in enumerate(part.blocks):
            start, stop = i * height, (i + 1) * height
            blocks[block] = whole.take_rows(start, stop) if isinstance(whole, Packed) else whole[start:stop]
    ordered = [blocks[i] for i in sorted(blocks)]
    packed = [b for b in ordered if isinstance(b, Packed)]
    stays_apart = (
        not storage.join and len(parts) > 1 and all(b.packing.name.startswith(_READ_AS_THEY_LIE) for b in packed)
    )
    if len(packed) == len(ordered) and not stays_apart:
        if storage.stack and (stacked := stack_rows(packed)) is not None:
            return StackedLinear(stacked, bias, dtype, compute=compute)
        if (joined := join_rows(packed)) is not None:
            return PackedLinear(joined, bias, dtype, compute=compute)
    biases = [None] * len(ordered) if bias is None else list(bias.chunk(len(ordered)))
    linears: list[nn.Linear] = []
    for rows, part_bias in zip(ordered, biases, strict=True):
        if isinstance(rows, Packed):
            linears.append(PackedLinear(rows, part_bias, dtype, compute=compute))
        else:
            linears.append(_plain_linear(rows, part_bias))
    return JoinedLinear(linears)


def _check(found: Format, part: Part, packed: Packed, later: NumberChecks | None) -> None:
    """Look through a layer's numbers, or have it done later."""
    check = check_of(found, part.layer, packed)
    if check is None:
        return
    if later is None:
        check()
    else:
        later.add(check)


def _plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    from torch import nn

    from shared.quant.unfilled import unfilled

    with unfilled():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    from torch import nn

    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
