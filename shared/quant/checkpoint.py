"""A weights file as a list of named tensors: opened by its header alone, without torch, and read tensor by tensor.

GGUF files are told by their first four bytes and read by gguf_file/; the rest of this page is about safetensors.

A safetensors file is eight bytes N (little-endian), N bytes of JSON, then the tensors' bytes back to back:

    {"__metadata__": {text: text}, "layer.weight": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}, ...}

Everything the header claims is checked against the file's size before anything else happens, so that a truncated
download or a hostile file is named here and not met as noise in a picture. Pickles are refused, never opened.
Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.quant.errors import CheckpointError
from shared.quant.mapping import OpenFile, opened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Bits of one element.
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip

# The reference reader's own limit.
MAX_HEADER_BYTES = 100_000_000

# Bytes from which on a tensor stays mapped even where its numbers begin at no multiple of their size.
MAPPED_ANYWHERE_FROM = 2**20

MAX_DIMENSIONS = 64  # torch's own
MAX_NUMBER = 2**63 - 1  # of dimensions and offsets; products of what JSON allows can take minutes, and memory

SUFFIXES = (".safetensors", ".sft", ".gguf")
INDEX_SUFFIX = ".safetensors.index.json"
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
_PICKLE_HINT = (
    "Such files can run any program when opened, so they are never read. "
    "Look for the same weights as .safetensors, or convert them with a tool you trust."
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int  # of its first byte in the file
    stored: str = ""  # how the file packs it, where load() unpacks it into `dtype` (GGUF norms and pad tokens)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model on disk: one file, or the shards that an index lists."""

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the header(s) of a .safetensors, .sft or .gguf file, a `*.safetensors.index.json`, or a folder of one.

        Raises CheckpointError for anything that is not such a file, whole and consistent.
        """
        path = Path(path)
        if path.is_dir():
            path = _only_checkpoint_in(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file.")
        files = _shards(path) if path.name.endswith(INDEX_SUFFIX) else (path,)
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for file in files:
            header, shard_metadata = read_header(file)
            for name in header:
                if name in tensors:
                    raise CheckpointError(
                        f"{file}: tensor {name} is also in {tensors[name].file.name}.",
                        "The shards do not belong together; download them again.",
                    )
            tensors.update(header)
            metadata.update(shard_metadata)
        return cls(path, files, tensors, metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(t.nbytes for t in self.tensors.values())

    def read_bytes(self, name: str) -> bytes:
        """One tensor's raw bytes, without torch: for small ones that hold text or a number. Raises CheckpointError if
        they are gone."""
        info = self.tensors[name]
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.offset)
            data = stream.read(info.nbytes)
        if len(data) < info.nbytes:
            raise _gone(info)
        return data

    def load(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Tensors by name, all of them by default, mapped from disk rather than copied (mapping.py).

        Packed GGUF matrices come as raw bytes, see gguf_file.load(). Raises CheckpointError for number types that
        torch does not have, and for a file that has become shorter since open().
        """
        from shared.quant import gguf_file

        by_file: dict[Path, list[TensorInfo]] = {}
        for name in self.tensors if names is None else names:
            info = self.tensors[name]
            by_file.setdefault(info.file, []).append(info)
        result: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with opened(file) as source:
                if file in self._gguf_files:
                    result |= gguf_file.load(source, wanted)
                else:
                    result |= {info.name: _plain(source, info) for info in wanted}
        return result

    @cached_property
    def _gguf_files(self) -> frozenset[Path]:
        from shared.quant import gguf_file

        files = {info.file for info in self.tensors.values()}
        return frozenset(file for file in files if gguf_file.is_gguf(file))


def _gone(info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{info.file}: it ends before {info.name}, but did not when it was opened.",
        "It has been altered meanwhile; try again.",
    )


def read_mapped(source: OpenFile, info: TensorInfo) -> Tensor:
    """A tensor's bytes as they lie in its file, uint8 (nbytes,), mapped. Raises CheckpointError if they are gone."""
    try:
        return source.map(info.offset, info.nbytes)
    except ValueError as error:
        raise _gone(info) from error


