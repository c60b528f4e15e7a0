"""The whole program in a process of its own: what a person waits for, imports, loading and all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.bench.measure import OUT_OF_MEMORY, reason_of
from shared.bench.process_memory import PeakMemory
from shared.bench.stand import Stand

if TYPE_CHECKING:
    from shared.bench.results import Value
    from shared.bench.run import CaseWork

PROMPT = "a lighthouse on a cliff at dusk, waves below, a small boat with a red sail"
# Caps on GPU memory, 10^9 bytes: those that goals speak of first, for a run may be cut short.
CAPS_GB = (6.0, 3.5, 4.0, 3.0, 1.5, 2.0, 8.0, 12.0, 16.0, 24.0)
SMALL_CAP_GB, SMALL_CAP_2048_GB = 1.5, 1.9
# Who moves the weights under a cap: the program's own choice, then its streamer, then mmgp's profiles.
ENGINES: Mapping[str, Sequence[str]] = {
    "ours": ("--offload", "auto"),
    "ours streamed": ("--offload", "stream"),
    **{f"P6 profile {profile}": ("--offload", "mmgp", "--profile", str(profile)) for profile in (1, 4, 5)},
}
_RUNS = 2
_HOW = "a fresh process each time, least of {}; page cache warm unless the row says otherwise"
_TIMEOUT = 3600  # seconds

# Steps of the short and of the whole picture on a CPU: what lies between them is forwards and nothing else.
_FEW, _ALL = 2, 8
# What a picture takes; the other files of a preset are small, and lie beside these.
_ROLES = frozenset({"transformer", "text_encoder", "vae"})

# Every process reads the prompt, as the peer's does.
_ON_GPU = ("--gpu", "cuda", "--prompt-cache", "0")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerProgram:
    """A family's module that draws with a peer, see models/z_image/bench/peer_program.py.

    whole: its first argument where all weights are on the GPU. offloading: those for less.
    """

    module: str
    whole: str
    offloading: Sequence[str]


def program_cases(
    root: Path,
    presets: Sequence[str],
    flags: Sequence[str] = (),
    *,
    caps: Sequence[float] = CAPS_GB,
    peer: PeerProgram | None = None,
) -> dict[str, CaseWork]:
    """Case id -> function(stand). root: where wgp.py is. flags: for wgp.py, such as where its models are.

    caps: those of B5, 10^9 bytes. peer: whose whole program is measured beside ours.
    """

    def case(work: Callable[[_Program], None]) -> CaseWork:
        return lambda stand: work(_Program(stand, root, presets, flags, tuple(caps), peer))

    return {"B5": case(_capped), "B6": case(_cold), "C4": case(_on_cpu)}


def _on_cpu(program: _Program) -> None:
    """Few forwards and many, the prompt read each time; from the two, what a forward takes."""
    stand = program.stand
    stand.how = (
        f"a fresh process of one thread each time, least CPU time of {program.runs}; page cache warm; "
        f"the CPU time of forwards by the difference of {_ALL} and {_FEW}"
    )
    flags = ["--gpu", "cpu", "--prompt-cache", "0"]
    for preset in program.presets:
        found: dict[int, dict[str, Value] | None] = {}
        try:
            for steps in (_FEW, _ALL):
                found[steps] = program.draw(
                    f"{preset}, 256x256, {steps} forwards", preset, flags, resolution="256x256", steps=steps, by="cpu"
                )
        finally:  # an interrupt leaves what was measured
            few, many = found.get(_FEW), found.get(_ALL)
            for steps, values in found.items():
                if values is not None:
                    if few is not None and many is not None:
                        each = (float(many["cpu_seconds"]) - float(few["cpu_seconds"])) / (_ALL - _FEW)
                        values |= {"forwards_cpu_seconds": round(each * steps, 2)}
                    stand.record(f"{preset}, 256x256, {steps} forwards", "ours", values)


def _cold(program: _Program) -> None:
    """The first picture with the files in memory and without, the next one, another model's, a large one."""
    program.stand.how = _HOW.format(program.runs)
    for preset in program.presets:
        row = f"{preset}, 1024x1024"
        program.measure(row, preset)
        program.measure_peer(row, preset)
        program.measure(f"{row}, files not in memory", preset, forget=True)
        program.measure(f"{preset}, 2048x2048", preset, resolution="2048x2048")
    program.measure_session()


def _capped(program: _Program) -> None:
    """Without a cap, then every cap for all presets, so that a run that is cut short has the first caps of all."""
    program.stand.how = _HOW.format(program.runs)
    for preset in program.presets:
        program.measure(f"{preset}, no cap", preset)
    for cap in program.caps:
        for preset in program.presets:
            for who, flags in ENGINES.items():
                program.measure(f"{preset}, {cap:g} GB", preset, [*_cap(cap), *flags], who=who)
            program.measure_peer(f"{preset}, {cap:g} GB", preset, cap=cap)
            if cap == SMALL_CAP_GB:
                row, flags = f"{preset}, 2048x2048, {SMALL_CAP_2048_GB:g} GB", _cap(SMALL_CAP_2048_GB)
                program.measure(row, preset, flags, resolution="2048x2048")


