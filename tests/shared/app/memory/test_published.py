"""Before files are here, published sizes and shapes come within a tenth of what their headers will say."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from models.z_image.variants import PUBLISHED_SHAPES
from shared.app.memory import MemoryEstimate, ModuleShapes, ModuleSizes, PublishedModule
from shared.quant.checkpoint import Checkpoint
from tests.support.big_files import QWEN3, transformer_shapes, write_safetensors
from tests.support.module_files import estimate, estimate_with

PROGRAM = Path(__file__).parents[4]
DEMO = PROGRAM / "models" / "z_image" / "demo"

DEMO_FILES = {
    "transformer": DEMO / "transformer.safetensors",
    "text_encoder": DEMO / "text_encoder" / "model.safetensors",
    "vae": DEMO / "vae" / "diffusion_pytorch_model.safetensors",
}


def demo_shapes(name: str) -> ModuleShapes:
    """What a family would publish of one of the demo's modules: counted from its tensors, not from the estimate."""
    shapes = {key: info.shape for key, info in Checkpoint.open(DEMO_FILES[name]).tensors.items()}
    if name == "vae":
        last = shapes["decoder.up_blocks.3.resnets.0.conv1.weight"][1]
        return ModuleShapes(numbers=sum(map(math.prod, shapes.values())), channels=last)
    inside = {key: shape for key, shape in shapes.items() if "layers." in key or "_refiner." in key}
    down = next(shape for key, shape in inside.items() if key.endswith(("w2.weight", "down_proj.weight")))
    return ModuleShapes(
        numbers=sum(map(math.prod, shapes.values())),
        outside=sum(math.prod(shape) for key, shape in shapes.items() if key not in inside),
        blocks=len({key.split(".attention")[0] for key in inside if ".attention." in key})
        or len({key.split(".self_attn")[0] for key in inside if ".self_attn." in key}),
        width=down[0],
        hidden=down[1],
        products=sum(math.prod(s) for key, s in inside.items() if len(s) == 2 and "adaLN" not in key),
    )


def published(name: str, nbytes: float, shapes: ModuleShapes | None = None, **more: object) -> PublishedModule:
    """A module of the 6B model's family, or of `shapes`, whose file weighs `nbytes`."""
    own = {"shapes": shapes or ModuleShapes(**PUBLISHED_SHAPES[name]), "is_joined": name != "text_encoder"}
    return PublishedModule(nbytes=round(nbytes), **own | more)  # type: ignore[arg-type]


RUN = {"width": 1024, "height": 1024, "tile_cells": 0, "vae_bytes": 4, "guided": True}
NO_FILES = {"transformer": [], "text_encoder": None, "vae": None}


def by_files(files: dict[str, Path], **changes: object) -> MemoryEstimate:
    return estimate_with(**files | {"transformer": [files["transformer"]]} | RUN | changes)


def by_sizes(modules: dict[str, PublishedModule], **changes: object) -> MemoryEstimate:
    return estimate_with(**NO_FILES | RUN | {"published": modules} | changes)


def assert_close(guess: MemoryEstimate, read: MemoryEstimate, within: float) -> None:
    assert guess.weights_mb == pytest.approx(read.weights_mb, rel=within)
    assert guess.working_mb == pytest.approx(read.working_mb, rel=within)
    assert guess.decode_tiled_mb == pytest.approx(read.decode_tiled_mb, rel=within)
    for name in ("transformer", "text_encoder"):
        one, other = guess.sizes[name], read.sizes[name]
        assert sum(one.blocks) == pytest.approx(sum(other.blocks), rel=within)
        assert (len(one.blocks), one.width, one.hidden) == (len(other.blocks), other.width, other.hidden)
        assert one.products == pytest.approx(other.products, rel=within)
        assert one.mapped == pytest.approx(other.mapped, rel=within)


