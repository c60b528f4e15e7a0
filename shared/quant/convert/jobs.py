"""What a conversion is made of: a model's file, the modules of the new one, and what is said of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shared.quant.checkpoint import Checkpoint
from shared.quant.layer_plan import Part, Plan
from shared.quant.targets import Naming, Target

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.inputs import Inputs


@dataclass(frozen=True)
class Place:
    """A module of the new file: our module's row blocks `blocks`, in that order, of `of` equal ones.

    official: what recipes call the rows.
    """

    module: str
    blocks: tuple[int, ...]
    of: int
    official: tuple[str, ...]


class Places(Protocol):
    def __call__(self, module: str, naming: Naming, *, packed: bool) -> tuple[Place, ...]:
        """Where a file of this naming keeps our module; packed: whether it will be."""


class Merge(Protocol):
    """A LoRA that is to become part of the weights."""

    @property
    def modules(self) -> Collection[str]:
        """Ours, whose parameters it changes."""

    def delta(self, module: str, suffix: str, base: Callable[[], Tensor]) -> Tensor | None:
        """What it adds to one of our parameters, float32, whole; None for nothing. base: the module's weight."""


@dataclass(frozen=True)
class Model:
    """A model's file, and what its family says of it. shapes: our module -> suffix -> shape. config: for the header.

    merges: added to the weights on the way.
    """

    checkpoint: Checkpoint
    plan: Plan
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    config: Mapping[str, Any]
    places: Places
    merges: Sequence[Merge] = ()


@dataclass(frozen=True)
class Job:
    """A module of the new file and how it is made. shapes: suffix -> shape; the suffix "" is a bare parameter.

    source: our module whose rows it holds.
    """

    source: str
    place: Place
    parts: Sequence[Part]
    shapes: Mapping[str, tuple[int, ...]]
    format: str
    target: Target | None  # None: plain numbers
    merges: Sequence[Merge] = ()

    @property
    def numbers(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class LayerReport:
    """How a matrix came out. relative_error: norm of what the format changed over the norm of the weight.

    output_error: the same of its outputs, for inputs it was seen to take; None without calibration.
    corrected_error, corrected_output_error: both with the error-correction LoRA; None without.
    """

    module: str
    format: str
    shape: tuple[int, ...]
    bytes: int
    relative_error: float
    output_error: float | None = None
    corrected_error: float | None = None
    corrected_output_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Means:
    """How matrices are packed, besides their formats.

    rank: of SVDQ's branch. inputs: what one of our modules was seen to take, None where nothing is known.
    learned_rounding: see rounding.py; for formats that offer it. error_lora_rank: 0 for none.
    """

    rank: int
    inputs: Callable[[str], Inputs | None] = lambda _module: None
    learned_rounding: bool = False
    error_lora_rank: int = 0


@dataclass(frozen=True)
class Conversion:
    """All modules of a new file, in its order, and which names it uses."""

    source: Path
    jobs: tuple[Job, ...]
    naming: Naming

    @property
    def numbers(self) -> int:
        return sum(job.numbers for job in self.jobs)

    @property
    def formats(self) -> dict[str, str]:
        """Packed module -> format."""
        return {job.place.module: job.format for job in self.jobs if job.target}

    @property
    def has_rank(self) -> bool:
        return any(job.target and job.target.has_rank for job in self.jobs)


# Numbers done, numbers in all, the module that comes next.
OnProgress = Callable[[int, int, str], None]


def tensor_name(module: str, suffix: str) -> str:
    """A tensor's name; the suffix "" is for a bare parameter."""
    return f"{module}.{suffix}" if suffix else module
