"""NAG on the demo, by what an independent judge sees; tests/nag_ablation.py draws as many pictures as one likes."""

from __future__ import annotations

from tests.nag_ablation import ablate, keeps, load_demo

SQUARE = "a large square on a white background"


def test_a_colour_in_the_negative_prompt_stays_away_and_the_rest_of_the_prompt_is_drawn() -> None:
    pairs = ablate(load_demo(), [(SQUARE, seed) for seed in (2, 3, 6)], NAG_scale=2.0)

    assert len(pairs) >= 2, "seeds that choose a hue by themselves"
    # At least 80 % less often: of two or three pictures that is never.
    assert [pair.seed for pair in pairs if pair.still_there] == []
    assert all(keeps(pair.guided, SQUARE)[what] for pair in pairs for what in ("ground", "one shape"))
