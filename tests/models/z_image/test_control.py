"""The control branch against diffusers' ZImageControlNetModel on the same weights, float32, and its loader."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file

from models.z_image import control_loader, conversion, lora
from models.z_image.config import TransformerConfig
from models.z_image.control import ControlBranch, ControlSignal
from models.z_image.control_config import ControlConfig, Refiner, release_of
from models.z_image.control_loader import plan_control, read_control_config
from models.z_image.loader import load_transformer
from models.z_image.transformer import ZImageTransformer
from shared.quant.checkpoint import Checkpoint
from shared.quant.convert import convert, convert_to_gguf, plan_conversion
from shared.quant.errors import LayerMismatchError, UnknownFormatError
from shared.quant.linear import PackedLinear
from shared.quant.recipe import Recipe
from shared.quant.targets import targets
from tests.support.tiny_model import randomise, relative_error

TOLERANCE = 1e-5  # sums of 1024 float32 products in another order differ by some 1e-7

# Four layers, two refiners: enough for places with gaps, and for hints at both refiner blocks.
TRUNK = TransformerConfig(
    dim=96, n_layers=4, n_refiner_layers=2, n_heads=3, cap_feat_dim=64, ffn_dim=256, time_dim=96, axes_dims=(8, 12, 12)
)

# release -> what diffusers calls its parts
RELEASES: dict[str, dict[str, Any]] = {
    "1.0": {"control_layers_places": [0, 2], "control_in_dim": 16},
    "2.0": {
        "control_layers_places": [0, 1, 2, 3],
        "control_refiner_layers_places": [0, 1],
        "control_in_dim": 33,
        "add_control_noise_refiner": "control_layers",
    },
    "2.1": {
        "control_layers_places": [0, 2],
        "control_refiner_layers_places": [0, 1],
        "control_in_dim": 33,
        "add_control_noise_refiner": "control_noise_refiner",
    },
    "2.1-lite": {
        "control_layers_places": [0],
        "control_refiner_layers_places": [0, 1],
        "control_in_dim": 33,
        "add_control_noise_refiner": "control_noise_refiner",
    },
}


@pytest.fixture(scope="module")
def trunk() -> ZImageTransformer2DModel:
    config = {k: v for k, v in TRUNK.as_diffusers().items() if not k.startswith("_")}
    return randomise(ZImageTransformer2DModel(**config), 11)


@pytest.fixture(scope="module")
def trunk_file(tmp_path_factory: pytest.TempPathFactory, trunk: ZImageTransformer2DModel) -> Path:
    path = tmp_path_factory.mktemp("trunk") / "transformer.safetensors"
    save_file(trunk.state_dict(), path)
    return path


def reference_branch(release: str, trunk: ZImageTransformer2DModel) -> ZImageControlNetModel:
    sizes = {"dim": TRUNK.dim, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3}
    branch = randomise(ZImageControlNetModel(**RELEASES[release], **sizes), 12)
    return ZImageControlNetModel.from_transformer(branch, trunk)


def branch_state(branch: ZImageControlNetModel) -> dict[str, torch.Tensor]:
    """What a published file holds: the branch's own tensors, and in 2.0 a refiner that was never trained."""
    state = {n: t.contiguous().clone() for n, t in branch.state_dict().items() if n.startswith("control_")}
    if branch.add_control_noise_refiner == "control_layers":
        for name, tensor in list(state.items()):
            for i in (0, 1):
                if name.startswith(f"control_layers.{i}."):
                    untrained = torch.zeros_like(tensor) if "_proj" in name else tensor.clone()
                    state[name.replace("control_layers", "control_noise_refiner")] = untrained
    return state


@pytest.fixture(scope="module")
def load(trunk: ZImageTransformer2DModel, trunk_file: Path) -> Callable[[str], Any]:
    """release -> (our transformer with the branch, diffusers' branch)."""

    @cache
    def load(release: str) -> tuple[ZImageTransformer, ZImageControlNetModel]:
        theirs = reference_branch(release, trunk)
        path = trunk_file.with_name(f"control_{release}.safetensors")
        save_file(branch_state(theirs), path)
        return load_transformer([trunk_file, path], torch.float32), theirs

    return load


