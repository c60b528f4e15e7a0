"""Every format that can be written: the reference's file converted, loaded, and close to the reference as promised."""

from __future__ import annotations

import base64
import json
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file

from models.z_image import conversion
from models.z_image.config import TransformerConfig
from models.z_image.keys import slot_of
from models.z_image.loader import load_transformer
from models.z_image.transformer import ZImageTransformer
from shared.quant.checkpoint import Checkpoint
from shared.quant.convert import (
    Conversion,
    Job,
    LayerReport,
    Means,
    OnProgress,
    convert,
    convert_to_gguf,
    plan_conversion,
)
from shared.quant.convert import layers as converting
from shared.quant.errors import LayerMismatchError, UserError
from shared.quant.layout import Layout
from shared.quant.linear import JoinedLinear, PackedLinear
from shared.quant.recipe import Recipe
from shared.quant.safetensors_writer import SafetensorsWriter
from shared.quant.targets import PLAIN, targets
from tests.support.packed_model import State, forward, official_names
from tests.support.tiny_model import relative_error

# Format -> the most that it may change weights of normal numbers by (formats.md; SVDQ: rank 32 of a random matrix).
LEVELS = {
    "int8": 0.009, "int8_comfy": 0.009, "int8_convrot": 0.009, "int8_tensor": 0.013,
    "fp8": 0.03, "fp8_scaled": 0.03, "fp8_scaled_rows": 0.03, "fp8_scaled_blocks": 0.03, "fp8_legacy": 0.03,
    "fp8_e5m2": 0.06, "fp8_scaled_e5m2": 0.06, "mxfp8": 0.03, "mxfp8_e8m0": 0.03, "nvfp4": 0.1,
    "svdq_int4": 0.11, "svdq_fp4": 0.1, "nvfp4_mixed": 0.1, "bf16": 0.0, "fp16": 0.0, "fp32": 0.0,
    "q8_0": 0.006, "q5_1": 0.042, "q5_0": 0.047, "q4_1": 0.085, "q4_0": 0.095,
}  # fmt: skip
GGUF = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, reference_transformer: ZImageTransformer2DModel) -> Path:
    path = tmp_path_factory.mktemp("source") / "reference.safetensors"
    save_file(reference_transformer.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def reference(source: Path) -> torch.Tensor:
    return forward(load_transformer(source, torch.float32))


def plan(source: Path, name: str, *, gguf: bool = False) -> Conversion:
    known = targets()
    recipe = Recipe.load(conversion.RECIPES / f"{name}.json", [*known, *PLAIN])
    return plan_conversion(conversion.open_model(source), recipe, known, gguf=gguf)


def converted(
    source: Path, name: str, folder: Path, *, suffix: str = "", rank: int = 32
) -> tuple[Path, list[LayerReport]]:
    suffix = suffix or (".gguf" if name in GGUF else ".safetensors")
    output = folder / f"{name}{suffix}"
    planned = plan(source, name, gguf=suffix == ".gguf")
    config = conversion.open_model(source).config
    metadata = conversion.header(planned.naming, planned.formats, config, rank)
    if suffix == ".gguf":
        return output, convert_to_gguf(planned, output, metadata={"config": metadata["config"]}, on_progress=ignore)
    reports = convert(planned, output, rank=rank, metadata=metadata, identity=name, on_progress=ignore)
    return output, reports


def ignore(done: int, total: int, module: str) -> None:
    assert 0 <= done <= total


@pytest.mark.parametrize("name", list(LEVELS))
def test_a_converted_file_loads_and_is_as_close_as_its_format(
    name: str, source: Path, reference: torch.Tensor, tmp_path: Path
) -> None:
    output, reports = converted(source, name, tmp_path)

    assert [p.name for p in tmp_path.iterdir()] == [output.name]
    packed = [r for r in reports if r.format not in PLAIN]
    assert all(r.relative_error <= LEVELS[name] for r in packed), max(packed, key=lambda r: r.relative_error)
    assert all(r.relative_error < 0.002 for r in reports if r not in packed)
    model = load_transformer(output, torch.float32)
    linears = [m for m in model.modules() if isinstance(m, PackedLinear | JoinedLinear)]
    assert bool(linears) == bool(packed)
    # Errors of layers add up to less than three times that of one.
    assert relative_error(forward(model), reference) <= max(3 * LEVELS[name], 0.01)
    if output.suffix == ".safetensors":
        assert load_file(output).keys() == Checkpoint.open(output).tensors.keys()


def test_reports_are_true_of_the_file(source: Path, tmp_path: Path) -> None:
    output, reports = converted(source, "nvfp4", tmp_path)

    ours, theirs = (load_transformer(path, torch.float32) for path in (output, source))
    report = next(r for r in reports if r.module == "layers.0.attention.qkv")
    weight = theirs.get_submodule(report.module).weight
    found = ours.get_submodule(report.module).dequantize()
    assert report.relative_error == pytest.approx(relative_error(found, weight), rel=1e-4)
    assert report.shape == tuple(weight.shape)


def test_every_recipe_of_the_program_is_tested() -> None:
    assert {path.stem for path in conversion.RECIPES.glob("*.json")} - {"auto"} == set(LEVELS)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("int8", 240), ("int8_comfy", 170), ("fp8", 170), ("fp8_scaled", 170), ("mxfp8", 170), ("nvfp4", 180),
        ("svdq_int4", 136), ("svdq_fp4", 136), ("q8_0", 180), ("q4_0", 180), ("bf16", 0), ("fp16", 0),
    ],
)  # fmt: skip
def test_recipes_pack_the_layers_of_the_6b_model_that_published_files_pack(name: str, packed: int) -> None:
    with torch.device("meta"):
        model = ZImageTransformer(TransformerConfig())
    recipe = Recipe.load(conversion.RECIPES / f"{name}.json", [*targets(), *PLAIN])
    naming = targets()[name].naming if packed else "official"
    places = [
        place
        for module, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear)
        for place in conversion.places(module, naming, packed=True)
    ]

    chosen = Counter(recipe.format_of(place.official[0]) for place in places)

    expected = {name: packed} if packed else {name: len(places)}
    assert {k: v for k, v in chosen.items() if k != "bf16" or name == "bf16"} == expected


