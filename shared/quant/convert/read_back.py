"""What a format's own reader makes of a new layer's tensors, and how far that is from the weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.quant import gguf_file
from shared.quant.checkpoint import Checkpoint, TensorInfo
from shared.quant.convert.jobs import Job, tensor_name
from shared.quant.formats import Layer, format_of, layers_of, read_checked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.inputs import Inputs

_ROWS_AT_ONCE = 1024  # compared together: a whole matrix in float32 twice would take most of a gigabyte


def errors_of(
    weight: Tensor,
    made: Mapping[str, Tensor],
    job: Job,
    inputs: Inputs | None,
    pair: tuple[Tensor, Tensor] | None = None,
) -> tuple[float, float | None]:
    """Relative errors of the weight and of its outputs (None without inputs), with a correcting pair if given."""
    changed = whole = outputs_changed = outputs = 0.0
    rows = None if inputs is None else inputs.judging
    for start, wanted, found in _read_back(weight, made, job):
        if pair is not None:
            found = found.addmm(pair[0][start : start + len(found)], pair[1])
        found -= wanted
        changed += float(found.square().sum(dtype=_double()))
        whole += float(wanted.square().sum(dtype=_double()))
        if rows is not None:
            outputs_changed += float((rows @ found.t()).square().sum(dtype=_double()))
            outputs += float((rows @ wanted.t()).square().sum(dtype=_double()))
    of_outputs = None if rows is None else _relative(outputs_changed, outputs)
    return _relative(changed, whole), of_outputs


def missing(weight: Tensor, made: Mapping[str, Tensor], job: Job) -> Tensor:
    """(N, K) float32: what the format took from the weight."""
    import torch

    return torch.cat([wanted - found for _, wanted, found in _read_back(weight, made, job)])


def _read_back(weight: Tensor, made: Mapping[str, Tensor], job: Job) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, rows of the weight, and what the format's own reader makes of the tensors; float32, new memory."""
    layer = _layer_of(made, job)
    reader = format_of(layer)
    packed = read_checked(reader, layer) if reader else None
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(weight))
        wanted = weight[start:stop].float()
        if packed:
            yield start, wanted, packed.take_rows(start, stop).dequantize(wanted.dtype)
        else:
            yield start, wanted, made["weight"][start:stop].to(wanted.dtype, copy=True)


def _relative(changed: float, whole: float) -> float:
    return float((changed / whole) ** 0.5) if whole else 0.0


@dataclass(frozen=True)
class _InMemory(Checkpoint):
    """Tensors that are on their way to a file, as their format's reader wants to see them."""

    data: Mapping[str, Tensor]

    def load(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        return {name: self.data[name] for name in (self.data if names is None else names)}

    def read_bytes(self, name: str) -> bytes:
        import torch

        return bytes(self.data[name].contiguous().flatten().view(torch.uint8).tolist())


def _layer_of(made: Mapping[str, Tensor], job: Job) -> Layer:
    from shared.quant.safetensors_writer import dtype_name

    module = job.place.module
    path = Path(module)
    infos: dict[str, TensorInfo] = {}
    for suffix, tensor in made.items():
        dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
        if job.target and job.target.gguf:
            dtype, shape = f"{gguf_file.PREFIX}{job.target.gguf}", job.shapes[suffix]
        name = tensor_name(module, suffix)
        infos[name] = TensorInfo(name, dtype, shape, tensor.numel() * tensor.element_size(), path, 0)
    data = {tensor_name(module, suffix): tensor for suffix, tensor in made.items()}
    checkpoint = _InMemory(path, (path,), infos, {}, data)
    return layers_of(checkpoint, infos)[module]


def _double() -> torch.dtype:
    import torch

    return torch.float64
