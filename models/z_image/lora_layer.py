"""LoRA beside a linear: a forward hook adds what the files on it add, at the strengths of the current step.

The hook asks nothing of the linear but its output, so any weight format and any kernel underneath can carry it, and the
weight is never touched. All low-rank changes of a layer, of however many files, are one product down and one up:

    x (T, in) --down of all files, stacked--> (T, ranks) --* strengths--> --up, for each range of rows--> += output

The up product is done by ranges of rows because our linears are fused: q's ranks reach q's rows only, and a block
diagonal matrix would be two thirds zeros.

DoRA (arXiv 2402.09353) rescales the changed weight: c * (W + D), c = magnitude / norm of (W + D), for each row (peft,
LyCORIS, ComfyUI) or each column (older LyCORIS). The norms need W, which is unpacked once, when the file is put on. At
strength s the layer computes W + s * (c * (W + D) - W), as ComfyUI does: linear in s, so that a change of strength
needs no new norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image.keys import Slot
from models.z_image.lora_changes import ROWS_AT_ONCE, Change, LowRank
from models.z_image.lora_file import Adapter, bias_of, change_of
from shared.ops.upload import upload
from shared.quant.errors import LayerMismatchError

# One number for the whole run, or phases of it, each a list of numbers that is spread over the phase's steps.
Strength = float | Sequence[Sequence[float]]


def per_step(strength: Strength, steps: int) -> list[float]:
    """A strength for each of `steps` steps. Phases share the steps equally, the earlier ones get what is left over.

    Step i of a phase of m takes number floor(i * k / m) of k, as in Wan2GP: a list that is longer loses some.
    """
    if isinstance(strength, (int, float)):
        return [float(strength)] * steps
    ends = [-(-(i + 1) * steps // len(strength)) for i in range(len(strength))]
    result: list[float] = []
    for numbers, end in zip(strength, ends, strict=True):
        length = end - len(result)
        result += [float(numbers[i * len(numbers) // length]) for i in range(length)]
    return result


class Strengths:
    """The strength of each file at the current step, shared by all layers that the files are on."""

    def __init__(self, strengths: Sequence[Strength]) -> None:
        self._steps = 1
        self.now: tuple[float, ...] = ()
        self._scales: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}
        self.set(strengths)

    def set(self, strengths: Sequence[Strength]) -> None:
        """Replace the strengths; the first step's are taken."""
        self._strengths = tuple(strengths)
        self._scales.clear()
        self.begin(self._steps)

    def begin(self, steps: int) -> None:
        """Spread the strengths over a run of `steps` and take the first step's."""
        self._steps = steps
        self._schedules = [per_step(strength, steps) for strength in self._strengths]
        self.set_step(0)

    def set_step(self, step: int) -> bool:
        """Take the strengths of `step`; the last step's for any beyond. Returns whether one changed."""
        before = self.now
        self.now = tuple(schedule[min(step, self._steps - 1)] for schedule in self._schedules)
        return self.now != before

    def scale(self, files: Sequence[int], like: Tensor) -> Tensor | None:
        """(ranks,) the present strength of each rank, whose file is in `files`; None when all are 1. Typed as `like`.

        Until set() the same strengths are the same tensor: recorded GPU work reads it where it lies.
        """
        values = tuple(self.now[file] for file in files)
        if all(value == 1 for value in values):
            return None
        key = values, like.dtype, like.device
        if key not in self._scales:
            self._scales[key] = upload(torch.tensor(values, device="cpu").to(like.dtype), like.device)
        return self._scales[key]


@dataclass(frozen=True)
class Addition:
    """What one adapter adds to rows `row` and following of one linear.

    row_gain (rows,), column_gain (in,): DoRA's c - 1, float32. Where there is one, `change` counts with c on it.
    """

    file: int
    row: int
    rows: int
    change: Change | None = None
    bias: Tensor | None = None
    row_gain: Tensor | None = None
    column_gain: Tensor | None = None

    def dense(self, weight: Callable[[], Tensor], start: int, stop: int) -> Tensor:
        """What is added to rows start to stop (of the addition) of the weight, float32. weight: the linear's."""
        added = 0 if self.change is None else self.change.dense(start, stop)
        if self.row_gain is None and self.column_gain is None:
            return torch.as_tensor(added)
        base = weight()[self.row + start : self.row + stop].float()
        gain = self.column_gain if self.row_gain is None else self.row_gain[start:stop, None]
        assert gain is not None
        return added + gain * (base + added)