def test_int8_files_have_diffusers_names_and_mmgps_map(source: Path, tmp_path: Path) -> None:
    output, _ = converted(source, "int8", tmp_path)

    found = Checkpoint.open(output)
    said = json.loads(base64.b64decode(found.metadata["quantization_map_base64"]))
    assert found.metadata["quantization_format"] == "quanto"
    assert set(said) == {n.removesuffix(".weight._data") for n in found.tensors if n.endswith("._data")}
    assert "layers.1.attention.to_k" in said
    assert not any(name.startswith(("noise_refiner", "context_refiner", "all_x_embedder")) for name in said)
    assert found.tensors["layers.0.attention.to_q.weight._scale"].dtype == "BF16"


def test_svdq_files_have_nunchakus_names_and_header(source: Path, tmp_path: Path) -> None:
    output, _ = converted(source, "svdq_int4", tmp_path, rank=48)

    found = Checkpoint.open(output)
    assert json.loads(found.metadata["quantization_config"])["rank"] == 48
    assert json.loads(found.metadata["quantization_config"])["skip_refiners"] is False
    assert found.tensors["layers.0.attention.to_qkv.proj_down"].shape == (384, 48)
    assert found.tensors["layers.0.feed_forward.net.0.proj.qweight"].shape == (2048, 192)
    modules = {n.rpartition(".")[0].partition("0.")[2] for n in found.tensors if n.startswith("layers.0.")}
    assert modules == {
        "attention.to_qkv", "attention.to_out.0", "attention.norm_q", "attention.norm_k", "feed_forward.net.0.proj",
        "feed_forward.net.2", "adaLN_modulation.0", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2",
    }  # fmt: skip


