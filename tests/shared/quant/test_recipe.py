"""Recipes are read strictly, the first rule that fits decides, and mistakes are named with file and entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.quant.errors import UserError
from shared.quant.recipe import Recipe

FORMATS = ("nvfp4", "mxfp8", "bf16")


def recipe(tmp_path: Path, content: object) -> Recipe:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Recipe.load(path, FORMATS)


def test_the_first_rule_that_fits_the_whole_name_decides(tmp_path: Path) -> None:
    rules = [[r"layers\.1\.w1", "mxfp8"], [r"layers\.\d+\.w1", "nvfp4"], [r".*\.w2", "mxfp8"]]

    read = recipe(tmp_path, {"description": "Mine", "rules": rules})

    assert read.description == "Mine"
    names = ("layers.1.w1", "layers.11.w1", "refiner.layers.1.w1", "layers.1.w1.weight", "layers.0.w2", "norm")
    assert [read.format_of(n) for n in names] == ["mxfp8", "nvfp4", "bf16", "bf16", "mxfp8", "bf16"]


RULE = ["a", "nvfp4"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no readable JSON"),
        ([], "holds a list, expected an object with rules"),
        ({"rules": [RULE], "rulez": []}, "unknown entry 'rulez'"),
        ('{"rules": [["a", "nvfp4"]], "rules": []}', "'rules' is given twice"),
        ({"description": "x"}, "rules is None"),
        ({"rules": []}, r"rules is \[\], expected a list"),
        ({"rules": [RULE], "description": 4}, "description is 4"),
        ({"rules": [RULE, "b"]}, r"rules\[1\] is 'b', expected \[pattern, format\]"),
        ({"rules": [RULE, ["b", "nvfp4", 3]]}, r"rules\[1\] is"),
        ({"rules": [RULE, ["b", 4]]}, r"rules\[1\] is"),
        ({"rules": [RULE, ["b", "nfvp4"]]}, r"rules\[1\]: unknown format 'nfvp4'. Did you mean 'nvfp4'"),
        ({"rules": [["b", "quanto"]]}, r"rules\[0\]: unknown format 'quanto'. Known are bf16, mxfp8, nvfp4"),
        ({"rules": [RULE, ["(b", "nvfp4"]]}, r"rules\[1\]: '\(b' is no regular expression"),
        ({"rules": [RULE, ["b", "nvfp4"], ["a", "mxfp8"]]}, r"rules\[2\] repeats the pattern of rules\[0\]"),
    ],
)
def test_mistakes_are_named_with_file_and_entry(tmp_path: Path, content: object, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        recipe(tmp_path, content)

    assert "mine.json" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        Recipe.load(tmp_path / "none.json", FORMATS)
