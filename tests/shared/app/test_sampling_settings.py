"""The settings of the walk are checked with words that help, and come back from their record."""

from __future__ import annotations

from typing import Any

import pytest

from shared.app.sampling_settings import SamplingSettings
from shared.app.schema import SETTING_KEYS
from shared.quant.errors import UserError


def build(**values: Any) -> SamplingSettings:
    return SamplingSettings.build({name: key.default for name, key in SETTING_KEYS.items()} | values)


def test_the_usual_settings_leave_no_trace_in_a_record() -> None:
    assert build() == SamplingSettings()
    assert SamplingSettings().as_record() == {}


def test_a_record_gives_the_same_settings_back() -> None:
    settings = build(
        schedule="beta", sigmas=[1, 0.5, 0], variation_strength=0.2, variation_seed=5, diversity=0.7,
        diversity_end=0.5, long_prompt="cut", precision="exact", step_cache=0.1,
    )  # fmt: skip

    assert settings.sigmas == (1.0, 0.5)
    assert build(**settings.as_record()) == settings


def test_a_variation_seed_is_drawn_where_there_is_a_variation_and_only_there() -> None:
    assert build(variation_strength=0.1).variation_seed >= 0
    assert build(variation_seed=5).variation_seed == -1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"schedule": "betta"}, 'one of simple, beta, linear or empty, got "betta".*closest is "beta"'),
        ({"long_prompt": "trim"}, 'one of keep, cut, refuse or empty, got "trim"'),
        ({"precision": "exakt"}, 'one of fast, exact or empty, got "exakt".*closest is "exact"'),
        ({"sigmas": [0.5, 0.7]}, r'"sigmas": .*numbers that fall.*got \[0.5, 0.7\]'),
        ({"variation_strength": 1.5}, '"variation_strength" must be from 0 to 1, got 1.5'),
        ({"step_cache": 0.7}, '"step_cache" must be from 0 to 0.5, got 0.7'),
        ({"diversity_end": -1}, '"diversity_end" must be from 0 to 1'),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_what_can(values: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(**values)
