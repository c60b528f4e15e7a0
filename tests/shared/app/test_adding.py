"""`presets --add`: files that lie in a folder become presets by what their tensors say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from models.z_image.conversion import open_model
from models.z_image.loader import load_transformer, to_diffusers
from models.z_image.transformer import ZImageTransformer
from shared.app.adding import Added, add_presets
from shared.app.context import AppContext
from shared.app.families import load_families
from shared.cli.commands import presets
from shared.cli.parser import build_parser, parse_arguments
from shared.quant.errors import UserError
from tests.support.big_files import transformer_shapes, write_safetensors
from tests.support.tiny_model import TINY, randomise

FAMILIES = load_families(Path(models.__path__[0]))


@pytest.fixture
def ctx(tmp_path: Path) -> AppContext:
    """A program folder with the 6B presets, whose files are not here, and one of a tiny model, whose file is."""
    (tmp_path / "defaults").mkdir()
    (tmp_path / "ckpts").mkdir()
    big = {"architecture": "z_image", "URLs": ["turbo.safetensors"], "gigabytes": {"transformer": 12.3, "VAE": 0.2}}
    write_preset(tmp_path, "z_image", {"name": "Turbo", **big}, num_inference_steps=8)
    write_preset(tmp_path, "z_image_base", {"name": "Base", **big, "architecture": "z_image_base"})
    write_preset(tmp_path, "z_image_twinflow_turbo", {"name": "Twin", **big}, num_inference_steps=2)
    write_preset(tmp_path, "tiny", {"name": "Tiny", "architecture": "z_image", "URLs": ["tiny.safetensors"]},
                 num_inference_steps=5)  # fmt: skip
    write_tiny(tmp_path / "ckpts" / "tiny.safetensors")
    return AppContext.create(root=tmp_path, families=FAMILIES)


def write_preset(root: Path, name: str, model: dict[str, object], **settings: object) -> None:
    (root / "defaults" / f"{name}.json").write_text(json.dumps({"model": model, **settings}))


def write_tiny(path: Path, prefix: str = "", **more: torch.Tensor) -> Path:
    state = to_diffusers(randomise(ZImageTransformer(TINY), 1).state_dict())
    save_file({f"{prefix}{name}": tensor.bfloat16().contiguous() for name, tensor in state.items()} | more, path)
    return path


def write_big(path: Path, *, second_time: bool = False) -> Path:
    """A file of the published sizes that holds no numbers and takes no room."""
    tensors = {name: ("BF16", shape) for name, shape in transformer_shapes().items()}
    if second_time:
        tensors |= {
            n.replace("t_embedder", "t_embedder_2"): t for n, t in tensors.items() if n.startswith("t_embedder")
        }
    write_safetensors(path, tensors, None)
    return path


def one(ctx: AppContext, path: Path, like: str = "") -> Added:
    (added,) = add_presets(ctx, [path], like)
    return added


def test_a_network_takes_the_settings_of_the_preset_with_its_sizes(ctx: AppContext, tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "My finetune v2.safetensors")

    added = one(ctx, file)

    preset = ctx.refresh_presets().get("my_finetune_v2")
    assert added.preset == preset.id
    assert (preset.urls, preset.settings["num_inference_steps"]) == ((str(file),), 5)
    assert ctx.presets.problems == []
    assert load_transformer(preset.urls[0], torch.float32).config == TINY


@pytest.mark.skipif(__import__("sys").platform == "win32", reason="the files take no room only where files have holes")
def test_the_published_sizes_are_turbos_unless_tensors_or_the_user_say_otherwise(
    ctx: AppContext, tmp_path: Path
) -> None:
    plain, twin = write_big(tmp_path / "a.safetensors"), write_big(tmp_path / "b.safetensors", second_time=True)
    base = write_big(tmp_path / "c.safetensors")

    ids = [one(ctx, plain).preset, one(ctx, twin).preset, one(ctx, base, like="z_image_base").preset]

    steps = [ctx.presets.get(preset).settings.get("num_inference_steps") for preset in ids]
    assert steps[:2] == [8, 2]
    assert ctx.presets.get(ids[2]).architecture == "z_image_base"
    written = json.loads((ctx.root / "finetunes" / "a.json").read_text())
    assert written["model"]["gigabytes"] == {"VAE": 0.2}, "what the other transformer weighs says nothing of this one"


def test_a_checkpoint_of_all_parts_brings_them(ctx: AppContext, tmp_path: Path) -> None:
    parts = {
        "text_encoders.qwen3_4b.transformer.model.norm.weight": torch.ones(8),
        "vae.decoder.conv_in.weight": torch.ones(8, 16, 3, 3),
    }
    file = write_tiny(tmp_path / "all.safetensors", "model.diffusion_model.", **parts)

    added = one(ctx, file)

    assert ctx.presets.problems == []
    preset = ctx.presets.get(added.preset)
    assert preset.urls == preset.text_encoder_urls == preset.vae_urls == (str(file),)


def test_a_folder_is_gone_through_and_what_is_no_model_is_told(
    ctx: AppContext, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dropped"
    folder.mkdir()
    write_tiny(folder / "new.safetensors")
    save_file({"layers.0.attention.to_q.lora_A.weight": torch.zeros(8, 384)}, folder / "style.safetensors")
    (folder / "cut.safetensors").write_bytes(b"\xff" * 40)
    arguments = parse_arguments(
        build_parser(FAMILIES, "lora_root"), ["presets", "--add", str(folder), str(tmp_path / "ckpts"), "nothing.gguf"]
    )

    code = presets(ctx, arguments)

    said = capsys.readouterr().out
    assert code == 0
    assert [path.name for path in (ctx.root / "finetunes").iterdir()] == ["new.json"]
    for words in ("--preset new", "a LoRA goes with a model", "cannot be read", "this preset already", "--preset tiny",
                  "no such file"):  # fmt: skip
        assert words in said


def test_adding_a_file_twice_makes_one_preset(ctx: AppContext, tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "new.safetensors")

    assert one(ctx, file).preset == one(ctx, file).preset == "new"

    other = write_tiny(tmp_path / "ckpts" / "new.safetensors")
    assert one(ctx, other).preset == "new_2", "another file of that name"


def test_sizes_that_no_preset_has_are_an_answer_and_not_a_guess(ctx: AppContext, tmp_path: Path) -> None:
    wide = ZImageTransformer(replace(TINY, ffn_dim=512))
    save_file(to_diffusers(wide.state_dict()), tmp_path / "wide.safetensors")

    added = one(ctx, tmp_path / "wide.safetensors")

    assert added.preset == "" and "--like" in added.words
    with pytest.raises(UserError, match='no preset "z_imag"'):
        one(ctx, tmp_path / "wide.safetensors", like="z_imag")
    assert open_model(tmp_path / "wide.safetensors").config["dim"] == TINY.dim