def additions(
    path: Path, file: int, slot: Slot, adapter: Adapter, shape: Sequence[int], weight: Callable[[], Tensor]
) -> list[Addition]:
    """An adapter made ready for its slot in a linear of `shape` (out, in). weight: the linear's, for DoRA.

    Raises LayerMismatchError for what does not fit.
    """
    height, columns = shape[0] // slot.of, shape[1]
    rows = height * len(slot.blocks)
    change = change_of(path, adapter, rows, columns)
    bias = bias_of(path, adapter, rows)
    magnitude = adapter.parts.get("magnitude")
    if change is None and bias is None and magnitude is None:
        raise LayerMismatchError(f"{path}: {adapter.module} has nothing but an alpha.", "The file is truncated.")
    runs = [Addition(file, block * height, height) for block in slot.blocks]
    if list(slot.blocks) == list(range(slot.blocks[0], slot.blocks[0] + len(slot.blocks))):
        runs = [Addition(file, slot.blocks[0] * height, rows)]
    ready = []
    at = 0  # in the file's rows
    for run in runs:
        part = slice(at, at + run.rows)
        cut = change if change is None or len(runs) == 1 else change.cut(part.start, part.stop)
        ready.append(replace(run, change=cut, bias=None if bias is None else bias[part]))
        at += run.rows
    return ready if magnitude is None else _decomposed(path, adapter, ready, magnitude.float(), rows, weight())


def _decomposed(
    path: Path, adapter: Adapter, plain: list[Addition], magnitude: Tensor, rows: int, weight: Tensor
) -> list[Addition]:
    """DoRA: the same additions with the gains that `magnitude` asks for."""
    columns = weight.shape[1]
    by_column = magnitude.ndim == 2 and tuple(magnitude.shape) == (1, columns)
    if not by_column and magnitude.numel() != rows:
        raise LayerMismatchError(
            f"{path}: {adapter.module} takes {columns} numbers and gives {rows} here; the file's DoRA magnitude has "
            f"shape {list(magnitude.shape)}.",
            "It is made for another model.",
        )
    squares = torch.cat([_square_sums(addition, weight, by_column) for addition in plain])
    norm = squares.view(-1, columns).sum(0).sqrt() if by_column else squares.sqrt()
    gain = magnitude.flatten() / norm.clamp_min(torch.finfo(torch.float32).tiny) - 1
    if by_column:
        return [replace(addition, column_gain=gain) for addition in plain]
    parts = gain.split([addition.rows for addition in plain])
    return [replace(addition, row_gain=part) for addition, part in zip(plain, parts, strict=True)]


def _square_sums(addition: Addition, weight: Tensor, by_column: bool) -> Tensor:
    """Sums of squares of the changed rows, (rows,); by column (in,). Some rows at a time, to keep little."""
    found = []
    for start in range(0, addition.rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, addition.rows)
        changed = weight[addition.row + start : addition.row + stop].float().cpu()
        if addition.change is not None:
            changed = changed + addition.change.dense(start, stop)
        found.append(changed.square().sum(0 if by_column else 1))
    return torch.stack(found).sum(0) if by_column else torch.cat(found)


class _Up(NamedTuple):
    """The ranks first to last reach the rows row to end."""

    first: int
    last: int
    row: int
    end: int
    matrix_RO: Tensor  # (ranks, rows): the transposed up


@dataclass
class _Ready:
    """The additions in the type and on the device that the layer computes in."""

    down: Tensor | None  # (ranks, in)
    rank_files: list[int]  # the file of each rank
    ups: list[_Up]
    others: list[Addition]
    biases: list[tuple[int, slice, Tensor]]  # file, rows, what is added
    row_gains: list[tuple[int, slice, Tensor]]
    column_gains: list[tuple[int, slice, Tensor]]
    strengths: tuple[float, ...] = ()  # what `scale` was made for
    scale: Tensor | None = None  # (ranks,); None when all are 1


