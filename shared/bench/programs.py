"""The whole program in a process of its own: what a person waits for, imports, loading and all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.bench.process_memory import PeakMemory
from shared.bench.stand import Stand

if TYPE_CHECKING:
    from shared.bench.run import CaseWork

PROMPT = "a lighthouse on a cliff at dusk, waves below, a small boat with a red sail"
CAPS_GB = (24, 16, 12, 8, 6, 4, 3, 2)
# Who moves the weights under a cap: the program's own choice, then each by name.
ENGINES = ("auto", "stream", "mmgp")
_OURS = {"auto": "ours", "stream": "ours streamed", "mmgp": "P6"}
_RUNS = 2
_HOW = f"a fresh process each time, least of {_RUNS}; page cache warm from the first"
_TIMEOUT = 3600  # seconds

# Steps of the short and of the whole picture on a CPU: what lies between them is forwards and nothing else.
_FEW, _ALL = 2, 8
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def program_cases(root: Path, presets: Sequence[str], flags: Sequence[str] = ()) -> dict[str, CaseWork]:
    """Case id -> function(stand). root: where wgp.py is. flags: for wgp.py, such as where its models are."""
    cases = {"B5": _capped, "B6": _cold, "C4": _on_cpu}
    return {case: partial(work, root=root, presets=presets, flags=flags) for case, work in cases.items()}


def _on_cpu(stand: Stand, *, root: Path, presets: Sequence[str], flags: Sequence[str]) -> None:
    """Few forwards and many, the prompt read each time; from the two, what a forward takes."""
    stand.how = (
        f"a fresh process of one thread each time, least CPU time of {_RUNS}; page cache warm; "
        f"the CPU time of forwards by the difference of {_ALL} and {_FEW}"
    )
    flags = ["--gpu", "cpu", "--prompt-cache", "0", *flags]
    for preset in presets:
        found: dict[int, dict[str, float] | None] = {}
        try:
            for steps in (_FEW, _ALL):
                row = f"{preset}, 256x256, {steps} forwards"
                found[steps] = _draw(stand, row, root, preset, "256x256", steps, flags, by="cpu")
        finally:  # an interrupt leaves what was measured
            few, many = found.get(_FEW), found.get(_ALL)
            for steps, values in found.items():
                if values is not None:
                    if few is not None and many is not None:
                        each = (many["cpu_seconds"] - few["cpu_seconds"]) / (_ALL - _FEW)
                        values |= {"forwards_cpu_seconds": round(each * steps, 2)}
                    stand.record(f"{preset}, 256x256, {steps} forwards", "ours", values)


def _cold(stand: Stand, *, root: Path, presets: Sequence[str], flags: Sequence[str]) -> None:
    stand.how = _HOW
    for preset in presets:
        _measure(stand, f"{preset}, 1024x1024", root, preset, ["--gpu", "cuda", *flags])


def _capped(stand: Stand, *, root: Path, presets: Sequence[str], flags: Sequence[str]) -> None:
    stand.how = _HOW
    for preset in presets:
        _measure(stand, f"{preset}, no cap", root, preset, ["--gpu", "cuda", *flags])
        for cap in CAPS_GB:
            for engine in (engine for engine in ENGINES if stand.wants(_OURS[engine])):
                given = ["--gpu", "cuda", "--max-vram", f"{cap}GB", "--offload", engine, *flags]
                _measure(stand, f"{preset}, {cap} GB", root, preset, given, who=_OURS[engine])


def _measure(stand: Stand, row: str, root: Path, preset: str, flags: Sequence[str], who: str = "ours") -> None:
    values = _draw(stand, row, root, preset, "1024x1024", 8, flags, by="wall", who=who)
    if values is not None:
        stand.record(row, who, values)


def _draw(
    stand: Stand,
    row: str,
    root: Path,
    preset: str,
    resolution: str,
    steps: int,
    flags: Sequence[str],
    *,
    by: str,
    who: str = "ours",
) -> dict[str, float] | None:
    """Draw one picture as often as it takes; the values of the quickest by that clock, or a note and None.

    The most memory of all runs counts, not of the quickest.
    """
    command = [
        sys.executable, "wgp.py", "generate", PROMPT, "--preset", preset, "--resolution", resolution,
        "--steps", str(steps), "--seed", "0", "--json", "--output", str(stand.folder / "picture.png"), *flags,
    ]  # fmt: skip
    environment = {**os.environ, **(_ONE_THREAD if by == "cpu" else {})}
    runs = []
    for _ in range(_RUNS):
        began, cpu = time.perf_counter(), _children_seconds()
        with (
            subprocess.Popen(
                command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as process,
            PeakMemory(process.pid, every=0.02) as peak,
        ):
            try:
                output, errors = process.communicate(timeout=_TIMEOUT)
            except BaseException:
                process.kill()
                raise
        wall, cpu = time.perf_counter() - began, _children_seconds() - cpu
        if process.returncode:
            why = (errors.strip() or "no reason given").splitlines()
            stand.note(f"{row}{'' if who == 'ours' else f', {who}'}: not drawn ({why[-1]}).")
            return None
        runs.append(_values(json.loads(output.strip().splitlines()[-1]), wall, cpu, peak.mib))
    quickest = min(runs, key=lambda run: run[f"{by}_seconds"])
    return quickest | {key: max(run[key] for run in runs) for key in quickest if key.endswith("_mb")}


def _values(result: dict[str, Any], wall: float, cpu: float, peak: Mapping[str, float]) -> dict[str, float]:
    """From what `generate --json` tells. rest_seconds: start, imports, saving. peak_own_mb: see
    process_memory.py."""
    told = {stage: float(seconds) for stage, seconds in result["seconds"].items() if stage != "total"}
    stages = {f"{stage}_seconds": seconds for stage, seconds in told.items()}
    found = {"wall_seconds": wall, "cpu_seconds": cpu, **stages, "rest_seconds": wall - sum(stages.values())}
    found |= {key: float(result[key]) for key in ("peak_rss_mb", "peak_vram_mb") if result.get(key)}
    if "RssAnon" in peak:
        found["peak_own_mb"] = peak["RssAnon"]
    return {key: round(value, 2) for key, value in found.items()} | {"forwards": result["forwards"], "repeats": _RUNS}


def _children_seconds() -> float:
    """CPU time of all child processes that have ended; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
