"""Write a safetensors file group by group (a layer is a group), never holding more than one, and go on after a kill.

    OUT.part            8 bytes, room for the header (spaces), then the tensors' bytes back to back
    OUT.part.journal    JSON lines: what is being written, then a line with a checksum for each group that is written

The header's final text is known only at the end, so room for it is reserved; a header may end in spaces. mmgp reads
offsets as a running sum in the header's order, so entries are listed in the order of their data, without gaps, and no
tensor may be padded. Others want numbers aligned to their size. Both hold because tensors whose size is no multiple of
eight bytes, all of them tiny (scalars, markers), wait in the journal and are written last, widest numbers first.

A second run with the same `job` takes up after the last group that is whole. Nothing waits for the disk in between:
after a power cut the checksums say which groups reached it. OUT itself appears in one step (fsync, rename) when
everything is in it.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from shared.quant.errors import RunError
from shared.quant.journal import as_json_gives_it_back, checksum, whole_lines, write_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALIGNMENT = 8  # bytes of the widest number in use


class SafetensorsWriter:
    """A context manager: add() groups that are not in `finished`, then finish().

    Left without finish(), nothing appears at `path`. The part and its journal stay only after an interrupt, for
    another run to take up; any other failure removes them. Raises RunError when the disk refuses.
    """

    def __init__(self, path: Path, *, names: int, name_bytes: int, metadata: Mapping[str, str], job: Any) -> None:
        """names, name_bytes: most tensors that will be added, and the bytes of their names together: for the room.

        job: JSON-able, whatever must be the same for an unfinished part to be worth going on with.
        """
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self.journal = path.with_name(f"{path.name}.part.journal")
        self.finished: dict[str, Any] = {}  # group -> the note that add() was given
        self._metadata = dict(metadata)
        self._start = header_bytes(names, name_bytes, self._metadata)
        self._job = as_json_gives_it_back({"job": job, "start": self._start})
        self._entries: dict[str, dict[str, Any]] = {}
        self._small: dict[str, dict[str, Any]] = {}
        self._end = 0  # of the data so far
        self._streams: list[BinaryIO] = []

    @property
    def entries(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> dtype, shape and data_offsets of what is in the file; of everything once it is finished."""
        return self._entries

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = self._resume()
            self._data = self._open(self.part, kept)
            self._log = self._open(self.journal, kept)
            if kept:
                self._log.truncate(kept)
                self._log.seek(kept)
            else:
                write_line(self._log, self._job)
                self._data.write(b" " * self._start)
            self._data.truncate(self._start + self._end)
            self._data.seek(self._start + self._end)
        except OSError as error:
            self._close()
            self._remove()
            raise self._refused(error) from error
        return self

    def add(self, group: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Write a group's tensors by name. note: JSON-able, kept in `finished`."""
        begin, checked = self._end, 0
        entries: dict[str, dict[str, Any]] = {}
        small: dict[str, dict[str, Any]] = {}
        try:
            for name, tensor in tensors.items():
                data = _bytes_of(tensor)
                entry: dict[str, Any] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
                if len(data) % ALIGNMENT:
                    width = tensor.element_size()
                    small[name] = {**entry, "width": width, "data": base64.b64encode(data).decode()}
                    continue
                checked = zlib.crc32(data, checked)
                entries[name] = self._append(entry, data)
            self._data.flush()
            line = {"group": group, "begin": begin, "end": self._end, "checksum": checked}
            line |= {"tensors": entries, "small": small, "note": note}
            write_line(self._log, line)
        except OSError as error:
            raise self._refused(error) from error
        self._take(line)

    def finish(self) -> int:
        """Write what waits, and the header; put the file in its place. Returns its size in bytes."""
        try:
            for name, kept in sorted(self._small.items(), key=lambda item: -item[1]["width"]):
                entry = {"dtype": kept["dtype"], "shape": kept["shape"]}
                self._entries[name] = self._append(entry, base64.b64decode(kept["data"]))
            header = {"__metadata__": self._metadata, **self._entries} if self._metadata else self._entries
            text = json.dumps(header, separators=(",", ":")).encode()
            if 8 + len(text) > self._start:
                raise ValueError(f"the header takes {len(text)} bytes, {self._start - 8} are reserved")
            self._data.seek(0)
            self._data.write(struct.pack("<Q", self._start - 8) + text)
            self._data.flush()
            os.fsync(self._data.fileno())
            self._data.close()
            os.replace(self.part, self.path)
        except OSError as error:
            raise self._refused(error) from error
        return self._start + self._end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        resumable = error is not None and not isinstance(error, Exception)  # Ctrl-C
        if not self._close() or not resumable:
            self._remove()

    def _open(self, path: Path, kept: int) -> BinaryIO:
        self._streams.append(path.open("r+b" if kept else "wb"))
        return self._streams[-1]

    def _close(self) -> bool:
        """Whether both streams closed well: a full disk may refuse what they still hold."""
        well = True
        for stream in self._streams:
            try:
                stream.close()
            except OSError:
                well = False
        return well

    def _append(self, entry: dict[str, Any], data: memoryview | bytes) -> dict[str, Any]:
        self._data.write(data)
        begin, self._end = self._end, self._end + len(data)
        return {**entry, "data_offsets": [begin, self._end]}

    def _take(self, line: Mapping[str, Any]) -> None:
        self._entries.update(line["tensors"])
        self._small.update(line["small"])
        self._end = line["end"]
        self.finished[line["group"]] = line["note"]

    def _resume(self) -> int:
        """Take over what an earlier run of the same job has on disk; bytes of its journal that hold, 0 for none."""
        if not (self.part.is_file() and self.journal.is_file()):
            return 0
        kept = 0
        with self.part.open("rb") as data:
            for length, line in whole_lines(self.journal, self._job):
                if kept:
                    data.seek(self._start + line["begin"])
                    if checksum(data, line["end"] - line["begin"]) != line["checksum"]:
                        break
                    self._take(line)
                kept += length
        return kept

    def _refused(self, error: OSError) -> RunError:
        return RunError(
            f"{self.path} could not be written: {error.strerror or error}.",
            "Look at the free space and the permissions there.",
        )

    def _remove(self) -> None:
        for path in (self.part, self.journal):
            with suppress(OSError):  # not there, or in a folder that could not be made
                path.unlink()


def header_bytes(names: int, name_bytes: int, metadata: Mapping[str, str]) -> int:
    """What precedes the data of a file that is written here: the room that is reserved for its header."""
    # dtype, two sizes, two offsets and the punctuation of an entry take at most 120 bytes.
    room = len(json.dumps({"__metadata__": dict(metadata)})) + name_bytes + 120 * names
    return 8 + room + -room % ALIGNMENT


def dtype_name(dtype: torch.dtype) -> str:
    """How a safetensors header calls a type. Raises KeyError for one that it has no name for."""
    import torch

    return {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
        torch.bool: "BOOL",
    }[dtype]  # fmt: skip


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
