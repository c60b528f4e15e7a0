"""`quantize` from the flags to the preset: what it writes, says and refuses. Formats: tests/models/z_image."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models.z_image import lora
from models.z_image.autoencoder import load_vae
from models.z_image.control import ControlBranch
from models.z_image.control_config import ControlConfig
from models.z_image.loader import load_transformer, to_diffusers
from models.z_image.text_encoder import load_text_encoder
from models.z_image.transformer import ZImageTransformer
from shared.app.context import AppContext, default_root
from shared.app.families import load_families
from shared.app.memory import MIB, Workload, estimate_memory
from shared.app.presets import choose_files
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


def test_a_folder_for_diffusers_is_loaded_by_diffusers(ctx: AppContext) -> None:
    from diffusers import ZImageTransformer2DModel

    folder = ctx.root / "transformer"

    run(ctx, "--format", "fp32", "--diffusers", "--shard-size", "40kB", "--output", str(folder))

    assert len(list(folder.glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    theirs = ZImageTransformer2DModel.from_pretrained(folder).state_dict()
    ours = load_transformer(ctx.root / "ckpts/mine.safetensors", torch.float32)
    state = to_diffusers(ours.state_dict())
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[name], state[name]) for name in state)
    preset = ctx.refresh_presets().get("transformer")
    assert preset.urls == (str(folder / "diffusion_pytorch_model.safetensors.index.json"),)
    load_transformer(preset.urls[0], torch.float32)


def test_a_checkpoint_of_all_three_is_opened_as_each(ctx: AppContext) -> None:
    demo = default_root() / "models/z_image/demo"
    encoder, vae = (next((demo / part).glob("*.safetensors")) for part in ("text_encoder", "vae"))
    output = ctx.root / "all.safetensors"

    run(ctx, "--format", "nvfp4", "--text-encoder", str(encoder), "--vae", str(vae), "--output", str(output))

    names = list(Checkpoint.open(output).tensors)
    assert {name.partition(".")[0] for name in names} == {"model", "text_encoders", "vae"}
    assert "text_encoders.qwen3_4b.transformer.model.embed_tokens.weight" in names
    load_transformer(output, torch.float32)
    for load, alone in ((load_text_encoder, encoder), (load_vae, vae)):
        ours, theirs = load(output, torch.float32).state_dict(), load(alone, torch.float32).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for key in ("scaling_factor", "shift_factor", "norm_num_groups"):  # beside the VAE they lie in a file of their own
        assert load_vae(output, torch.float32).config[key] == load_vae(vae, torch.float32).config[key]
    alone_mb, together_mb = weights_mb(demo / "transformer.safetensors", encoder, vae), weights_mb(*[output] * 3)
    assert {role: together_mb[role] for role in ("text_encoder", "vae")} == {
        role: alone_mb[role] for role in ("text_encoder", "vae")
    }
    assert together_mb["transformer"] * MIB < output.stat().st_size - encoder.stat().st_size
    wants = choose_files(ctx.refresh_presets().get("all")).wants
    assert {want.role for want in wants if want.url == str(output)} == {"transformer", "text_encoder", "vae"}


def weights_mb(transformer: Path, text_encoder: Path, vae: Path) -> dict[str, float]:
    work = Workload(width=64, height=64, tile_cells=None, compute_bytes=2, vae_bytes=4, guided=False)
    return estimate_memory(transformer=[transformer], text_encoder=text_encoder, vae=vae, work=work).weights_mb


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
        (("--format", "int9", "--output", "o.safetensors"), r"^int9: .* Known are auto, bf16, .*svdq_int4"),
        (("--format", "int8", "--output", "o.txt"), r"o\.txt: a name that ends in \.safetensors or \.gguf"),
        (("--format", "int8", "--output", "o.gguf"), r"int8 cannot be written into a GGUF file"),
        (("--format", "q8_0", "--output", "o.safetensors"), r"q8_0 cannot be written into a safetensors file"),
        (("--format", "q8_0", "--shard-size", "1GB", "--output", "o.gguf"), r"--shard-size: a GGUF file is one file"),
        (("--format", "int8", "--vae", "v.safetensors", "--output", "o.safetensors"), r"--vae makes a ComfyUI check"),
        (("--format", "nvfp4", "--vae", "ckpts/mine.safetensors", "--output", "o.safetensors"), r"mine.*: no VAE in"),
        (("--format", "nvfp4", "--diffusers", "--output", "o"), r"diffusers reads no nvfp4 from a folder"),
        (("--format", "bf16", "--diffusers", "--output", "o.sft"), r"o\.sft: with --diffusers it is a folder"),
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
    with pytest.raises(UserError, match=r"LoRA.*only transformers and ControlNets can be converted"):
        run(ctx, "--format", "int8", "--output", str(ctx.root / "o.safetensors"))

    path.write_bytes(b"\0" * 7)
    with pytest.raises(CheckpointError, match="too short"):
        run(ctx, "--format", "int8", "--output", str(ctx.root / "o.safetensors"))


def lora_beside(ctx: AppContext, name: str, seed: int) -> tuple[Path, torch.Tensor]:
    """A LoRA for a part of a fused linear, and the difference it makes to that part's weight."""
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, 384, generator=generator) * 0.2, torch.randn(384, 4, generator=generator) * 0.2
    path = ctx.root / name
    key = "transformer.layers.1.attention.to_v"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, path)
    return path, up @ down


