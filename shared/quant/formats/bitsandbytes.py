"""bitsandbytes 4-bit weights (nf4, fp4) in single files, as transformers and diffusers save them. Read only.

    module.weight                                 U8 (numbers / 2, 1)   two codes a byte, rows run on without a break
    module.weight.quant_map                       F32 (16,)             what each code stands for
    module.weight.absmax                          F32 (blocks,)         largest magnitude of every 64 numbers, or
                                                  U8 (blocks,)          codes for it ("nested", the default), with
    module.weight.nested_quant_map, nested_absmax F32 (256,), (blocks / 256,)
    module.weight.quant_state.bitsandbytes__nf4   U8                    JSON: quant_type, blocksize, dtype, shape, and
                                                                        where nested nested_blocksize, nested_offset

A nested magnitude is nested_quant_map[code] * nested_absmax[block // 256] + nested_offset (packings/bitsandbytes.py).
Blocks need not end where rows do: of 96 columns in blocks of 64, gcd(96, 64) = 32 numbers always share one magnitude,
so that is the block kept here, and magnitudes are worked out and repeated at load. Where blocks end with rows, as in
every layer of this model, all stays as it lies in the file.
Source: bitsandbytes 0.50.2, functional.py, QuantState.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.quant.formats import Layer
from shared.quant.formats.scales import all_finite

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.packing import Packed

NAME = "bitsandbytes 4-bit"
KINDS = ("nf4", "fp4")
_STATES = {f"weight.quant_state.bitsandbytes__{kind}": kind for kind in KINDS}
SUFFIXES = frozenset(("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *_STATES))

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those the library has
MAX_STATE_BYTES = 65_536
_FLOATS = ("F32", "F16", "BF16")
# What the file calls the packing's tensors.
_SPELLED = {
    "codes": "weight",
    "absmax": "weight.absmax",
    "table": "weight.quant_map",
    "nested_table": "weight.nested_quant_map",
    "nested_absmax": "weight.nested_absmax",
    "nested_offset": "nested_offset",
}
_ELSEWHERE = "The file was written wrongly; get it from elsewhere."


@dataclass(frozen=True)
class State:
    """What the JSON of a layer says. nested_block: 0 where magnitudes are plain floats."""

    kind: str
    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] * self.shape[1] // self.block)


def claims(layer: Layer) -> bool:
    return not SUFFIXES.isdisjoint(layer.tensors)


def shape(layer: Layer) -> tuple[int, int]:
    return _state(layer).shape


def describe(layer: Layer) -> dict[str, Any]:
    state = _state(layer)
    return {"format": f"bitsandbytes {state.kind}", "group": state.block, "nested": bool(state.nested_block)}


def read(layer: Layer) -> Packed:
    import torch

    from shared.quant.packing import Packed
    from shared.quant.packings.bitsandbytes import TableBlocks

    state = _state(layer)
    rows, columns = state.shape
    tensors = _loaded(layer, state)
    # Files for sharded training keep the bytes under a float type; they are bytes all the same.
    tensors["codes"] = tensors["codes"].contiguous().view(torch.uint8).view(rows, columns // 2)
    packing = TableBlocks(state.kind, state.nested_block)
    shared = math.gcd(columns, state.block)
    if shared == state.block:
        tensors["absmax"] = tensors["absmax"].view(rows, -1)
    else:
        _check_finite(layer, tensors)
        tensors = packing.unnested({**tensors, "absmax": tensors["absmax"].view(1, -1)})
        absmax = tensors["absmax"].flatten().repeat_interleave(state.block // shared)
        tensors["absmax"] = absmax[: rows * columns // shared].view(rows, -1)
    return Packed(packing, state.shape, tensors)


def check(layer: Layer, packed: Packed) -> None:
    """Raises CheckpointError for magnitudes and tables that make no numbers, or none that differ."""
    from shared.quant.packings.bitsandbytes import TableBlocks

    _check_finite(layer, packed.tensors)
    packing = packed.packing
    assert isinstance(packing, TableBlocks)
    codes, absmax = packed.tensors["codes"], packed.tensors["absmax"]
    for some in (absmax[:1], absmax):  # as a rule the first row tells
        if packing.magnitudes({**packed.tensors, "absmax": some}).any():
            return
    if bool((codes != codes[0, 0]).any()):
        raise layer.fail("every magnitude is zero, but its codes differ.", _ELSEWHERE)


def _check_finite(layer: Layer, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise layer.fail(f"{_SPELLED[name]} holds NaN or infinity.", _ELSEWHERE)


def _state(layer: Layer) -> State:
    """The layer's JSON, checked against what the header says of its tensors."""
    found = [suffix for suffix in _STATES if suffix in layer.tensors]
    if len(found) != 1 or "weight" not in layer.tensors:
        raise layer.fail(f"has {len(found)} bitsandbytes quant_state tensors, expected a weight and one of them.")
    state: State = layer.read_once.get("state") or _parsed(layer, found[0])
    layer.read_once["state"] = state
    rows, columns = state.shape
    if columns % 2:
        raise layer.fail(f"an odd number of columns ({columns}), of which two share a byte, cannot be read.", "")
    weight = layer.tensors["weight"]
    if weight.nbytes * 2 != rows * columns:
        raise layer.fail(
            f"weight has {weight.nbytes:,} bytes, {rows} x {columns} numbers need {rows * columns // 2:,}."
        )
    absmax = layer.tensors.get("weight.absmax")
    if absmax is None:
        raise layer.fail("its weight is packed but has no weight.absmax.", "The file is truncated; download it again.")
    if (absmax.dtype == "U8") != bool(state.nested_block) or absmax.dtype not in ("U8", *_FLOATS):
        raise layer.fail(f"weight.absmax is {absmax.dtype}, which its quant_state does not fit.")
    if absmax.numel != state.blocks:
        raise layer.fail(f"weight.absmax has {absmax.numel:,} magnitudes, expected {state.blocks:,}.")
    return state


