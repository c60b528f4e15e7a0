"""Fill a model built without weights from a checkpoint's layers, whatever each is packed in: strictly, by row blocks.

A family says where each layer of a file belongs (a `Plan`); this module checks that every parameter is filled exactly
once by something of the right shape, and puts it there: plain numbers as parameters, packed ones as PackedLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.quant.errors import LayerMismatchError
from shared.quant.formats import Format, Layer, format_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from shared.quant.linear import JoinedLinear, PackedLinear


@dataclass(frozen=True)
class Part:
    """A file's layer and the rows of one of our modules that it fills.

    Its i-th equal block of rows is block `blocks[i]` of our module's `of` equal blocks.
    """

    layer: Layer
    blocks: tuple[int, ...] = (0,)
    of: int = 1

    @property
    def in_order(self) -> bool:
        return list(self.blocks) == sorted(self.blocks)


# Bytes of a file. The linears of a smaller one are better copied: each is one product then, of its own numbers.
MAPPED_FROM = 2**30

# Packings whose numbers are multiplied from where they lie in the file, by the beginnings of their names.
_READ_AS_THEY_LIE = ("int8", "fp8", "gguf")

# Our module's (or bare parameter's) name -> what fills it, in the file's order.
Plan = dict[str, list[Part]]

# How a file would call the blocks of our parameter that are missing: (module, suffix, blocks) -> words.
NameMissing = Callable[[str, str, Sequence[int]], str]


def shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Our parameter names -> shapes, of the first part that fills each; packed weights as the matrix they stand for."""
    result: dict[str, tuple[int, ...]] = {}
    for module, parts in plan.items():
        layer = parts[0].layer
        packed = format_of(layer)
        for suffix, info in layer.tensors.items():
            result[_join_name(module, suffix)] = info.shape
        if packed is not None:
            result[f"{module}.weight"] = packed.shape(layer)
    return result


def fill(
    model: nn.Module,
    plan: Plan,
    dtype: torch.dtype,
    *,
    source: str,
    name_missing: NameMissing | None = None,
    hint: Callable[[Sequence[str]], str] | None = None,
    compute: str = "auto",
    join: bool = True,
    widen: bool = False,
) -> None:
    """Put every layer of `plan` into `model` (built on the meta device), plain numbers in `dtype`, on the CPU.

    source: the file, for errors. hint: given the names nothing here takes, what to tell the user. compute: how packed
    layers are multiplied (kernels/__init__.py). Plain tensors of the right type and layout stay mapped from disk; what
    has to be copied is, layer by layer, without its source staying in memory.
    join: False leaves also those linears mapped whose rows stand apart in the file, plain, in 8 bits or GGUF's blocks:
    each becomes a JoinedLinear, which costs a copy of its outputs instead of one of its weight.
    widen: with float32 as `dtype`, linears whose numbers have 16 bits in the file keep them, mapped, and widen them for
    each product.
    Raises LayerMismatchError listing the first five missing, doubled, unexpected and misshapen tensors each;
    UnknownFormatError and CheckpointError as the formats do.
    """
    from torch import nn

    wanted = check(model, plan, source=source, name_missing=name_missing, hint=hint)
    for module, parameters in wanted.items():
        parts = plan[module]
        is_linear = "weight" in parameters and isinstance(model.get_submodule(module), nn.Linear)
        if any(format_of(p.layer) for p in parts):
            filled = _packed_linear(parts, "bias" in parameters, dtype, compute, join)
            if is_linear:
                _replace(model, module, filled)
            else:  # an embedding table, say: nothing multiplies it, so it is unpacked once
                _set_parameter(model, f"{module}.weight", filled.dequantize())
        elif is_linear and widen and (halves := _halves(parts, "bias" in parameters, dtype, compute)):
            _replace(model, module, halves)
        elif is_linear and not join and (apart := _apart(parts, "bias" in parameters, dtype)):
            _replace(model, module, apart)
        else:
            for suffix, shape in parameters.items():
                _set_parameter(model, _join_name(module, suffix), _plain(parts, suffix, dtype).reshape(shape))


