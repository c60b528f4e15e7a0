"""The tables of known keys fit each other and the family's handler."""

import pytest

from models.z_image.z_image_handler import family_handler
from shared.app.host_keys import HOST_MODEL_KEYS, HOST_SETTING_KEYS, RECORD_KEYS
from shared.app.schema import MODEL_KEYS, SETTING_KEYS, closest_key, describe, read_json_object
from shared.app.schema.kinds import CONDITION, NUMBER, WHOLE
from shared.quant.errors import UserError


def test_no_key_stands_in_two_tables():
    assert not HOST_SETTING_KEYS & SETTING_KEYS.keys()
    assert not RECORD_KEYS & (SETTING_KEYS.keys() | HOST_SETTING_KEYS)
    assert not HOST_MODEL_KEYS & MODEL_KEYS.keys()


def test_every_default_is_of_its_own_kind():
    for name, key in (MODEL_KEYS | SETTING_KEYS).items():
        assert key.default is None or key.kind.accepts(key.default), name


def test_whatever_the_handler_answers_is_known():
    known = MODEL_KEYS.keys() | HOST_MODEL_KEYS
    for architecture in family_handler.query_supported_types():
        settings = {}
        family_handler.update_default_settings(architecture, {}, settings)

        assert family_handler.query_model_def(architecture, {}).keys() <= known
        assert settings.keys() <= SETTING_KEYS.keys() | HOST_SETTING_KEYS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "nested too deep"),
        (f'{{"seed": {"1" * 5000}}}', "4300 digits"),
        ("[]", "expected a JSON object"),
    ],
)
def test_a_file_that_json_cannot_hold_is_named(tmp_path, text, said):
    path = tmp_path / "preset.json"
    path.write_text(text)

    with pytest.raises(UserError, match=said) as raised:
        read_json_object(path)

    assert str(path) in raised.value.message


def test_a_whole_number_that_no_float_can_hold_is_none():
    assert not NUMBER.accepts(10**400) and not WHOLE.accepts(-(10**400))
    assert NUMBER.accepts(10**300)


def test_the_closest_key_ignores_case_and_separators():
    assert closest_key("nag-scale", SETTING_KEYS) == "NAG_scale"
    assert closest_key("numInferenceSteps", SETTING_KEYS) == "num_inference_steps"
    assert closest_key("wormhole", SETTING_KEYS) is None


def test_long_values_are_shortened_in_messages():
    text = describe("x" * 200)

    assert len(text) < 80
    assert text.endswith("... (text)")


def test_conditions_are_comparisons_joined_by_and_and_or():
    good = ["<89", ">= 75 & < 90", "86+89", "=120"]
    bad = ["", "sm89", "<89&", "<<89", "89 90", "<8.9"]

    assert [condition for condition in good if not CONDITION.fullmatch(condition)] == []
    assert [condition for condition in bad if CONDITION.fullmatch(condition)] == []