def test_comfy_files_have_official_names(
    source: Path, reference_transformer: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    output, _ = converted(source, "bf16", tmp_path)

    assert Checkpoint.open(output).tensors.keys() == official_names(reference_transformer.state_dict()).keys()


def test_formats_that_differ_in_spelling_hold_the_same_numbers(source: Path, tmp_path: Path) -> None:
    for one, other in (("fp8_scaled", "fp8_legacy"), ("mxfp8", "mxfp8_e8m0")):
        models = [load_transformer(converted(source, name, tmp_path)[0], torch.float32) for name in (one, other)]
        ours, theirs = (m.get_submodule("layers.0.attention.qkv").dequantize() for m in models)
        assert torch.equal(ours, theirs)

    types = {name: Checkpoint.open(tmp_path / f"{name}.safetensors").tensors for name in ("fp8_legacy", "mxfp8_e8m0")}
    assert "scaled_fp8" in types["fp8_legacy"]
    assert "layers.0.attention.qkv.scale_weight" in types["fp8_legacy"]
    assert types["mxfp8_e8m0"]["layers.0.attention.qkv.weight_scale"].dtype == "F8_E8M0"


def test_shards_hold_what_one_file_would_and_are_of_the_size_asked_for(source: Path, tmp_path: Path) -> None:
    whole, expected = converted(source, "nvfp4", tmp_path)
    output, limit = tmp_path / "split" / "model.safetensors", whole.stat().st_size // 3

    reports = convert_in_shards(source, output, limit)

    index = output.with_name("model.safetensors.index.json")
    said = json.loads(index.read_text(encoding="utf-8"))
    files = sorted(set(said["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) >= 3
    assert {p.name for p in output.parent.iterdir()} == {index.name, *files}
    for file in files:
        nbytes = sum(info.nbytes for info in Checkpoint.open(output.with_name(file)).tensors.values())
        assert nbytes <= limit
    ours, theirs = Checkpoint.open(index).load(), load_file(whole)
    assert ours.keys() == theirs.keys()
    assert said["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in theirs.values())
    assert all(torch.equal(ours[n].flatten().view(torch.uint8), theirs[n].flatten().view(torch.uint8)) for n in ours)
    assert reports == expected


def test_killed_shards_go_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    limit = source.stat().st_size // 8
    convert_in_shards(source, tmp_path / "whole" / "m.safetensors", limit)
    seen: list[str] = []

    def interrupt(done: int, total: int, module: str) -> None:
        seen.append(module)
        if len(seen) == 30:
            raise KeyboardInterrupt

    again = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        convert_in_shards(source, again / "m.safetensors", limit, interrupt)
    assert not list(again.glob("*.safetensors"))
    assert len(list(again.glob("*.part"))) > 1
    convert_in_shards(source, again / "m.safetensors", limit)

    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def convert_in_shards(
    source: Path, output: Path, shard_bytes: int, on_progress: OnProgress | None = None
) -> list[LayerReport]:
    layout = Layout(shard_bytes=shard_bytes)
    return convert(
        plan(source, "nvfp4"), output, rank=0, metadata={}, identity=0, on_progress=on_progress or ignore, layout=layout
    )


@pytest.mark.parametrize("naming", ["official", "diffusers", "nunchaku"])
@pytest.mark.parametrize("packed", [True, False])
def test_places_are_what_the_loader_makes_of_the_names(naming: str, packed: bool) -> None:
    for module in ("x_embedder", "layers.3.attention.qkv", "noise_refiner.0.feed_forward.w13", "layers.3.attention.out",
                   "layers.0.feed_forward.w2", "layers.0.attention.q_norm", "final_layer.linear"):  # fmt: skip
        for place in conversion.places(module, naming, packed=packed):
            assert slot_of(place.module) == (module, place.blocks, place.of)


@pytest.mark.parametrize("naming", ["official", "packed"])
def test_other_sources_give_the_same_file(
    naming: str, source: Path, reference_transformer: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    """Official naming behind a prefix holds the same numbers; an exactly packed source is unpacked on the way."""
    other = tmp_path / "other.safetensors"
    if naming == "official":
        state = official_names(reference_transformer.state_dict())
        save_file({f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}, other)
        expected, _ = converted(source, "mxfp8", tmp_path)
    else:
        other, _ = converted(source, "svdq_int4", tmp_path, rank=16)
        unpacked: State = {}
        model = load_transformer(other, torch.float32)
        for name, parameter in model.named_parameters():
            unpacked[name] = parameter.data
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                unpacked[f"{name}.weight"] = module.dequantize()
        save_file(unpacked, tmp_path / "unpacked.safetensors")
        expected, _ = converted(tmp_path / "unpacked.safetensors", "mxfp8", tmp_path)
    (tmp_path / "again").mkdir()

    output, _ = converted(other, "mxfp8", tmp_path / "again")

    ours, theirs = load_file(output), load_file(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n].view(torch.uint8), theirs[n].view(torch.uint8)) for n in ours)


def test_a_killed_conversion_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    whole, expected = converted(source, "nvfp4_mixed", tmp_path)
    (tmp_path / "again").mkdir()
    planned = plan(source, "nvfp4_mixed")
    metadata = conversion.header(planned.naming, planned.formats, conversion.open_model(source).config, None)
    output = tmp_path / "again" / whole.name
    seen: list[str] = []

    def interrupt(done: int, total: int, module: str) -> None:
        seen.append(module)
        if len(seen) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(planned, output, rank=32, metadata=metadata, identity="nvfp4_mixed", on_progress=interrupt)
    assert not output.exists()

    output, reports = converted(source, "nvfp4_mixed", tmp_path / "again")

    assert output.read_bytes() == whole.read_bytes()
    assert reports == expected


def test_a_killed_gguf_file_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(source, "q4_1", gguf=True)
    means = Means(rank=0, error_lora_rank=4)
    seen: list[str] = []

    def to_gguf(folder: str, on_progress: OnProgress) -> list[LayerReport]:
        output = tmp_path / folder / "m.gguf"
        return convert_to_gguf(planned, output, metadata={}, identity=1, on_progress=on_progress, means=means)

    def interrupt(done: int, total: int, module: str) -> None:
        seen.append(module)
        if len(seen) == 12:
            raise KeyboardInterrupt

    expected = to_gguf("whole", ignore)
    with pytest.raises(KeyboardInterrupt):
        to_gguf("again", interrupt)
    assert not (tmp_path / "again" / "m.gguf").exists()
    rows = converting.rows_of
    read: set[str] = set()
    monkeypatch.setattr(converting, "rows_of", lambda job, suffix: read.add(job.place.module) or rows(job, suffix))
    reports = to_gguf("again", ignore)

    assert not read & set(seen[:11])
    assert reports == expected
    for name in ("m.gguf", "m_lora.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_memory_holds_two_layers_at_most_however_many_there_are(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one at work, and what was written of the one before."""
    layers: list[list[weakref.ref[torch.Tensor]]] = []
    most = 0
    rows, add = converting.rows_of, SafetensorsWriter.add

    def count() -> None:
        nonlocal most
        most = max(most, sum(any(tensor() is not None for tensor in layer) for layer in layers))

    def counted_rows(job: Job, suffix: str) -> torch.Tensor:
        found = rows(job, suffix).clone()  # else it is mapped from the file, which takes no memory
        layers.append([weakref.ref(found)])
        count()
        return found

    def counted_add(writer: SafetensorsWriter, group: str, tensors: State, note: object = None) -> None:
        layers.append([weakref.ref(tensor) for tensor in tensors.values()])
        count()
        add(writer, group, tensors, note)

    monkeypatch.setattr(converting, "rows_of", counted_rows)
    monkeypatch.setattr(SafetensorsWriter, "add", counted_add)
    planned = plan(source, "mxfp8")
    means = Means(rank=0, error_lora_rank=4)

    convert(planned, tmp_path / "out.safetensors", rank=0, metadata={}, identity=0, on_progress=ignore, means=means)

    assert len(planned.jobs) > 40
    # Of each of two layers: the weight, its bias, the correcting pair, the tensors that are written.
    assert 2 <= most <= 8


def test_a_truncated_model_is_named_before_anything_is_written(
    reference_transformer: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    state = dict(reference_transformer.state_dict())
    del state["layers.1.attention.to_k.weight"]
    path = tmp_path / "model.safetensors"
    save_file(state, path)

    with pytest.raises(LayerMismatchError, match=r"1 missing \(layers\.1\.attention\.to_k\.weight\)"):
        conversion.open_model(path)


@pytest.mark.parametrize("name", ["int8", "bf16", "nvfp4", "q4_0"])
def test_nan_in_the_source_is_named_and_leaves_nothing(
    name: str, reference_transformer: ZImageTransformer2DModel, tmp_path: Path
) -> None:
    state = {n: t.clone() for n, t in reference_transformer.state_dict().items()}
    state["layers.1.feed_forward.w2.weight"][3, 5] = float("nan")
    path = tmp_path / "model.safetensors"
    save_file(state, path)

    with pytest.raises(UserError, match=r"model\.safetensors: layers\.1\.feed_forward\.w2"):
        converted(path, name, tmp_path)

    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_numbers_beyond_fp16_are_named(reference_transformer: ZImageTransformer2DModel, tmp_path: Path) -> None:
    state = {n: t.clone() for n, t in reference_transformer.state_dict().items()}
    state["cap_pad_token"][0, 0] = 1e5
    path = tmp_path / "model.safetensors"
    save_file(state, path)

    with pytest.raises(UserError, match=r"cap_pad_token holds numbers that are not finite, or too large for F16"):
        converted(path, "fp16", tmp_path)


def mixed(tmp_path: Path, *rules: tuple[str, str]) -> Recipe:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"rules": rules}))
    return Recipe.load(path, [*targets(), *PLAIN])


def test_formats_that_cannot_share_a_file_are_refused(source: Path, tmp_path: Path) -> None:
    model = conversion.open_model(source)
    for one, other in (("int8", "nvfp4"), ("svdq_int4", "svdq_fp4"), ("q8_0", "mxfp8")):
        recipe = mixed(tmp_path, (r"layers\.0\..*\.qkv", one), (r"layers\.1\..*\.qkv", other))
        with pytest.raises(UserError, match=rf"mine\.json: .*{one}.* cannot be written into a safetensors file"):
            plan_conversion(model, recipe, targets())


def test_halves_of_one_matrix_cannot_have_two_formats(source: Path, tmp_path: Path) -> None:
    recipe = mixed(tmp_path, (r"layers\.0\.feed_forward\.w1", "svdq_int4"))

    with pytest.raises(UserError, match=r"net\.0\.proj is one matrix .*w3 in bf16\."):
        plan_conversion(conversion.open_model(source), recipe, targets())


def test_a_layer_that_the_format_cannot_hold_is_named_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    recipe = mixed(tmp_path, (r".*", "svdq_int4"))

    with pytest.raises(UserError, match=r"x_embedder\S* is 384 x 64, but svdq_int4 needs .* of 128") as raised:
        plan_conversion(conversion.open_model(source), recipe, targets())
    assert "--keep 'x_embedder'" in str(raised.value)


@pytest.mark.parametrize("name", list(PLAIN))
def test_plain_numbers_can_be_gguf_too(name: str, source: Path, reference: torch.Tensor, tmp_path: Path) -> None:
    output, reports = converted(source, name, tmp_path, suffix=".gguf")

    assert {r.format for r in reports} == {name}
    assert relative_error(forward(load_transformer(output, torch.float32)), reference) <= 0.01
