"""`compare` on the embedded demo: every format's pictures beside the reference's, and what a LoRA changes in each."""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import models
from shared.app.compare import CompareRequest, Comparison, compare, format_names
from shared.app.context import AppContext, default_root
from shared.app.drawing import DrawJob, Drawn, Spent, draw
from shared.app.families import load_families
from shared.app.presets import LoraChoice
from shared.app.quantize import QuantizeRequest
from shared.quant.errors import UserError
from tests.support.fake_family import FakeHandler, fake_context, write_preset, write_weights

# Six models are written and drawn with: half a minute of one core, more on a machine that has other work.
pytestmark = pytest.mark.timeout(900)

# Least correlation of what a LoRA changes with what it changes in bf16, in pictures and in latents.
LEAST = {"int8": 0.95, "mxfp8": 0.95, "nvfp4": 0.85, "svdq_int4_r32": 0.85, "q4_0": 0.85}
PICTURES = 2
DEMO = default_root() / "models/z_image/demo/transformer.safetensors"
NEON = default_root() / "lora_root/z_image/demo/neon.safetensors"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("comparison")
    families = load_families(Path(models.__path__[0]))
    ctx = AppContext.create(argparse.Namespace(gpu="cpu"), default_root(), families)
    request = CompareRequest(
        preset="z_image_demo",
        output=folder / "out",
        formats=tuple(LEAST),
        count=PICTURES,
        settings={"num_inference_steps": 4},
        lora=LoraChoice(str(NEON)),
    )
    return compare(ctx, request, lambda _: None, lambda job: draw(job, ctx))


def test_the_reference_equals_itself(comparison: Comparison) -> None:
    row = comparison.rows[0]

    assert (row.name, row.psnr, row.ssim, row.latent_error) == ("bf16", math.inf, 1.0, 0.0)
    assert row.lora == pytest.approx(1)
    assert row.bytes == DEMO.stat().st_size


def test_eight_bits_stay_nearer_to_the_reference_than_four(comparison: Comparison) -> None:
    errors = {row.name: row.latent_error for row in comparison.rows}

    assert 0 < errors["int8"] < errors["mxfp8"] < min(errors[name] for name in ("nvfp4", "svdq_int4_r32", "q4_0"))


def test_a_lora_changes_pictures_and_latents_alike_in_every_format(comparison: Comparison) -> None:
    for of in (lambda row: row.lora, lambda row: row.lora_latents):
        found = {row.name: of(row) for row in comparison.rows if row.name in LEAST}

        assert found.keys() == LEAST.keys()
        assert all(alike is not None and alike >= LEAST[name] for name, alike in found.items()), found


def test_the_formats_are_in_the_order_that_is_expected(comparison: Comparison) -> None:
    assert len(comparison.order) == 7
    assert [said for said in comparison.order if not said.holds] == []


def test_the_demo_brings_prompts_and_verdicts_of_its_own(comparison: Comparison) -> None:
    row = comparison.rows[0]

    assert len(set(comparison.prompts)) == PICTURES
    assert row.adherence is not None
    assert 0 <= row.adherence <= row.kept["ground"] <= 1


def test_report_sheet_and_pictures_are_left_in_the_folder(comparison: Comparison) -> None:
    said = json.loads(comparison.report.read_text(encoding="utf-8"))

    assert [row["name"] for row in said["rows"]] == ["bf16", *LEAST]
    assert said["rows"][0]["psnr"] is None, "JSON has no infinity"
    with Image.open(comparison.sheet) as sheet:
        assert sheet.width > len(said["rows"]) * 128
    assert len(list((comparison.report.parent / "int8").glob("*.png"))) == PICTURES


# ------------------------------------------------------------------------- what is drawn with, without a model


def fake_draw(job: DrawJob) -> Iterator[Drawn | Spent]:
    """Pictures that only the prompt and the file's name decide; a file called broken is refused."""
    if "broken" in job.file.stem:
        raise UserError(f"{job.file}: broken.")
    offset = sum(job.file.stem.encode()) % 5
    for settings in job.pictures:
        grey = sum(settings["prompt"].encode()) % 200 + offset + 20 * bool(settings.get("activated_loras"))
        yield Drawn(np.full((32, 32, 3), grey, np.uint8), np.full((16, 4, 4), grey, np.float32), 0.5)
    yield Spent(1.0, 100.0, 0.0)


@pytest.fixture
def fake_ctx(tmp_path: Path) -> AppContext:
    write_preset(tmp_path, "small")
    recipes = tmp_path / "models" / "fake" / "recipes"
    recipes.mkdir(parents=True)
    for name in ("int8", "svdq_int4"):
        (recipes / f"{name}.json").touch()
    return fake_context(tmp_path, FakeHandler())


def run(ctx: AppContext, **changes: Any) -> Comparison:
    request = {"preset": "small", "output": ctx.root / "out", "count": 3} | changes
    return compare(ctx, CompareRequest(**request), lambda _: None, fake_draw)


