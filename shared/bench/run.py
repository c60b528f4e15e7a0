"""Run cases: find who does their work, set the device up, keep the records."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.bench import machine
from shared.bench.cases import Case
from shared.bench.measure import Clock, CpuClock, CudaClock
from shared.bench.programs import program_cases
from shared.bench.results import Record
from shared.bench.stand import Stand
from shared.bench.streaming import streaming
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.families import Families

CaseWork = Callable[[Stand], None]

# Beside a family's handler: a package of this name with CASES, case id -> function(stand), and STREAMED, a function
# that tells kind of weight -> (bytes of each block, GPU -> milliseconds of computing).
PACKAGE = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """command: as typed, for the record. repeats: in place of what the cases ask for. root: of the code."""

    peers: frozenset[str]
    command: str
    root: Path
    repeats: int | None = None
    folder: Path | None = None  # for large files; None takes the system's


def find_work(families: Families, root: Path, presets: Sequence[str], flags: Sequence[str] = ()) -> dict[str, CaseWork]:
    """Case id -> the function that does it: those of the whole program, and of families that bring a bench package.

    root: where wgp.py is. presets: the models that the whole program draws with. flags: what it is given besides.
    """
    found = program_cases(root, presets, flags)
    for handler in dict.fromkeys(families.handlers.values()):
        package = f"{handler.__module__.rpartition('.')[0]}.{PACKAGE}"
        if importlib.util.find_spec(package) is not None:
            module = importlib.import_module(package)
            found |= {**module.CASES, "C6": partial(streaming, variants=module.STREAMED())}
    return found


def run_cases(
    cases: Sequence[Case],
    work: Mapping[str, CaseWork],
    options: Options,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Record]:
    """A record for each case, as they are done; an interrupt passes on after the record of what it cut short.

    Raises UserError before the first when one cannot be run here.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if refused := [case.id for case in cases if case.needs_gpu and not has_gpu]:
        raise UserError(
            f"{', '.join(refused)} need{'s' if len(refused) == 1 else ''} an NVIDIA GPU, and there is none here.",
            "C* runs on every machine.",
        )
    if missing := [case.id for case in cases if case.id not in work]:
        raise UserError(f"No model family here can run {', '.join(missing)}.")
    for case in cases:
        tell(f"{case.id}: {case.what}")
        device = torch.device("cuda" if case.needs_gpu else "cpu")
        clock: Clock = CudaClock() if case.needs_gpu else CpuClock()
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, _one_thread(), torch.no_grad():
            stand = Stand(
                device=device, clock=clock, peers=options.peers & frozenset(case.peers), folder=Path(folder),
                repeats=options.repeats, tell=tell,
            )  # fmt: skip
            before = machine.state()
            interrupt = _interrupted(work[case.id], stand)
        yield Record(
            case=case.id,
            date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            commit=machine.commit(options.root),
            command=options.command,
            how=stand.how,
            versions=machine.versions(),
            before=before,
            after=machine.state(),
            notes=tuple(stand.notes),
            rows=tuple(stand.rows),
        )
        if interrupt is not None:
            raise interrupt


def _interrupted(work: CaseWork, stand: Stand) -> KeyboardInterrupt | None:
    """Do the work; Ctrl-C ends it, and what was measured until then is kept."""
    try:
        work(stand)
    except KeyboardInterrupt as interrupt:
        stand.note(f"Interrupted after {len(stand.rows)} figures; the rest was not measured.")
        return interrupt
    return None


@contextmanager
def _one_thread() -> Iterator[Any]:
    """Timings of several threads on a shared machine differ a hundredfold; those of one by a few percent."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