def test_merged_loras_are_in_the_weights_before_they_are_rounded(
    ctx: AppContext, capsys: pytest.CaptureFixture[str]
) -> None:
    (one, one_delta), (two, two_delta) = lora_beside(ctx, "one.safetensors", 1), lora_beside(ctx, "two.safetensors", 2)
    plain, merged = ctx.root / "plain.safetensors", ctx.root / "merged.safetensors"
    run(ctx, "--format", "bf16", "--no-preset", "--output", str(plain))
    capsys.readouterr()

    flags = ("--merge-lora", f"{one}:0.5", "--merge-lora", str(two))
    run(ctx, "--format", "bf16", *flags, "--no-preset", "--output", str(merged))

    said = capsys.readouterr().out
    assert "one.safetensors: 2 of 2 keys matched" in said
    before, after = Checkpoint.open(plain).load(), Checkpoint.open(merged).load()
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["layers.1.attention.qkv.weight"]
    expected = before[changed[0]].float()
    expected[768:] += 0.5 * one_delta + two_delta
    # Added up in another order, a sum may round to the next bfloat16.
    torch.testing.assert_close(after[changed[0]].float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("format", "suffix"), [("nvfp4", ".safetensors"), ("svdq_int4", ".safetensors")])
def test_merging_reaches_packed_layers_of_every_naming(ctx: AppContext, format: str, suffix: str) -> None:
    path, delta = lora_beside(ctx, "lora.safetensors", 1)
    only = ("--keep", r"(?!layers\.1\.attention\.qkv).*", "--no-preset")
    output = ctx.root / f"out{suffix}"

    run(ctx, "--format", format, *only, "--merge-lora", str(path), "--output", str(output))

    source = load_transformer(ctx.root / "ckpts" / "mine.safetensors", torch.float32)
    expected = source.get_submodule("layers.1.attention.qkv").weight.clone()
    expected[768:] += delta
    found = load_transformer(output, torch.float32).get_submodule("layers.1.attention.qkv").dequantize()
    assert float((found - expected).norm() / expected.norm()) < 0.12


def test_a_lora_that_matches_nothing_is_refused_and_nothing_is_written(ctx: AppContext) -> None:
    path = ctx.root / "other.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(4, 4)}, path)
    before = sorted(ctx.root.rglob("*"))

    with pytest.raises(UserError, match=r"other\.safetensors: 0 of its 1 keys"):
        run(ctx, "--format", "int8", "--merge-lora", str(path), "--output", str(ctx.root / "o.safetensors"))
    with pytest.raises(UserError, match=r"--merge-lora .*nowhere\.safetensors: there is no such file"):
        run(ctx, "--format", "int8", "--merge-lora", "nowhere.safetensors", "--output", str(ctx.root / "o.safetensors"))

    assert sorted(ctx.root.rglob("*")) == before