# What the published branches have beside a trunk of 30 layers. 8-step, Tile and Base are 2.1 with other weights.
PUBLISHED_PLACES = {
    "1.0": list(range(0, 30, 5)),
    "2.0": list(range(0, 30, 2)),
    "2.1": list(range(0, 30, 2)),
    "2.1-lite": [0, 10, 20],
}


def inputs(release: str, *, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Latents, times, captions of different padded length, control context. 60 image tokens: four of padding."""
    captions = [torch.randn(n, TRUNK.cap_feat_dim) for n in (20, 40)[:batch]]
    context = torch.randn(batch, RELEASES[release]["control_in_dim"], 20, 12)
    return torch.randn(batch, 16, 20, 12), torch.rand(batch), captions, context


@pytest.mark.parametrize("release", RELEASES)
def test_agrees_with_diffusers(load: Callable[[str], Any], trunk: ZImageTransformer2DModel, release: str) -> None:
    ours, theirs = load(release)
    assert_agreement(ours, theirs, trunk, release)


@pytest.mark.parametrize("release", PUBLISHED_PLACES)
def test_agrees_with_diffusers_at_the_published_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    config = {k: v for k, v in replace(TRUNK, n_layers=30).as_diffusers().items() if not k.startswith("_")}
    trunk = randomise(ZImageTransformer2DModel(**config), 11)
    monkeypatch.setitem(RELEASES, release, RELEASES[release] | {"control_layers_places": PUBLISHED_PLACES[release]})
    theirs = reference_branch(release, trunk)
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    save_file(branch_state(theirs), tmp_path / "control.safetensors")

    ours = load_transformer([tmp_path / "trunk.safetensors", tmp_path / "control.safetensors"], torch.float32)

    assert_agreement(ours, theirs, trunk, release)


def assert_agreement(ours: ZImageTransformer, theirs: Any, trunk: Any, release: str) -> None:
    latents, time, captions, context = inputs(release)
    # diffusers' trunk refines without the hints that its branch refines with; here it is given the branch's stream.
    refined: list[torch.Tensor] = []
    seen = theirs.control_layers[0].register_forward_hook(lambda _m, args, _out: refined.append(args[1]))

    with torch.no_grad():
        samples = theirs(list(latents[:, :, None]), time, captions, list(context[:, :, None]), conditioning_scale=0.7)
        hook = trunk.layers[0].register_forward_pre_hook(lambda _m, args: (refined[-1], *args[1:]))
        expected = trunk(
            list(latents[:, :, None]), time, captions, controlnet_block_samples=samples, return_dict=False
        )[0]  # fmt: skip
        hook.remove()
        seen.remove()
        result = ours(latents, time, captions, ControlSignal(context, 0.7))

    assert relative_error(result, torch.stack(list(expected))[:, :, 0]) <= TOLERANCE


@pytest.mark.parametrize("text", ["{", "3", "[" * 100_000], ids=["cut", "number", "brackets"])
def test_a_header_config_of_something_else_is_passed_over(tmp_path: Path, text: str) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "c.safetensors", metadata={"config": text})

    assert control_loader._header_config(Checkpoint.open(tmp_path / "c.safetensors")) == {}


@pytest.mark.parametrize("release", ["1.0", "2.1"])
def test_control_changes_the_answer_and_weight_0_does_not(load: Callable[[str], Any], release: str) -> None:
    model, _ = load(release)
    latents, time, captions, context = inputs(release)

    plain = model(latents, time, captions)

    assert relative_error(model(latents, time, captions, ControlSignal(context, 1.0)), plain) > 0.01
    assert torch.equal(model(latents, time, captions, ControlSignal(context, 0.0)), plain)


def test_one_context_serves_a_whole_batch(load: Callable[[str], Any]) -> None:
    model, _ = load("2.1")
    latents, time, captions, context = inputs("2.1")

    shared = model(latents, time, captions, ControlSignal(context[:1], 0.5))
    repeated = model(latents, time, captions, ControlSignal(context[:1].repeat(2, 1, 1, 1), 0.5))

    assert relative_error(shared, repeated) <= TOLERANCE


def test_a_context_of_other_channels_or_size_is_refused(load: Callable[[str], Any]) -> None:
    model, _ = load("1.0")
    latents, time, captions, context = inputs("1.0")

    with pytest.raises(ValueError, match="33 channels, expected 16"):
        model(latents, time, captions, ControlSignal(torch.randn(1, 33, 20, 12), 1.0))
    with pytest.raises(ValueError, match="does not go with 2 images"):
        model(latents, time, captions, ControlSignal(context[:, :, :10], 1.0))


def test_control_without_a_branch_is_an_error(trunk_file: Path) -> None:
    model = load_transformer(trunk_file, torch.float32)
    latents, time, captions, context = inputs("1.0")

    with pytest.raises(ValueError, match="without a control branch"):
        model(latents, time, captions, ControlSignal(context, 1.0))


# ------------------------------------------------------------------------------------------------ published sizes


def published(layers: int, channels: int, *, refiner_hints: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of a published branch (6B trunk, diffusers naming), from the keys that decide its release."""
    shapes = {"control_all_x_embedder.2-1.weight": (3840, channels * 4)}
    for stage, count, hints in (("control_layers", layers, True), ("control_noise_refiner", 2, refiner_hints)):
        for i in range(count):
            shapes[f"{stage}.{i}.attention_norm1.weight"] = (3840,)
            if hints:
                shapes[f"{stage}.{i}.after_proj.weight"] = (1, 8)  # its content is read, its shape is not
    return shapes


@pytest.mark.parametrize(
    ("layers", "channels", "hints", "places", "refiner", "words"),
    [
        pytest.param(6, 16, False, (0, 5, 10, 15, 20, 25), "plain", "Union 1.0", id="1.0"),
        pytest.param(15, 33, True, tuple(range(0, 30, 2)), "own", r"2\.1 \(Union, 8-step, Tile or Base\)", id="2.1"),
        pytest.param(3, 33, True, (0, 10, 20), "own", r"2\.1-lite", id="2.1-lite"),
    ],
)
def test_published_releases_are_told_by_their_tensors(
    tmp_path: Path, layers: int, channels: int, hints: bool, places: tuple[int, ...], refiner: str, words: str
) -> None:
    path = tmp_path / "any_name.safetensors"
    save_file(
        {n: torch.ones(s, dtype=torch.bfloat16) for n, s in published(layers, channels, refiner_hints=hints).items()},
        path,
    )
    checkpoint = Checkpoint.open(path)

    config = read_control_config(checkpoint, plan_control(checkpoint))

    assert (config.places, config.in_channels, config.refiner) == (places, channels, refiner)
    assert config.can_inpaint == (channels == 33)
    assert re.search(words, release_of(config))


@pytest.mark.parametrize(
    ("layers", "channels", "refiner", "parameters"),
    [
        pytest.param(6, 16, "plain", 1_550_778_368, id="1.0"),
        pytest.param(15, 33, "layers", 2_950_156_800, id="2.0"),
        pytest.param(15, 33, "own", 3_356_225_792, id="2.1"),
        pytest.param(3, 33, "own", 1_008_308_480, id="2.1-lite"),
    ],
)
def test_the_published_sizes_have_the_published_parameter_counts(
    layers: int, channels: int, refiner: Refiner, parameters: int
) -> None:
    with torch.device("meta"):
        branch = ControlBranch(
            TransformerConfig(), ControlConfig(places=tuple(range(layers)), in_channels=channels, refiner=refiner)
        )

    assert sum(p.numel() for p in branch.parameters()) == parameters


def test_the_refiner_of_2_0_that_was_never_trained_is_recognised_and_named(tmp_path: Path) -> None:
    path = tmp_path / "union_2.1_says_its_name.safetensors"
    state = {n: torch.ones(s) for n, s in published(15, 33, refiner_hints=True).items()}
    for i in (0, 1):
        state[f"control_noise_refiner.{i}.after_proj.weight"].zero_()
    save_file(state, path)
    checkpoint = Checkpoint.open(path)

    config = read_control_config(checkpoint, plan_control(checkpoint))

    assert config.refiner == "layers"
    assert "2.0 (its own refiner was never trained" in release_of(config)


# ------------------------------------------------------------------------------------------------ files


def test_a_branch_inside_the_transformers_own_file_is_loaded(
    tmp_path: Path, trunk: ZImageTransformer2DModel, load: Callable[[str], Any]
) -> None:
    apart, theirs = load("2.1")
    path = tmp_path / "merged.safetensors"
    merged = trunk.state_dict() | branch_state(theirs)
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in merged.items()}, path)
    latents, time, captions, context = inputs("2.1")

    together = load_transformer(path, torch.float32)

    signal = ControlSignal(context, 0.7)
    assert torch.equal(together(latents, time, captions, signal), apart(latents, time, captions, signal))


