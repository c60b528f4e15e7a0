"""Run cases: find who does their work, set the device up, keep the records."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.bench import machine
from shared.bench.cases import Case
from shared.bench.measure import Clock, CpuClock, CudaClock, reason_of
from shared.bench.programs import CAPS_GB, PeerProgram, program_cases
from shared.bench.results import Record
from shared.bench.stand import Stand
from shared.bench.streaming import streaming
from shared.quant.errors import UserError

if TYPE_CHECKING:
    import torch

    from shared.app.families import Families

CaseWork = Callable[[Stand], None]

# Beside a family's handler: a package of this name with CASES, case id -> function(stand), STREAMED, a function that
# tells kind of weight -> (bytes of each block, GPU -> milliseconds of computing), and PEER_PROGRAM, PeerProgram's
# fields.
PACKAGE = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """command: as typed, for the record. repeats: in place of what the cases ask for. root: of the code."""

    peers: frozenset[str]
    command: str
    root: Path
    repeats: int | None = None
    folder: Path | None = None  # for large files; None takes the system's
    keep: Callable[[Record], None] = lambda record: None  # given a case's record after each comparison


def find_work(
    families: Families, root: Path, presets: Sequence[str], flags: Sequence[str] = (), caps: Sequence[float] = CAPS_GB
) -> dict[str, CaseWork]:
    """Case id -> the function that does it: those of the whole program, and of families that bring a bench package.

    root: where wgp.py is. presets: the models that the whole program draws with. flags: what it is given besides. caps:
    on GPU memory, 10^9 bytes.
    """
    found = program_cases(root, presets, flags, caps=caps)
    for handler in dict.fromkeys(families.handlers.values()):
        package = f"{handler.__module__.rpartition('.')[0]}.{PACKAGE}"
        if importlib.util.find_spec(package) is not None:
            module = importlib.import_module(package)
            found |= {**module.CASES, "C6": partial(streaming, variants=module.STREAMED())}
            found |= program_cases(root, presets, flags, caps=caps, peer=PeerProgram(**module.PEER_PROGRAM))
    return found


def run_cases(
    cases: Sequence[Case],
    work: Mapping[str, CaseWork],
    options: Options,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Record]:
    """A record for each case, as they are done; an interrupt passes on after the record of what it cut short.

    A case that fails says so in its record and leaves the others their turn; so does everything it measured until then.
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
        device, clock = place(case)
        before = machine.state()
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, _one_thread(), torch.no_grad():
            stand = Stand(
                device=device, clock=clock, peers=options.peers & frozenset(case.peers), folder=Path(folder),
                repeats=options.repeats, tell=tell,
                keep=partial(_keep, case, options, before),
            )  # fmt: skip
            trouble = _trouble(work[case.id], stand)
        yield _record(case, options, stand, before, finished=trouble is None)
        if isinstance(trouble, KeyboardInterrupt):
            raise trouble


def _keep(case: Case, options: Options, before: Mapping[str, Any], stand: Stand) -> None:
    options.keep(_record(case, options, stand, before, finished=False))


def _record(case: Case, options: Options, stand: Stand, before: Mapping[str, Any], *, finished: bool) -> Record:
    return Record(
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
        finished=finished,
    )


def place(case: Case) -> tuple[torch.device, Clock]:
    """Where a case computes, and how its time is taken."""
    import torch

    return (torch.device("cuda"), CudaClock()) if case.needs_gpu else (torch.device("cpu"), CpuClock())


def _trouble(work: CaseWork, stand: Stand) -> BaseException | None:
    """Do the work. Ctrl-C ends it, and so does a failure; what was measured until then is kept."""
    try:
        work(stand)
    except KeyboardInterrupt as interrupt:
        stand.note(f"Interrupted after {len(stand.rows)} figures; the rest was not measured.")
        return interrupt
    except Exception as error:  # noqa: BLE001 - told in the record; minutes on a GPU are not to be lost for one case
        traceback.print_exc()
        reason = reason_of(f"{type(error).__name__}: {error}")
        stand.note(f"Failed after {len(stand.rows)} figures ({reason}); the rest was not measured.")
        return error
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
