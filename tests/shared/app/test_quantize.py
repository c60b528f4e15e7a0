"""`quantize` from the flags to the preset: what it writes, says and refuses. Formats: tests/models/z_image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from models.z_image.loader import to_diffusers
from models.z_image.transformer import ZImageTransformer
from shared.app.context import AppContext
from shared.app.families import load_families
from shared.cli.parser import build_parser, parse_arguments
from shared.cli.quantize import quantize
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError, UserError
from tests.support.tiny_model import TINY, randomise

FAMILIES = load_families(Path(models.__path__[0]))
MODEL = {"name": "Mine", "architecture": "z_image_base", "URLs": ["mine.safetensors"], "description": "Mine."}


@pytest.fixture
def ctx(tmp_path: Path) -> AppContext:
    """A program folder with the presets z_image and mine, and mine's file in ckpts."""
    (tmp_path / "defaults").mkdir()
    (tmp_path / "ckpts").mkdir()
    plain = MODEL | {"name": "Turbo", "architecture": "z_image", "URLs": ["turbo.safetensors"]}
    (tmp_path / "defaults" / "z_image.json").write_text(json.dumps({"model": plain}))
    (tmp_path / "defaults" / "mine.json").write_text(json.dumps({"model": MODEL, "num_inference_steps": 11}))
    state = to_diffusers(randomise(ZImageTransformer(TINY), 1).state_dict())
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in state.items()}, tmp_path / "ckpts/mine.safetensors")
    return AppContext.create(root=tmp_path, families=FAMILIES)


def run(ctx: AppContext, *arguments: str) -> int:
    source = str(ctx.root / "ckpts" / "mine.safetensors")
    parser = build_parser(FAMILIES, "lora_root")
    return quantize(ctx, parse_arguments(parser, ["quantize", source, *arguments]))


def test_json_ends_stdout_and_the_file_is_a_preset_like_its_source(
    ctx: AppContext, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ctx.root / "new" / "Mine int8.safetensors"

    assert run(ctx, "--format", "int8", "--output", str(output), "--json") == 0

    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["output"] == str(output)
    assert said["bytes"] == output.stat().st_size
    assert said["layers"] == {"int8": 16, "bf16": said["layers"]["bf16"]}
    assert len(said["worst"]) == 10
    errors = [layer["relative_error"] for layer in said["worst"]]
    assert errors == sorted(errors, reverse=True)
    assert 0.001 < said["mean_relative_error"] <= errors[0] < 0.01
    report = json.loads(Path(said["report"]).read_text())
    assert len(report["every_layer"]) == sum(said["layers"].values())
    preset = ctx.refresh_presets().get(said["preset"])
    assert (preset.id, preset.architecture, preset.urls) == ("mine_int8", "z_image_base", (str(output),))
    assert preset.settings["num_inference_steps"] == 11
    assert ctx.presets.problems == []


def test_the_report_for_people_names_the_worst_layers_and_the_preset(
    ctx: AppContext, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ctx.root / "mxfp8.safetensors"
    run(ctx, "--format", "mxfp8", "--keep", r"layers\.0\..*", "--like", "z_image", "--output", str(output))

    text = capsys.readouterr().out
    assert "mean relative error of the weights 0.0" in text
    assert "layers.1.feed_forward.w2" in text
    assert "layers.0." not in text
    assert "--preset mxfp8" in text
    assert ctx.refresh_presets().get("mxfp8").architecture == "z_image"
    assert Checkpoint.open(output).tensors["layers.0.attention.qkv.weight"].dtype == "BF16"


def test_the_same_output_keeps_one_preset_and_another_gets_its_own(ctx: AppContext) -> None:
    for folder in ("one", "one", "two"):
        run(ctx, "--format", "bf16", "--overwrite", "--output", str(ctx.root / folder / "out.safetensors"))
        ctx.refresh_presets()

    assert sorted(path.name for path in (ctx.root / "finetunes").iterdir()) == ["out.json", "out_2.json"]


def test_without_a_preset_nothing_but_file_and_report_is_written(ctx: AppContext) -> None:
    run(ctx, "--format", "q8_0", "--no-preset", "--output", str(ctx.root / "new" / "out.gguf"))

    assert sorted(path.name for path in (ctx.root / "new").iterdir()) == ["out.gguf", "out.gguf.report.json"]
    assert not (ctx.root / "finetunes").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "int9", "--output", "o.safetensors"), r"^int9: .* Known are bf16, .*svdq_int4"),
        (("--format", "int8", "--output", "o.txt"), r"o\.txt: a name that ends in \.safetensors or \.gguf"),
        (("--format", "int8", "--output", "o.gguf"), r"int8 cannot be written into a GGUF file"),
        (("--format", "q8_0", "--output", "o.safetensors"), r"q8_0 cannot be written into a safetensors file"),
        (("--format", "int8", "--rank", "32", "--output", "o.safetensors"), r"--rank 32: .* for SVDQ formats only"),
        (("--format", "svdq_int4", "--rank", "0", "--output", "o.safetensors"), r"--rank 0: a positive number"),
        (("--format", "int8", "--keep", "qkv", "--output", "o.safetensors"), r"--keep qkv fits no layer's whole name"),
        (("--format", "int8", "--keep", "(", "--output", "o.safetensors"), r"--keep \(: no regular expression"),
        (("--format", "int8", "--output", "ckpts/mine.safetensors"), r"is a folder, or the file to be converted"),
        (("--format", "int8", "--output", "there.safetensors"), r"there\.safetensors is there already"),
        (("--format", "int8", "--like", "nine", "--output", "o.safetensors"), r"nine"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_nothing_is_written(
    ctx: AppContext, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ctx.root)
    Path("there.safetensors").write_bytes(b"mine")
    before = sorted(ctx.root.rglob("*"))

    with pytest.raises(UserError, match=message):
        run(ctx, *arguments)

    assert sorted(ctx.root.rglob("*")) == before


def test_what_is_no_transformer_is_called_by_its_name(ctx: AppContext) -> None:
    path = ctx.root / "ckpts" / "mine.safetensors"
    pairs = {f"diffusion_model.layers.0.attention.out.lora_{x}.weight": torch.ones(4, 384) for x in "A"}
    pairs["diffusion_model.layers.0.attention.out.lora_B.weight"] = torch.ones(384, 4)
    save_file(pairs, path)
    with pytest.raises(UserError, match=r"LoRA.*only transformers can be converted"):
        run(ctx, "--format", "int8", "--output", str(ctx.root / "o.safetensors"))

    path.write_bytes(b"\0" * 7)
    with pytest.raises(CheckpointError, match="too short"):
        run(ctx, "--format", "int8", "--output", str(ctx.root / "o.safetensors"))
