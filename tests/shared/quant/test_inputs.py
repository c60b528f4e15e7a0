"""What is kept of a linear's inputs, and what it buys: smoothing, branch and rounding made for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.quant.inputs import InputRecorder, Inputs
from shared.quant.packings.svdq import Kind, Svdq
from shared.quant.rounding import round_with_feedback
from shared.quant.svdquant import fit

GROUPS: dict[Kind, int] = {"int4": 64, "fp4": 16}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def skewed(count: int, columns: int, seed: int) -> torch.Tensor:
    """Rows as layers take them: a few directions hold most of them, a few columns are much larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(12, columns, generator=torch.Generator().manual_seed(9))
    rows = torch.randn(count, 12, generator=generator) @ directions + 0.3 * torch.randn(
        count, columns, generator=generator
    )
    rows[:, ::37] *= 12
    return rows


def seen(rows: torch.Tensor) -> Inputs:
    return Inputs(rows.square().mean(dim=0).sqrt(), rows.abs().amax(dim=0), rows)


def test_statistics_cover_all_that_was_seen_and_the_sample_is_bounded() -> None:
    model, batches = network(), [torch.randn(3, 5, 8), torch.randn(40, 8), torch.randn(1, 8)]

    with InputRecorder(model, rows=10) as recorder:
        for batch in batches:
            model(batch)
    model(torch.full((4, 8), 100.0))  # unseen: the recorder has gone

    everything = torch.cat([batch.reshape(-1, 8) for batch in batches])
    found = recorder.inputs("0")
    assert found is not None
    torch.testing.assert_close(found.rms, everything.square().mean(dim=0).sqrt())
    torch.testing.assert_close(found.peak, everything.abs().amax(dim=0))
    assert found.rows.shape == (10, 8)
    rounded = everything.bfloat16().float()
    assert all((rounded == row).all(dim=1).any() for row in found.rows)
    assert len(found.fitting) + len(found.judging) == 10
    assert recorder.inputs("1") is None


def test_every_row_has_the_same_chance_to_be_sampled() -> None:
    layer = nn.Linear(1, 1)
    first = 0
    for seed in range(200):
        with InputRecorder(nn.Sequential(layer), rows=4, seed=seed) as recorder:
            for start in (0, 8):
                layer(torch.arange(start, start + 8.0)[:, None])
        found = recorder.inputs("0")
        assert found is not None
        first += int((found.rows < 8).sum())

    # Half of 800 draws, give or take four standard deviations.
    assert abs(first - 400) < 57


def test_what_is_kept_does_not_grow_with_what_is_drawn() -> None:
    model = network()
    with InputRecorder(model, rows=16) as recorder:
        sizes = []
        for _ in range(3):
            model(torch.randn(500, 8))
            sizes.append(sum(t.numel() for s in recorder._seen.values() for t in (s.rows, s.lots, s.peak, s.squares)))

    assert sizes[0] == sizes[1] == sizes[2] == 16 * (8 + 16) + 2 * 16 + 2 * (8 + 16)


def test_feedback_makes_outputs_better_than_rounding_to_the_nearest() -> None:
    weight = torch.randn(64, 128)
    steps = torch.full((64, 1), 0.5)

    def nearest(numbers: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return (numbers / steps).round() * steps

    rounded = round_with_feedback(weight, skewed(256, 128, 1), nearest)

    assert torch.equal(rounded, (rounded / 0.5).round() * 0.5)
    rows = skewed(256, 128, 2)
    plain = (weight / 0.5).round() * 0.5
    assert (rows @ (rounded - weight).t()).norm() < 0.6 * (rows @ (plain - weight).t()).norm()


@pytest.mark.parametrize("kind", ["int4", "fp4"])
def test_calibration_then_learned_rounding_bring_outputs_nearer_each(kind: Kind) -> None:
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(3)) * 0.05
    inputs, unseen = seen(skewed(256, 256, 1)), skewed(256, 256, 2)

    def error(inputs: Inputs | None, rank: int = 16, *, learned: bool = False) -> float:
        made = fit(
            weight, kind=kind, rank=rank, group=GROUPS[kind], smooth=None, iterations=2, parts=1, inputs=inputs,
            learned_rounding=learned,
        )  # fmt: skip
        wanted = unseen @ weight.t()
        return float((unseen @ Svdq(kind).dequantize(made, torch.float32).t() - wanted).norm() / wanted.norm())

    plain, calibrated, learned = error(None), error(inputs), error(inputs, learned=True)
    assert calibrated < 0.85 * plain
    assert learned < 0.85 * calibrated
    assert error(inputs, 64) < error(inputs, 32) < calibrated


def test_a_layer_that_saw_only_zeros_is_packed_all_the_same() -> None:
    weight = torch.randn(128, 128)
    inputs = seen(torch.zeros(32, 128))

    made = fit(weight, kind="int4", rank=16, group=64, smooth=None, iterations=0, parts=1, inputs=inputs,
               learned_rounding=True)  # fmt: skip

    found = Svdq("int4").dequantize(made, torch.float32)
    assert (found - weight).norm() / weight.norm() < 0.2