def _cap(gigabytes: float) -> list[str]:
    """The program's GB are 2^30 bytes, as cards are sold; those of goals and results are 10^9."""
    return ["--max-vram", f"{gigabytes * 1e9 / 2**20:.0f}MB"]


@dataclass
class _Program:
    """Draws with wgp.py and with a peer's program, and keeps what that took in the stand."""

    stand: Stand
    root: Path
    presets: Sequence[str]
    flags: Sequence[str]
    caps: Sequence[float]
    peer: PeerProgram | None
    hopeless: set[str] = field(default_factory=set)  # presets whose files the peer cannot read
    known: dict[str, dict[str, Path]] = field(default_factory=dict)  # preset -> what files() found

    @cached_property
    def runs(self) -> int:
        return self.stand.repeats or _RUNS

    def measure(
        self,
        row: str,
        preset: str,
        flags: Sequence[str] = (),
        *,
        who: str = "ours",
        resolution: str = "1024x1024",
        forget: bool = False,
    ) -> None:
        """Draw on the GPU and keep a row, with what the plan said of weights and room. forget: read files from disk."""
        if not self.stand.wants(who):
            return
        flags = [*_ON_GPU, *flags]
        values = self.draw(row, preset, flags, resolution=resolution, steps=_ALL, by="wall", who=who, forget=forget)
        if values is not None:
            plan = self.plan(preset, flags, resolution)
            self.stand.record(row, who, {**values, **_room(plan), **_sizes(plan)})

    def measure_peer(self, row: str, preset: str, *, cap: float = 0.0) -> None:
        """The peer in every way that fits: all on the GPU without a cap, else each way of offloading."""
        if self.peer is None:
            return
        for place in self.peer.offloading if cap else (self.peer.whole,):
            who = f"P5 {place}" if cap else "P1"
            if not self.stand.wants(who) or preset in self.hopeless:
                continue
            files = self.files(preset)
            if not files.keys() >= _ROLES:
                self.stand.note(f"{row}, {who}: not drawn (the preset's files are not here).")
                self.hopeless.add(preset)
                return
            command = [
                sys.executable, "-m", self.peer.module, place, "--cap", str(cap), "--resolution", "1024x1024",
                "--steps", str(_ALL), "--prompt", PROMPT, "--picture", str(self.stand.folder / "peer.png"),
                *(word for role, path in files.items() for word in (f"--{role.replace('_', '-')}", str(path))),
            ]  # fmt: skip
            values = self._run(row, command, who=who, by="wall")
            if values is not None:
                self.stand.record(row, who, values)
            elif self.stand.rows[-1].values["outcome"] != OUT_OF_MEMORY:
                self.hopeless.add(preset)

    def measure_session(self) -> None:
        """Two pictures of every preset in one process: the second, and the first after another model's."""
        command = [
            sys.executable, "-m", "shared.bench.one_session", ",".join(self.presets), "1024x1024", str(_ALL), PROMPT,
            str(self.stand.folder), *_ON_GPU, *self.flags,
        ]  # fmt: skip
        began = time.perf_counter()
        output, why, _ = self._process(command, {})
        if why:
            self.stand.note(f"second pictures and changes of model: not drawn ({why}).")
            return
        before = ""
        for told in json.loads(output):
            kind = "second picture" if told["picture"] == 2 else f"after {before}" if before else "first picture"
            stages = {f"{stage}_seconds": s for stage, s in told["seconds"].items() if stage != "total"}
            peaks = {key: told[key] for key in ("peak_rss_mb", "peak_vram_mb") if told[key]}
            values = {"wall_seconds": round(told["wall_seconds"], 3), **stages, **peaks, "forwards": told["forwards"]}
            self.stand.record(f"one process: {told['preset']}, {kind}", "ours", values)
            before = told["preset"]
        self.stand.record("one process", "ours", {"wall_seconds": round(time.perf_counter() - began, 2)})

    def draw(
        self,
        row: str,
        preset: str,
        flags: Sequence[str],
        *,
        resolution: str,
        steps: int,
        by: str,
        who: str = "ours",
        forget: bool = False,
    ) -> dict[str, Value] | None:
        """Draw one picture with wgp.py as often as it takes, see _run."""
        picture = ["--json", "--output", str(self.stand.folder / "picture.png")]
        command = [*self._generate(preset, resolution, steps), *picture, *flags, *self.flags]
        return self._run(row, command, who=who, by=by, forget=list(self.files(preset).values()) if forget else ())

    def plan(self, preset: str, flags: Sequence[str], resolution: str = "1024x1024") -> dict[str, Any]:
        """What `generate --dry-run --json` says; {} if it fails."""
        command = [*self._generate(preset, resolution, _ALL), "--dry-run", "--json", *flags, *self.flags]
        output, why, _ = self._process(command, {})
        return {} if why else dict(json.loads(output))

    def files(self, preset: str) -> dict[str, Path]:
        """The preset's files of weights that are here, by what they are for."""
        if preset not in self.known:
            files = self.plan(preset, ()).get("files", [])
            here = [file for file in files if file["path"] and file["role"] in _ROLES]
            self.known[preset] = {file["role"]: Path(file["path"]) for file in here}
        return self.known[preset]

    def _generate(self, preset: str, resolution: str, steps: int) -> list[str]:
        return [
            sys.executable, "wgp.py", "generate", PROMPT, "--preset", preset, "--resolution", resolution,
            "--steps", str(steps), "--seed", "0",
        ]  # fmt: skip

    def _run(
        self, row: str, command: Sequence[str], *, who: str, by: str, forget: Sequence[Path] = ()
    ) -> dict[str, Value] | None:
        """The values of the quickest run by that clock, or a row and a note that tell why there is none, and None.

        The most memory of all runs counts, not of the quickest. forget: files to be thrown out of memory before each.
        """
        runs = []
        for _ in range(self.runs):
            for path in forget:
                forget_file(path)
            began, cpu = time.perf_counter(), _children_seconds()
            output, why, peak = self._process(command, _ONE_THREAD if by == "cpu" else {})
            wall, cpu = time.perf_counter() - began, _children_seconds() - cpu
            if why:
                self.stand.note(f"{row}{'' if who == 'ours' else f', {who}'}: not drawn ({why}).")
                self.stand.record(row, who, {"outcome": why})
                return None
            runs.append(_values(json.loads(output), wall, cpu, peak, self.runs))
        quickest = min(runs, key=lambda run: run[f"{by}_seconds"])
        return quickest | {key: max(run[key] for run in runs) for key in quickest if key.endswith("_mb")}

    def _process(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, str, Mapping[str, float]]:
        """Run a program: the last line that it prints, why it failed ("" if it did not), its peaks of memory."""
        with (
            subprocess.Popen(
                command, cwd=self.root, env={**os.environ, **environment}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            ) as process,
            PeakMemory(process.pid, every=0.02) as peak,
        ):  # fmt: skip
            try:
                output, errors = process.communicate(timeout=_TIMEOUT)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            return "", _why(errors), peak.mib
        return output.strip().splitlines()[-1], "", peak.mib


