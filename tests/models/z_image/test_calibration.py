"""`quantize --calibrate`: the source draws, its linears are watched, and the new file is made for what they took."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import models
from models.z_image.prompts import SCENES, SHAPES, calibration_prompts
from shared.app.calibration import Drawings, watch
from shared.app.context import AppContext
from shared.app.families import load_families
from shared.app.inspection import inspect_path
from shared.app.quantize import QuantizeRequest, quantize
from shared.cli.quantize import report_text
from tests.support.tiny_model import TINY
from tests.support.tiny_preset import TINY_PRESET

PRESET = {"model": {**TINY_PRESET, "description": "Tiny."}, "resolution": "1024x1024", "num_inference_steps": 2}


@pytest.fixture
def ctx(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> AppContext:
    """A program folder whose one preset is the tiny model; pictures for calibration are small."""
    shutil.copytree(model_folder, tmp_path / "tiny")
    (tmp_path / "defaults").mkdir()
    (tmp_path / "defaults" / "z_image.json").write_text(json.dumps(PRESET))
    monkeypatch.setattr("shared.app.calibration._CALIBRATION_SIZE", "64x96")
    return AppContext.create(root=tmp_path, families=load_families(Path(models.__path__[0])))


def test_every_linear_that_runs_is_watched_and_nothing_is_decoded(ctx: AppContext) -> None:
    said: list[str] = []
    source = ctx.root / "tiny" / "transformer.safetensors"
    drawings = Drawings(source=source, like=ctx.presets.get("z_image"), prompts=["a fox", "an owl"], count=3)

    recorder = watch(ctx, drawings, said.append)

    inputs = recorder.inputs("layers.1.feed_forward.w2")
    assert inputs is not None
    # Every step of every picture, image and caption tokens: 4 x 6 padded to 32, and 32.
    assert recorder._seen["layers.1.feed_forward.w2"].count == 3 * 2 * 64
    assert inputs.rows.shape == (384, 1024)
    assert (inputs.peak >= inputs.rms).all() and (inputs.rms > 0).all()
    assert recorder.inputs("final_layer.linear") is not None
    assert said[-1] == "Calibrating, picture 3 of 3"


def test_learned_rounding_brings_every_output_nearer_than_calibration_alone(ctx: AppContext) -> None:
    def made(name: str, **more: Any) -> dict[str, Any]:
        request = QuantizeRequest(
            source=ctx.root / "tiny" / "transformer.safetensors",
            output=ctx.root / name,
            recipe="svdq_int4",
            rank=16,
            keep=[r"(?!layers\.1\.).*"],
            calibrate=3,
            with_preset=False,
            **more,
        )
        report: dict[str, Any] = json.loads(quantize(ctx, request, lambda *_: None).report.read_text())
        return report

    calibrated, learned = made("one.safetensors"), made("two.safetensors", learned_rounding=True)

    assert calibrated["calibration"] == {"pictures": 3, "prompts": list(SHAPES)}
    assert calibrated["notes"] == []
    for one, two in zip(calibrated["every_layer"], learned["every_layer"], strict=True):
        if one["format"] == "svdq_int4":
            assert 0 < two["output_error"] < one["output_error"] < 0.2, one["module"]
    assert learned["mean_output_error"] < 0.9 * calibrated["mean_output_error"]


def test_a_calibrated_file_says_so_and_its_report_goes_by_outputs(ctx: AppContext) -> None:
    request = QuantizeRequest(
        source=ctx.root / "tiny" / "transformer.safetensors",
        output=ctx.root / "calibrated.safetensors",
        recipe="svdq_int4",
        rank=16,
        keep=[r"(?!layers\.1\.).*"],
        calibrate=1,
        with_preset=False,
    )

    result = quantize(ctx, request, lambda *_: None)

    (described,) = inspect_path(request.output, {"z_image": None})
    assert described["calibration"] == {"drawn with": '{"pictures": 1, "learned_rounding": false}'}
    errors = [layer["output_error"] for layer in result.as_dict()["worst"]]
    assert len(errors) > 1 and errors == sorted(errors, reverse=True)
    assert [float(line.split()[-1]) for line in report_text(result).splitlines() if " svdq_int4  " in line] == [
        pytest.approx(error, abs=1e-4) for error in errors
    ]


def test_small_models_are_shown_shapes_and_large_ones_scenes() -> None:
    assert calibration_prompts(TINY.as_diffusers()) == SHAPES
    assert calibration_prompts({"dim": 3840}) == SCENES
