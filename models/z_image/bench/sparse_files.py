"""Checkpoints of the real sizes and names with next to nothing in them: as long as real ones, zeros nearly all through.

A sparse file takes no room on the disk for its zeros, and a program that opens it cannot tell. What readers look at is
there: markers, and scales of one, so that what they stand for are sound numbers, zeros.

    kind                        names       linears of the blocks
    bf16, official names        official    plain
    bf16, diffusers names       diffusers   plain, q, k and v apart
    fp16, fp32                  official    plain
    quanto int8                 diffusers   codes, a scale for each row
    int8                        official    the same as ComfyUI writes it
    FP8 scaled                  official    codes, one scale
    MXFP8, NVFP4                official    codes, swizzled scales for blocks
    SVDQ int4 r256, fp4 r128    nunchaku    codes and scales in tiles, a branch of rank 256 or 128
    nf4                         diffusers   bitsandbytes' codes and nested magnitudes
    Q8_0, Q4_K                  official    GGUF's blocks, as its converters write them: the refiners plain
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from models.z_image.bench.twins import PACKED
from models.z_image.config import TransformerConfig
from models.z_image.keys import diffusers_names, split_parameter
from models.z_image.transformer import ZImageTransformer
from shared.quant.formats import svdq

Names = Literal["official", "diffusers", "nunchaku"]
_ITEM = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "U8": 1}
_ONE = {"BF16": b"\x80\x3f", "F32": b"\x00\x00\x80\x3f", "F8_E4M3": b"\x38"}
_EXPONENT_OF_ONE = b"\x7f"
_PIECE = 2**20  # bytes written at a time


class Stored(NamedTuple):
    """A tensor in a file. fill: bytes repeated all over it, b"" for zeros."""

    dtype: str
    shape: tuple[int, ...]
    fill: bytes = b""

    @property
    def nbytes(self) -> int:
        return _ITEM[self.dtype] * int(np.prod(self.shape, dtype=np.int64))


class Kind(NamedTuple):
    """names: how layers are called. packed: the tensors of a matrix (rows, columns) by suffix, None for plain files.

    gguf: the type of a GGUF file's blocks. rank: of SVDQuant.
    """

    names: Names
    packed: Callable[[int, int], Mapping[str, Stored]] | None = None
    gguf: str = ""
    rank: int = 0
    plain: str = "BF16"


def _ones(dtype: str, *shape: int) -> Stored:
    return Stored(dtype, shape, _ONE[dtype])


def _json(suffix: str, **entries: Any) -> dict[str, Stored]:
    text = json.dumps(entries).encode()
    return {suffix: Stored("U8", (len(text),), text)}


def _quanto(rows: int, columns: int) -> dict[str, Stored]:
    unused = {name: _ones("BF16") for name in ("input_scale", "output_scale")}
    return {"weight._data": Stored("I8", (rows, columns)), "weight._scale": _ones("BF16", rows, 1), **unused}


def _int8(rows: int, columns: int) -> dict[str, Stored]:
    marker = _json("comfy_quant", format="int8_tensorwise", per_row=True)
    return {"weight": Stored("I8", (rows, columns)), "weight_scale": _ones("F32", rows, 1), **marker}


def _fp8(rows: int, columns: int) -> dict[str, Stored]:
    marker = _json("comfy_quant", format="float8_e4m3fn")
    return {"weight": Stored("F8_E4M3", (rows, columns)), "weight_scale": _ones("F32"), **marker}


def _mxfp8(rows: int, columns: int) -> dict[str, Stored]:
    scales = Stored("U8", (rows, columns // 32), _EXPONENT_OF_ONE)
    return {
        "weight": Stored("F8_E4M3", (rows, columns)),
        "weight_scale": scales,
        **_json("comfy_quant", format="mxfp8"),
    }


def _nvfp4(rows: int, columns: int) -> dict[str, Stored]:
    scales = {"weight_scale": _ones("F8_E4M3", rows, columns // 16), "weight_scale_2": _ones("F32")}
    return {"weight": Stored("U8", (rows, columns // 2)), **scales, **_json("comfy_quant", format="nvfp4")}


def _svdq_int4(rows: int, columns: int) -> dict[str, Stored]:
    return _svdq(rows, columns, 256, _ones("BF16", columns // 64, rows))


def _svdq_fp4(rows: int, columns: int) -> dict[str, Stored]:
    return _svdq(rows, columns, 128, _ones("F8_E4M3", columns // 16, rows)) | {"wtscale": _ones("BF16", 1)}


def _svdq(rows: int, columns: int, rank: int, scales: Stored) -> dict[str, Stored]:
    return {
        "qweight": Stored("I8", (rows, columns // 2)), "wscales": scales,
        "smooth_factor": _ones("BF16", columns), "smooth_factor_orig": _ones("BF16", columns),
        "proj_down": Stored("BF16", (columns, rank)), "proj_up": Stored("BF16", (rows, rank)),
    }  # fmt: skip


def _nf4(rows: int, columns: int) -> dict[str, Stored]:
    numbers = rows * columns
    state = _json(
        "weight.quant_state.bitsandbytes__nf4", quant_type="nf4", blocksize=64, dtype="bfloat16", shape=[rows, columns],
        nested_blocksize=256, nested_dtype="float32", nested_offset=0.5,
    )  # fmt: skip
    return {
        "weight": Stored("U8", (numbers // 2, 1)),
        "weight.absmax": Stored("U8", (numbers // 64,)),
        "weight.quant_map": _ones("F32", 16),
        "weight.nested_quant_map": _ones("F32", 256),
        "weight.nested_absmax": _ones("F32", -(-numbers // 64 // 256)),
        **state,
    }


PLAIN: Mapping[str, Kind] = {"official": Kind("official"), "diffusers": Kind("diffusers")}
KINDS: Mapping[str, Kind] = {
    "fp16": Kind("official", plain="F16"),
    "fp32": Kind("official", plain="F32"),
    "quanto int8": Kind("diffusers", _quanto),
    "int8": Kind("official", _int8),
    "FP8 scaled": Kind("official", _fp8),
    "MXFP8": Kind("official", _mxfp8),
    "NVFP4": Kind("official", _nvfp4),
    "SVDQ int4 r256": Kind("nunchaku", _svdq_int4, rank=256),
    "SVDQ fp4 r128": Kind("nunchaku", _svdq_fp4, rank=128),
    "nf4": Kind("diffusers", _nf4),
    "Q8_0": Kind("official", gguf="Q8_0"),
    "Q4_K": Kind("official", gguf="Q4_K"),
}


def write(path: Path, config: TransformerConfig, kind: Kind) -> int:
    """A transformer of these sizes in a file of this kind; its length in bytes.

    nunchaku's tiles want widths that are multiples of 128, Q4_K multiples of 256.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    matrices, plain = _tensors(config, kind.names)
    if kind.gguf:
        return _write_gguf(path, {f"{module}.weight": s for module, s in matrices.items()} | plain, kind.gguf)
    tensors: dict[str, Stored] = {}
    for module, shape in matrices.items():
        if kind.packed is None:
            tensors[f"{module}.weight"] = Stored(kind.plain, shape)
        else:
            tensors |= {f"{module}.{suffix}": stored for suffix, stored in kind.packed(*shape).items()}
    tensors |= {name: Stored(kind.plain, shape) for name, shape in plain.items()}
    metadata: dict[str, str] = {}
    if kind.rank:
        svdq_kind: Any = "int4" if kind.packed is _svdq_int4 else "fp4"
        metadata = svdq.header(config.as_diffusers(), kind=svdq_kind, rank=kind.rank)
    return write_safetensors(path, tensors, metadata)