def forget_file(path: Path) -> None:
    """Throw a file out of the page cache, so that it is read from the disk; nothing where the system cannot."""
    if not hasattr(os, "posix_fadvise"):  # Windows, macOS
        return
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _why(errors: str) -> str:
    """Why a program failed, from what it wrote: memory, or its last words."""
    lines = [line for line in errors.strip().splitlines() if line.strip() and "--verbose 2" not in line]
    if any(reason_of(line) == OUT_OF_MEMORY for line in lines):
        return OUT_OF_MEMORY
    return reason_of(lines[-1] if lines else "")


def _room(plan: Mapping[str, Any]) -> dict[str, Value]:
    """What a plan says of the network's weights and the room for them, and who moves them."""
    memory = plan.get("memory")
    if not memory:
        return {}
    gigabytes = {"weights_gb": memory["weights_mb"]["transformer"], "room_gb": memory["budget_mb"]}
    found: dict[str, Value] = {key: round(float(mib) * 2**20 / 1e9, 3) for key, mib in gigabytes.items()}
    return found | {"predicted_vram_mb": memory["vram_mb"], "engine": memory["engine"]}


def _sizes(plan: Mapping[str, Any]) -> dict[str, Value]:
    """Bytes of all files that are loaded."""
    size = sum(file.get("bytes") or 0 for file in plan.get("files", ()))
    return {"files_gb": round(size / 1e9, 3)} if size else {}


def _values(result: Mapping[str, Any], wall: float, cpu: float, peak: Mapping[str, float], runs: int) -> dict[str, Any]:
    """From what `generate --json` tells; see process_memory.py for peak_own_mb.

    ready_seconds: until the prompt is read, for which the text encoder is loaded. stages_seconds: from loading to the
    picture. rest_seconds: start, imports, saving.
    """
    told = {stage: float(seconds) for stage, seconds in result["seconds"].items() if stage != "total"}
    stages = {f"{stage}_seconds": seconds for stage, seconds in told.items()}
    total = sum(stages.values())
    found = {"wall_seconds": wall, "cpu_seconds": cpu, **stages, "stages_seconds": total, "rest_seconds": wall - total}
    found["ready_seconds"] = told.get("load", 0.0) + told.get("text", 0.0)
    found |= {key: float(result[key]) for key in ("peak_rss_mb", "peak_vram_mb") if result.get(key)}
    if "RssAnon" in peak:
        found["peak_own_mb"] = peak["RssAnon"]
    return {key: round(value, 2) for key, value in found.items()} | {"forwards": result["forwards"], "repeats": runs}


def _children_seconds() -> float:
    """CPU time of all child processes that have ended; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