def test_a_file_that_cannot_be_drawn_with_gets_a_row_that_says_why(fake_ctx: AppContext) -> None:
    files = [write_weights(fake_ctx.root / f"{name}.safetensors") for name in ("broken", "good")]

    rows = run(fake_ctx, files=files).rows

    assert [row.name for row in rows] == ["fp32", "broken", "good"]
    assert "broken.safetensors: broken." in rows[1].problem
    assert not rows[2].problem


def test_a_named_format_that_cannot_be_written_gets_a_row_and_the_rest_goes_on(
    fake_ctx: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(ctx: AppContext, request: QuantizeRequest, on_progress: object) -> None:
        if request.recipe == "int8":
            raise UserError("int8 does not fit.")
        request.output.parent.mkdir(exist_ok=True)
        write_weights(request.output)

    monkeypatch.setattr("shared.app.compare.contenders.quantize", convert)

    rows = run(fake_ctx, formats=("int8", "svdq_int4_r32")).rows

    assert [(row.name, row.problem) for row in rows] == [
        ("fp32", ""), ("int8", "int8 does not fit."), ("svdq_int4_r32", "")
    ]  # fmt: skip


def test_models_are_drawn_with_so_many_at_a_time_and_keep_their_order(fake_ctx: AppContext) -> None:
    files = [write_weights(fake_ctx.root / f"{name}.safetensors") for name in ("a", "broken", "b", "c")]
    alone = run(fake_ctx, files=files).rows
    both, at_once, most = threading.Barrier(2), 0, 0

    def draw_two(job: DrawJob) -> Iterator[Drawn | Spent]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        if job.file.stem in ("a", "transformer"):
            both.wait(timeout=60)  # until the other of the two has begun as well
        try:
            yield from fake_draw(job)
        finally:
            at_once -= 1

    request = CompareRequest(preset="small", output=fake_ctx.root / "out", count=3, files=files, jobs=2)
    together = compare(fake_ctx, request, lambda _: None, draw_two).rows

    assert together == alone
    assert most == 2


def test_a_lora_may_be_drawn_with_on_some_of_the_prompts_only(fake_ctx: AppContext) -> None:
    drawn: list[int] = []

    def draw_and_count(job: DrawJob) -> Iterator[Drawn | Spent]:
        drawn.append(len(job.pictures))
        return fake_draw(job)

    lora = write_weights(fake_ctx.root / "style.safetensors")
    request = CompareRequest(
        preset="small", output=fake_ctx.root / "out", count=5, lora=LoraChoice(str(lora)), lora_count=2,
        files=[write_weights(fake_ctx.root / "a.safetensors")],
    )  # fmt: skip
    rows = compare(fake_ctx, request, lambda _: None, draw_and_count).rows

    assert drawn == [7, 7]
    assert [row.problem for row in rows] == ["", ""]


def test_prompts_of_ones_own_are_drawn_in_turn_and_not_scored(
    fake_ctx: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "training.fake", SimpleNamespace())

    result = run(fake_ctx, prompts=("one", "two"), scorer="training.fake")

    assert result.prompts == ["one", "two", "one"]
    assert result.rows[0].adherence is None


def test_pictures_that_only_one_side_keeps_are_counted_against_the_reference(
    fake_ctx: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference keeps pictures 0 and 1, the other one 1 and 2 and 3."""
    kept = iter([True, True, False, False, False, True, True, True])
    scorer = SimpleNamespace(
        held_out_captions=lambda count, seed: [SimpleNamespace(text=f"prompt {i}") for i in range(count)],
        judge_picture=lambda picture, caption: SimpleNamespace(everything=next(kept)),
    )
    monkeypatch.setitem(sys.modules, "training.fake", scorer)

    reference, other = run(
        fake_ctx, count=4, scorer="training.fake", files=[write_weights(fake_ctx.root / "a.safetensors")]
    ).rows

    assert (reference.adherence, reference.lost, reference.gained) == (0.5, 0, 0)
    assert (other.adherence, other.lost, other.gained) == (0.75, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": ("int9",)}, r"no format int9\. Known are int8, svdq_int4_r32, .*svdq_int4_r64"),
        ({"scorer": "training.nothing"}, r"training\.nothing cannot be imported"),
        ({"scorer": "json"}, r"json is no scorer: it has no held_out_captions and no judge_picture"),
        ({"settings": {"resolution": "33x32"}}, r"33 is not a multiple"),
        ({"preset": "smal"}, r'no preset "smal"'),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(fake_ctx: AppContext, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(fake_ctx, **changes)

    assert not (fake_ctx.root / "out").exists()


def test_all_formats_name_each_published_rank_once() -> None:
    names = format_names(default_root())

    assert {"int8", "nvfp4_mixed", "svdq_int4_r32", "svdq_int4_r256", "svdq_fp4_r128", "q4_0"} <= set(names)
    assert "svdq_int4" not in names
    assert len(names) == len(set(names))
