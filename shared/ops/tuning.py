"""How each Triton kernel is launched on each generation of GPU: read from tables, so that nothing is searched.

    {"architectures": {"80": {"row": [[1024, {"num_warps": 4}], [null, {"num_warps": 16}]], ...}, ...}}

For each architecture (compute capability without the dot) and kernel a list by size, the first whose bound is not
exceeded counts; null has no bound. The size is a row's width for kernels of rows, the number of tokens for products. An
architecture that is not listed takes the newest listed one before it.

Two files: tuning.json comes with the program, set by reasoning (docs/kernels.md). What `wgp.py doctor --tune` measured
on this machine lies in MACHINE_FILE and goes before it, for its own architecture; ZIMAGE_TUNING=0 in the environment
leaves it out.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE = Path(__file__).with_name("tuning.json")
MACHINE_FILE = Path(__file__).parents[2] / ".cache" / "tuning.json"
SWITCH = "ZIMAGE_TUNING"

Launch = dict[str, int]
Entries = Sequence[Sequence[Any]]
Table = Mapping[str, Mapping[str, Entries]]

_tried: ContextVar[tuple[str, Launch] | None] = ContextVar("launch options that are being tried", default=None)


def launch(kernel: str, capability: int, size: int, table: Table | None = None) -> Launch:
    """The launch options of `kernel` for a size on a GPU of this compute capability, a fresh dict.

    capability: major * 10 + minor; below the oldest listed one, as on the interpreter, the oldest is taken.
    """
    tried = _tried.get()
    if tried is not None and tried[0] == kernel:
        return dict(tried[1])
    for bound, options in of_architecture(capability, known() if table is None else table)[kernel]:
        if bound is None or size <= bound:
            return dict(options)
    raise KeyError(f"tuning.json has no entry of {kernel} without a bound for capability {capability}")


@contextmanager
def trying(kernel: str, options: Launch) -> Iterator[None]:
    """Meanwhile `kernel` is launched with these options, whatever the tables say."""
    token = _tried.set((kernel, options))
    try:
        yield
    finally:
        _tried.reset(token)


@cache
def read(file: Path = FILE) -> Table:
    """The table of a file that comes with the program."""
    table: Table = json.loads(file.read_text(encoding="utf-8"))["architectures"]
    return table


@cache
def known() -> Table:
    """The program's table, and before it what was measured on this machine.

    A file that is not what `doctor --tune` writes is left aside, which is logged.
    """
    table, machine_file = read(), MACHINE_FILE
    if os.environ.get(SWITCH, "").strip() == "0" or not machine_file.is_file():
        return table
    try:
        measured = json.loads(machine_file.read_text(encoding="utf-8"))["architectures"]
        own = {
            str(int(name)): _checked(entries, of_architecture(int(name), table)) for name, entries in measured.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as fault:
        log.warning("%s is not what doctor --tune writes (%s) and is left aside; delete it.", machine_file, fault)
        return table
    return {**table, **own}


def write(kernels: Mapping[str, Entries], capability: int, origin: str) -> None:
    """Keep what was measured for this architecture, in the place of what was; it holds from now on.

    kernels: with all their bounds. origin: with what it was measured, in words. Raises OSError.
    """
    machine_file, document = MACHINE_FILE, dict[str, Any]()
    if known() is not read():  # else it is not there, or of no use to anybody
        document = json.loads(machine_file.read_text(encoding="utf-8"))
    for key, value in (("measured", origin), ("architectures", kernels)):
        document[key] = {**document.get(key, {}), str(capability): value}
    machine_file.parent.mkdir(parents=True, exist_ok=True)
    beside = machine_file.with_suffix(".part")
    beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    beside.replace(machine_file)
    known.cache_clear()


def of_architecture(capability: int, table: Table) -> Mapping[str, Entries]:
    """The kernels of the newest listed architecture that is not newer."""
    names = sorted(int(name) for name in table)
    return table[str(max((arch for arch in names if arch <= capability), default=names[0]))]


def _checked(measured: Mapping[str, Entries], usual: Mapping[str, Entries]) -> dict[str, Entries]:
    """The usual kernels with the measured ones in their place. Raises ValueError for what no kernel could take."""
    for kernel, entries in measured.items():
        wanted = {name for _, options in usual[kernel] for name in options}
        for bound, options in entries:
            right = set(options) == wanted and all(type(value) is int and value > 0 for value in options.values())
            if not right or type(bound) not in (int, type(None)):
                raise ValueError(f"{kernel}: {bound}, {options}")
        if not entries or entries[-1][0] is not None:
            raise ValueError(f"{kernel} has no entry without a bound")
    return {**usual, **measured}