def _parsed(layer: Layer, suffix: str) -> State:
    info = layer.tensors[suffix]
    if info.dtype != "U8" or info.nbytes > MAX_STATE_BYTES:
        raise layer.fail(f"{suffix} is {info.dtype} of {info.nbytes:,} bytes, expected JSON as U8.")
    try:
        entries = json.loads(layer.checkpoint.read_bytes(info.name))
    except (ValueError, RecursionError) as error:
        raise layer.fail(f"{suffix} is not readable JSON ({error}).") from error
    match entries:
        case {"quant_type": str(kind), "blocksize": int(block), "shape": [int(rows), int(columns)]}:
            pass
        case _:
            raise layer.fail(f"{suffix} lacks quant_type, blocksize or a shape of two dimensions.")
    if kind != _STATES[suffix] or block not in BLOCK_SIZES or rows < 1 or columns < 1:
        raise layer.fail(f"{suffix} says {kind!r}, blocks of {block}, shape {[rows, columns]}, which cannot be.")
    nested_block, offset = _nested(layer, suffix, entries)
    return State(kind, (rows, columns), block, nested_block, offset)


def _nested(layer: Layer, suffix: str, entries: Mapping[str, Any]) -> tuple[int, float]:
    if "nested_blocksize" not in entries:
        return 0, 0.0
    block, offset = entries["nested_blocksize"], entries.get("nested_offset")
    if type(block) is not int or block not in BLOCK_SIZES or not isinstance(offset, float) or not math.isfinite(offset):
        raise layer.fail(f"{suffix} says nested blocks of {block!r} with offset {offset!r}, which cannot be.")
    return block, offset


def _loaded(layer: Layer, state: State) -> dict[str, Tensor]:
    """What the file has of the packing's tensors, floats as float32, and the offset of nested magnitudes."""
    import torch

    floats = {"table": 16}
    if state.nested_block:
        floats |= {"nested_table": 256, "nested_absmax": -(-state.blocks // state.nested_block)}
    for name, count in floats.items():
        suffix = _SPELLED[name]
        info = layer.tensors.get(suffix)
        if info is None:
            raise layer.fail(f"its weight is packed but has no {suffix}.", "The file is truncated; download it again.")
        if info.dtype not in _FLOATS or info.numel != count:
            raise layer.fail(f"{suffix} is {info.dtype} {list(info.shape)}, expected {count:,} floats.")
    names = ("codes", "absmax", *floats)
    loaded = dict(zip(names, layer.load(*(_SPELLED[name] for name in names)), strict=True))
    tensors = {name: loaded[name].flatten().float() for name in floats} | {"codes": loaded["codes"]}
    if not state.nested_block:
        return tensors | {"absmax": loaded["absmax"].flatten().float()}
    offset = torch.full_like(tensors["nested_absmax"], state.offset)
    return tensors | {"absmax": loaded["absmax"].flatten(), "nested_offset": offset}
