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

from shared.app.memory import MIB, MemoryEstimate, estimate_memory, peak_rss_mb
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
    plain, guided = estimate(tmp_path), estimate(tmp_path, guided=True)

    assert plain.denoise_mb == (16 * 8 + 512) * (3 * 32 + 4 * 80) * 2 / MIB
    assert guided.denoise_mb == 2 * plain.denoise_mb


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
