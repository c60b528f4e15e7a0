"""Pictures one after the other in one process, as the page draws them: the first, the next, another model's.

    python -m shared.bench.one_session z_image,z_image_int8 1024x1024 8 "a prompt" FOLDER [flags of wgp.py generate]

Each preset draws two pictures; the last line is one JSON object: a list with what each took.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PICTURES = 2


def main(argv: Sequence[str]) -> None:
    presets, resolution, steps, prompt, folder, *flags = argv
    with contextlib.redirect_stdout(sys.stderr):  # libraries print as they please
        found = draw(presets.split(","), resolution, int(steps), prompt, Path(folder), flags)
    sys.stdout.write(json.dumps(found) + "\n")


def draw(
    presets: Sequence[str], resolution: str, steps: int, prompt: str, folder: Path, flags: Sequence[str]
) -> list[dict[str, Any]]:
    """What every picture took: preset, which of its pictures, wall seconds, seconds by stage, peaks in MiB so far."""
    from shared.app.context import AppContext
    from shared.app.settings import GenerationSettings

    program: Any = importlib.import_module("wgp")  # by its name: it stands above this package
    args = program.parse(["generate", prompt, *flags])
    ctx = AppContext.create(args, program.ROOT, args.families)
    found = []
    for name in presets:
        preset = ctx.presets.get(name)
        overrides = {"prompt": prompt, "resolution": resolution, "num_inference_steps": steps, "seed": 0}
        settings = GenerationSettings.build(preset, ctx.saved_settings(preset), overrides)
        for number in range(1, _PICTURES + 1):
            began = time.perf_counter()
            told = ctx.session.generate(preset, settings, output=folder / "one.png").as_dict()
            wall = time.perf_counter() - began
            kept = {key: told[key] for key in ("seconds", "forwards", "peak_rss_mb", "peak_vram_mb")}
            found.append({"preset": name, "picture": number, "wall_seconds": wall, **kept})
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
