"""bitsandbytes 4-bit weights (nf4, fp4) in single files, as transformers and diffusers save them. Read only.

    module.weight                                 U8 (numbers / 2, 1)   two codes a byte, rows run on without a break
    module.weight.quant_map                       F32 (16,)             what each code stands for
    module.weight.absmax                          F32 (blocks,)         largest magnitude of every 64 numbers, or
                                                  U8 (blocks,)          codes for it ("nested", the default), with
    module.weight.nested_quant_map, nested_absmax F32 (256,), (blocks / 256,)
    module.weight.quant_state.bitsandbytes__nf4   U8                    JSON: quant_type, blocksize, dtype, shape, and
                                                                        where nested nested_blocksize, nested_offset

A nested magnitude is nested_quant_map[code] * nested_absmax[block // 256] + nested_offset. It is worked out once, at
load: blocks of blocks do not end where rows end, and float magnitudes cost half a bit a weight. Blocks need not end
there either: of 96 columns in blocks of 64, gcd(96, 64) = 32 numbers always share one magnitude, so that is the block
kept here. Source: bitsandbytes 0.50.2, functional.py, QuantState.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.quant.formats import Layer

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
    # Files for sharded training keep the bytes under a float type; they are bytes all the same.
    codes = layer.load("weight")[0].contiguous().view(torch.uint8).view(rows, columns // 2)
    table = _floats(layer, "weight.quant_map", 16)
    absmax = _magnitudes(layer, state)
    if not absmax.any() and bool((codes != codes[0, 0]).any()):
        raise layer.fail("every magnitude is zero, but its codes differ.", _ELSEWHERE)
    shared = math.gcd(columns, state.block)
    absmax = absmax.repeat_interleave(state.block // shared)[: rows * columns // shared].view(rows, -1)
    return Packed(TableBlocks(state.kind), state.shape, {"codes": codes, "absmax": absmax, "table": table})


def _state(layer: Layer) -> State:
    """The layer's JSON, checked against what the header says of its tensors."""
    found = [suffix for suffix in _STATES if suffix in layer.tensors]
    if len(found) != 1 or "weight" not in layer.tensors:
        raise layer.fail(f"has {len(found)} bitsandbytes quant_state tensors, expected a weight and one of them.")
    state = _parsed(layer, found[0])
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


def _magnitudes(layer: Layer, state: State) -> Tensor:
    """Every block's largest magnitude, (blocks,) float32."""
    if not state.nested_block:
        return _floats(layer, "weight.absmax", state.blocks)
    codes = layer.load("weight.absmax")[0].flatten().int()
    table = _floats(layer, "weight.nested_quant_map", 256)
    scale = _floats(layer, "weight.nested_absmax", -(-state.blocks // state.nested_block))
    return table[codes] * scale.repeat_interleave(state.nested_block)[: state.blocks] + state.offset


def _floats(layer: Layer, suffix: str, count: int) -> Tensor:
    """A tensor of `count` finite floats, as float32."""
    info = layer.tensors.get(suffix)
    if info is None:
        raise layer.fail(f"its weight is packed but has no {suffix}.", "The file is truncated; download it again.")
    if info.dtype not in _FLOATS or info.numel != count:
        raise layer.fail(f"{suffix} is {info.dtype} {list(info.shape)}, expected {count:,} floats.")
    values = layer.load(suffix)[0].flatten().float()
    if not values.isfinite().all():
        raise layer.fail(f"{suffix} holds NaN or infinity.", _ELSEWHERE)
    return values