def check(
    model: nn.Module,
    plan: Plan,
    *,
    source: str,
    name_missing: NameMissing | None = None,
    hint: Callable[[Sequence[str]], str] | None = None,
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The first half of fill(): whether the plan fills the model, from headers alone, with fill()'s errors.

    Returns our module (or bare parameter) -> suffix -> shape, of everything the model has to be given.
    """
    wanted = _wanted(model)
    _check(plan, wanted, source, name_missing or _plain_names, hint)
    return wanted


def _wanted(model: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """Module (or bare parameter) -> suffix -> shape, of everything the model has to be given."""
    wanted: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        module, _, suffix = name.rpartition(".")
        key, suffix = (module, suffix) if suffix in ("weight", "bias") else (name, "")
        wanted.setdefault(key, {})[suffix] = tuple(parameter.shape)
    return wanted


def _check(
    plan: Plan,
    wanted: Mapping[str, Mapping[str, tuple[int, ...]]],
    source: str,
    name_missing: NameMissing,
    hint: Callable[[Sequence[str]], str] | None,
) -> None:
    missing, twice, misshapen = [], [], []
    for module, parameters in wanted.items():
        parts = plan.get(module, [])
        filled = [block for p in parts for block in p.blocks]
        if len(filled) > len(set(filled)):
            twice.append(" + ".join(p.layer.module for p in parts))
            continue
        absent = sorted(set(range(parts[0].of)) - set(filled)) if parts else []
        for suffix, shape in parameters.items():
            if not parts or absent:
                missing.append(name_missing(module, suffix, absent))
                continue
            for part in parts:
                found = _shape(part.layer, suffix)
                rows = shape[0] * len(part.blocks) // part.of
                if found is None:
                    missing.append(_join_name(part.layer.module, suffix))
                # The pad tokens are (1, dim) in most files and (dim,) in some.
                elif found not in ((rows, *shape[1:]), shape[1:] if shape[0] == 1 else None):
                    expected = [rows, *shape[1:]]
                    misshapen.append(f"{_join_name(part.layer.module, suffix)} is {list(found)}, expected {expected}")
    unexpected = [n for m, parts in plan.items() for p in parts for n in _unexpected(p.layer, wanted.get(m, {}))]
    groups = (("missing", missing), ("given twice", twice), ("unexpected", unexpected), ("of another shape", misshapen))
    problems = [
        f"{len(found)} {what} ({', '.join(found[:5])}{', ...' if len(found) > 5 else ''})"
        for what, found in groups
        if found
    ]
    if problems:
        advice = hint(unexpected) if hint else "The file is truncated or belongs to another model."
        raise LayerMismatchError(f"{source}: tensors do not fit: {'; '.join(problems)}.", advice)


def _shape(layer: Layer, suffix: str) -> tuple[int, ...] | None:
    packed = format_of(layer)
    if packed is not None and suffix == "weight":
        return packed.shape(layer)
    return layer.tensors[suffix].shape if suffix in layer.tensors else None


def _unexpected(layer: Layer, parameters: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of a layer's tensors that neither the model nor the layer's format takes."""
    packed = format_of(layer)
    taken = set(parameters) | (packed.SUFFIXES if packed is not None and parameters else set())
    return [info.name for suffix, info in layer.tensors.items() if suffix not in taken]


def _plain(parts: Sequence[Part], suffix: str, dtype: torch.dtype) -> Tensor:
    """A parameter's blocks in our order and in `dtype`; one whole tensor of that type is passed through."""
    import torch

    loaded = [part.layer.load(suffix)[0] for part in parts]
    if len(parts) == 1 and parts[0].in_order:
        return loaded[0].to(dtype)
    return torch.cat(_in_order(parts, loaded)).to(dtype)


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

    loaded = [part.layer.load("weight")[0] for part in parts]
    if (len(parts) == 1 and parts[0].in_order) or any(weight.dtype != dtype for weight in loaded):
        return None
    blocks = _in_order(parts, loaded)
    biases = _plain(parts, "bias", dtype).chunk(len(blocks)) if has_bias else [None] * len(blocks)
    return JoinedLinear([_plain_linear(rows, bias) for rows, bias in zip(blocks, biases, strict=True)])


def _halves(
    parts: Sequence[Part], has_bias: bool, dtype: torch.dtype, compute: str
) -> PackedLinear | JoinedLinear | None:
    """A linear that keeps 16-bit numbers where they lie; None where there are none, or they are wanted as they are."""
    import torch

    from shared.quant.linear import JoinedLinear, PackedLinear
    from shared.quant.packing import Packed
    from shared.quant.packings.half import Half

    loaded = [part.layer.load("weight")[0] for part in parts]
    if dtype != torch.float32 or any(weight.dtype not in (torch.bfloat16, torch.float16) for weight in loaded):
        return None
    blocks = _in_order(parts, loaded)
    if len(parts) == 1 and parts[0].in_order:
        blocks = loaded
    biases = list(_plain(parts, "bias", dtype).chunk(len(blocks))) if has_bias else [None] * len(blocks)
    linears = [
        PackedLinear(Packed(Half(), (rows.shape[0], rows.shape[1]), {"numbers": rows}), bias, dtype, compute=compute)
        for rows, bias in zip(blocks, biases, strict=True)
    ]
    return linears[0] if len(linears) == 1 else JoinedLinear(linears)


def _packed_linear(
    parts: Sequence[Part], has_bias: bool, dtype: torch.dtype, compute: str, join: bool
) -> PackedLinear | JoinedLinear:
    """One PackedLinear where the parts can (and are to) be joined, else a JoinedLinear of one layer per block."""
    from shared.quant.linear import JoinedLinear, PackedLinear
    from shared.quant.packing import Packed, join_rows

    bias = _plain(parts, "bias", dtype) if has_bias else None
    blocks: dict[int, Packed | Tensor] = {}
    for part in parts:
        packed_format: Format | None = format_of(part.layer)
        whole = part.layer.load("weight")[0].to(dtype) if packed_format is None else packed_format.read(part.layer)
        if len(parts) == 1 and part.in_order and isinstance(whole, Packed):
            return PackedLinear(whole, bias, dtype, compute=compute)
        height = whole.shape[0] // len(part.blocks)
        for i, block in enumerate(part.blocks):
            start, stop = i * height, (i + 1) * height
            blocks[block] = whole.take_rows(start, stop) if isinstance(whole, Packed) else whole[start:stop]
    ordered = [blocks[i] for i in sorted(blocks)]
    packed = [b for b in ordered if isinstance(b, Packed)]
    stays_apart = not join and len(parts) > 1 and all(b.packing.name.startswith(_READ_AS_THEY_LIE) for b in packed)
    joined = join_rows(packed) if len(packed) == len(ordered) and not stays_apart else None
    if joined is not None:
        return PackedLinear(joined, bias, dtype, compute=compute)
    biases = [None] * len(ordered) if bias is None else list(bias.chunk(len(ordered)))
    linears: list[nn.Linear] = []
    for rows, part_bias in zip(ordered, biases, strict=True):
        if isinstance(rows, Packed):
            linears.append(PackedLinear(rows, part_bias, dtype, compute=compute))
        else:
            linears.append(_plain_linear(rows, part_bias))
    return JoinedLinear(linears)


def _plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    from torch import nn

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
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


def _join_name(module: str, suffix: str) -> str:
    return f"{module}.{suffix}" if suffix else module


def _plain_names(module: str, suffix: str, _blocks: Sequence[int]) -> str:
    return _join_name(module, suffix)
