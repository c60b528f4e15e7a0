"""A run: so many changed files read one after another, and what is found."""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shared.quant.errors import UserError
from tests.fuzz.mutations import mutate
from tests.fuzz.readers import Reader

SLOW_SECONDS = 1.0  # of processor time, for files of a few kilobytes


@dataclass(frozen=True)
class Find:
    """A file that broke the promise, and how."""

    data: bytes
    words: str


def run(reader: Reader, count: int, seed: int, folder: Path, *, most: int = 20) -> tuple[Counter[str], list[Find]]:
    """Read `count` broken files; what came of them, by kind, and up to `most` finds of different places."""
    rng = random.Random(seed)
    path = folder / f"input{reader.suffix}"
    for name, data in reader.beside.items():
        (folder / name).write_bytes(data)
    outcomes: Counter[str] = Counter()
    finds: dict[str, Find] = {}
    for _ in range(count):
        data = mutate(rng.choice(reader.seeds), rng)
        path.write_bytes(data)
        began = time.process_time()
        try:
            reader.read(path)
            outcome = "read"
        except UserError as error:
            str(error).encode("utf-8", "backslashreplace")  # it can be shown
            outcome = type(error).__name__
        except Exception as error:  # noqa: BLE001 - finding these is the purpose
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
            finds.setdefault(outcome, Find(data, traceback.format_exc(limit=-6)))
        seconds = time.process_time() - began
        if seconds > SLOW_SECONDS:
            outcome = "slow"
            finds.setdefault(outcome, Find(data, f"took {seconds:.1f} s of processor time"))
        outcomes[outcome] += 1
        if len(finds) >= most:
            break
    return outcomes, list(finds.values())
