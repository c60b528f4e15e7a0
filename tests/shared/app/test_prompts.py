"""Texts with several prompts, macros, choices and wildcards become plain prompts, the same for the same seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from shared.app.families import load_families
from shared.app.presets import Preset, load_presets
from shared.app.prompts import Wildcards, escape, expand, mode_of, pictures, split
from shared.app.settings import GenerationSettings
from shared.quant.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def wildcards(tmp_path: Path) -> Wildcards:
    files = {
        "colours": "red\n\n# a note\n3::blue\n",
        "animals/cats": "lynx\n__colours__ tiger\n",
        "round": "a __round__",
        "empty": "# nothing\n",
    }
    for name, text in files.items():
        path = tmp_path / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Wildcards(tmp_path)


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    folder = tmp_path_factory.mktemp("presets")
    model = {"name": "Test", "URLs": ["weights.safetensors"], "architecture": "z_image"}
    (folder / "test.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    return load_presets([folder], load_families(ROOT / "models")).get("test")


def drawn(text: str, wildcards: Wildcards, count: int = 400) -> Counter[str]:
    return Counter(expand(text, random.Random(seed), wildcards) for seed in range(count))


# ---- several prompts in one text


@pytest.mark.parametrize(
    ("mode", "prompts"),
    [("FG", ["a cat\nin snow\n\na dog"]), ("G", ["a cat", "in snow", "a dog"]), ("PG", ["a cat\nin snow", "a dog"])],
)
def test_the_mode_says_what_is_one_prompt(mode: str, prompts: list[str]) -> None:
    assert split("# note\na cat\nin snow\n \n  # more\na dog\n", mode) == prompts


@pytest.mark.parametrize(("value", "mode"), [(0, "G"), ("2", "FG"), ("pg", "PG"), ("", "FG"), ("W", "G"), ("PW", "PG")])
def test_modes_in_wan2gp_s_other_spellings_are_understood(value: object, mode: str) -> None:
    assert mode_of(value) == mode


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match=r'must be FG .* or PG .*, got "lines"'):
        mode_of("lines")


def test_a_macro_makes_one_copy_per_value_and_short_lists_start_again() -> None:
    text = '! {Animal}="cat","dog","owl" : {Colour}="black","white"\na {Colour} {Animal}\n{Animal} in snow'

    assert split(text, "G") == [
        "a black cat", "cat in snow", "a white dog", "dog in snow", "a black owl", "owl in snow"
    ]  # fmt: skip


def test_each_macro_line_begins_anew_and_lines_before_it_are_plain() -> None:
    text = 'a fox\n! {A}="x","y"\n1{A}\n!{B}="z"\n2{B}'

    assert split(text, "G") == ["a fox", "1x", "1y", "2z"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('! {A}="x"\na {B}', r"\{B\} is not a variable.*\{A\}"),
        ("! {A}=x\na {A}", "cannot be read at"),
        ('! {A}="x" "y"\na {A}', "cannot be read at"),
        ('! {A}="x",\na {A}', "cannot be read at"),
        ("# only\n# notes", "notes .* only"),
    ],
)
def test_a_macro_that_cannot_be_read_is_shown(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        split(text, "G")


def test_an_empty_text_is_one_empty_prompt_and_an_exclamation_is_no_macro() -> None:
    assert split("", "G") == [""]
    assert split("! watch out", "G") == ["! watch out"]


# ---- choices and wildcards


def test_choices_nest_and_follow_their_weights(wildcards: Wildcards) -> None:
    seen = drawn("a {3::red|{dark |}blue|} hat", wildcards)

    assert set(seen) == {"a red hat", "a dark blue hat", "a blue hat", "a  hat"}
    assert 200 < seen["a red hat"] < 280  # 3 of 5


def test_wildcards_come_from_files_nest_and_follow_their_weights(wildcards: Wildcards) -> None:
    seen = drawn("__animals/cats__", wildcards)

    assert set(seen) == {"lynx", "red tiger", "blue tiger"}
    assert 160 < seen["lynx"] < 240
    assert 2 < seen["blue tiger"] / seen["red tiger"] < 4.5


@pytest.mark.parametrize("text", ["a {cat}", "2 | 3", "{a", "a }b", "snake_case __", r"C:\cats", "a\\"])
def test_what_is_no_choice_stays_as_it_is(text: str, wildcards: Wildcards) -> None:
    assert set(drawn(text, wildcards, 5)) == {text}


def test_a_backslash_takes_the_meaning_away(wildcards: Wildcards) -> None:
    assert set(drawn(r"\{a\|b} \__colours__ {a\|b|a\|b}", wildcards, 5)) == {"{a|b} __colours__ a|b"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("__colour__", r"no wildcard file colour\.txt.*Closest: colours.*\\__"),
        ("__../secret__", "no wildcard file"),
        ("__round__", "circle: round > round"),
        ("__empty__", "is empty"),
        ("{0::a|0::b}", "weight 0"),
    ],
)
def test_wildcards_that_cannot_be_used_are_named(text: str, says: str, wildcards: Wildcards, tmp_path: Path) -> None:
    (tmp_path.parent / "secret.txt").write_text("never", encoding="utf-8")

    with pytest.raises(UserError, match=says):
        expand(text, random.Random(0), wildcards)


def test_escaped_text_expands_to_itself(wildcards: Wildcards) -> None:
    chance = random.Random(5)

    for _ in range(2000):
        text = "".join(chance.choices(r"ab{}|_\ ", k=chance.randint(0, 12)))
        assert expand(escape(text), chance, wildcards) == text


# ---- pictures


def test_every_picture_is_drawn_with_the_prompt_its_record_tells(preset: Preset, wildcards: Wildcards) -> None:
    text = "a __colours__ {hat|coat} in \\{braces|x}\n\na dog"
    wishes = {"prompt": text, "multi_prompts_gen_type": "PG", "batch_size": 3, "seed": 7, "negative_prompt": "{a|b}"}
    settings = GenerationSettings.build(preset, {}, wishes)

    alone = pictures(settings, wildcards.folder)
    again = [pictures(GenerationSettings.build(preset, one.as_record()), wildcards.folder) for one in alone]

    assert [one.seed for one in alone] == [7, 8, 9, 7, 8, 9]
    assert len({one.prompt for one in alone[:3]}) > 1
    assert {one.prompt for one in alone[3:]} == {"a dog"}
    assert {one.prompt_template for one in alone} == {text}
    for one, redrawn in zip(alone, again, strict=True):
        assert [r.host_kwargs() for r in redrawn] == [one.host_kwargs()]
        assert "{braces|x}" in one.host_kwargs()["input_prompt"] or one.prompt == "a dog"


def test_a_picture_of_a_batch_is_expanded_as_it_is_alone(preset: Preset, wildcards: Wildcards) -> None:
    wishes = {"prompt": "{a|b|c|d|e|f|g|h}", "seed": 20, "batch_size": 4}
    batch = pictures(GenerationSettings.build(preset, {}, wishes), wildcards.folder)

    alone = [
        pictures(GenerationSettings.build(preset, {}, wishes | {"seed": 20 + i, "batch_size": 1}), wildcards.folder)[0]
        for i in range(4)
    ]

    assert batch == tuple(alone)


def test_variations_share_the_seed_and_have_their_own_second_one(preset: Preset, tmp_path: Path) -> None:
    wishes = {"prompt": "x", "seed": 4, "batch_size": 2, "variation_strength": 0.3, "variation_seed": 10}

    alone = pictures(GenerationSettings.build(preset, {}, wishes), tmp_path)

    assert [(one.seed, one.sampling.variation_seed) for one in alone] == [(4, 10), (4, 11)]
