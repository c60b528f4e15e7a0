"""The estimate follows its documented formula, and peaks are this process's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shared.app.memory import MIB, MemoryEstimate, estimate_memory, peak_rss_mb
from tests.support.fake_family import write_weights

PROGRAM = Path(__file__).parents[3]


def estimate(folder: Path, **changes: object) -> MemoryEstimate:
    """A transformer of 64 rows x 32, a text encoder of 32 x 32, a VAE whose last stage takes 12 channels."""
    files = {
        "transformer": [write_weights(folder / "t.safetensors", shape=(64, 32))],
        "text_encoder": write_weights(folder / "e.safetensors", shape=(32, 32)),
        "vae": write_weights(folder / "v.safetensors", "decoder.conv_out.weight", (3, 12, 3, 3)),
    }
    run = {"width": 256, "height": 128, "tile_cells": 0, "compute_bytes": 2, "vae_bytes": 4, "guided": False}
    return estimate_memory(**files | run | changes)  # type: ignore[arg-type]


def test_weights_count_at_the_size_of_the_compute_type(tmp_path: Path) -> None:
    weights = estimate(tmp_path, compute_bytes=2).weights_mb

    assert weights["transformer"] == 64 * 32 * 2 / MIB
    assert weights["text_encoder"] == 32 * 32 * 2 / MIB
    assert weights["vae"] == 3 * 12 * 9 * 4 / MIB


def test_denoising_grows_with_tokens_and_doubles_with_guidance(tmp_path: Path) -> None:
    plain, guided = estimate(tmp_path), estimate(tmp_path, guided=True)

    assert plain.denoise_mb == (16 * 8 + 512) * 64 * 2 * 3 / MIB
    assert guided.denoise_mb == 2 * plain.denoise_mb


def test_decoding_grows_with_pixels_and_shrinks_with_tiles(tmp_path: Path) -> None:
    whole, tiled = estimate(tmp_path), estimate(tmp_path, tile_cells=8)

    assert whole.decode_mb == 3 * 256 * 128 * 12 * 4 / MIB
    assert tiled.decode_mb == (2 * 256 * 128 + 3 * 64 * 64) * 12 * 4 / MIB


def test_on_the_cpu_everything_counts_as_ram(tmp_path: Path) -> None:
    placed = estimate(tmp_path).placed(on_cpu=True, resident_mb=None)
    working = max(placed.denoise_mb, placed.decode_mb)

    assert placed.vram_mb == 0
    assert placed.ram_mb == pytest.approx(500 + sum(placed.weights_mb.values()) + working)


def test_on_a_gpu_only_what_is_resident_counts(tmp_path: Path) -> None:
    unplaced = estimate(tmp_path)
    streamed = unplaced.placed(on_cpu=False, resident_mb=0.001)
    whole = unplaced.placed(on_cpu=False, resident_mb=None)

    assert whole.vram_mb - streamed.vram_mb == pytest.approx(sum(unplaced.weights_mb.values()) - 0.001)


def test_the_peak_is_not_inherited_from_the_process_that_started_this_one() -> None:
    ballast = bytearray(300 * MIB)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from shared.app.memory import peak_rss_mb; print(peak_rss_mb())"

    child = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM, capture_output=True, text=True, check=True)

    assert float(child.stdout) < 200 < (peak_rss_mb() or 0)
