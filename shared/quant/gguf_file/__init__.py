"""GGUF files: their header read with suspicion, their tensors mapped from disk, and whole files written.

A GGUF file is, little-endian throughout, with text as a 64-bit length and that many bytes of UTF-8:

    "GGUF", version u32, number of tensors u64, number of keys u64
    per key:     name (text), value type u32, value     (an array is: element type u32, count u64, elements)
    per tensor:  name (text), dimensions u32, that many u64, number type u32, offset u64
    padding to `general.alignment` (32 unless a key says otherwise); offsets count from here
    the tensors' bytes, each padded to the alignment

Dimensions are listed fastest first, so a weight (out, in) = (3840, 10240) is written as [10240, 3840]; here shapes are
turned round. A packed tensor is rows of blocks along its fastest dimension. A Q8_0 block holds 32 numbers in 34 bytes,
so that weight is 3840 rows of 10240 / 32 * 34 = 10,880 bytes, 41,779,200 in all.

The gguf package allocates what a header claims before it looks at the file's size; here every count and length is
checked against the bytes that are left first. Limits on counts keep the time bounded as well.

What files in the wild do, and what becomes of it:
* city96's converter: `comfy.gguf.orig_shape.NAME` keys give the true shape of tensors that were cut up to fit blocks.
* stable-diffusion.cpp packs norms and pad tokens too, and drops leading dimensions of 1 ((1, 3840) becomes (3840,)).
  Nothing multiplies by those, so whatever is no matrix is unpacked when loaded, and called F32.
* Some tools typed the bytes of BF16 pad tokens as I8: 7680 numbers where 3840 belong. They are taken for what they are.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; sizes of blocks: gguf 0.19.0, GGML_QUANT_SIZES.
"""

from __future__ import annotations

from shared.quant.gguf_file.header import is_gguf, read_header
from shared.quant.gguf_file.tensors import load, renamed
from shared.quant.gguf_file.types import BLOCKS, PREFIX, TYPES, packed_bytes
from shared.quant.gguf_file.writer import GgufWriter, Source, write

__all__ = [
    "BLOCKS",
    "PREFIX",
    "TYPES",
    "GgufWriter",
    "Source",
    "is_gguf",
    "load",
    "packed_bytes",
    "read_header",
    "renamed",
    "write",
]
