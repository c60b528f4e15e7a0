"""The error-correction LoRA: what rounding took from a packed model's weights, as far as a low rank can give it back.

It is written beside the packed file, in the names that convert_to_quant and ComfyUI use:

    model.safetensors         the packed weights
    model_lora.safetensors    diffusion_model.<layer>.lora_up.weight (N, R), .lora_down.weight (R, K), F32, no alpha

and fits that file alone. With inputs of the layers at hand (inputs.py) it is the outputs' error that the pair is the
best for, column by column; else the weights'. Source: formats.md 4.6, after convert_to_quant's nvfp4_conversion.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shared.quant.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.inputs import Inputs

PREFIX = "diffusion_model."
UP, DOWN = "lora_up.weight", "lora_down.weight"

# Columns whose inputs are smaller than this part of the largest count as this large.
_LEAST_SIZE = 1e-4


class Place(Protocol):
    """Of a packed matrix, see convert/jobs.py."""

    @property
    def module(self) -> str: ...
    @property
    def blocks(self) -> tuple[int, ...]: ...
    @property
    def of(self) -> int: ...
    @property
    def official(self) -> tuple[str, ...]: ...


def path_beside(checkpoint: Path) -> Path:
    """Where the error-correction LoRA of a weights file lies, if it has one."""
    return checkpoint.with_name(f"{checkpoint.stem}_lora.safetensors")


def find_beside(checkpoint: Path) -> Path | None:
    """The error-correction LoRA of a weights file, told by its name and its header.

    Other LoRAs that happen to have the name are not taken for it: it holds nothing but pairs in float32 without
    alphas. Raises CheckpointError when such a file is there and is no weights file.
    """
    path = path_beside(checkpoint)
    if not checkpoint.is_file() or not path.is_file():
        return None
    tensors = Checkpoint.open(path).tensors
    pairs = all(
        name.startswith(PREFIX) and name.endswith((f".{UP}", f".{DOWN}")) and info.dtype == "F32"
        for name, info in tensors.items()
    )
    return path if tensors and pairs else None


def correction(error: Tensor, rank: int, inputs: Inputs | None) -> tuple[Tensor, Tensor]:
    """up (N, R) and down (R, K), float32, whose product makes up best for `error` (N, K) float32."""
    from shared.quant.svdquant import largest_directions

    rank = min(rank, *error.shape)
    if inputs is None or not inputs.rms.any():
        return largest_directions(error, rank)[:2]
    size = inputs.rms.to(error.device)
    size = size.clamp(min=float(size.max()) * _LEAST_SIZE)
    up, down, _ = largest_directions(error * size, rank)
    return up, down / size


def tensors_of(place: Place, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """A pair under the names of the layers whose rows the matrix holds."""
    layers = layers_of(place)
    return {
        f"{PREFIX}{name}.{suffix}": tensor.contiguous()
        for name, rows in zip(layers, up.chunk(len(layers)), strict=True)
        for suffix, tensor in ((DOWN, down), (UP, rows))
    }


def layers_of(place: Place) -> tuple[str, ...]:
    """Official names of the layers that fill a matrix, one for each equal part of its rows, in their order.

    A matrix that is a part of an official layer (q of the fused q, k and v) goes by the name that its file has.
    """
    if len(place.official) == place.of:
        return tuple(place.official[block] for block in place.blocks)
    return place.official if len(place.blocks) == place.of else (place.module,)


def name_room(places: Iterable[Place]) -> tuple[int, int]:
    """How many tensors the LoRA of these matrices has, and how many bytes their names take, for the writer."""
    names = [f"{PREFIX}{name}.{suffix}" for place in places for name in layers_of(place) for suffix in (UP, DOWN)]
    return len(names), sum(len(name.encode()) for name in names)


def metadata(packed: Path, rank: int) -> Mapping[str, str]:
    """The header's metadata: for people, and for tools that show it."""
    return {"format": "pt", "ss_network_dim": str(rank), "error_correction_of": packed.name}