class Branches:
    """Everything that LoRA files add to one linear; called by torch after the linear's forward."""

    def __init__(self, additions: Sequence[Addition], strengths: Strengths) -> None:
        self.additions = tuple(additions)
        self.strengths = strengths
        self._files = sorted({addition.file for addition in additions})
        self._ready: tuple[tuple[torch.device, torch.dtype], _Ready] | None = None

    def __call__(self, linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        now = self.strengths.now
        if not any(now[file] for file in self._files):
            return output
        ready = self._ready_for(output.device, output.dtype)
        x_TI = inputs[0].reshape(-1, inputs[0].shape[-1]).to(output.dtype)
        y_TO = output.reshape(-1, output.shape[-1])
        if ready.row_gains:
            unbiased = y_TO if linear.bias is None else y_TO - linear.bias.to(y_TO)
            added = torch.zeros_like(y_TO)
            for file, rows, gain in ready.row_gains:
                added[:, rows] += unbiased[:, rows] * (now[file] * gain)
            y_TO = y_TO + added
        for file, rows, gain in ready.column_gains:
            again = linear.forward(x_TI * gain)
            again = again if linear.bias is None else again - linear.bias.to(again)
            y_TO[:, rows] += now[file] * again[:, rows]
        for file, rows, bias in ready.biases:
            y_TO[:, rows] += now[file] * bias
        if ready.down is not None:
            h_TR = F.linear(x_TI, ready.down)
            if (scale := self._scale(ready, h_TR)) is not None:
                h_TR *= scale
            for up in ready.ups:
                y_TO[:, up.row : up.end].addmm_(h_TR[:, up.first : up.last], up.matrix_RO)
        for other in ready.others:
            assert other.change is not None
            x = x_TI if other.column_gain is None else x_TI * (1 + other.column_gain)
            added = other.change.apply(x) * now[other.file]
            added = added if other.row_gain is None else added * (1 + other.row_gain)
            y_TO[:, other.row : other.row + other.rows] += added
        return y_TO.view(output.shape)

    def _scale(self, ready: _Ready, like: Tensor) -> Tensor | None:
        now = self.strengths.now
        if ready.strengths != now:
            ready.scale = self.strengths.scale(ready.rank_files, like)
            ready.strengths = now
        return ready.scale

    def _ready_for(self, device: torch.device, dtype: torch.dtype) -> _Ready:
        if self._ready is None or self._ready[0] != (device, dtype):
            self._ready = (device, dtype), _make_ready(self.additions, device, dtype)
        return self._ready[1]


def _make_ready(given: Sequence[Addition], device: torch.device, dtype: torch.dtype) -> _Ready:
    low_rank = [a for a in given if isinstance(a.change, LowRank)]
    low_rank.sort(key=lambda a: (a.row, a.rows))  # same rows side by side: one product serves all files
    downs, ranks, ups = [], [], []
    by_rows: dict[tuple[int, int], list[Tensor]] = {}
    for addition in low_rank:
        change = addition.change
        assert isinstance(change, LowRank)
        up, down = change.up.float() * change.scale, change.down.float()
        up = up if addition.row_gain is None else up * (1 + addition.row_gain[:, None])
        down = down if addition.column_gain is None else down * (1 + addition.column_gain)
        downs.append(down.to(device, dtype))
        ranks += [addition.file] * len(down)
        by_rows.setdefault((addition.row, addition.row + addition.rows), []).append(up.T.to(device, dtype))
    first = 0
    for (row, end), matrices in by_rows.items():
        matrix = torch.cat(matrices)
        ups.append(_Up(first, first + len(matrix), row, end, matrix))
        first += len(matrix)

    def tensors(name: str) -> list[tuple[int, slice, Tensor]]:
        found = [(a, getattr(a, name)) for a in given]
        return [(a.file, slice(a.row, a.row + a.rows), t.to(device, dtype)) for a, t in found if t is not None]

    others = [
        replace(
            a,
            change=a.change.to(device, dtype),
            row_gain=None if a.row_gain is None else a.row_gain.to(device, dtype),
            column_gain=None if a.column_gain is None else a.column_gain.to(device, dtype),
        )
        for a in given
        if a.change is not None and not isinstance(a.change, LowRank)
    ]
    return _Ready(
        torch.cat(downs) if downs else None, ranks, ups, others,
        tensors("bias"), tensors("row_gain"), tensors("column_gain"),
    )  # fmt: skip


class NormBranches:
    """Full differences to a norm's weight; called by torch after the norm's forward, which it does again."""

    def __init__(self, additions: Sequence[tuple[int, Tensor]], strengths: Strengths) -> None:
        self.additions = tuple(additions)  # file, difference (width,)
        self.strengths = strengths

    def __call__(self, norm: nn.RMSNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        now = self.strengths.now
        if not any(now[file] for file, _ in self.additions):
            return output
        weight = norm.weight.float()
        for file, difference in self.additions:
            weight = weight + now[file] * difference.to(weight.device)
        return F.rms_norm(inputs[0], list(weight.shape), weight.to(norm.weight.dtype), norm.eps)
