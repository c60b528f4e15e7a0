"""The memory estimate against what a process really takes: within a tenth, on a small model and a larger one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mid_size_model import PROGRAM, write_preset

# A process of its own: memory that other tests have taken says nothing about this one.
DRAW = """
import argparse, json, sys
from pathlib import Path
from shared.app.context import AppContext
from shared.app.families import load_families
from shared.app.settings import GenerationSettings

program, root, preset, settings = sys.argv[1:]
here = root if Path(root, "defaults").is_dir() else program
args = argparse.Namespace(gpu="cpu", config=root, prompt_cache=0)
ctx = AppContext.create(args, Path(here), load_families(Path(program, "models")))
preset = ctx.presets.get(preset)
asked = GenerationSettings.build(preset, {}, {"prompt": "a red circle", "seed": 1, **json.loads(settings)})
plan = ctx.session.plan(preset, asked)
result = ctx.session.generate(preset, asked, output=Path(root, "picture.png"))
print(json.dumps({"predicted": plan.placement.ram_mb, "measured": result.peak_rss_mb}))
"""


def figures(root: Path, preset: str, **settings: object) -> tuple[float, float]:
    """(predicted, measured) MiB."""
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(PROGRAM), str(root), preset, json.dumps(settings)],
        cwd=PROGRAM, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["predicted"], found["measured"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the program's own share of the memory was measured on Linux")
def test_the_demos_prediction_is_within_a_tenth_of_its_peak(tmp_path: Path) -> None:
    predicted, measured = figures(tmp_path, "z_image_demo", resolution="512x512", num_inference_steps=1)

    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the program's own share of the memory was measured on Linux")
@pytest.mark.parametrize("tile", [0, 16])
def test_a_larger_models_prediction_is_within_a_tenth_of_its_peak(tmp_path: Path, tile: int) -> None:
    preset = write_preset(tmp_path)

    predicted, measured = figures(tmp_path, preset, VAE_tile_size=tile)

    assert predicted == pytest.approx(measured, rel=0.1)
