"""A GGUF file's header, read with suspicion: every count and length is held against the bytes that are left."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.quant.checkpoint import TensorInfo
from shared.quant.errors import CheckpointError
from shared.quant.gguf_file.types import MAGIC, MAX_DIMENSIONS, PREFIX, TYPES

# Far above any real file: Qwen3's tokenizer takes 6 MB of header, the largest language models have 2,000 tensors.
MAX_HEADER_BYTES = 64 * 2**20
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 65_535  # the specification's own
MAX_ALIGNMENT = 2**16
KEPT_ELEMENTS = 16  # of an array in `metadata`: enough for shapes, not for vocabularies

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_DOWNLOAD = "It is truncated or damaged; download it again."


def is_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == MAGIC


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one GGUF file, checked against its size; nothing of the tensors is read.

    Shapes are (out, in). dtype is "F32", "F16", "BF16" ... for plain numbers and for everything that is unpacked when
    loaded, "GGUF_Q4_K" and the like for packed matrices. Values of keys are text, long arrays only counted.
    Raises CheckpointError naming what is wrong: version, byte order, counts, lengths, types, alignment, offsets, a
    tensor or key listed twice, one shard of several.
    """
    size = file.stat().st_size
    if size < 24:
        raise CheckpointError(f"{file}: a GGUF file of only {size} bytes.", _DOWNLOAD)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        cursor = _Cursor(file, mapped, min(size, MAX_HEADER_BYTES))
        _check_version(file, cursor)
        tensors, keys = cursor.number(_U64), cursor.number(_U64)
        for found, most, what in ((tensors, MAX_TENSORS, "tensors"), (keys, MAX_KEYS, "keys")):
            if found > most:
                raise CheckpointError(f"{file}: its GGUF header claims {found:,} {what}.", _DOWNLOAD)
        values = _read_keys(file, cursor, keys)
        listed = [_read_listing(cursor) for _ in range(tensors)]
        alignment = _alignment(file, values)
        data_start = -(-cursor.position // alignment) * alignment
    infos: dict[str, TensorInfo] = {}
    for listing in listed:
        if listing.name in infos:
            raise CheckpointError(f"{file}: its header lists {listing.name!r} twice.", _DOWNLOAD)
        infos[listing.name] = _tensor_info(file, listing, values, data_start)
    _check_offsets(file, infos, alignment, size)
    return infos, {key: _as_text(value) for key, value in values.items()}


class _Cursor:
    """Reads a mapped header front to back. No length is believed before it is held against the bytes that are left."""

    def __init__(self, file: Path, data: mmap.mmap, end: int) -> None:
        self.file = file
        self.data = data
        self.end = end
        self.position = 4  # past the magic

    def take(self, count: int, what: str) -> int:
        """Move past `count` bytes and return where they began."""
        start = self.position
        if count > self.end - start:
            raise CheckpointError(
                f"{self.file}: at byte {start:,} its GGUF header claims {count:,} more bytes ({what}), "
                f"{self.end - start:,} are left.",
                _DOWNLOAD,
            )
        self.position = start + count
        return start

    def number(self, kind: struct.Struct, what: str = "a number") -> Any:
        return kind.unpack_from(self.data, self.take(kind.size, what))[0]

    def text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        length = self.number(_U64, what)
        if length > most:
            raise CheckpointError(f"{self.file}: {what} of {length:,} bytes in its GGUF header.", _DOWNLOAD)
        start = self.take(length, what)
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file}: {what} in its GGUF header is not UTF-8.", _DOWNLOAD) from error


@dataclass(frozen=True)
class _Listing:
    """A tensor as the header lists it: dimensions fastest first, offset from the start of the data."""

    name: str
    dimensions: tuple[int, ...]
    type_number: int
    offset: int


@dataclass(frozen=True)
class _LongArray:
    """An array that was skipped: only how long it was."""

    count: int


def _check_version(file: Path, cursor: _Cursor) -> None:
    version = cursor.number(_U32)
    if version in (2, 3):
        return
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(f"{file}: a GGUF file in big-endian byte order.", "Use the little-endian file.")
    raise CheckpointError(
        f"{file}: a GGUF file of version {version}; versions 2 and 3 are readable.",
        "Convert the model again with a current tool.",
    )


