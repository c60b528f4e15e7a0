"""Plans give every choice with its reason, and need no network."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.app.context import AppContext
from shared.quant.errors import UserError
from tests.support.fake_family import write_preset
from tests.support.fake_plans import CARD, CPU, GIB, REMOTE, plan


def test_the_plan_is_json(ctx: AppContext) -> None:
    told = json.loads(json.dumps(plan(ctx, "remote", seed=5).as_dict()))

    assert told["preset"] == "remote"
    assert told["settings"]["seed"] == 5
    assert told["to_download"] == [REMOTE]
    assert [file["role"] for file in told["files"]] == ["transformer", "text_encoder", "vae"]
    for choice in ("device", "dtype", "attention", "offload"):
        assert told[choice]["value"] and told[choice]["reason"]


def test_a_machine_that_is_too_small_is_told_with_what_it_lacks(
    sized: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.app.plan.generation.ram_bytes", lambda: 2 * GIB)
    small = plan(sized, "remote")
    monkeypatch.setattr("shared.app.plan.generation.ram_bytes", lambda: 64 * GIB)
    large = plan(sized, "remote")

    assert not small.fits and "2,048 MiB of RAM, " in small.fit_words and "too few" in small.memory_words
    assert large.fits and large.fit_words == "This machine has 65,536 MiB of RAM: it fits."
    assert (small.as_dict()["memory"]["fits"], large.as_dict()["memory"]["fits"]) == (False, True)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"offload": "disk"}, "disk"),
        ({"max_vram": "much"}, "much"),
        ({"profile": 7.0}, "7"),
        ({"attention": "sdap"}, "sdap"),
        ({"attention": "sage"}, "sage"),
    ],
)
def test_a_flag_that_cannot_be_followed_is_the_users_mistake(
    ctx: AppContext, flags: dict[str, Any], named: str
) -> None:
    for name, value in flags.items():
        setattr(ctx.args, name, value)

    with pytest.raises(UserError, match=named):
        plan(ctx)


def test_the_presets_attention_rule_is_followed_on_its_card(ctx: AppContext) -> None:
    write_preset(ctx.root, "ruled", attention={"<90": "sdpa"})
    ctx.refresh_presets()

    assert "preset" in plan(ctx, "ruled", machine=CARD).attention.reason
    assert "preset" not in plan(ctx, "ruled", machine=CPU).attention.reason
