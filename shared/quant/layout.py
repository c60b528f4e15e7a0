"""Where a new model's tensors go: one file, several files with an index, or a file that holds other models as well.

    model.safetensors                                               one file
    model-00001-of-00002.safetensors, ..., model.safetensors.index.json        --shard-size; the names of transformers
    model.diffusion_model.*, text_encoders.*, vae.* in one file                ComfyUI's all-in-one checkpoint

Which group of tensors (a layer is a group) goes into which shard is settled before anything is written, from the most
bytes that each may take, so that an interrupted run goes on with the same files.
"""

from __future__ import annotations

import json
import os
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shared.quant.checkpoint import INDEX_SUFFIX, Checkpoint
from shared.quant.errors import RunError
from shared.quant.safetensors_writer import SafetensorsWriter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Carried:
    """A tensor that goes along as it is. name: in the new file. original: in the checkpoint it comes from."""

    name: str
    checkpoint: Checkpoint
    original: str

    @property
    def nbytes(self) -> int:
        return self.checkpoint.tensors[self.original].nbytes

    def load(self) -> Tensor:
        return self.checkpoint.load([self.original])[self.original]


@dataclass(frozen=True)
class Layout:
    """shard_bytes: of the tensors in one file, about; 0 for one file of any size. prefix: of the model's own names."""

    shard_bytes: int = 0
    prefix: str = ""
    carried: tuple[Carried, ...] = ()

    def files(self, output: Path, groups: Mapping[str, int]) -> dict[Path, list[str]]:
        """Each file of the new model and the groups it holds, in order. groups: name -> the most bytes it may take."""
        shards: list[list[str]] = [[]]
        room = self.shard_bytes
        for group, nbytes in groups.items():
            if self.shard_bytes and nbytes > room and shards[-1]:
                shards.append([])
                room = self.shard_bytes
            shards[-1].append(group)
            room -= nbytes
        if len(shards) == 1:
            return {output: shards[0]}
        names = (f"{output.stem}-{n:05}-of-{len(shards):05}{output.suffix}" for n in range(1, len(shards) + 1))
        return dict(zip(map(output.with_name, names), shards, strict=True))


def opened(output: Path, files: Collection[Path]) -> Path:
    """What is to be opened of a model in these files: the file itself, or the index of several."""
    return output if len(files) == 1 else output.with_name(f"{output.stem}{INDEX_SUFFIX}")


class ShardedWriter:
    """Several SafetensorsWriters as one, and the index of what they wrote. All files appear when all are complete."""

    def __init__(
        self,
        output: Path,
        files: Mapping[Path, Sequence[str]],
        *,
        names: int,
        name_bytes: int,
        metadata: Mapping[str, str],
        job: Any,
    ) -> None:
        """files: see Layout.files(). names, name_bytes, metadata, job: as for SafetensorsWriter, for each of them."""
        self.index = opened(output, files)
        self._writers = [
            SafetensorsWriter(
                path, names=names, name_bytes=name_bytes, metadata=metadata, job=[job, number, len(files)]
            )
            for number, path in enumerate(files)
        ]
        groups = zip(self._writers, files.values(), strict=True)
        self._owner = {group: writer for writer, owned in groups for group in owned}
        self._stack = ExitStack()
        self.finished = ChainMap(*(writer.finished for writer in self._writers))

    def __enter__(self) -> Self:
        for writer in self._writers:
            self._stack.enter_context(writer)
        return self

    def add(self, group: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Write a group's tensors by name. note: JSON-able, kept in `finished`."""
        self._owner[group].add(group, tensors, note)

    def finish(self) -> int:
        """Complete the files, then write their index. Returns the bytes of all files but the index."""
        total = sum(writer.finish() for writer in self._writers)
        entries = {writer.path.name: writer.entries for writer in self._writers}
        tensor_bytes = sum(e["data_offsets"][1] - e["data_offsets"][0] for f in entries.values() for e in f.values())
        weight_map = {name: file for file, found in entries.items() for name in found}
        text = json.dumps({"metadata": {"total_size": tensor_bytes}, "weight_map": weight_map}, indent=2)
        part = self.index.with_name(f"{self.index.name}.part")
        try:
            part.write_text(text + "\n", encoding="utf-8")
            os.replace(part, self.index)
        except OSError as error:
            raise RunError(
                f"{self.index} could not be written: {error.strerror or error}.",
                "Look at the free space and the permissions there.",
            ) from error
        return total

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