def test_merging_into_packed_layers_is_said(ctx: AppContext, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = lora_beside(ctx, "lora.safetensors", 1)
    run(ctx, "--format", "mxfp8", "--no-preset", "--output", str(ctx.root / "mxfp8.safetensors"))
    parser = build_parser(FAMILIES, "lora_root")
    flags = ["--format", "bf16", "--no-preset", "--merge-lora", str(path), "--output", str(ctx.root / "o.safetensors")]
    capsys.readouterr()

    quantize(ctx, parse_arguments(parser, ["quantize", str(ctx.root / "mxfp8.safetensors"), *flags]))

    assert "layers of mxfp8.safetensors are packed already" in capsys.readouterr().out


# Formats of each naming; the name that the LoRA has for w3 there, and for v.
@pytest.mark.parametrize(
    ("format", "name"),
    [("nvfp4", "layers.0.attention.qkv"), ("svdq_int4", "layers.0.feed_forward.w3"),
     ("int8", "layers.0.attention.to_v"), ("q4_0", "layers.0.attention.qkv")],
)  # fmt: skip
def test_the_error_correction_lora_brings_the_weights_nearer(ctx: AppContext, format: str, name: str) -> None:
    output = ctx.root / ("out.gguf" if format.startswith("q") else "out.safetensors")

    run(ctx, "--format", format, "--error-lora", "64", "--no-preset", "--output", str(output))

    beside = Checkpoint.open(output.with_name("out_lora.safetensors"))
    assert {f"diffusion_model.{name}.lora_{part}.weight" for part in ("up", "down")} <= beside.tensors.keys()
    assert {info.dtype for info in beside.tensors.values()} == {"F32"}
    report = json.loads(Path(f"{output}.report.json").read_text())
    layers = [layer for layer in report["every_layer"] if layer["format"] == format]
    assert layers and all(layer["corrected_error"] < 0.95 * layer["relative_error"] for layer in layers)
    # What the report says holds for the model as it is loaded, all names found.
    source = load_transformer(ctx.root / "ckpts" / "mine.safetensors", torch.float32)
    packed = load_transformer(output, torch.float32)
    file = lora.read(beside.path)
    shapes = {f"{n}.weight": tuple(m.weight.shape) for n, m in source.named_modules() if hasattr(m, "weight")}
    assert lora.match(file, shapes).unmatched == ()
    for parameter, delta in lora.deltas(file, 1.0, shapes, source.get_parameter):
        module, weight = parameter.removesuffix(".weight"), source.get_parameter(parameter)
        found = packed.get_submodule(module).dequantize()
        assert (found + delta - weight).norm() < 0.95 * (found - weight).norm(), module


def test_an_error_correction_lora_of_an_older_file_is_not_left_beside_a_new_one(ctx: AppContext) -> None:
    output = str(ctx.root / "out.safetensors")
    run(ctx, "--format", "nvfp4", "--error-lora", "8", "--no-preset", "--output", output)

    with pytest.raises(
        UserError, match=r"out_lora\.safetensors corrects the errors of the file that is to be replaced"
    ):
        run(ctx, "--format", "mxfp8", "--no-preset", "--overwrite", "--output", output)
    assert run(ctx, "--format", "mxfp8", "--error-lora", "4", "--no-preset", "--overwrite", "--output", output) == 0

    with pytest.raises(UserError, match="no layer is packed"):
        run(ctx, "--format", "bf16", "--error-lora", "8", "--no-preset", "--output", str(ctx.root / "o.safetensors"))


def source_bytes(ctx: AppContext) -> int:
    return (ctx.root / "ckpts" / "mine.safetensors").stat().st_size


@pytest.mark.parametrize(("share", "suffix"), [(0.42, ".safetensors"), (0.45, ".gguf")])
def test_auto_fills_the_size_it_is_given_and_says_why(
    ctx: AppContext, share: float, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    size = round(share * source_bytes(ctx))
    output = ctx.root / f"auto{suffix}"

    run(ctx, "--recipe", "auto", "--target-size", f"{size}B", "--no-preset", "--output", str(output))

    assert 0.97 * size < output.stat().st_size <= size
    assert re.search(r"error 0\.\d+ -> 0\.\d+, excess kurtosis", capsys.readouterr().out)
    report = json.loads(Path(f"{output}.report.json").read_text())
    assert report["expected_bytes"] == pytest.approx(output.stat().st_size, rel=0.01)
    assert len(set(report["layers"])) >= 3
    # The recipe that was found makes the same file again.
    again = ctx.root / f"again{suffix}"
    run(ctx, "--recipe", f"{output}.recipe.json", "--no-preset", "--output", str(again))
    assert again.read_bytes() == output.read_bytes()


def test_auto_takes_svdquant_where_a_few_directions_are_all_that_4_bits_cannot_hold(ctx: AppContext) -> None:
    path = ctx.root / "ckpts" / "mine.safetensors"
    state = load_file(path)
    linears = re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.to|feed_forward)\S*\.weight")
    for name, tensor in state.items():
        if linears.fullmatch(name):  # a direction that every row has much of: it spends the range of each group
            direction = torch.outer(torch.randn(len(tensor)), torch.randn(tensor.shape[1]))
            state[name] = tensor + 2 * direction.bfloat16()
    save_file(state, path)
    output = ctx.root / "auto.safetensors"

    size = f"{0.5 * source_bytes(ctx):.0f}B"
    run(ctx, "--recipe", "auto", "--rank", "16", "--target-size", size, "--no-preset", "--output", str(output))

    report = json.loads(Path(f"{output}.report.json").read_text())
    assert set(report["layers"]) <= {"svdq_fp4", "svdq_int4", "bf16"}
    assert report["layers"].keys() - {"bf16"}
    assert report["expected_bytes"] == pytest.approx(output.stat().st_size, rel=0.01)
    assert "--rank 16" in json.loads(Path(f"{output}.recipe.json").read_text())["description"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "auto"), "leaves formats open, which takes a size"),
        (("--recipe", "auto", "--target-size", "1MB"), r"1\.0 MB is too small; the smallest file .* takes \d+\.\d MB"),
        (("--format", "int8", "--target-size", "9MB"), "leaves no format open"),
        (("--format", "svdq_int4", "--learned-rounding"), "Add --calibrate"),
        (("--format", "int8", "--calibrate", "1", "--learned-rounding"), "none of the formats here offers it"),
        (("--format", "int8", "--prompts", "prompts.txt"), "--prompts are for the pictures of --calibrate"),
        (("--format", "int8", "--calibrate", "-1"), "--calibrate -1"),
        (("--format", "int8", "--error-lora", "-1"), "--error-lora -1"),
        (("--format", "int8", "--calibrate", "1"), r"draws with the preset mine, whose .* is not on this machine"),
    ],
)  # fmt: skip
def test_what_calibration_and_auto_cannot_do_is_said_before_anything_is_written(
    ctx: AppContext, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ctx.root)
    Path("prompts.txt").write_text("a fox\n")
    before = sorted(ctx.root.rglob("*"))

    with pytest.raises(UserError, match=message):
        run(ctx, *arguments, "--output", "o.safetensors")

    assert sorted(ctx.root.rglob("*")) == before


