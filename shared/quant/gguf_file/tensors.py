"""Tensors of GGUF files, mapped from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from shared.quant.checkpoint import Checkpoint, TensorInfo, read_mapped
from shared.quant.errors import CheckpointError
from shared.quant.gguf_file.types import BLOCKS, PREFIX, torch_types
from shared.quant.mapping import OpenFile

if TYPE_CHECKING:
    from torch import Tensor


def load(source: OpenFile, infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """Tensors of a GGUF file by name, mapped from disk (mapping.py).

    Plain numbers come in their type and shape. Packed matrices come as uint8 (rows, bytes per row), or, where a block
    runs past the end of a row, as (blocks, bytes per block). Other packed tensors are unpacked to float32.
    """
    result: dict[str, Tensor] = {}
    for info in infos:
        data = read_mapped(source, info)
        if info.stored:
            result[info.name] = _unpack(data, info)
        elif info.dtype.startswith(PREFIX):
            numbers, size = BLOCKS[info.dtype.removeprefix(PREFIX)]
            rows = info.shape[0] if info.shape[-1] % numbers == 0 else info.nbytes // size
            result[info.name] = data.view(rows, -1)
        else:
            result[info.name] = data.view(torch_types()[info.dtype]).view(info.shape)
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


def _unpack(data: Tensor, info: TensorInfo) -> Tensor:
    import torch

    from shared.quant.packings.gguf import GgufBlocks, is_readable

    if not is_readable(info.stored):
        raise CheckpointError(f"{info.file}: {info.name} is GGUF {info.stored}, which nothing here unpacks.")
    packing = GgufBlocks(info.stored, info.numel)
    return packing.dequantize({"blocks": data.view(1, -1)}, torch.float32).view(info.shape)
