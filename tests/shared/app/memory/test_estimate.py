"""The estimate follows its documented formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.z_image import token_rows
from shared.app.memory import MIB, sizes
from shared.app.memory.workload import FEED_FORWARD_TOKENS_ON_CPU, FEED_FORWARD_TOKENS_ON_GPU
from tests.support.fake_family import write_weights
from tests.support.module_files import block, estimate, write_tensors

BLOCK_NUMBERS = 32 * 32 * 4 + 2 * 32 * 80 + 4 * 32 * 16


def test_weights_count_at_the_size_of_the_compute_type(tmp_path: Path) -> None:
    assert estimate(tmp_path, compute_bytes=2).weights_mb["text_encoder"] == 32 * 32 * 2 / MIB
    assert estimate(tmp_path, compute_bytes=4).weights_mb["text_encoder"] == 32 * 32 * 4 / MIB
    assert estimate(tmp_path).weights_mb["vae"] == 3 * 12 * 9 * 4 / MIB


def test_blocks_are_told_from_what_belongs_to_none(tmp_path: Path) -> None:
    drawn = estimate(tmp_path).sizes["transformer"]

    assert drawn.blocks == (BLOCK_NUMBERS * 2,) * 2
    assert drawn.trunk == (32 * 64 + 2 * 8 * 8) * 2
    assert (drawn.width, drawn.hidden) == (32, 80)
    assert drawn.products == 2 * (32 * 32 * 4 + 2 * 32 * 80)  # the modulation's input is no token
    assert drawn.scratch == 0


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
    vae = write_tensors(tmp_path / "half.safetensors", {"decoder.conv_out.weight": (3, 12, 3, 3)})
    own, half = estimate(tmp_path, vae=vae), estimate(tmp_path, vae=vae, decode_bytes=2)

    assert not half.decodes_beside
    # The VAE itself is hardly looked at then, and stays in its file.
    assert half.sizes["vae"].mapped == half.sizes["vae"].nbytes == own.sizes["vae"].nbytes / 2
    assert own.decode_mb / 3 < half.decode_mb < 0.6 * own.decode_mb


def test_a_decoder_that_comes_to_a_gpu_takes_the_place_of_the_vae_s_own(tmp_path: Path) -> None:
    own, beside = estimate(tmp_path, on_cpu=False), estimate(tmp_path, on_cpu=False, decode_bytes=2)

    assert beside.decodes_beside and not own.decodes_beside
    assert 0 < beside.saved_mb < beside.weights_mb["vae"] and own.saved_mb == 0
    cells = max(beside.decode_ways)
    assert beside.decode_ways[cells] == "bands of rows"
    assert all(tile < cells for tile in list(beside.decode_ways)[1:])
    assert 0 < beside.decode_tiled_mb[cells] <= beside.decode_mb


def test_loras_and_control_branches_count(tmp_path: Path) -> None:
    lora = write_weights(tmp_path / "l.safetensors", shape=(256, 256))
    branch = write_tensors(tmp_path / "c.safetensors", block("control_layers.0", 32, 80))
    plain = estimate(tmp_path)

    assert estimate(tmp_path, loras=[lora]).loras_mb == 256 * 256 * 2 / MIB
    controlled = estimate(tmp_path, transformer=[tmp_path / "t.safetensors", branch])
    assert len(controlled.sizes["transformer"].blocks) == 3
    assert controlled.weights_mb["transformer"] > plain.weights_mb["transformer"]


def test_a_packed_table_counts_as_it_is_unpacked_and_is_not_mapped(tmp_path: Path) -> None:
    plain = {"model.embed_tokens.weight": torch.zeros(100, 32, dtype=torch.bfloat16)}
    packed = {"model.embed_tokens.weight": torch.zeros(100, 32).to(torch.float8_e4m3fn)}
    save_file(plain, tmp_path / "plain.safetensors")
    save_file(packed, tmp_path / "packed.safetensors")

    as_is = estimate(tmp_path, text_encoder=tmp_path / "plain.safetensors").sizes["text_encoder"]
    unpacked = estimate(tmp_path, text_encoder=tmp_path / "packed.safetensors").sizes["text_encoder"]

    assert as_is.nbytes == unpacked.nbytes == as_is.table == unpacked.table == 100 * 32 * 2
    assert (as_is.mapped, unpacked.mapped, unpacked.scratch) == (100 * 32 * 2, 0, 0)


def test_of_nunchaku_s_tiles_a_cpu_puts_the_low_rank_branch_in_order_and_a_gpu_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled = {
        "layers.0.out.qweight": torch.zeros(128, 64, dtype=torch.int8),
        "layers.0.out.wscales": torch.ones(2, 128, dtype=torch.bfloat16),
        "layers.0.out.smooth_factor": torch.ones(128, dtype=torch.bfloat16),
        "layers.0.out.proj_down": torch.zeros(128, 16, dtype=torch.bfloat16),
        "layers.0.out.proj_up": torch.zeros(128, 16, dtype=torch.bfloat16),
    }
    save_file(tiled, tmp_path / "p.safetensors")
    codes, scales, smooth = 128 * 64, 2 * 128 * 2, 128 * 2

    def mapped(**changes: object) -> int:
        return estimate(tmp_path, transformer=[tmp_path / "p.safetensors"], **changes).sizes["transformer"].mapped

    assert mapped(on_cpu=True) == scales + smooth, "of a small file packed rows may be copied"
    monkeypatch.setattr(sizes, "MAPPED_FROM", 1)
    assert mapped(on_cpu=True) == codes + scales + smooth
    assert mapped(on_cpu=False) == smooth


def test_a_packed_matrix_counts_as_packed_and_unpacked_once(tmp_path: Path) -> None:
    packed = {
        "layers.0.out.weight._data": torch.zeros(64, 48, dtype=torch.int8),
        "layers.0.out.weight._scale": torch.ones(64, 1, dtype=torch.bfloat16),
    }
    save_file(packed, tmp_path / "p.safetensors")

    sizes = estimate(tmp_path, transformer=[tmp_path / "p.safetensors"])

    assert sizes.sizes["transformer"].scratch == 64 * 48 * 2
    assert sizes.weights_mb["transformer"] < 64 * 48 * 2 / MIB
