"""What a network's linears are fed with while it draws: the ground for choosing how to round their weights.

    with InputRecorder(network) as recorder:
        ...                                          # run the network as often as wanted
    found = recorder.inputs("layers.0.attention.qkv")

Shape legend:  K columns (inputs of a linear)   n sampled rows

Of every linear only this is kept, however much is drawn: the root mean square and the largest magnitude of each
column, over everything seen, and a sample of n rows, each row seen having the same chance to be among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

SAMPLE_ROWS = 512  # kept in bfloat16: 0.8 GB for all linears of the 6B model


@dataclass(frozen=True)
class Inputs:
    """What one linear was seen to take. rms, peak: (K,) float32. rows: (n, K) float32, in random order."""

    rms: Tensor
    peak: Tensor
    rows: Tensor

    @property
    def fitting(self) -> Tensor:
        """The half of the rows that choices may be made by."""
        return self.rows[0::2]

    @property
    def judging(self) -> Tensor:
        """The other half, which choices have not seen: for telling how good they are. The only row, if there is one."""
        return self.rows[1::2] if len(self.rows) > 1 else self.rows


@dataclass
class _Seen:
    count: int
    squares: Tensor  # (K,) float64
    peak: Tensor
    rows: Tensor  # (up to n, K) bfloat16
    lots: Tensor  # (up to n,) the numbers drawn for these rows: the largest of all drawn


class InputRecorder:
    """A context manager that watches every linear of `network`. rows: the most that are kept of each linear's."""

    def __init__(self, network: nn.Module, *, rows: int = SAMPLE_ROWS, seed: int = 0) -> None:
        self._network: nn.Module | None = network
        self._rows = rows
        self._generator = torch.Generator().manual_seed(seed)
        self._seen: dict[str, _Seen] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        assert self._network is not None, "it watches once"
        for name, module in self._network.named_modules():
            if isinstance(module, nn.Linear):
                self._handles.append(module.register_forward_pre_hook(self._watch(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._network = None  # what was seen may be kept longer than a network of gigabytes

    def inputs(self, module: str) -> Inputs | None:
        """What the linear of this name took; None if it never ran."""
        seen = self._seen.get(module)
        if seen is None:
            return None
        order = seen.lots.argsort()  # of lots drawn at random: no row tells by its place when it was seen
        return Inputs((seen.squares / seen.count).sqrt().float(), seen.peak, seen.rows[order].float())

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def watch(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._note(name, arguments[0].detach().reshape(-1, arguments[0].shape[-1]))

        return watch

    def _note(self, name: str, x: Tensor) -> None:
        peak = x.abs().amax(dim=0).float().cpu()
        squares = x.float().square().sum(dim=0).double().cpu()
        lots = torch.rand(len(x), generator=self._generator, dtype=torch.float64)
        seen = self._seen.get(name)
        least = float(seen.lots.min()) if seen is not None and len(seen.lots) == self._rows else 0.0
        drawn = (lots >= least).nonzero().flatten()
        rows, lots = x[drawn.to(x.device)].cpu().bfloat16(), lots[drawn]
        if seen is None:
            self._seen[name] = seen = _Seen(0, squares, peak, rows[:0], lots[:0])
        else:
            seen.squares += squares
            seen.peak = torch.maximum(seen.peak, peak)
        seen.count += len(x)
        every_lot = torch.cat([seen.lots, lots])
        kept = every_lot.topk(min(self._rows, len(every_lot))).indices
        seen.rows, seen.lots = torch.cat([seen.rows, rows])[kept], every_lot[kept]
