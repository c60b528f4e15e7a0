"""The estimate follows its documented formula, and peaks are this process's own."""

from __future__ import annotations

import ctypes
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.z_image import token_rows
from models.z_image.variants import PUBLISHED_SHAPES
from shared.app.memory import (
    FEED_FORWARD_TOKENS_ON_CPU,
    FEED_FORWARD_TOKENS_ON_GPU,
    MIB,
    MemoryEstimate,
    ModuleShapes,
    ModuleSizes,
    PublishedModule,
    estimate_memory,
    peak_rss_mb,
)
from shared.quant.checkpoint import Checkpoint
from tests.support.big_files import QWEN3, transformer_shapes, write_safetensors
from tests.support.fake_family import write_weights

PROGRAM = Path(__file__).parents[3]


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A real safetensors file of bfloat16 zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


def block(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.attention.qkv.weight": (3 * width, width),
        f"{prefix}.attention.out.weight": (width, width),
        f"{prefix}.feed_forward.w1.weight": (hidden, width),
        f"{prefix}.feed_forward.w2.weight": (width, hidden),
        f"{prefix}.adaLN_modulation.0.weight": (4 * width, 16),
    }


def estimate(folder: Path, **changes: object) -> MemoryEstimate:
    """A transformer of two blocks 32 wide, a text encoder of 32 x 32, a VAE whose last stage takes 12 channels."""
    transformer = block("layers.0", 32, 80) | block("layers.1", 32, 80) | {"x_embedder.weight": (32, 64)}
    transformer |= {"t_embedder.mlp.0.weight": (8, 8), "t_embedder.mlp.2.weight": (8, 8)}
    files = {
        "transformer": [write_tensors(folder / "t.safetensors", transformer)],
        "text_encoder": write_weights(folder / "e.safetensors", shape=(32, 32)),
        "vae": write_weights(folder / "v.safetensors", "decoder.conv_out.weight", (3, 12, 3, 3)),
    }
    run = {"width": 256, "height": 128, "tile_cells": 0, "compute_bytes": 2, "vae_bytes": 4, "guided": False}
    return estimate_memory(**files | run | changes)  # type: ignore[arg-type]


BLOCK_NUMBERS = 32 * 32 * 4 + 2 * 32 * 80 + 4 * 32 * 16


def test_weights_count_at_the_size_of_the_compute_type(tmp_path: Path) -> None:
    assert estimate(tmp_path, compute_bytes=2).weights_mb["text_encoder"] == 32 * 32 * 2 / MIB
    assert estimate(tmp_path, compute_bytes=4).weights_mb["text_encoder"] == 32 * 32 * 4 / MIB
    assert estimate(tmp_path).weights_mb["vae"] == 3 * 12 * 9 * 4 / MIB


def test_blocks_are_told_from_what_belongs_to_none(tmp_path: Path) -> None:
    sizes = estimate(tmp_path).sizes["transformer"]

    assert sizes.blocks == (BLOCK_NUMBERS * 2,) * 2
    assert sizes.trunk == (32 * 64 + 2 * 8 * 8) * 2
    assert (sizes.width, sizes.hidden) == (32, 80)
    assert sizes.products == 2 * (32 * 32 * 4 + 2 * 32 * 80)  # the modulation's input is no token
    assert sizes.scratch == 0


def test_denoising_grows_with_tokens_and_doubles_with_guidance(tmp_path: Path) -> None:
    plain, guided = estimate(tmp_path, on_cpu=False), estimate(tmp_path, guided=True, on_cpu=False)

    assert plain.denoise_mb == (16 * 8 + 512) * (7 * 32 + 3 * 80) * 2 / MIB
    assert guided.denoise_mb == 2 * plain.denoise_mb


def test_of_many_tokens_only_a_part_is_in_the_feed_forward_unless_bits_count(tmp_path: Path) -> None:
    sizes = {"width": 512, "height": 512}
    part, whole = estimate(tmp_path, **sizes), estimate(tmp_path, is_exact=True, **sizes)

    assert part.denoise_mb == (1536 * 7 * 32 + 576 * 3 * 80) * 2 / MIB
    assert whole.denoise_mb == 1536 * (7 * 32 + 3 * 80) * 2 / MIB
    assert estimate(tmp_path, width=2048, height=2048).denoise_mb == 16896 * 8 * 32 * 2 / MIB, "attention takes more"


def test_the_part_is_the_familys() -> None:
    assert (FEED_FORWARD_TOKENS_ON_CPU, FEED_FORWARD_TOKENS_ON_GPU) == (token_rows.CPU_TOKENS, token_rows.GPU_TOKENS)


def test_decoding_grows_with_pixels_and_shrinks_with_tiles(tmp_path: Path) -> None:
    whole, tiled = estimate(tmp_path, on_cpu=False), estimate(tmp_path, tile_cells=8, on_cpu=False)

    assert whole.decode_mb == 3 * 256 * 128 * 12 * 4 / MIB
    assert tiled.decode_mb == 3 * 64 * 64 * 12 * 4 / MIB
    assert estimate(tmp_path, tile_cells=8).decode_mb > tiled.decode_mb  # a CPU stores whole layers in the same RAM
    assert whole.decode_tiled_mb == {64: whole.decode_mb, 32: whole.decode_mb, 16: tiled.decode_mb * 4}


