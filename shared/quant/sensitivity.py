"""Which layer gets which format, under a size: the recipe entry "auto".

Every layer that is to be chosen for is tried in each format, on a sample of its rows (whole in SVDQuant, whose branch
would hold more of a few rows than of all). What counts is the relative error
of its outputs: on inputs it was seen to take, where there are any, else on random ones that are normal and independent,
for which that error is the weight's own. The choice is the one that makes the sum of squared errors of all layers
least: from the smallest format on, the step that buys most for a byte is taken next, for as long as the size allows.
(These are the points of the convex hull that a Lagrange multiplier for the bytes would find.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.quant.convert import Job, Means
    from shared.quant.targets import Target

AUTO = "auto"

# What "auto" chooses among: the formats that can stand in one file, the smallest first. SVDQuant stands alone, and
# takes long to try: it is asked where the others leave layers at 4 bits. GGUF types go into a .gguf file only.
SAFETENSORS_FORMATS = ("nvfp4", "mxfp8", "int8_comfy", "bf16")
SVDQ_FORMATS = ("svdq_int4", "svdq_fp4")
GGUF_FORMATS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16")

_SAMPLED_ROWS = 1024


@dataclass(frozen=True)
class Candidate:
    """A format for a layer. error: relative, of outputs. bytes: of all the layer's tensors in it."""

    format: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Sensitivity:
    """What was found about a layer. name: as recipes have it.

    kurtosis: of its numbers, less 3, which normal numbers have: outliers make it large. peak: the largest over the root
    mean square.
    """

    name: str
    kurtosis: float
    peak: float
    candidates: tuple[Candidate, ...]
    names: tuple[str, ...] = ()  # of all that one matrix holds, where a file stacks several


def probe(job: Job, formats: Mapping[str, Target | None], means: Means) -> Sensitivity:
    """Try the formats (None: plain numbers) on a sample of a job's rows."""
    from shared.quant.convert import sampled

    weight, tries = sampled(job, formats, means, _SAMPLED_ROWS)
    numbers = weight.double().flatten()
    centred = numbers - numbers.mean()
    variance = float(centred.square().mean())
    fourth = float(centred.pow(4).mean())
    rms = float(numbers.square().mean()) ** 0.5
    rows, columns = job.shapes["weight"]
    others = 2 * (job.numbers - rows * columns)  # a bias
    found = tuple(
        Candidate(name, others + bytes_of(name, target, rows, columns, means.rank), tries[name])
        for name, target in formats.items()
    )
    kurtosis = fourth / variance**2 - 3 if variance else 0.0
    peak = float(numbers.abs().max()) / rms if rms else 0.0
    return Sensitivity(job.place.official[0], kurtosis, peak, found, job.place.official)


def bytes_of(name: str, target: Target | None, rows: int, columns: int, rank: int = 0) -> int:
    """Bytes of a matrix in a format; None is plain. Raises UserError for a format that is not counted.

    rank: of the formats that have one; 0 if it is not known.
    """
    if target is None:
        return plain_bytes(name) * rows * columns
    if target.ranked_bytes is not None and rank:
        return target.ranked_bytes(rows, columns, rank)
    if target.bytes is None:
        raise UserError(
            f"The size of {name} layers is not known beforehand, so it cannot stand beside {AUTO}.",
            f"Use {', '.join(SAFETENSORS_FORMATS)}, or GGUF types.",
        )
    return target.bytes(rows, columns)


def plain_bytes(name: str) -> int:
    """Bytes of a number that is not packed, in a format of that name."""
    return 4 if name == "fp32" else 2


def choose(layers: Sequence[Sensitivity], budget: int) -> dict[str, Candidate]:
    """Layer -> its candidate, all together at most `budget` bytes. Raises UserError naming the least that is possible.

    The least sum of squared errors but for the last few bytes, which one step more would overrun.
    """
    chosen = {layer.name: min(layer.candidates, key=lambda c: (c.bytes, c.error)) for layer in layers}
    left = budget - sum(c.bytes for c in chosen.values())
    if left < 0:
        raise UserError(f"The smallest formats take {-left:,} bytes more than there are.", "Allow a larger size.")
    open_layers = {layer.name: layer for layer in layers}
    while open_layers:
        steps = {name: _best_step(chosen[name], layer.candidates) for name, layer in open_layers.items()}
        open_layers = {name: layer for name, layer in open_layers.items() if steps[name] is not None}
        gains = {name: _gain(chosen[name], step) for name, step in steps.items() if step is not None}
        if not gains:
            break
        name = max(gains, key=gains.__getitem__)
        step = steps[name]
        assert step is not None
        if step.bytes - chosen[name].bytes > left:
            del open_layers[name]  # a layer of fewer bytes may still fit
            continue
        left -= step.bytes - chosen[name].bytes
        chosen[name] = step
    return chosen


def _best_step(now: Candidate, candidates: Sequence[Candidate]) -> Candidate | None:
    """Of larger formats with smaller errors the one that gains most for a byte."""
    better = [c for c in candidates if c.bytes > now.bytes and c.error < now.error]
    return max(better, key=lambda c: _gain(now, c), default=None)


def _gain(now: Candidate, step: Candidate) -> float:
    return (now.error**2 - step.error**2) / (step.bytes - now.bytes)