# ------------------------------------------------------------------------------------------------ ControlNets


@pytest.fixture
def control_file(ctx: AppContext) -> Path:
    """A ControlNet for the tiny model, in official names, with a preset that has it as its module."""
    sizes = ControlConfig(places=(0, 15), in_channels=33, refiner="own", refiner_places=(0,))
    branch = randomise(ControlBranch(TINY, sizes), 3)
    state = {}
    for name, tensor in branch.state_dict().items():
        theirs = f"control_{name.replace('x_embedder', 'all_x_embedder.2-1')}"
        halves = {theirs: tensor}
        if ".w13." in name:
            halves = dict(zip((theirs.replace("w13", "w1"), theirs.replace("w13", "w3")), tensor.chunk(2), strict=True))
        state |= {key: half.to(torch.bfloat16).contiguous() for key, half in halves.items()}
    path = ctx.root / "ckpts" / "control.safetensors"
    save_file(state, path)
    model = MODEL | {"architecture": "z_image_control2_1", "modules": [["control.safetensors"]]}
    (ctx.root / "defaults" / "steered.json").write_text(json.dumps({"model": model}))
    ctx.refresh_presets()
    return path


def convert_control(ctx: AppContext, source: Path, *arguments: str) -> int:
    parser = build_parser(FAMILIES, "lora_root")
    return quantize(ctx, parse_arguments(parser, ["quantize", str(source), *arguments]))


def test_a_controlnet_becomes_a_module_of_a_preset_like_its_own(ctx: AppContext, control_file: Path) -> None:
    output = ctx.root / "control_nvfp4.safetensors"

    convert_control(ctx, control_file, "--format", "nvfp4", "--output", str(output))

    preset = ctx.refresh_presets().get("control_nvfp4")
    assert (preset.architecture, preset.modules) == ("z_image_control2_1", ((str(output),),))
    assert preset.urls == ("mine.safetensors",)
    assert Checkpoint.open(output).tensors["control_layers.1.attention.qkv.weight"].dtype == "U8"
    assert Checkpoint.open(output).tensors["control_layers.1.after_proj.weight"].dtype == "BF16"


@pytest.mark.parametrize("flag", [("--merge-lora", "x.safetensors"), ("--error-lora", "8"), ("--calibrate", "2")])
def test_what_takes_a_transformer_is_refused_for_a_controlnet(
    ctx: AppContext, control_file: Path, flag: tuple[str, str]
) -> None:
    save_file({"x": torch.ones(1)}, ctx.root / "x.safetensors")
    given = (flag[0], str(ctx.root / flag[1])) if flag[0] == "--merge-lora" else flag

    with pytest.raises(UserError, match=f"{flag[0]} is for transformers, and control.safetensors is a ControlNet"):
        convert_control(ctx, control_file, "--format", "int8", *given, "--output", str(ctx.root / "o.safetensors"))