def test_a_branch_for_another_model_is_named(tmp_path: Path, trunk: ZImageTransformer2DModel, trunk_file: Path) -> None:
    path = tmp_path / "control.safetensors"
    state = branch_state(reference_branch("1.0", trunk))
    state["control_layers.1.feed_forward.w2.weight"] = torch.randn(96, 512)
    save_file(state, path)

    with pytest.raises(LayerMismatchError, match=r"(?s)control\.safetensors.*w2.*\[96, 512\].*other sizes"):
        load_transformer([trunk_file, path], torch.float32)


def test_more_control_layers_than_the_trunk_has_are_refused(tmp_path: Path, trunk_file: Path) -> None:
    path = tmp_path / "control.safetensors"
    save_file({n: torch.ones(s) for n, s in published(6, 16, refiner_hints=False).items()}, path)

    with pytest.raises(LayerMismatchError, match=r"6 control layers .* of 4 transformer layers"):
        load_transformer([trunk_file, path], torch.float32)


def test_a_module_that_is_no_control_branch_is_named(trunk_file: Path) -> None:
    with pytest.raises(LayerMismatchError, match="no Fun ControlNet in this file"):
        load_transformer([trunk_file, trunk_file], torch.float32)


def test_two_branches_at_once_are_refused(trunk_file: Path) -> None:
    with pytest.raises(UnknownFormatError, match="one ControlNet at a time"):
        load_transformer([trunk_file, trunk_file, trunk_file], torch.float32)


