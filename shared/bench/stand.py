"""The stand that a family's case function is given: it compares, counts and keeps what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.bench.counters import Counts, count
from shared.bench.measure import MANY, Clock, interleave
from shared.bench.results import Row, Value

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Stand:
    """One case's workplace.

    device: where to compute. peers: keys of cases.PEERS that may be run. folder: for files, emptied afterwards.
    repeats: of every row, None if each has its own. rows, notes: what came out so far. how: the way figures were taken,
    in words; a case that has its own sets it.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        clock: Clock,
        peers: frozenset[str],
        folder: Path,
        repeats: int | None = None,
        tell: Callable[[str], None] = lambda text: None,
        keep: Callable[[Stand], None] = lambda stand: None,
    ) -> None:
        """repeats: for all rows, in place of what they ask for. keep: called when there is more to keep."""
        self.device, self.clock, self.peers, self.folder = device, clock, peers, folder
        self.how = clock.how
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.repeats, self._tell, self._keep = repeats, tell, keep

    def compare(
        self,
        row: str,
        contenders: Mapping[str, Callable[[], Any]],
        *,
        reference: Tensor | str | None = None,
        repeats: int = MANY,
        facts: Mapping[str, Mapping[str, Value]] | None = None,
        memory: bool = False,
        pictures: bool = False,
    ) -> dict[str, float]:
        """Time contenders in turns and keep a row for each, with its error against `reference` where that is given.

        contenders: who -> a call that returns its result, a tensor shaped like the reference, or nothing to compare.
        reference: what the result should be, or whose result is taken for it, where that one takes part.
        Peers that this run leaves out (by their key, before the first blank) are passed over. facts: who -> further
        values. memory: keep `peak_mb`, too, the most that a call takes on the GPU beyond what was taken before (10^6
        bytes). pictures: results are pictures (B, 3, H, W) in [-1, 1]; keep `ssim` and `psnr` of the first in 8 bits.
        A contender that fails has a row with its reason under `outcome`. Returns who -> the milliseconds that
        count, of those that did not.
        """
        taken = {who: work for who, work in contenders.items() if self.wants(who)}
        self._tell(f"{row}: {', '.join(taken)}")
        peaks: dict[str, float] = {}
        if memory and self.device.type == "cuda":
            taken = {who: _watched(who, work, peaks) for who, work in taken.items()}
        found = interleave(taken, self.clock, repeats=self.repeats or repeats)
        if isinstance(reference, str):
            reference = found.results.get(reference)
        for who in taken:
            values: dict[str, Value] = {}
            if who in found.failures:
                self._tell(f"{row}: {who} failed, {found.failures[who]}")
                values["outcome"] = found.failures[who]
            else:
                values |= found.timings[who].values(self.clock.headline)
                if reference is not None and found.results[who] is not None:
                    values["error"] = float(f"{relative_error(found.results[who], reference):.3g}")
                    if pictures:
                        values |= _likeness(found.results[who], reference)
                if who in peaks:
                    values["peak_mb"] = peaks[who]
            self.rows.append(Row(row, who, values | dict((facts or {}).get(who, {}))))
        self._keep(self)
        return {who: getattr(timing, self.clock.headline) for who, timing in found.timings.items()}

    def record(self, row: str, who: str, values: Mapping[str, Value]) -> None:
        """Keep what was measured otherwise."""
        self.rows.append(Row(row, who, dict(values)))
        self._keep(self)

    def count(self, work: Callable[[], Any]) -> Counts:
        return count(work)

    def wants(self, who: str) -> bool:
        """Whether a contender is one of ours or a peer of this run."""
        key = who.split()[0]
        return not (key[:1] == "P" and key[1:].isdigit()) or key in self.peers

    def note(self, text: str) -> None:
        """Keep a sentence about the run, such as why a contender is missing."""
        self._tell(text)
        self.notes.append(text)


def _watched(who: str, work: Callable[[], Any], peaks: dict[str, float]) -> Callable[[], Any]:
    """The same work, its first two calls measured; the second counts, as the first makes what is kept afterwards."""
    import torch

    calls = 0

    def watched() -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            return work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        peaks[who] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
        return result

    return watched


# Decibels of pictures that are equal, for which there is no number.
_EQUAL = 99.0


def _likeness(picture: Tensor, reference: Tensor) -> dict[str, Value]:
    from shared.app.picture_metrics import psnr, ssim

    first, second = (
        ((some[0].detach().float().cpu().permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        for some in (picture, reference)
    )
    return {"ssim": round(ssim(first, second), 5), "psnr": round(min(psnr(first, second), _EQUAL), 2)}


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference, in float32 on the CPU."""
    found, reference = found.detach().float().cpu(), reference.detach().float().cpu()
    return float((found - reference).norm() / reference.norm())
