"""Every case function at a size that a test can afford: both sides compute the same, and say what they did."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from models.z_image.bench import blocks, forwards, loras, opening, pictures, sparse_files, stages, twins
from models.z_image.config import TransformerConfig
from shared.bench.measure import CpuClock
from shared.bench.stand import Stand
from shared.quant.linear import PackedLinear

SMALL = twins.sized(384, 1, heads=3, refiners=1, features=64)
QWEN3 = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 300,
}  # fmt: skip
VAE = {**stages.VAE, "block_out_channels": (8, 16, 16, 32), "layers_per_block": 1, "norm_num_groups": 4}

# bf16 keeps 8 bits; errors of a few layers add up to about a hundredth.
BF16 = 0.03
# Weights and activations of 8 bits each add about as much again.
INT8 = 0.06


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    peers = frozenset({"P1", "P3", "P7"})
    return Stand(device=torch.device("cpu"), clock=CpuClock(), peers=peers, folder=tmp_path, repeats=1)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def errors(stand: Stand) -> dict[tuple[str, str], float]:
    return {(row.row, row.who): float(row.values["error"]) for row in stand.rows if "error" in row.values}


def test_twins_hold_the_same_numbers() -> None:
    both = twins.make(SMALL, torch.float32, torch.device("cpu"))
    given = twins.scene(SMALL, width=64, height=96, caption=20, device=torch.device("cpu"))

    torch.testing.assert_close(
        twins.our_forward(both.ours, given)(), twins.their_forward(both.theirs, given)(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        twins.our_loop(both.ours, given)(), twins.their_loop(both.theirs, given)(), rtol=1e-3, atol=1e-3
    )


def test_the_real_size_has_the_arithmetic_of_its_paper_sum() -> None:
    """At 1024x1024 with 100 tokens: 47.84 TFLOP in linears and 8.74 in attention, caption blocks (0.09) among them."""
    given = twins.Scene(
        latents=torch.empty(1, 16, 128, 128, device="meta"), features=torch.empty(100, 2560, device="meta")
    )

    flops = twins.forward_flops(TransformerConfig(), given)

    assert given.tokens == 4224
    assert flops / 1e12 == pytest.approx(56.57 - 0.09, rel=2e-3)


def test_packed_twins_multiply_packed_weights_of_the_same_network(tmp_path: Path) -> None:
    both = twins.make(SMALL, torch.bfloat16, torch.device("cpu"))
    given = twins.scene(SMALL, width=64, height=64, caption=20, device=torch.device("cpu"))

    model = twins.packed(both.ours, "int8", tmp_path)

    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 4 * 3
    assert not any(isinstance(m, PackedLinear) for m in both.ours.modules())
    plain = twins.our_forward(twins.expanded(model), given)()
    difference = (twins.our_forward(model, given)() - plain).norm() / plain.norm()
    assert float(difference) < BF16
    assert twins.weight_bytes(model) < 0.6 * twins.weight_bytes(both.ours)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            lambda s: forwards.small(s, lambda dim, layers: twins.sized(128, 1, heads=2, features=32)), id="C2"
        ),
        pytest.param(lambda s: forwards.on_gpu(s, SMALL, (64,)), id="B1"),
        pytest.param(lambda s: pictures.batches(s, SMALL, ((64, 1), (64, 2))), id="B4"),
        pytest.param(lambda s: stages.text_on_cpu(s, QWEN3, 2), id="C8"),
        pytest.param(lambda s: stages.text_on_gpu(s, QWEN3, 2), id="B7"),
        pytest.param(lambda s: stages.decode_on_cpu(s, VAE, 64), id="C9"),
        pytest.param(lambda s: stages.decode_on_gpu(s, VAE, (64,)), id="B8"),
    ],
)
def test_both_sides_of_a_comparison_compute_the_same(
    stand: Stand, case: Callable[[Stand], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # B1's other captions belong to 1024x1024, which no test can afford.
    small = twins.scene
    monkeypatch.setattr(twins, "scene", lambda config, *, width, height, caption, device: small(
        config, width=min(width, 64), height=min(height, 64), caption=min(caption, 40), device=device))  # fmt: skip

    case(stand)

    found = errors(stand)
    assert {"P1"} <= {who.split()[0] for _, who in found}
    assert {key: error for key, error in found.items() if error > (INT8 if "int8" in key[1] else BF16)} == {}


def test_our_tiles_leave_no_error_and_theirs_do(stand: Stand) -> None:
    stages.decode_on_gpu(stand, VAE, (64,), tile=4)

    found = errors(stand)
    ours = ("ours", "ours in bands", "ours tiled")
    assert max(found["64x64", who] for who in ours) < BF16 < found["64x64", "P1 bf16 tiled"]
    assert found["64x64", "ours float32"] < 1e-5 < BF16 < found["64x64", "P1 float32 tiled"]
    levels = {row.who: row.values["mean_levels_of_255"] for row in stand.rows}
    assert max(float(levels[who]) for who in ours) < 1 < float(levels["P1 float32 tiled"])


def test_a_block_in_every_kind_of_weight(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_GROWTH", ((64, 1),))

    blocks.on_cpu(stand, twins.sized(384, 1, heads=3, refiners=0, features=64))

    found = errors(stand)
    assert found["bf16, 1024 tokens", "ours"] < BF16
    assert found["int8, 1024 tokens", "ours int8"] < INT8
    assert found["int8, 1024 tokens", "P3"] < INT8
    assert found["4-bit, 1024 tokens", "ours nvfp4"] == pytest.approx(found["4-bit, 1024 tokens", "P7"], rel=0.2)
    assert {"growth, 64x64"} <= {row for row, _ in found}
    kinds = {row.who: row.values for row in stand.rows if "weight_bytes" in row.values}
    assert kinds["ours nvfp4"]["weight_bytes"] < 0.6 * float(kinds["ours int8"]["weight_bytes"])
    assert all(kinds[who]["kernels"] for who in kinds)


def test_a_lora_is_the_same_change_on_both_sides(stand: Stand) -> None:
    loras.on_cpu(stand, SMALL)
    loras.on_gpu(stand, SMALL, 64)

    found = errors(stand)
    for row in ("rank 32, 1024 tokens", "rank 32, 64x64"):
        assert max(found[row, "ours with LoRA"], found[row, "P1 with LoRA"]) < BF16
        assert min(found[row, "ours"], found[row, "P1"]) > 2 * BF16, "a forward without it is another"
    added = [row.who for row in stand.rows if "percent" in row.values]
    assert added == ["ours: added by the LoRA", "P1: added by the LoRA"] * 2
    assert {row.who for row in stand.rows if row.row.startswith("the demo")} == {
        "ours forward", "ours swap", "ours swap and forward",
    }  # fmt: skip


def test_every_format_runs_in_the_case_for_gpus(stand: Stand) -> None:
    blocks.on_gpu(stand, twins.sized(384, 1, heads=3, refiners=0, features=64), 64)

    whos = {row.who for row in stand.rows}
    assert {"ours int8", "ours svdq_int4 r32", "ours svdq_int4 r256", "ours svdq_fp4 r128", "P3", "P7"} <= whos


def test_a_whole_picture_and_its_stages(stand: Stand) -> None:
    pictures.warm(stand, SMALL, QWEN3, VAE, (64,), 2, varied=64, base_steps=2)

    assert errors(stand)["64x64", "ours"] < 0.1, "8 steps in bf16"
    assert [row.who for row in stand.rows if row.row == "64x64, stages"] == [
        "ours text", "ours denoise", "ours decode", "ours rest",
    ]  # fmt: skip
    varied = {row: error for (row, who), error in errors(stand).items() if row.startswith("64x64, ") and who == "ours"}
    assert set(varied) == {
        "64x64, Base, 2 steps, guided", "64x64, 1 LoRA of rank 32", "64x64, 3 LoRAs of rank 32", "64x64, ControlNet",
    }  # fmt: skip
    assert max(varied.values()) < BF16, "guidance, LoRAs and the control picture are the same on both sides"


def test_growth_is_a_line_through_the_measured_points(stand: Stand) -> None:
    pictures.growth(stand, SMALL, ((64, 1), (96, 1), (64, 2)))

    fits = {row.who: row.values for row in stand.rows if row.row == "fit"}
    assert set(fits) == {"ours", "P1"}
    assert pictures._line([(1.0, 5.0), (2.0, 7.0), (3.0, 9.0)]) == pytest.approx((3.0, 2.0))


# The least widths that tiles of 128 and blocks of 256 fit.
TILED = twins.sized(768, 1, heads=6, refiners=1, features=64)


@pytest.mark.parametrize("kind", [*sparse_files.PLAIN, *sparse_files.KINDS])
def test_sparse_files_are_sound_and_of_their_kind(tmp_path: Path, kind: str) -> None:
    from models.z_image.loader import load_transformer

    found = (sparse_files.PLAIN | sparse_files.KINDS)[kind]
    path = tmp_path / ("m.gguf" if found.gguf else "m.safetensors")
    size = sparse_files.write(path, TILED, found)

    model = load_transformer(path, torch.bfloat16)  # which looks through the numbers of so small a file

    assert path.stat().st_size == size
    assert model.config.dim == TILED.dim
    w13 = model.layers[0].feed_forward.w13
    is_packed = any(isinstance(module, PackedLinear) for module in w13.modules())
    assert is_packed == bool(found.packed or found.gguf)
    weight = w13.dequantize() if is_packed else w13.weight
    assert weight.shape == (2 * TILED.ffn_dim, TILED.dim)
    assert kind == "nf4" or not weight.any()  # its code 0 stands for another number


def test_a_file_is_opened_in_a_process_of_its_own(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "RUNS", 1)
    path = stand.folder / "model.safetensors"
    sparse_files.write(path, SMALL, sparse_files.PLAIN["official"])

    opening._record(stand, "small", "ours", path, 0.1)

    assert [(row.row, row.who) for row in stand.rows] == [("small", "ours")]
    assert float(stand.rows[0].values["seconds"]) > 0


def test_opening_is_timed_each_way(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "RUNS", 1)
    monkeypatch.setattr(opening.subprocess, "run", opened_here)
    opening.opening(stand, {"small": TILED}, qwen3={**QWEN3, "num_hidden_layers": 3}, vae=VAE)

    rows = {(row.row, row.who): row.values for row in stand.rows}
    parts = {(name, "ours") for name in ("text encoder, bf16", "text encoder, FP8 scaled", "VAE, bf16")}
    packed = {(kind, who) for kind in sparse_files.KINDS for who in ("ours", opening.FOR_A_GPU)}
    assert packed | {
        ("small, official names", "ours"),
        ("small, diffusers names", "ours"),
        ("small, diffusers names", "P1"),
        *parts,
    } == set(rows)
    assert all(float(values["first_seconds"]) >= float(values["seconds"]) > 0 for values in rows.values())
    assert all("used_seconds" in rows[row] for row in rows.keys() - parts if row[1] == "ours")


def opened_here(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
    """A process of its own would import everything again."""
    who, path = command[-2:]
    with redirect_stdout(StringIO()) as said:
        opening.main(who, Path(path))
    return subprocess.CompletedProcess(command, 0, said.getvalue(), "")
