"""A preset file is read as Wan2GP writes it, and a mistake in it is told with file, key and remedy."""

import pytest

from shared.quant.errors import UserError
from tests.support.preset_folders import mistake


def test_byte_order_marks_and_tabs_are_read(folders):
    text = '\ufeff{"model": {"architecture": "z_image", "URLs": ["a.safetensors"]},\t"batch_size": 2}'
    (folders.finetunes / "windows.json").write_text(text, encoding="utf-8")

    preset = folders.load().get("windows")

    assert (preset.name, preset.settings["batch_size"]) == ("windows", 2)


def test_a_misspelt_setting_is_an_error_that_names_the_closest_key(folders):
    message = mistake(folders, lambda write: write("mine", num_inference_step=8))

    assert '"num_inference_step"' in message
    assert '"num_inference_steps"' in message


def test_a_misspelt_model_key_is_an_error_that_names_the_closest_key(folders):
    message = mistake(folders, lambda write: write("mine", {"discription": "x"}))

    assert '"discription"' in message
    assert '"description"' in message


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ({}, {"num_inference_steps": "eight"}, '"num_inference_steps" must be a whole number, got "eight" (text)'),
        ({}, {"num_inference_steps": 8.5}, "a whole number, got 8.5 (number)"),
        ({}, {"guidance_scale": True}, '"guidance_scale" must be a number, got true (truth value)'),
        ({}, {"activated_loras": "a.safetensors"}, '"activated_loras" must be a list of texts, got "a.safetensors"'),
        ({"URLs": 3}, {}, '"URLs" must be a list of URLs or paths, or the id of another preset, got 3 (number)'),
        ({"URLs": []}, {}, 'has no "URLs"'),
        ({"URLs": ...}, {}, 'has no "URLs"'),
        ({"URLs": "a/b.safetensors"}, {}, '"URLs" must be a list: write ["a/b.safetensors"]'),
        ({"modules": [3]}, {}, '"modules" must be a list of modules'),
        ({"visible": "no"}, {}, '"visible" must be true or false, got "no" (text)'),
        ({"dtype": "bfloat16"}, {}, '"dtype" must be "bf16" or "fp16", got "bfloat16" (text)'),
        ({"attention": {"under 89": "sdpa"}}, {}, '"attention" must be an object like'),
        ({"architecture": ...}, {}, 'has no "architecture"'),
        ({"architecture": "z_imag"}, {}, 'unknown architecture "z_imag", the closest is "z_image"'),
        ({"URLs": "z_imagine"}, {}, '"URLs" refers to the preset "z_imagine", which does not exist'),
        ({"modules": ["mine"]}, {}, '"modules" refers to itself: mine -> mine'),
        ({"modules": ["mine#x"]}, {}, '"modules" asks for "mine#x", but "mine" has a list of 1'),
        ({"configs": {"c": {"URL": ["x"]}}}, {}, 'config "c": there is no key "URL"'),
    ],
)
def test_wrong_values_are_told_with_file_key_and_what_is_allowed(folders, model, settings, words):
    message = mistake(folders, lambda write: write("mine", model, **settings))

    assert words in message


def test_broken_json_is_told_with_line_and_column(folders):
    def write(writer):
        path = writer("mine")
        path.write_text('{\n  "model": {},\n  "seed": 1,,\n}', encoding="utf-8")
        return path

    assert "mine.json, line 3, column 13: not valid JSON" in mistake(folders, write)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected a JSON object {...}, got [] (list)"),
        ('{"prompt": "x"}', 'needs a "model" object, got none'),
        ('{"model": "z_image"}', 'needs a "model" object, got "z_image" (text)'),
    ],
)
def test_json_that_is_no_preset_is_told(folders, text, words):
    def write(writer):
        path = writer("mine")
        path.write_text(text, encoding="utf-8")
        return path

    assert words in mistake(folders, write)


def test_a_file_that_is_not_text_is_told(folders):
    path = folders.finetune("mine")
    path.write_bytes(b'{"model": "\xff"}')

    assert "not UTF-8 text (byte 11)" in folders.load().problems[0]


@pytest.mark.parametrize(
    "wrong",
    [
        12.3,
        {"transformer": "12.3 GB"},
        {"transformer": 0},
        {"transformer": []},
        {"vae": 0.2},
        {"VAE": [True]},
        {"VAE": [[1]]},
        {"modules": [[0]]},
    ],
)
def test_a_wrong_size_is_told_with_the_file_and_the_key(folders, wrong):
    path = folders.default("z_image", {"gigabytes": wrong})

    with pytest.raises(UserError, match="gigabytes") as told:
        folders.load()

    assert str(path) in str(told.value) and "by transformer, modules, text_encoder and VAE" in str(told.value)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ({"wormhole": 1}, {}, 'unknown key "wormhole", handed on to the model as it is'),
        ({}, {"wormhole": 1}, 'unknown key "wormhole", without effect'),
        ({}, {"guidance4_scale": 1}, 'the closest known key is "guidance'),
        ({"URLs3": ["x"]}, {}, 'unknown key "URLs3"'),
        ({"xmodules": ["x"]}, {}, 'unknown key "xmodules"'),
        ({"num_inference_steps": 8}, {}, '"num_inference_steps" is a setting'),
        ({}, {"URLs": ["x"]}, '"URLs" has no effect at the top level'),
        ({"URLs2": ["x"]}, {}, '"URLs2" has no effect here: weights for a second phase are not used'),
        ({"auto_quantize": True}, {}, '"auto_quantize" has no effect here'),
    ],
)
def test_a_foreign_key_is_named_once_and_the_preset_loads(folders, model, settings, words):
    path = folders.finetune("mine", model, **settings)
    collection = folders.load()

    (note,) = collection.get("mine").notes

    assert collection.problems == []
    assert note.startswith(f"{path}: ")
    assert words in note


def test_keys_that_begin_with_an_underscore_are_comments(folders):
    folders.finetune("mine", {"_comment": "x"}, _why="y")

    assert folders.load().get("mine").notes == ()