def _read_keys(file: Path, cursor: _Cursor, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text("a key", MAX_NAME_BYTES)
        if key in values:
            raise CheckpointError(f"{file}: its header lists the key {key!r} twice.", _DOWNLOAD)
        values[key] = _read_value(cursor, cursor.number(_U32), key)
    shards = values.get("split.count", 1)
    if isinstance(shards, int) and shards > 1:
        raise CheckpointError(
            f"{file}: one of {shards} pieces of a GGUF file.", "Join them with `llama-gguf-split --merge`."
        )
    return values


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _SCALARS:
        return cursor.number(struct.Struct(_SCALARS[kind]), key)
    if kind == _STRING:
        return cursor.text(key)
    if kind != _ARRAY:
        raise CheckpointError(f"{cursor.file}: {key} has the unknown value type {kind}.", _DOWNLOAD)
    element, count = cursor.number(_U32, key), cursor.number(_U64, key)
    if element == _STRING:
        return _skip_texts(cursor, count, key)
    if element not in _SCALARS:
        raise CheckpointError(f"{cursor.file}: {key} is an array of the unknown type {element}.", _DOWNLOAD)
    number = struct.Struct(_SCALARS[element])
    start = cursor.take(count * number.size, key)
    if count > KEPT_ELEMENTS:
        return _LongArray(count)
    return [number.unpack_from(cursor.data, start + i * number.size)[0] for i in range(count)]


def _skip_texts(cursor: _Cursor, count: int, key: str) -> _LongArray:
    # A vocabulary has 150,000 of them: lengths are hopped over without the cursor's calls.
    if count * _U64.size > cursor.end - cursor.position:
        cursor.take(count * _U64.size, key)  # raises
    data, end, position, unpack = cursor.data, cursor.end, cursor.position, _U64.unpack_from
    for _ in range(count):
        if position + 8 > end:
            break
        position += 8 + unpack(data, position)[0]
    cursor.take(position - cursor.position, key)
    return _LongArray(count)


def _read_listing(cursor: _Cursor) -> _Listing:
    name = cursor.text("a tensor's name", MAX_NAME_BYTES)
    count = cursor.number(_U32, name)
    if count > MAX_DIMENSIONS:
        raise CheckpointError(f"{cursor.file}: {name} has {count:,} dimensions.", _DOWNLOAD)
    dimensions = tuple(cursor.number(_U64, name) for _ in range(count))
    return _Listing(name, dimensions, cursor.number(_U32, name), cursor.number(_U64, name))


def _alignment(file: Path, values: Mapping[str, Any]) -> int:
    alignment = values.get("general.alignment", 32)
    # Numbers are read in place, so they must lie at multiples of their own size.
    fits = type(alignment) is int and 8 <= alignment <= MAX_ALIGNMENT and alignment & (alignment - 1) == 0
    if not fits:
        raise CheckpointError(
            f"{file}: general.alignment is {alignment!r}, not a power of two from 8 to {MAX_ALIGNMENT}.", _DOWNLOAD
        )
    return int(alignment)


def _tensor_info(file: Path, listing: _Listing, values: Mapping[str, Any], data_start: int) -> TensorInfo:
    name, dimensions = listing.name, listing.dimensions
    if listing.type_number not in TYPES:
        raise CheckpointError(
            f"{file}: {name} has the number type {listing.type_number}, which this version does not know.",
            "Use a file of another type, such as Q8_0.",
        )
    kind, numbers, size = TYPES[listing.type_number]
    total = math.prod(dimensions)
    if 0 in dimensions or (numbers > 1 and not dimensions) or (dimensions and dimensions[0] % numbers):
        raise CheckpointError(
            f"{file}: {name} has the impossible shape {list(reversed(dimensions))} for {kind}, "
            f"which comes in blocks of {numbers}.",
            _DOWNLOAD,
        )
    shape = tuple(reversed(dimensions))
    original = values.get(f"{_ORIGINAL_SHAPE}{name}")
    if original is not None:
        shape = _original_shape(file, name, original, total)
    dtype, stored = kind, ""
    if numbers > 1:
        matrix = len(shape) == 2 and 1 not in shape
        dtype, stored = (f"{PREFIX}{kind}", "") if matrix else ("F32", kind)
    elif kind == "I8" and name.endswith("pad_token") and shape and shape[-1] % 2 == 0:
        dtype, shape = "BF16", (*shape[:-1], shape[-1] // 2)
    return TensorInfo(name, dtype, shape, total // numbers * size, file, data_start + listing.offset, stored)


def _original_shape(file: Path, name: str, shape: Any, total: int) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape) or math.prod(shape) != total:
        raise CheckpointError(f"{file}: {_ORIGINAL_SHAPE}{name} is {shape!r}, the tensor has {total:,} numbers.")
    return tuple(shape)


def _check_offsets(file: Path, infos: Mapping[str, TensorInfo], alignment: int, size: int) -> None:
    """Tensors lie at aligned places inside the file and do not overlap. Unused bytes between them do no harm."""
    free, before = 0, ""
    for info in sorted(infos.values(), key=lambda i: i.offset):
        if info.offset % alignment:
            raise CheckpointError(f"{file}: {info.name} does not start at a multiple of {alignment} bytes.", _DOWNLOAD)
        if info.offset < free:
            raise CheckpointError(f"{file}: {info.name} overlaps {before}.", _DOWNLOAD)
        free, before = info.offset + info.nbytes, info.name
        if free > size:
            raise CheckpointError(f"{file}: {info.name} ends at byte {free:,}, the file has {size:,}.", _DOWNLOAD)


def _as_text(value: Any) -> str:
    match value:
        case _LongArray(count=count):
            return f"[{count} elements]"
        case list():
            return json.dumps(value)
        case _:
            return str(value)
