"""Packed weights on a CPU, unpacked by compiled code for every product: into int8 codes, or into bfloat16.

    compiled-int8   y = (round(x) codes^T) * scale_x * scale      codes, scale: the unpacked rows, rounded to 8 bits
    compiled-bf16   y = x W^T                                     nothing is rounded but W to bfloat16

Rounding a row of 4-bit numbers to 8 bits adds an error a tenth of theirs. Unpacking takes 0.15 to 1.2 ns a number
(plain torch: 0.5 to 3.4), so that a 4-bit weight is multiplied about as fast as an int8 one, and stays packed: what is
unpacked goes into memory that all layers share (scratch.py). SVDQuant's branch is added in bfloat16 as svdq.py does,
and put in order for it when the layer is first used; codes and scales stay in nunchaku's tiles, in the file.

A packing is one line in _ROWS: which loop of compiled_rows.py unpacks it, and what that is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.ops import compiled_ready
from shared.ops.rounding import Kind, Rounded, Sums
from shared.quant.gguf_file import BLOCKS
from shared.quant.kernels import Kernel, register, torch_int8
from shared.quant.packing import Packed
from shared.quant.packings import svdq_tiles
from shared.quant.packings.bitsandbytes import TableBlocks
from shared.quant.packings.block_scaled import BlockScaled
from shared.quant.packings.fp8 import Float8
from shared.quant.packings.gguf import GgufBlocks
from shared.quant.packings.mxfp8 import BLOCK as MXFP8_BLOCK
from shared.quant.packings.mxfp8 import Mxfp8
from shared.quant.packings.nvfp4 import BLOCK as NVFP4_BLOCK
from shared.quant.packings.nvfp4 import Nvfp4
from shared.quant.packings.svdq import Svdq
from shared.quant.svdq_tiling import BAND
from shared.quant.svdq_tiling import ROWS as TILE_ROWS
from shared.quant.swizzle import TILE_COLUMNS, padded_shape

if TYPE_CHECKING:
    from shared.quant.linear import PackedLinear


class _Rows(NamedTuple):
    """How rows are unpacked: the name of a loop in compiled_rows.py, and its arguments between n and the output.

    held: tensors whose addresses those are, until the loop is done. height: how many rows; 0 for all of the matrix.
    band: rows that the loop counts as one; those of more are in compiled_tiles.py.
    """

    loop: str
    arguments: tuple[Any, ...]
    held: tuple[Tensor, ...]
    height: int = 0
    band: int = 1


# The tensors that are read where they lie; of the others, a few numbers for each row, a copy costs nothing.
_LARGE = ("codes", "block_scales", "scales", "exponents", "blocks")


# Loops trust what they are told, so it is checked: a tensor of another size would be read past its end.
_ODD = "its tensors are not of the sizes that its packing says"
_PADDED = "its blocks do not end where the matrix does"


def _is(tensor: Tensor, itemsize: int, *shape: int) -> bool:
    return tuple(tensor.shape) == shape and tensor.element_size() == itemsize


def _tiles(packing: BlockScaled, scales: Tensor, rows: int, blocks: int) -> int | None:
    """How many tiles of swizzled scales lie side by side, 0 where they lie in rows; None: not of the right size."""
    if not packing.swizzled:
        return 0 if _is(scales, 1, rows, blocks) else None
    rows, blocks = padded_shape(rows, blocks)
    return blocks // TILE_COLUMNS if _is(scales, 1, rows, blocks) else None


def _nvfp4(packed: Packed) -> _Rows | str:
    assert isinstance(packed.packing, Nvfp4)
    if packed.packing.columns is not None:
        return _PADDED
    from shared.quant.kernels import compiled_rows as rows

    codes, blocks, row = (packed.tensors[name] for name in ("codes", "block_scales", "tensor_scale"))
    n, k = packed.shape
    tiles = _tiles(packed.packing, blocks, n, k // NVFP4_BLOCK)
    if tiles is None or not (_is(codes, 1, n, k // 2) and row.dtype == torch.float32):
        return _ODD
    row, high_first = row.expand(n, 1).contiguous(), not packed.packing.low_first
    lying = (blocks.data_ptr(), rows.E4M3, NVFP4_BLOCK, tiles)
    return _Rows("nibbles", (codes.data_ptr(), -1, high_first, *lying, row.data_ptr()), (codes, blocks, row))


def _svdq(packed: Packed) -> _Rows | list[_Rows] | str:
    """The 4-bit part of the smoothed weight; of tiles, each piece where it lies."""
    packing, tensors = packed.packing, packed.tensors
    assert isinstance(packing, Svdq)
    from shared.quant.kernels import compiled_rows as rows

    tiled = svdq_tiles.are_tiles(tensors)
    names = (svdq_tiles.CODES, svdq_tiles.SCALES) if tiled else ("codes", "scales")
    row = svdq_tiles.row_scale(tensors).contiguous()
    kinds = {torch.float8_e4m3fn: rows.E4M3, torch.float16: rows.HALF, torch.bfloat16: rows.BRAIN}
    n, k = packed.shape
    groups = tensors[names[1]].shape[1]
    kind = rows.INT4 if packing.kind == "int4" else -1
    if k % groups or row.dtype != torch.float32 or not _is(row, 4, n, 1):
        return _ODD
    found, place = [], 0
    for codes, scales in zip(*(svdq_tiles.pieces(tensors, name) for name in names), strict=True):
        if not (codes.is_contiguous() and scales.is_contiguous()):
            return _ODD
        if scales.dtype not in kinds:
            return f"its scales are {scales.dtype}"
        height, group = len(codes), k // groups
        if not (_is(codes, 1, height, k // 2) and _is(scales, scales.element_size(), height, groups)):
            return _ODD
        lying = (scales.data_ptr(), kinds[scales.dtype], group, row.data_ptr() + place * row.element_size())
        if tiled:
            if height % TILE_ROWS or group != (64 if packing.kind == "int4" else 16):
                return _ODD
            arguments: tuple[Any, ...] = (codes.data_ptr(), kind, *lying)
        else:
            arguments = (codes.data_ptr(), kind, False, *lying[:-1], 0, lying[-1])
        found.append(_Rows("nibbles", arguments, (codes, scales, row), height, BAND if tiled else 1))
        place += height
    return found if place == n else _ODD


def _fp8(packed: Packed) -> _Rows | str:
    from shared.quant.kernels import compiled_rows as rows

    assert isinstance(packed.packing, Float8)
    codes, scale = packed.tensors["codes"], packed.tensors.get("scale")
    kind = rows.E4M3 if packed.packing.kind == "e4m3fn" else rows.E5M2
    n, k = packed.shape
    if not _is(codes, 1, n, k):
        return _ODD
    if scale is None:
        return _Rows("floats8", (codes.data_ptr(), kind, 0, 0, n, 0, 0), (codes,))
    scale = scale.contiguous()
    if scale.dtype != torch.float32 or k % scale.shape[1] or n % len(scale):
        return _ODD
    arguments = (codes.data_ptr(), kind, scale.data_ptr(), scale.shape[1], n // len(scale), 0, 0)
    return _Rows("floats8", arguments, (codes, scale))


def _mxfp8(packed: Packed) -> _Rows | str:
    assert isinstance(packed.packing, Mxfp8)
    if packed.packing.columns is not None:
        return _PADDED
    from shared.quant.kernels import compiled_rows as rows

    codes, exponents = packed.tensors["codes"], packed.tensors["exponents"]
    n, k = packed.shape
    tiles = _tiles(packed.packing, exponents, n, k // MXFP8_BLOCK)
    if tiles is None or not _is(codes, 1, n, k):
        return _ODD
    arguments = (codes.data_ptr(), rows.E4M3, 0, k // MXFP8_BLOCK, n, exponents.data_ptr(), tiles)
    return _Rows("floats8", arguments, (codes, exponents))


def _table(packed: Packed) -> _Rows | str:
    """Nested magnitudes are worked out by expand(); of them, only the sizes are looked at here."""
    codes, absmax, table = (packed.tensors[name] for name in ("codes", "absmax", "table"))
    n, k = packed.shape
    groups = absmax.shape[1]
    if k % groups or k % 2 or not (_is(codes, 1, n, k // 2) and len(absmax) == n and _is(table, 4, 16)):
        return _ODD
    absmax = absmax.contiguous()
    return _Rows("tables", (codes.data_ptr(), table.data_ptr(), absmax.data_ptr(), groups), (codes, table, absmax))


def _gguf(packed: Packed, loop: str, *more: Any) -> _Rows | str:
    assert isinstance(packed.packing, GgufBlocks)
    numbers, size = BLOCKS[packed.packing.type]
    n, k = packed.shape
    if k % numbers:
        return "its blocks run on from row to row"
    blocks = packed.tensors["blocks"]
    if blocks.element_size() != 1 or blocks.numel() != n * k // numbers * size:
        return _ODD
    return _Rows(loop, (blocks.data_ptr(), *more), (blocks,))


_ROWS: Mapping[str, Callable[[Packed], _Rows | list[_Rows] | str]] = {
    "nvfp4": _nvfp4, "svdq": _svdq, "fp8": _fp8, "mxfp8": _mxfp8,
    "nf4": _table, "fp4": _table,
    "gguf_q8_0": partial(_gguf, loop="q8_0"),
    "gguf_q4_0": lambda packed: _gguf(packed, "q4", False), "gguf_q4_1": lambda packed: _gguf(packed, "q4", True),
    "gguf_q5_0": lambda packed: _gguf(packed, "q5", False), "gguf_q5_1": lambda packed: _gguf(packed, "q5", True),
    "gguf_q4_k": lambda packed: _gguf(packed, "q45_k", False), "gguf_q5_k": lambda packed: _gguf(packed, "q45_k", True),
    "gguf_q6_k": partial(_gguf, loop="q6_k"), "gguf_q3_k": partial(_gguf, loop="q3_k"),
    "gguf_q2_k": partial(_gguf, loop="q2_k"),
}  # fmt: skip


def expand(packed: Packed, out: Tensor) -> Tensor | None:
    """Unpack the matrix into `out` (rows, columns), contiguous: float32, bfloat16, or int8 codes.

    Returns the codes' scales (rows, 1) float32, None for numbers. Of SVDQuant's weight this is the 4-bit part. Raises
    ValueError for a weight that _ROWS does not unpack.
    """
    from shared.ops import compiled
    from shared.quant.kernels import compiled_rows, compiled_tiles

    if isinstance(packed.packing, TableBlocks):
        packed = replace(packed, tensors=packed.packing.unnested(packed.tensors))
    found = _ROWS[packed.packing.name](packed)
    if isinstance(found, str):
        raise ValueError(found)
    rows, columns = packed.shape
    scales = torch.empty(rows, 1) if out.dtype == torch.int8 else None
    place = 0
    for piece in found if isinstance(found, list) else [found]:
        height, kernels = piece.height or rows, compiled_rows if piece.band == 1 else compiled_tiles
        compiled.over_rows(
            getattr(kernels, piece.loop), height // piece.band, columns, *piece.arguments,
            out[place:].data_ptr(), compiled.kind_of(out), 0 if scales is None else scales[place:].data_ptr(),
            numbers=piece.band * columns,
        )  # fmt: skip
        place += height
    return scales


def _refuse(layer: PackedLinear, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"is for CPUs, the device is {device.type}"
    if layer.weight.dtype == torch.float16:
        return "for activations in bfloat16 or float32"
    if not all(tensor.is_contiguous() for name, tensor in layer.packed.tensors.items() if name in _LARGE):
        return "its tensors do not lie row after row"
    if (reason := compiled_ready.why_not()) is not None:
        return reason
    found = _ROWS[layer.packing.name](layer.packed)
    return found if isinstance(found, str) else None


def _refuse_bf16(layer: PackedLinear, device: torch.device) -> str | None:
    scale = layer.packed.tensors.get("scale")
    if isinstance(layer.packing, Float8) and scale is not None and scale.shape[1] == 1:
        return "scaling the result rounds less"
    return _refuse(layer, device)


def _run_int8(layer: PackedLinear, x: Tensor | Rounded) -> Tensor:
    packed = layer.packed
    if not isinstance(packed.packing, Svdq):
        result = torch_int8.scaled(_sums(layer, x))
        return result if layer.bias is None else result.add_(layer.bias)
    assert isinstance(x, Tensor)
    from shared.ops import compiled

    down, up = (packed.tensors[name].to(x.dtype) for name in ("down", "up"))
    smoothed = compiled.round_rows(x.contiguous(), packed.tensors["smooth"].float().reciprocal_())
    result = torch_int8.scaled(_sums(layer, smoothed)).view(-1, layer.out_features)
    result.addmm_(F.linear(x, down).view(-1, len(down)), up.t())
    if layer.bias is not None:
        result.add_(layer.bias)
    return result.view(*x.shape[:-1], layer.out_features)


def _sums(layer: PackedLinear, x: Tensor | Rounded) -> Sums:
    codes = layer.scratch.take((layer.out_features, layer.in_features), torch.int8, torch.device("cpu"))
    scale = expand(layer.packed, codes)
    assert scale is not None
    return torch_int8.product(x, codes, scale)


def _run_bf16(layer: PackedLinear, x: Tensor) -> Tensor:
    packed = layer.packed
    weight = layer.scratch.take((layer.out_features, layer.in_features), x.dtype, x.device)
    expand(packed, weight)
    if not isinstance(packed.packing, Svdq):
        return F.linear(x, weight, layer.bias)
    from shared.quant.kernels import svdq

    return svdq.with_branch(layer, x, weight)


def _branch_in_order(packed: Packed) -> Packed:
    return Packed(packed.packing, packed.shape, svdq_tiles.with_branch_in_order(packed.tensors))


def _branch_lies_in_order(layer: PackedLinear) -> bool:
    return not svdq_tiles.branch_is_tiled(layer.packed.tensors)


def _takes(_layer: PackedLinear) -> Kind | None:
    return "int8"


def _never_known(_layer: PackedLinear, _device: torch.device) -> str | None:
    return None


for _packing in _ROWS:
    _is_split = _packing == "svdq"  # its branch reads the activations as they are
    # Only for who asks for int8: Q8_0 is rounded more finely than int8 activations are, and bitsandbytes, whose files
    # nf4 and fp4 are, multiplies them in 16 bits.
    _is_fine = _packing in ("gguf_q8_0", "nf4", "fp4")
    register(
        Kernel(
            name="compiled-int8",
            packing=_packing,
            compute="int8",
            priority=10,
            refuse=_refuse,
            run=_run_int8,
            known=_never_known if _is_fine else torch_int8.known,
            takes=(lambda _layer: None) if _is_split else _takes,
            sums=None if _is_split else _sums,
            arrange=_branch_in_order if _is_split else None,
            laid_out=_branch_lies_in_order,
            expands=True,
        )
    )
    register(
        Kernel(
            name="compiled-bf16",
            packing=_packing,
            compute="bf16",
            priority=20,
            refuse=_refuse_bf16,
            run=_run_bf16,
            arrange=_branch_in_order if _is_split else None,
            laid_out=_branch_lies_in_order,
            expands=True,
        )
    )