def _tensors(config: TransformerConfig, names: Names) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """(modules of the linears that are packed, with rows and columns; every other parameter), in a file's names."""
    with torch.device("meta"):
        model = ZImageTransformer(config)
    matrices: dict[str, tuple[int, int]] = {}
    plain: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        module, suffix = split_parameter(name)
        theirs = _modules(module, names)
        rows, *rest = parameter.shape
        for their in theirs:
            if PACKED.fullmatch(module) and suffix == ".weight":
                matrices[their] = rows // len(theirs), rest[0]
            else:
                plain[their + suffix] = (rows // len(theirs), *rest)
    return matrices, plain


def _modules(module: str, names: Names) -> tuple[str, ...]:
    """What a file calls one of our modules."""
    theirs = diffusers_names(module)
    if names == "diffusers":
        return theirs
    if names == "official":  # as ComfyUI and the model's own repository: q, k and v in one, w1 and w3 apart
        return theirs if module.endswith("feed_forward.w13") else (module,)
    block, _, linear = module.rpartition("attention." if ".attention." in module else "feed_forward.")
    stacked = {"qkv": "attention.to_qkv", "w13": "feed_forward.net.0.proj", "w2": "feed_forward.net.2"}
    return (block + stacked[linear],) if linear in stacked else theirs


def write_safetensors(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> int:
    """These tensors in a file, as long as it would be; its length in bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    # As the safetensors library orders them, so that all numbers begin at multiples of their size.
    for name, stored in sorted(tensors.items(), key=lambda given: (-_ITEM[given[1].dtype], given[0])):
        begin, end = end, end + stored.nbytes
        header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(start + end)
        for name, stored in tensors.items():
            if stored.fill:
                file.seek(start + header[name]["data_offsets"][0])
                _repeat(file, stored.fill, stored.nbytes)
    return start + end


def _repeat(file: Any, fill: bytes, nbytes: int) -> None:
    piece = fill * max(1, _PIECE // len(fill))
    while nbytes > 0:
        nbytes -= file.write(piece[:nbytes])


def _write_gguf(path: Path, shapes: Mapping[str, tuple[int, ...]], kind: str) -> int:
    """By the gguf package, but for the data. The first block of each matrix has a scale, others are zeros."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.constants import GGML_QUANT_SIZES

    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    writer = GGUFWriter(path, "lumina2")
    lengths: dict[str, int] = {}
    for name, (rows, *rest) in shapes.items():
        if _is_packed_in_gguf(name, rest):
            shape = (rows, rest[0] // numbers * size)
            lengths[name] = rows * shape[1]
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), lengths[name], GGMLQuantizationType[kind])
        else:
            stored = GGMLQuantizationType.BF16 if rest else GGMLQuantizationType.F32
            lengths[name] = (2 if rest else 4) * int(np.prod((rows, *rest), dtype=np.int64))
            writer.add_tensor_info(name, (rows, *rest), np.dtype(np.float32), lengths[name], stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        position = GGUFWriter.ggml_pad(file.seek(0, 2), writer.data_alignment)
        for name, length in lengths.items():
            if _is_packed_in_gguf(name, shapes[name][1:]):
                file.seek(position)
                file.write(b"\x00\x3c")  # 1 in float16, where Q8_0 and Q4_K have a block's scale
            position += GGUFWriter.ggml_pad(length, writer.data_alignment)
        file.truncate(position)
    return position


def _is_packed_in_gguf(name: str, columns: Sequence[int]) -> bool:
    """Every matrix of the layers; what stands outside them, the refiners too, is left in 16 bits."""
    return name.startswith("layers.") and len(columns) == 1
