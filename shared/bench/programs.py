"""The whole program in a process of its own: what a person waits for, imports, loading and all."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.bench.stand import Stand

if TYPE_CHECKING:
    from shared.bench.run import CaseWork

PROMPT = "a lighthouse on a cliff at dusk, waves below, a small boat with a red sail"
CAPS_GB = (24, 16, 12, 8, 6, 4, 3, 2)
_RUNS = 2
_HOW = f"a fresh process each time, least of {_RUNS}; page cache warm from the first"
_TIMEOUT = 3600  # seconds


def program_cases(root: Path, presets: Sequence[str]) -> dict[str, CaseWork]:
    """Case id -> function(stand). root: where wgp.py is."""
    return {
        "B5": partial(_capped, root=root, presets=presets),
        "B6": partial(_cold, root=root, presets=presets),
        "C4": partial(_on_cpu, root=root, presets=presets),
    }


def _on_cpu(stand: Stand, *, root: Path, presets: Sequence[str]) -> None:
    stand.how = _HOW
    for preset in presets:
        _measure(stand, f"{preset}, 256x256, 2 forwards", root, preset, "256x256", 2, ["--gpu", "cpu"])


def _cold(stand: Stand, *, root: Path, presets: Sequence[str]) -> None:
    stand.how = _HOW
    for preset in presets:
        _measure(stand, f"{preset}, 1024x1024", root, preset, "1024x1024", 8, ["--gpu", "cuda"])


def _capped(stand: Stand, *, root: Path, presets: Sequence[str]) -> None:
    stand.how = _HOW
    for preset in presets:
        caps = {"no cap": [], **{f"{cap} GB": ["--max-vram", f"{cap}GB"] for cap in CAPS_GB}}
        for name, flags in caps.items():
            _measure(stand, f"{preset}, {name}", root, preset, "1024x1024", 8, ["--gpu", "cuda", *flags])


def _measure(
    stand: Stand, row: str, root: Path, preset: str, resolution: str, steps: int, flags: Sequence[str]
) -> None:
    """Draw one picture as often as it takes and keep the quickest; a note where it is not drawn."""
    command = [
        sys.executable, "wgp.py", "generate", PROMPT, "--preset", preset, "--resolution", resolution,
        "--steps", str(steps), "--seed", "0", "--json", "--output", str(stand.folder / "picture.png"), *flags,
    ]  # fmt: skip
    runs = []
    for _ in range(_RUNS):
        began, cpu = time.perf_counter(), _children_seconds()
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        wall, cpu = time.perf_counter() - began, _children_seconds() - cpu
        if done.returncode:
            why = (done.stderr.strip() or "no reason given").splitlines()
            stand.note(f"{row}: not drawn ({why[-1]}).")
            return
        runs.append(_values(json.loads(done.stdout.strip().splitlines()[-1]), wall, cpu))
    stand.record(row, "ours", min(runs, key=lambda run: run["wall_seconds"]))


def _values(result: dict[str, Any], wall: float, cpu: float) -> dict[str, float]:
    """From what `generate --json` tells. rest_seconds: start, imports, loading, saving."""
    stages = {f"{stage}_seconds": float(seconds) for stage, seconds in result["seconds"].items()}
    found = {"wall_seconds": wall, "cpu_seconds": cpu, **stages, "rest_seconds": wall - sum(stages.values())}
    found |= {key: float(result[key]) for key in ("peak_rss_mb", "peak_vram_mb") if result.get(key)}
    return {key: round(value, 2) for key, value in found.items()} | {"forwards": result["forwards"], "repeats": _RUNS}


def _children_seconds() -> float:
    """CPU time of all child processes that have ended; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
