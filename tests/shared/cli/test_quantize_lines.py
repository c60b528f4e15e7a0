"""What `quantize` says where nobody can see a bar."""

from __future__ import annotations

from shared.cli.quantize import PlainLines


def test_stages_are_told_once_and_layers_by_tenths_with_the_time_left() -> None:
    seconds = iter([0, 8, 20, 24, 100])
    lines = PlainLines(lambda: next(seconds))

    told = [
        line
        for done, module in (
            (0, "Calibrating, picture 1 of 2"), (0, "Calibrating, picture 1 of 2"), (0, "Calibrating, picture 2 of 2"),
            (0, "layers.0.attention.qkv"), (80, "layers.0.attention.out"), (200, "layers.0.feed_forward.w1"),
            (240, "layers.0.feed_forward.w2"), (1000, "layers.1.attention.qkv"),
        )
        for line in lines.told(done, 1000, module)
    ]  # fmt: skip

    assert told == [
        "Calibrating, picture 1 of 2", "Calibrating, picture 2 of 2", "20%, 80 s left", "100%, 0.0 s left",
    ]  # fmt: skip


def test_a_run_that_goes_on_says_so_and_counts_its_own_time_only() -> None:
    seconds = iter([0, 10])
    lines = PlainLines(lambda: next(seconds))

    assert list(lines.told(500, 1000, "layers.3.attention.qkv")) == ["going on at 50%, where an earlier run ended"]
    assert list(lines.told(600, 1000, "layers.3.attention.out")) == ["60%, 40 s left"]
