"""Families found on disk, and what their handlers say merged."""

import argparse
import textwrap
from pathlib import Path

import pytest

from shared.app.families import load_families
from shared.quant.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
HANDLER = """
class family_handler:
    query_supported_types = staticmethod(lambda: {types!r})
    query_family_maps = staticmethod(lambda: ({equivalents!r}, {compatible!r}))
    query_model_family = staticmethod(lambda: {family!r})
    query_family_infos = staticmethod(lambda: {{{family!r}: ({order}, {family!r}.title())}})
    query_model_def = staticmethod(lambda base, definition: {{}})
    query_model_files = staticmethod(lambda compute, base, definition: [])
    get_lora_dir = staticmethod(lambda base, args, root: root)
    load_model = staticmethod(lambda *args, **kwargs: None)
    update_default_settings = staticmethod(lambda base, definition, settings: None)

    @staticmethod
    def register_lora_cli_args(parser, lora_root):
        parser.add_argument("--lora-dir-" + {family!r})
"""


@pytest.fixture
def models(tmp_path, monkeypatch, request):
    """A folder for made-up families, importable under a name that no other test has used."""
    folder = tmp_path / f"models_{abs(hash(request.node.name))}"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def write_handler(models, name, *, types, family=None, equivalents=None, compatible=None, order=100, text=None):
    folder = models / name
    folder.mkdir()
    code = text or HANDLER.format(
        types=types,
        family=family or name,
        equivalents=equivalents or {},
        compatible=compatible or {},
        order=order,
    )
    (folder / f"{name}_handler.py").write_text(textwrap.dedent(code), encoding="utf-8")


def test_the_programs_own_family_is_found():
    families = load_families(ROOT / "models")

    assert families.family_of("z_image_base") == "z_image"
    assert families.infos["z_image"] == (1120, "Z-Image")


def test_a_folder_with_a_handler_is_a_family(models):
    write_handler(models, "b", types=["b1", "b2"], order=2)
    write_handler(models, "a", types=["a1"], order=1)
    (models / "c").mkdir()

    families = load_families(models)

    assert list(families.handlers) == ["a1", "b1", "b2"]
    assert dict(families.infos) == {"a": (1, "A"), "b": (2, "B")}
    assert families.family_of("b2") == "b"


def test_an_unknown_architecture_is_told_with_the_closest():
    families = load_families(ROOT / "models")

    with pytest.raises(UserError, match='unknown architecture "z_image_bas", the closest is "z_image_base"'):
        families.family_of("z_image_bas")


def test_two_families_cannot_serve_one_architecture(models):
    write_handler(models, "a", types=["x"])
    write_handler(models, "b", types=["x"])

    with pytest.raises(UserError, match=r'b_handler\.py: the architecture "x" is already served by .*a_handler'):
        load_families(models)


def test_a_handler_without_a_method_of_the_contract_is_told(models):
    write_handler(models, "a", types=[], text="class family_handler:\n    query_supported_types = list\n")

    with pytest.raises(UserError, match=r"a_handler\.py: family_handler lacks query_family_maps, query_model_family"):
        load_families(models)


def test_a_handler_module_without_the_class_is_told(models):
    write_handler(models, "a", types=[], text="pass\n")

    with pytest.raises(UserError, match=r"a_handler\.py: no class named family_handler"):
        load_families(models)


def test_settings_fit_equivalent_architectures_both_ways_and_compatible_ones_one_way(models):
    write_handler(models, "a", types=["x", "y", "z"], equivalents={"y": "x"}, compatible={"x": {"z"}})
    families = load_families(models)

    answers = {(given, wanted): families.are_compatible(given, wanted) for given in "xyz" for wanted in "xyz"}

    assert [pair for pair, answer in answers.items() if not answer] == [("z", "x"), ("z", "y")]


def test_turbo_and_base_take_each_others_settings_but_not_a_control_models():
    families = load_families(ROOT / "models")

    assert families.are_compatible("z_image_base", "z_image")
    assert families.are_compatible("z_image", "z_image_base")
    assert not families.are_compatible("z_image_control", "z_image")
    assert not families.are_compatible("t2v", "z_image")


def test_each_family_adds_its_flags_once_even_with_two_handlers(models):
    write_handler(models, "a", types=["x"], family="shared")
    write_handler(models, "b", types=["y"], family="shared")
    write_handler(models, "c", types=["z"])
    parser = argparse.ArgumentParser()

    load_families(models).register_cli_args(parser, "loras")

    assert vars(parser.parse_args([])) == {"lora_dir_shared": None, "lora_dir_c": None}