def test_a_packed_branch_steers_like_its_own_expanded_weights(
    tmp_path: Path, trunk: ZImageTransformer2DModel, trunk_file: Path
) -> None:
    plain, packed = {}, {}
    for name, tensor in branch_state(reference_branch("2.1", trunk)).items():
        if tensor.ndim == 2 and ("attention" in name or "feed_forward" in name):
            scale = tensor.abs().max() / 448
            codes = (tensor / scale).to(torch.float8_e4m3fn)
            packed |= {name: codes, name.replace(".weight", ".weight_scale"): scale}
            plain[name] = codes.float() * scale
        else:
            packed[name] = plain[name] = tensor
    save_file(packed, tmp_path / "packed.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    latents, time, captions, context = inputs("2.1")

    models = [load_transformer([trunk_file, tmp_path / f"{n}.safetensors"], torch.float32) for n in ("packed", "plain")]

    assert any(isinstance(module, PackedLinear) for module in models[0].control.modules())
    ours, theirs = (model(latents, time, captions, ControlSignal(context, 0.7)) for model in models)
    assert relative_error(ours, theirs) <= TOLERANCE


def test_a_lora_reaches_the_transformer_and_leaves_the_branch_alone(
    tmp_path: Path, load: Callable[[str], Any], trunk_file: Path
) -> None:
    pairs = {
        "diffusion_model.layers.1.attention.to_v.lora_A.weight": torch.randn(4, TRUNK.dim),
        "diffusion_model.layers.1.attention.to_v.lora_B.weight": torch.randn(TRUNK.dim, 4),
    }
    save_file(pairs, tmp_path / "lora.safetensors")
    model, _ = load("2.1")
    latents, time, captions, context = inputs("2.1")
    before = model(latents, time, captions, ControlSignal(context, 0.7))

    (match,) = lora.apply(model, [lora.read(tmp_path / "lora.safetensors")], [1.0])
    changed = model(latents, time, captions, ControlSignal(context, 0.7))
    hooked = [name for name, module in model.named_modules() if module._forward_hooks]
    lora.apply(model, [], [])

    assert (match.matched > 0, match.unmatched) == (True, ())
    assert relative_error(changed, before) > 1e-3
    assert hooked == ["layers.1.attention.qkv"]
    assert torch.equal(model(latents, time, captions, ControlSignal(context, 0.7)), before)


@pytest.mark.parametrize(
    ("release", "recipe", "name"),
    [
        ("2.1", "int8", "control_layers.0.attention.to_q.weight._data"),
        ("2.0", "mxfp8", "control_layers.0.attention.to_q.weight"),
        ("1.0", "q8_0", "control_layers.0.attention.to_q.weight"),
        ("2.1-lite", "bf16", "control_noise_refiner.1.after_proj.bias"),
    ],
)
def test_a_converted_branch_keeps_its_names_and_steers_the_same_way(
    load: Callable[[str], Any], trunk_file: Path, tmp_path: Path, release: str, recipe: str, name: str
) -> None:
    whole, _ = load(release)
    model = conversion.open_model(trunk_file.with_name(f"control_{release}.safetensors"))
    known = targets()
    chosen = Recipe.load(conversion.RECIPES / f"{recipe}.json", [*known, "bf16"])
    gguf = recipe == "q8_0"
    plan = plan_conversion(model, chosen, known, gguf=gguf)
    output = tmp_path / ("branch.gguf" if gguf else "branch.safetensors")

    if gguf:
        reports = convert_to_gguf(plan, output, metadata={}, on_progress=lambda *_: None)
    else:
        metadata = conversion.header(plan.naming, plan.formats, model.config, None)
        reports = convert(plan, output, rank=1, metadata=metadata, identity=1, on_progress=lambda *_: None)
    packed = load_transformer([trunk_file, output], torch.float32)

    assert name in Checkpoint.open(output).tensors
    assert packed.control.config == whole.control.config
    is_packed = any(isinstance(module, PackedLinear) for module in packed.control.modules())
    assert is_packed == (recipe != "bf16")
    assert len([r for r in reports if r.relative_error > 0]) > 5 or recipe == "bf16"
    latents, time, captions, context = inputs(release)
    plain = whole(latents, time, captions, None)
    steered = whole(latents, time, captions, ControlSignal(context, 1.0)) - plain
    ours = packed(latents, time, captions, ControlSignal(context, 1.0)) - plain
    assert relative_error(ours, steered) < 0.08


def test_a_truncated_branch_is_named_before_it_is_converted(
    load: Callable[[str], Any], trunk_file: Path, tmp_path: Path
) -> None:
    load("2.1")
    state = load_file(trunk_file.with_name("control_2.1.safetensors"))
    del state["control_layers.1.feed_forward.w2.weight"]
    save_file(state, tmp_path / "short.safetensors")

    with pytest.raises(LayerMismatchError, match=r"layers\.1\.feed_forward\.w2\.weight"):
        conversion.open_model(tmp_path / "short.safetensors")
