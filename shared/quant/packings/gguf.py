"""GGUF's blocks: rows of equal runs of numbers, each run with its own scale inside it.

A row of the matrix is its blocks one after the other, so rows are taken and joined as they lie. Bytes of one block
(f16 are little-endian; d and m stand for the block's scale and minimum):

    Q8_0     32 numbers    d f16, 32 int8                                        d * q
    Q4_0     32            d, 16 bytes                                           d * (q - 8)
    Q4_1     32            d, m, 16 bytes                                        d * q + m
    Q5_0     32            d, 4 bytes of fifth bits, 16 bytes                    d * (q - 16)
    Q5_1     32            d, m, 4 bytes of fifth bits, 16 bytes                 d * q + m
    IQ4_NL   32            d, 16 bytes                                           d * table[q]
    Q2_K    256            16 scales (low 4 bits) and minima (high), 64 bytes, d, m
    Q3_K    256            32 bytes of third bits, 64 bytes, 12 bytes of 6-bit scales, d
    Q4_K    256            d, m, 12 bytes of 6-bit scales and minima, 128 bytes
    Q5_K    256            d, m, 12 bytes of 6-bit scales and minima, 32 bytes of fifth bits, 128 bytes
    Q6_K    256            128 bytes of low 4 bits, 64 bytes of high 2 bits, 16 int8 scales, d
    IQ4_XS  256            d, 2 bytes of high scale bits, 4 bytes of low ones, 128 bytes

Nibbles do not alternate: the low halves of a run of bytes are its first numbers, the high halves its last. A Q4_0 block
00 3C | 21 43 ... (d = 1.0) therefore begins 1-8, 3-8, ... = -7, -5, ...; the 2 and the 4 are numbers 16 and 17.

A K block is cut into 8 or 16 sub-blocks, each with a small whole number as its scale (and one as its minimum):
w = d * scale * q - m * minimum. In Q4_K the twelve bytes s hold eight pairs of 6-bit numbers. The first four are
s[j] & 63 and s[j+4] & 63; the other four put their low 4 bits into s[8..11] (scale low, minimum high nibble) and their
high 2 bits into the top of s[0..3] (scales) and s[4..7] (minima). With s[0] = 0xC5, s[8] = 0x21: scale 0 is 5, scale 4
is 1 + (3 << 4) = 49, and the low nibble of minimum 4 is 2.

Sums are taken in the order and the float32 that ggml's own code uses, so the results are equal bit for bit.
Other types (IQ1 to IQ3, TQ, MXFP4) are unpacked by the gguf package, on the CPU, wherever they lie.
Source: ggml's block structures (ggml/src/ggml-common.h); checked against gguf 0.19.0, gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.quant.errors import CheckpointError
from shared.quant.gguf_file import BLOCKS
from shared.quant.pieces import Stackable

# Numbers unpacked at a time: the float32 in between stays near the processor's caches, and small beside the weights.
_CHUNK = 2**18

# Where a block's f16 scales are, in bytes: not finite, they make the whole block so.
_SCALES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "Q1_0": (0,),
}  # fmt: skip

_F16_EXPONENT = 0x7C00

_IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class GgufBlocks(Stackable):
    """A matrix in GGUF's blocks of one type ("Q4_K"). Tensor: blocks, uint8 (rows, bytes per row).

    columns: of the matrix. Where they are no multiple of a block's numbers (files with an `orig_shape`), blocks run on
    from row to row and the tensor is (blocks, bytes per block) instead.
    """

    type: str
    columns: int

    @property
    def name(self) -> str:
        return f"gguf_{self.type.lower()}"

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        numbers, size = BLOCKS[self.type]
        blocks = tensors["blocks"].reshape(-1, size)
        decode = _DECODERS.get(self.type) or (lambda part: _by_package(part, self.type))
        result = torch.empty(blocks.shape[0], numbers, dtype=dtype, device=blocks.device)
        step = _CHUNK // numbers if blocks.device.type == "cpu" else 256 * _CHUNK // numbers
        for start in range(0, blocks.shape[0], step):
            result[start : start + step] = decode(blocks[start : start + step])
        return result.view(-1, self.columns)

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        numbers = BLOCKS[self.type][0]
        if self.columns % numbers:
            if start * self.columns % numbers or stop * self.columns % numbers:
                raise CheckpointError(
                    f"Rows {start} to {stop} of a GGUF {self.type} matrix of {self.columns} columns cut through a "
                    f"block of {numbers} numbers."
                )
            start, stop = start * self.columns // numbers, stop * self.columns // numbers
        return {"blocks": tensors["blocks"][start:stop]}

    def stack_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
        return {"blocks": [part["blocks"] for part in parts]}


def is_readable(type_name: str) -> bool:
    """Whether anything here unpacks blocks of this type."""
    return type_name in _DECODERS or type_name in _package_types()


def scales_are_finite(blocks: Tensor, type_name: str) -> bool:
    """False when a block's scale is infinite or no number. blocks: uint8, any shape of whole blocks."""
    size = BLOCKS[type_name][1]
    flat = blocks.reshape(-1, size)
    if flat.storage_offset() % 2 or size % 2:
        return all(bool(_f16(flat, at).isfinite().all()) for at in _SCALES.get(type_name, ()))
    # By the exponent's bits, all ones in what is no number: a seventh of the time, of files that are read whole.
    halves = flat.view(torch.int16)
    return all(int((halves[:, at // 2] & _F16_EXPONENT).max()) < _F16_EXPONENT for at in _SCALES.get(type_name, ()))


def scales_are_lost(blocks: Tensor, type_name: str) -> bool:
    """True when every scale is zero although the blocks differ: numbers were there, nothing of them is left."""
    flat = blocks.reshape(-1, BLOCKS[type_name][1])
    places = _SCALES.get(type_name, ())
    # The first block answers for nearly every file.
    if not places or any(bool(_f16(flat[:1], at).any()) for at in places):
        return False
    return not any(bool(_f16(flat, at).any()) for at in places) and bool((flat != flat[:1]).any())


# -------------------------------------------------------- decoders: (n, bytes) uint8 -> (n, numbers) float32


def _f16(blocks: Tensor, at: int) -> Tensor:
    """The f16 at a byte of each block, (n, 1) float32."""
    scale: Tensor = blocks[:, at : at + 2].contiguous().view(torch.float16)
    return scale.float()


def _fields(packed: Tensor, bits: int, run: int) -> Tensor:
    """Split bytes into fields of `bits`, (n, numbers): of each run of bytes first all lowest fields, then the next."""
    n = packed.shape[0]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)
    fields: Tensor = (packed.reshape(n, -1, 1, run) >> shifts) & (2**bits - 1)
    return fields.reshape(n, -1)


def _bit_string(packed: Tensor) -> Tensor:
    """Bits of bytes, lowest first, (n, 8 * bytes)."""
    return _fields(packed, 1, 1)


def _q8_0(blocks: Tensor) -> Tensor:
    return _f16(blocks, 0) * blocks[:, 2:].view(torch.int8)


def _q4_0(blocks: Tensor) -> Tensor:
    return _f16(blocks, 0) * (_fields(blocks[:, 2:], 4, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _f16(blocks, 0) * _fields(blocks[:, 4:], 4, 16) + _f16(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    q = _fields(blocks[:, 6:], 4, 16) | (_bit_string(blocks[:, 2:6]) << 4)
    return _f16(blocks, 0) * (q.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    q = _fields(blocks[:, 8:], 4, 16) | (_bit_string(blocks[:, 4:8]) << 4)
    return _f16(blocks, 0) * q + _f16(blocks, 2)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, q = blocks[:, :16], _fields(blocks[:, 16:80], 2, 32)
    return _sub_blocks(_f16(blocks, 80) * (scales & 15), q, _f16(blocks, 82) * (scales >> 4))


def _q3_k(blocks: Tensor) -> Tensor:
    low = torch.cat([blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4], dim=1)
    scales = (low | (_fields(blocks[:, 104:108], 2, 4) << 4)).float() - 32
    # The third bit is kept the other way round: set, nothing is taken off.
    q = _fields(blocks[:, 32:96], 2, 32) | (_fields(blocks[:, :32], 1, 32) << 2)
    return _sub_blocks(_f16(blocks, 108) * scales, q.float() - 4)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    q = _fields(blocks[:, 16:], 4, 32)
    return _sub_blocks(_f16(blocks, 0) * scales, q, _f16(blocks, 2) * minima)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    q = _fields(blocks[:, 48:], 4, 32) | (_fields(blocks[:, 16:48], 1, 32) << 4)
    return _sub_blocks(_f16(blocks, 0) * scales, q, _f16(blocks, 2) * minima)


def _q6_k(blocks: Tensor) -> Tensor:
    q = _fields(blocks[:, :128], 4, 64) | (_fields(blocks[:, 128:192], 2, 32) << 4)
    return _sub_blocks(_f16(blocks, 208) * blocks[:, 192:208].view(torch.int8), q.float() - 32)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _f16(blocks, 0) * _from_table(_fields(blocks[:, 2:], 4, 16))


def _iq4_xs(blocks: Tensor) -> Tensor:
    low, high = blocks[:, 4:8], blocks[:, 2:4]
    scales = _fields(low, 4, 1) | (_fields(high, 2, 1) << 4)
    return _sub_blocks(_f16(blocks, 0) * (scales.float() - 32), _from_table(_fields(blocks[:, 8:], 4, 16)))


def _sub_blocks(scales: Tensor, q: Tensor, minima: Tensor | None = None) -> Tensor:
    """scales (n, s) times q (n, 256) in s equal runs, less minima (n, s)."""
    n, runs = scales.shape
    scaled = scales.unsqueeze(2) * q.view(n, runs, -1)
    return (scaled if minima is None else scaled - minima.unsqueeze(2)).reshape(n, -1)


def _six_bit_pairs(s: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima, (n, 8) each, of the twelve bytes (n, 12) explained above."""
    a, b, rest = s[:, :4], s[:, 4:8], s[:, 8:]
    scales = torch.cat([a & 63, (rest & 15) | ((a >> 6) << 4)], dim=1)
    minima = torch.cat([b & 63, (rest >> 4) | ((b >> 6) << 4)], dim=1)
    return scales, minima


def _from_table(q: Tensor) -> Tensor:
    return torch.tensor(_IQ4_TABLE, dtype=torch.float32, device=q.device)[q.int()]


def _by_package(blocks: Tensor, type_name: str) -> Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    numbers = dequantize(blocks.cpu().numpy(), GGMLQuantizationType[type_name])
    return torch.from_numpy(numbers).to(blocks.device)


def _package_types() -> frozenset[str]:
    """Types that the gguf package unpacks."""
    from gguf.quants import _type_traits

    return frozenset(kind.name for kind in _type_traits)


_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
