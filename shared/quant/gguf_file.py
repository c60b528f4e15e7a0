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

import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from shared.quant.checkpoint import Checkpoint, TensorInfo, read_mapped
from shared.quant.errors import CheckpointError
from shared.quant.journal import as_json_gives_it_back, checksum, whole_lines, write_line

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
PREFIX = "GGUF_"  # of TensorInfo.dtype for packed types: "GGUF_Q4_K"

# Number in the file -> name, numbers per block, bytes per block.
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 28: ("F64", 1, 8), 30: ("BF16", 1, 2),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
BLOCKS: Mapping[str, tuple[int, int]] = {name: (numbers, size) for name, numbers, size in TYPES.values()}

# Far above any real file: Qwen3's tokenizer takes 6 MB of header, the largest language models have 2,000 tensors.
MAX_HEADER_BYTES = 64 * 2**20
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 65_535  # the specification's own
MAX_DIMENSIONS = 4  # ggml's own
MAX_ALIGNMENT = 2**16
ALIGNMENT = 32  # of tensors in the files written here
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


def load(infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """Tensors of GGUF files by name, mapped from disk (mapping.py).

    Plain numbers come in their type and shape. Packed matrices come as uint8 (rows, bytes per row), or, where a block
    runs past the end of a row, as (blocks, bytes per block). Other packed tensors are unpacked to float32.
    """
    result: dict[str, Tensor] = {}
    for info in infos:
        data = read_mapped(info)
        if info.stored:
            result[info.name] = _unpack(data, info)
        elif info.dtype.startswith(PREFIX):
            numbers, size = BLOCKS[info.dtype.removeprefix(PREFIX)]
            rows = info.shape[0] if info.shape[-1] % numbers == 0 else info.nbytes // size
            result[info.name] = data.view(rows, -1)
        else:
            result[info.name] = data.view(_torch_types()[info.dtype]).view(info.shape)
    return result


def renamed(checkpoint: Checkpoint, rename: Callable[[str], str]) -> Checkpoint:
    """The same GGUF checkpoint with its tensors called otherwise: they are read by their place, not by their name.

    Raises CheckpointError when two tensors would get one name.
    """
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        new = rename(name)
        if new in tensors:
            raise CheckpointError(f"{checkpoint.path}: two of its tensors stand for {new} (one is {name}).")
        tensors[new] = replace(info, name=new)
    return replace(checkpoint, tensors=tensors)


@dataclass(frozen=True)
class Source:
    """A tensor to be written, whose data is asked for when its turn comes.

    dtype: "F32", "F16", "BF16", or "GGUF_Q8_0" and the like. shape: of the numbers, (out, in). load() gives a tensor
    of that type and shape, or the packed bytes (out, bytes per row) as uint8.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def packed_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a GGUF file; dtype as a Source has it."""
    numbers, size = BLOCKS[dtype.removeprefix(PREFIX)]
    return math.prod(shape) // numbers * size


def write(
    path: Path,
    tensors: Mapping[str, Tensor | Source],
    *,
    architecture: str = "lumina2",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a GGUF file, one tensor in memory at a time; it appears under its name only when it is complete.

    Tensors must be float32, float16 or bfloat16; packed ones are given as a Source (formats/gguf.py makes their
    bytes). Raises what GgufWriter raises; then no file is left.
    """
    sources = {name: t if isinstance(t, Source) else _plain_source(name, t) for name, t in tensors.items()}
    listing = {name: (source.dtype, source.shape) for name, source in sources.items()}
    with GgufWriter(path, listing, architecture=architecture, metadata=metadata) as writer:
        for name, source in sources.items():
            writer.add(name, source.load())
        writer.finish()


class GgufWriter:
    """A context manager: add() each tensor that is not in `finished`, in the listing's order, then finish().

    A journal beside the file (journal.py) lets another run with the same `job` go on after an interrupt or a kill; any
    other failure leaves nothing. Raises ValueError for a tensor that the format cannot hold, OSError for the disk.
    """

    def __init__(
        self,
        path: Path,
        listing: Mapping[str, tuple[str, tuple[int, ...]]],
        *,
        architecture: str = "lumina2",
        metadata: Mapping[str, str] | None = None,
        job: Any = None,
    ) -> None:
        """listing: name -> dtype and shape as a Source has them. architecture: "lumina2" is what other programs know a
        Z-Image transformer by. job: JSON-able, whatever must be the same to go on with an unfinished file; None: never.
        """
        for name, (dtype, shape) in listing.items():
            _check_listed(name, dtype, shape)
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self.journal = path.with_name(f"{path.name}.part.journal")
        self.finished: dict[str, Any] = {}  # name -> the note that add() was given
        self._listing = dict(listing)
        self._header = _header_bytes(path, listing, architecture, dict(metadata or {}))
        self._resumable = job is not None
        self._job = as_json_gives_it_back({"job": job, "header": zlib.crc32(self._header), "names": list(listing)})
        self._streams: list[BinaryIO] = []

    def __enter__(self) -> Self:
        try:
            kept, end = self._resume()
            self._data = self._open(self.part, kept)
            self._log = self._open(self.journal, kept)
            if kept:
                self._log.truncate(kept)
                self._log.seek(kept)
            else:
                write_line(self._log, self._job)
                self._data.write(self._header)
                end = len(self._header)
            self._data.truncate(end)
            self._data.seek(end)
        except OSError:
            self._leave(resumable=False)
            raise
        return self

    def add(self, name: str, tensor: Tensor, note: Any = None) -> None:
        """Write the next tensor: of its listed type, or the packed bytes as uint8. note: JSON-able, for `finished`."""
        data = _bytes_of(name, *self._listing[name], tensor)
        begin = self._data.tell()
        self._data.write(data)
        self._data.write(b"\0" * (-len(data) % ALIGNMENT))
        self._data.flush()
        line = {"name": name, "begin": begin, "end": begin + len(data), "checksum": zlib.crc32(data), "note": note}
        write_line(self._log, line)
        self.finished[name] = note

    def finish(self) -> None:
        """Put the file in its place."""
        self._data.flush()
        os.fsync(self._data.fileno())
        self._data.close()
        os.replace(self.part, self.path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = error is not None and not isinstance(error, Exception)  # Ctrl-C
        self._leave(resumable=self._resumable and interrupted)

    def _leave(self, *, resumable: bool) -> None:
        for stream in self._streams:
            try:
                stream.close()
            except OSError:  # a full disk may refuse what the stream still holds
                resumable = False
        if not resumable:
            for path in (self.part, self.journal):
                path.unlink(missing_ok=True)

    def _open(self, path: Path, kept: int) -> BinaryIO:
        self._streams.append(path.open("r+b" if kept else "wb"))
        return self._streams[-1]

    def _resume(self) -> tuple[int, int]:
        """Take over an earlier run of the same job: bytes of its journal that hold, and where the data go on."""
        if not (self._resumable and self.part.is_file() and self.journal.is_file()):
            return 0, 0
        kept, end = 0, len(self._header)
        with self.part.open("rb") as data:
            if data.read(end) != self._header:
                return 0, 0
            for length, line in whole_lines(self.journal, self._job):
                if kept:
                    data.seek(line["begin"])
                    if checksum(data, line["end"] - line["begin"]) != line["checksum"]:
                        break
                    self.finished[line["name"]] = line["note"]
                    end = line["end"] + -line["end"] % ALIGNMENT
                kept += length
        return kept, end


# ------------------------------------------------------------------------------------------------ reading the header


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


# --------------------------------------------------------------------------------------------------- tensors to bytes


def _torch_types() -> dict[str, Any]:
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    }  # fmt: skip


def _unpack(data: Tensor, info: TensorInfo) -> Tensor:
    import torch

    from shared.quant.packings.gguf import GgufBlocks, is_readable

    if not is_readable(info.stored):
        raise CheckpointError(f"{info.file}: {info.name} is GGUF {info.stored}, which nothing here unpacks.")
    packing = GgufBlocks(info.stored, info.numel)
    return packing.dequantize({"blocks": data.view(1, -1)}, torch.float32).view(info.shape)


def _plain_source(name: str, tensor: Tensor) -> Source:
    names = {dtype: kind for kind, dtype in _torch_types().items() if kind in ("F32", "F16", "BF16")}
    if tensor.dtype not in names:
        raise ValueError(f"{name} is {tensor.dtype}; give packed bytes as a Source, other numbers as float32")
    return Source(names[tensor.dtype], tuple(tensor.shape), lambda: tensor)


def _check_listed(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    kind = dtype.removeprefix(PREFIX)
    if kind not in BLOCKS or (kind in ("F32", "F16", "BF16")) == dtype.startswith(PREFIX):
        raise ValueError(f"{name}: {dtype} is no type of a GGUF file")
    if not 1 <= len(shape) <= MAX_DIMENSIONS or 0 in shape:
        raise ValueError(f"{name}: a GGUF file holds 1 to {MAX_DIMENSIONS} dimensions, not {list(shape)}")
    if shape[-1] % BLOCKS[kind][0]:
        raise ValueError(f"{name}: {kind} needs rows of a multiple of {BLOCKS[kind][0]}, not {shape[-1]}")


def _header_bytes(
    path: Path, listing: Mapping[str, tuple[str, tuple[int, ...]]], architecture: str, metadata: Mapping[str, str]
) -> bytes:
    """Everything before the tensors' bytes, by the gguf package, which writes into files only."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.constants import GGML_QUANT_VERSION

    with TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / path.name, architecture)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for key, value in metadata.items():
            writer.add_string(key, value)
        for name, (dtype, shape) in listing.items():
            kind = dtype.removeprefix(PREFIX)
            size = packed_bytes(dtype, shape)
            writer.add_tensor_info(name, shape, _no_dtype(), size, raw_dtype=GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = (Path(folder) / path.name).read_bytes()
    return header + b"\0" * (-len(header) % ALIGNMENT)


def _no_dtype() -> Any:
    """A numpy type that makes the writer take a shape as it is (uint8 would be taken for packed bytes)."""
    import numpy

    return numpy.dtype(numpy.float32)


def _bytes_of(name: str, dtype: str, shape: tuple[int, ...], tensor: Tensor) -> memoryview:
    import torch

    tensor = tensor.detach()
    expected = torch.uint8 if dtype.startswith(PREFIX) else _torch_types()[dtype]
    nbytes = packed_bytes(dtype, shape)
    if tensor.dtype != expected or tensor.numel() * tensor.element_size() != nbytes:
        raise ValueError(
            f"{name}: {tensor.dtype} of {tensor.numel() * tensor.element_size():,} bytes came, "
            f"{dtype} {list(shape)} is {expected} of {nbytes:,}"
        )
    array: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