@pytest.mark.parametrize("compute_bytes", [2, 4])
def test_published_sizes_come_within_ten_percent_of_the_demos_headers(compute_bytes: int) -> None:
    modules = {name: published(name, path.stat().st_size, demo_shapes(name)) for name, path in DEMO_FILES.items()}

    guess = by_sizes(modules, compute_bytes=compute_bytes)

    assert guess.published == ("text_encoder", "transformer", "vae")
    assert_close(guess, by_files(DEMO_FILES, compute_bytes=compute_bytes), within=0.1)


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    """Qwen3-4B's matrices: the vectors beside them are less than a thousandth."""
    width, hidden = QWEN3["hidden_size"], QWEN3["intermediate_size"]
    heads, shared = (QWEN3[key] * QWEN3["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    layer = {f"self_attn.{name}_proj": (rows, width) for name, rows in (("q", heads), ("k", shared), ("v", shared))}
    layer |= {"self_attn.o_proj": (width, heads), "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width)}
    layer |= {"mlp.down_proj": (width, hidden)}
    shapes = {f"model.layers.{i}.{key}.weight": layer[key] for i in range(QWEN3["num_hidden_layers"]) for key in layer}
    return shapes | {"model.embed_tokens.weight": (QWEN3["vocab_size"], width)}


def vae_shapes() -> dict[str, tuple[int, ...]]:
    """As many numbers as Flux's VAE has, and the two layers that tell how wide its last stage is."""
    ends = {"decoder.up_blocks.3.resnets.0.conv1.weight": (128, 256, 3, 3), "decoder.conv_out.weight": (3, 128, 3, 3)}
    return ends | {"rest": (83_819_683 - sum(map(math.prod, ends.values())),)}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The 6B model's files, sparse: every tensor by name and shape, and no number."""
    if sys.platform != "linux":
        pytest.skip("needs sparse files")
    folder = tmp_path_factory.mktemp("big")
    for name, shapes in {"transformer": transformer_shapes(), "text_encoder": encoder_shapes()}.items():
        write_safetensors(folder / f"{name}.safetensors", {key: ("BF16", shapes[key]) for key in shapes}, None)
        packed: dict[str, tuple[str, tuple[int, ...]]] = {}
        for key, shape in shapes.items():  # as quanto packs them: see docs/presets.md
            inside = len(shape) == 2 and key.startswith(("layers.", "model.layers."))
            packed |= (
                {f"{key}._data": ("I8", shape), f"{key}._scale": ("BF16", (shape[0], 1))}
                if inside
                else {key: ("BF16", shape)}
            )
        write_safetensors(folder / f"{name}_int8.safetensors", packed, None)
    write_safetensors(folder / "vae.safetensors", {key: ("BF16", shape) for key, shape in vae_shapes().items()}, None)
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("compute_bytes", [2, 4])
@pytest.mark.parametrize(("kind", "gigabytes"), [("", (12.31, 8.04)), ("_int8", (6.89, 4.41))])
def test_published_sizes_come_within_ten_percent_of_the_6b_models_headers(
    big: dict[str, Path], kind: str, gigabytes: tuple[float, float], compute_bytes: int
) -> None:
    files = {"transformer": big[f"transformer{kind}"], "text_encoder": big[f"text_encoder{kind}"], "vae": big["vae"]}
    sizes = dict(zip(files, (*gigabytes, 0.17), strict=True))

    guess = by_sizes({name: published(name, size * 1e9) for name, size in sizes.items()}, compute_bytes=compute_bytes)

    read = by_files(files, compute_bytes=compute_bytes)
    assert_close(guess, read, within=0.1)
    for name in ("transformer", "text_encoder"):
        assert guess.sizes[name].scratch == pytest.approx(read.sizes[name].scratch, rel=0.1)


def test_a_cast_file_has_no_plain_numbers_and_a_gguf_encoders_table_is_unpacked_once_and_for_all() -> None:
    cast = published("transformer", 6.15e9).sizes(4)
    gguf = published("text_encoder", 2.5e9, packs_table=True).sizes(2)

    assert cast.nbytes == cast.mapped == round(6.15e9)
    shapes = PUBLISHED_SHAPES["text_encoder"]
    packed = round(shapes["outside"] * 2.5e9 / shapes["numbers"])
    assert gguf.nbytes == round(2.5e9) - packed + shapes["outside"] * 2
    assert gguf.mapped == round(2.5e9) - packed
    assert gguf.table == shapes["table"] * 2 and gguf.scratch == shapes["largest"] * 2


def test_a_control_branch_that_is_not_here_counts_in_blocks_like_the_transformers() -> None:
    plain, controlled = (published("transformer", 12.31e9, further=files).sizes(2) for files in ((), (round(6.71e9),)))

    assert controlled.nbytes - plain.nbytes == round(6.71e9)
    assert len(controlled.blocks) - len(plain.blocks) == 18  # 15 control layers, 2 refiners, their projections
    assert controlled.products / plain.products == pytest.approx(52 / 34, rel=0.01)


def test_large_packed_files_stay_where_they_are_and_a_text_encoder_is_let_go_of(big: dict[str, Path]) -> None:
    files = {"transformer": big["transformer_int8"], "text_encoder": big["text_encoder_int8"], "vae": big["vae"]}

    sizes = by_files(files, compute_bytes=2).sizes

    assert sizes["text_encoder"].mapped == pytest.approx(sizes["text_encoder"].nbytes, rel=0.01)
    assert sizes["transformer"].mapped == pytest.approx(sizes["transformer"].nbytes, rel=0.01)


def test_only_what_is_missing_is_taken_from_the_published_size(tmp_path: Path) -> None:
    missing = {"text_encoder": published("text_encoder", 8.04e9)}

    mixed, read = estimate(tmp_path, text_encoder=None, published=missing), estimate(tmp_path)

    assert mixed.published == ("text_encoder",) and read.published == ()
    assert mixed.sizes["transformer"] == read.sizes["transformer"]
    assert isinstance(mixed.sizes["text_encoder"], ModuleSizes)
    assert (mixed.as_dict()["source"], read.as_dict()["source"]) == ("published sizes", "file headers")
