"""Whole GGUF files written, one tensor in memory at a time, and gone on with after an interrupt."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from shared.quant.gguf_file.types import ALIGNMENT, BLOCKS, MAX_DIMENSIONS, PREFIX, packed_bytes, torch_types
from shared.quant.journal import as_json_gives_it_back, checksum, whole_lines, write_line

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A tensor to be written, whose data is asked for when its turn comes.

    dtype: "F32", "F16", "BF16", or "GGUF_Q8_0" and the like. shape: of the numbers, (out, in). load() gives a tensor
    of that type and shape, or the packed bytes (out, bytes per row) as uint8.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


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


def _plain_source(name: str, tensor: Tensor) -> Source:
    names = {dtype: kind for kind, dtype in torch_types().items() if kind in ("F32", "F16", "BF16")}
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
    expected = torch.uint8 if dtype.startswith(PREFIX) else torch_types()[dtype]
    nbytes = packed_bytes(dtype, shape)
    if tensor.dtype != expected or tensor.numel() * tensor.element_size() != nbytes:
        raise ValueError(
            f"{name}: {tensor.dtype} of {tensor.numel() * tensor.element_size():,} bytes came, "
            f"{dtype} {list(shape)} is {expected} of {nbytes:,}"
        )
    array: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