def _plain(source: OpenFile, info: TensorInfo) -> Tensor:
    """A safetensors tensor in its own type and shape, at whatever address it has in memory.

    In mmgp's files numbers begin at odd ones. Small tensors are copied then, so that what is taken from them one by one
    lies as the language asks for; a copy of the large ones would be gigabytes, and processors read those bytes as fast.
    """
    dtype = torch_types().get(info.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{info.file}: {info.name} is {info.dtype}, which this version of torch does not have.",
            "Use another file of the same model.",
        )
    data = read_mapped(source, info)
    if info.offset % dtype.itemsize and info.nbytes < MAPPED_ANYWHERE_FROM:
        data = data.clone()
    # Two 4-bit numbers make one element of torch's type.
    shape = (*info.shape[:-1], info.shape[-1] // 2) if info.dtype == "F4" else info.shape
    return data.view(dtype).view(shape)


@cache
def torch_types() -> dict[str, torch.dtype]:
    """Our names of number types -> torch's, of those that it has."""
    import torch

    names = {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
        "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    }  # fmt: skip
    return {ours: getattr(torch, theirs) for ours, theirs in names.items() if hasattr(torch, theirs)}


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one file, checked against its size.

    Raises CheckpointError saying what is wrong: a pickle, a truncated or foreign file, offsets that overlap, leave
    gaps or disagree with dtype and shape, a name listed twice.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(9)
        _refuse_foreign(file, start)
        if start[:4] == b"GGUF":
            from shared.quant import gguf_file

            return gguf_file.read_header(file)
        if len(start) < 8:
            raise CheckpointError(f"{file}: only {size} bytes, too short for a safetensors file.", "Download it again.")
        (length,) = struct.unpack("<Q", start[:8])
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                f"{file}: its header claims {length:,} bytes but the file has {size:,}.",
                "It is truncated or no safetensors file; download it again.",
            )
        stream.seek(8)
        text = stream.read(length)
    try:
        # As UTF-8: given bytes, json would also take UTF-16 and UTF-32.
        header = json.loads(text.decode(), object_pairs_hook=lambda pairs: _unique(pairs, file))
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise CheckpointError(f"{file}: its header is not readable JSON ({error}).", "Download it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is a {type(header).__name__}, not an object.", "Download it again.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: __metadata__ is a {type(metadata).__name__}, not an object.")
    tensors = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_offsets(file, header, size - 8 - length)
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def _refuse_foreign(file: Path, start: bytes) -> None:
    # Protocols 2 to 5. A header of 640 bytes begins like protocol 2, but its JSON follows.
    is_pickle = start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and start[8:9] != b"{"
    if file.suffix.lower() in _PICKLE_SUFFIXES or start[:4] == b"PK\x03\x04" or is_pickle:
        raise CheckpointError(f"{file}: a Python pickle (or zip) file.", _PICKLE_HINT)
    if start[:4] in (b"<!DO", b"<htm", b"<HTM") or start.startswith(b"version "):
        raise CheckpointError(f"{file}: a web page or a Git LFS pointer, not weights.", "Download the file itself.")
    if file.suffix.lower() == ".gguf" and start[:4] != b"GGUF":
        raise CheckpointError(f"{file}: not a GGUF file, it begins with {start[:4]!r}.", "Download it again.")


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{file}: its header lists {twice!r} twice.", "Download it again.")
    return result


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise CheckpointError(f"{file}: {name} lacks dtype, shape or data_offsets.", "Download it again.")
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"{file}: {name} has the unknown number type {dtype!r}.")
    sizes = (*shape, begin, end)
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_NUMBER for n in sizes):
        raise CheckpointError(
            f"{file}: {name} has an impossible shape or place, {list(sizes)!s:.80}.", "Download it again."
        )
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: {name} is {dtype} {shape}, {nbytes:,} bytes, but its offsets span {end - begin:,}.",
            "Download it again.",
        )
    return TensorInfo(name, dtype, tuple(shape), nbytes, file, data_start + begin)


def _check_offsets(file: Path, header: Mapping[str, Any], data_bytes: int) -> None:
    """Offsets must tile the data without gap or overlap and end where the file ends."""
    position = 0
    for name, (begin, end) in sorted(((n, e["data_offsets"]) for n, e in header.items()), key=lambda item: item[1]):
        if begin != position:
            raise CheckpointError(
                f"{file}: {name} starts at byte {begin:,} of the data, expected {position:,}.",
                "Tensors overlap or leave a gap; download it again.",
            )
        position = end
    if position != data_bytes:
        raise CheckpointError(
            f"{file}: its tensors take {position:,} bytes but {data_bytes:,} follow the header.",
            "The file is truncated or has been altered; delete it and download it again.",
        )


def _only_checkpoint_in(folder: Path) -> Path:
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if len(indexes) == 1:
        return indexes[0]
    if not indexes and len(files) == 1:
        return files[0]
    found = ", ".join(p.name for p in (indexes or files)[:5]) or "none"
    raise CheckpointError(
        f"{folder}: expected one safetensors or GGUF file or one index in the folder, found {found}.",
        "Name the file itself.",
    )


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) < 256  # file systems' limit


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a shard index with a weight_map ({error}).") from error
    if odd := [name for name in names if not _is_file_name(name)]:
        raise CheckpointError(f"{index}: not a shard index, its weight_map names the file {odd[0]!r:.80}.")
    shards = tuple(index.parent / name for name in names)
    for shard in shards:
        if shard.resolve().parent != index.parent.resolve():
            raise CheckpointError(f"{index}: names a shard outside its folder: {shard.name}.")
        if not shard.is_file():
            raise CheckpointError(f"{index}: shard {shard.name} is missing.", f"Put it into {index.parent}.")
    return shards