def test_decoding_in_another_type_counts_its_activations_and_a_second_decoder(tmp_path: Path) -> None:
    own, half = estimate(tmp_path, on_cpu=False), estimate(tmp_path, on_cpu=False, decode_bytes=2)

    assert own.decode_mb / 2 < half.decode_mb < own.decode_mb / 2 + own.weights_mb["vae"]


def test_loras_and_control_branches_count(tmp_path: Path) -> None:
    lora = write_weights(tmp_path / "l.safetensors", shape=(256, 256))
    branch = write_tensors(tmp_path / "c.safetensors", block("control_layers.0", 32, 80))
    plain = estimate(tmp_path)

    assert estimate(tmp_path, loras=[lora]).loras_mb == 256 * 256 * 2 / MIB
    controlled = estimate(tmp_path, transformer=[tmp_path / "t.safetensors", branch])
    assert len(controlled.sizes["transformer"].blocks) == 3
    assert controlled.weights_mb["transformer"] > plain.weights_mb["transformer"]


def test_a_packed_matrix_counts_as_packed_and_unpacked_once(tmp_path: Path) -> None:
    packed = {
        "layers.0.out.weight._data": torch.zeros(64, 48, dtype=torch.int8),
        "layers.0.out.weight._scale": torch.ones(64, 1, dtype=torch.bfloat16),
    }
    save_file(packed, tmp_path / "p.safetensors")

    sizes = estimate(tmp_path, transformer=[tmp_path / "p.safetensors"])

    assert sizes.sizes["transformer"].scratch == 64 * 48 * 2
    assert sizes.weights_mb["transformer"] < 64 * 48 * 2 / MIB


def test_the_peak_is_not_inherited_from_the_process_that_started_this_one() -> None:
    ballast = bytearray(300 * MIB)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from shared.app.memory import peak_rss_mb; print(peak_rss_mb())"

    child = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM, capture_output=True, text=True, check=True)

    assert float(child.stdout) < 200 < (peak_rss_mb() or 0)


ALLOCATE = """
import ctypes
from shared.app.memory import give_freed_memory_back

class Figures(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks pieces bytes a b c d e".split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo2.restype = Figures
give_freed_memory_back()
libc.free(libc.malloc(30 << 20))  # from which glibc would learn
before = libc.mallinfo2().pieces
libc.malloc(20 << 20)
print(libc.mallinfo2().pieces - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc 2.33"
)
def test_large_pieces_of_ram_are_the_systems_again_when_they_are_freed() -> None:
    done = subprocess.run([sys.executable, "-c", ALLOCATE], cwd=PROGRAM, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "1"


# ---- before the files are here


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
    return estimate_memory(**files | {"transformer": [files["transformer"]]} | RUN | changes)  # type: ignore[arg-type]


def by_sizes(modules: dict[str, PublishedModule], **changes: object) -> MemoryEstimate:
    return estimate_memory(**NO_FILES | RUN | {"published": modules} | changes)  # type: ignore[arg-type]


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


def test_a_cast_file_has_no_plain_numbers_and_a_gguf_encoder_unpacks_its_table_too() -> None:
    cast = published("transformer", 6.15e9).sizes(4)
    gguf = published("text_encoder", 2.5e9, packs_table=True).sizes(2)

    assert cast.nbytes == round(6.15e9) and cast.mapped == 0
    assert gguf.nbytes == round(2.5e9) and gguf.scratch == PUBLISHED_SHAPES["text_encoder"]["outside"] * 2


def test_a_control_branch_that_is_not_here_counts_in_blocks_like_the_transformers() -> None:
    plain, controlled = (published("transformer", 12.31e9, further=files).sizes(2) for files in ((), (round(6.71e9),)))

    assert controlled.nbytes - plain.nbytes == round(6.71e9)
    assert len(controlled.blocks) - len(plain.blocks) == 18  # 15 control layers, 2 refiners, their projections
    assert controlled.products / plain.products == pytest.approx(52 / 34, rel=0.01)


def test_a_packed_text_encoder_stays_in_its_file_and_so_is_let_go_of(big: dict[str, Path]) -> None:
    files = {"transformer": big["transformer_int8"], "text_encoder": big["text_encoder_int8"], "vae": big["vae"]}

    sizes = by_files(files, compute_bytes=2).sizes

    assert sizes["text_encoder"].mapped == pytest.approx(sizes["text_encoder"].nbytes, rel=0.01)
    drawn = sizes["transformer"]
    assert drawn.mapped < 0.3 * drawn.nbytes, "q, k, v and w1, w3 may be copied side by side"


def test_only_what_is_missing_is_taken_from_the_published_size(tmp_path: Path) -> None:
    missing = {"text_encoder": published("text_encoder", 8.04e9)}

    mixed, read = estimate(tmp_path, text_encoder=None, published=missing), estimate(tmp_path)

    assert mixed.published == ("text_encoder",) and read.published == ()
    assert mixed.sizes["transformer"] == read.sizes["transformer"]
    assert isinstance(mixed.sizes["text_encoder"], ModuleSizes)
    assert (mixed.as_dict()["source"], read.as_dict()["source"]) == ("published sizes", "file headers")
