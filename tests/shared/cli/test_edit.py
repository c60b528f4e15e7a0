"""The flags that draw from pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shared.app.context import default_root
from shared.app.families import load_families
from shared.cli.parser import build_parser, overrides_of, parse_arguments


@pytest.fixture(scope="module")
def parser() -> Any:
    return build_parser(load_families(default_root() / "models"), "lora_root")


def overrides(parser: Any, *flags: str) -> dict[str, Any]:
    return overrides_of(parse_arguments(parser, ["generate", "a fox", *flags]))


def test_the_flags_become_settings(parser: Any) -> None:
    asked = overrides(
        parser, "--image", "a.png", "--mask", "m.png", "--outpaint", "left=8", "--denoising-strength", "0.4",
        "--control", "c.png:canny", "--control-weight", "0.9", "--reference", "r.png", "--reference", "s.png",
    )  # fmt: skip

    assert asked == {
        "image_refs": ["r.png", "s.png"],
        "prompt": "a fox", "image_start": "a.png", "image_mask": "m.png", "outpaint": "left=8",
        "denoising_strength": 0.4, "image_guide": "c.png", "control_preprocessor": "canny", "control_net_weight": 0.9,
    }  # fmt: skip


def test_without_them_nothing_is_asked(parser: Any) -> None:
    assert overrides(parser) == {"prompt": "a fox"}


@pytest.mark.parametrize(
    ("flags", "strength"),
    [
        (["--image", "a.png"], 0.6),
        (["--image", "a.png", "--set", "denoising_strength=0.2"], 0.2),
        (["--image", "a.png", "--mask", "m.png"], None),
        (["--image", "a.png", "--outpaint", "all=8"], None),
        (["--image", "a.png", "--set", "image_mask=m.png"], None),
    ],
)
def test_a_picture_alone_is_changed_by_six_tenths(parser: Any, flags: list[str], strength: float | None) -> None:
    assert overrides(parser, *flags).get("denoising_strength") == strength


def test_a_misspelt_preprocessor_is_told_at_once(parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        overrides(parser, "--control", "c.png:cany")

    assert stopped.value.code == 2
    assert 'The closest is "canny"' in capsys.readouterr().err


def test_the_preview_is_written_and_nothing_is_loaded(
    parser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from shared.app.context import AppContext
    from shared.cli import commands

    Image.new("RGB", (60, 40), "red").save(tmp_path / "c.png")
    args = parse_arguments(
        parser,
        ["generate", "x", "--preset", "z_image_control2_1_8s", "--control", f"{tmp_path / 'c.png'}:gray",
         "--resolution", "64x64", "--control-preview", str(tmp_path / "seen" / "it.png")],
    )  # fmt: skip

    code = commands.generate(AppContext.create(args), args)

    with Image.open(tmp_path / "seen" / "it.png") as seen:
        assert (code, seen.size) == (0, (64, 64))
    assert capsys.readouterr().out.strip() == str(tmp_path / "seen" / "it.png")
