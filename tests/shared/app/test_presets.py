"""Presets read from JSON files: Wan2GP's schema, references, merging, mistakes, and the choice of files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.app.device import DeviceInfo
from shared.app.families import load_families
from shared.app.presets import LoraChoice, attention_rule, choose_files, load_presets
from shared.quant.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
HUB = "https://huggingface.co/someone/weights/resolve/main/"
QWEN = "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/Qwen3/"


@pytest.fixture(scope="module")
def families():
    return load_families(ROOT / "models")


class Folders:
    """A defaults and a finetunes folder to write presets into."""

    def __init__(self, root, families):
        self.families = families
        self.defaults, self.finetunes = root / "defaults", root / "finetunes"
        self.defaults.mkdir()
        self.finetunes.mkdir()

    def default(self, preset_id, model=None, **settings):
        return self._write(self.defaults, preset_id, model, settings)

    def finetune(self, preset_id, model=None, **settings):
        return self._write(self.finetunes, preset_id, model, settings)

    def load(self):
        return load_presets([self.defaults, self.finetunes], self.families)

    def _write(self, folder, preset_id, model, settings):
        path = folder / f"{preset_id}.json"
        model = {"name": preset_id, "architecture": "z_image", "URLs": [f"{HUB}{preset_id}_bf16.safetensors"]} | (
            model or {}
        )
        model = {key: value for key, value in model.items() if value is not ...}
        path.write_text(json.dumps({"model": model, **settings}, indent=4), encoding="utf-8")
        return path


@pytest.fixture
def folders(tmp_path, families):
    return Folders(tmp_path, families)


# ---- Wan2GP's own kinds of files


def test_settings_are_the_architectures_under_the_files(folders):
    folders.default("turbo", num_inference_steps=9, resolution="1920x1088")

    settings = folders.load().get("turbo").settings

    assert (settings["num_inference_steps"], settings["resolution"]) == (9, "1920x1088")
    assert (settings["guidance_scale"], settings["NAG_tau"], settings["image_mode"]) == (0, 3.5, 1)


def test_a_null_setting_means_not_set(folders):
    folders.default("base", {"architecture": "z_image_base"}, num_inference_steps=None, image_guide=None)

    assert folders.load().get("base").settings["num_inference_steps"] == 30


def test_model_keys_of_the_file_lie_on_top_of_the_handlers(folders):
    folders.default("turbo", {"NAG": False, "unified_solver": True, "text_encoder_folder": "Other"})

    preset = folders.load().get("turbo")

    assert preset.model_def["NAG"] is False
    assert preset.model_def["unified_solver"] is True
    assert preset.model_def["text_encoder_folder"] == "Other"
    assert preset.model_def["image_outputs"] is True
    assert preset.notes == ()


def test_a_control_preset_takes_its_weights_by_id_and_brings_a_module(folders):
    folders.default("z_image")
    module = [f"{HUB}Union_bf16.safetensors", f"{HUB}Union_quanto_bf16_int8.safetensors"]
    folders.default(
        "z_image_control",
        {"architecture": "z_image_control", "URLs": "z_image", "modules": [module]},
        num_inference_steps=9,
        control_net_weight_alt=0.75,
    )

    preset = folders.load().get("z_image_control")

    assert preset.urls == (f"{HUB}z_image_bf16.safetensors",)
    assert preset.modules == (tuple(module),)
    assert preset.settings["control_net_weight"] == 0.75
    assert preset.settings["control_net_weight_alt"] == 0.75
    assert preset.notes == ()


def test_every_list_can_be_inherited_through_several_presets(folders):
    folders.default(
        "first",
        {
            "modules": [["m.safetensors"]],
            "text_encoder_URLs": ["te.safetensors"],
            "VAE_URLs": ["vae.safetensors"],
            "preload_URLs": [f"{HUB}map.json|maps"],
            "loras": ["a.safetensors", "b.safetensors"],
            "loras_multipliers": [0.5],
        },
    )
    keys = (
        "URLs",
        "modules",
        "text_encoder_URLs",
        "VAE_URLs",
        "preload_URLs",
        "loras",
        "loras_multipliers",
    )
    folders.default("second", dict.fromkeys(keys, "first"))
    folders.finetune("third", dict.fromkeys(keys, "second"))

    preset = folders.load().get("third")

    assert preset.urls == (f"{HUB}first_bf16.safetensors",)
    assert preset.modules == (("m.safetensors",),)
    assert preset.text_encoder_urls == ("te.safetensors",)
    assert preset.vae_urls == ("vae.safetensors",)
    assert preset.preload_urls == (f"{HUB}map.json|maps",)
    assert preset.loras == (LoraChoice("a.safetensors", "0.5"), LoraChoice("b.safetensors", "1"))


def test_the_text_encoder_of_another_preset_may_be_the_families_own(folders):
    folders.default("z_image")
    folders.default("other", {"text_encoder_URLs": "z_image"})

    assert folders.load().get("other").text_encoder_urls == (
        f"{QWEN}qwen3_bf16.safetensors",
        f"{QWEN}qwen3_quanto_bf16_int8.safetensors",
    )


def test_modules_can_be_single_ones_of_other_presets(folders):
    folders.default("control", {"modules": [["union.safetensors"]]})
    folders.default("named", {"modules": {"tile": ["tile.safetensors"], "lite": "control"}, "visible": False})
    wanted = ["control", "named#tile", {"URLs": ["third.safetensors"]}, "named#lite"]
    folders.finetune("mix", {"modules": wanted})

    collection = folders.load()

    assert collection.problems == []
    assert collection.get("named").modules == ()  # it only lends them
    assert collection.get("mix").modules == (
        ("union.safetensors",),
        ("tile.safetensors",),
        ("third.safetensors",),
        ("union.safetensors",),
    )


def test_a_single_vae_may_stand_without_a_list(folders):
    folders.default("turbo", {"VAE_URLs": f"{HUB}other_vae.safetensors"})

    preset = folders.load().get("turbo")

    assert preset.vae_urls == (f"{HUB}other_vae.safetensors",)
    assert choose_files(preset).vae == f"{HUB}other_vae.safetensors"


def test_configs_are_the_preset_with_other_parts(folders):
    sets = {
        "_name": "Parts",
        "_default_label": "Own",
        "small_encoder": {"name": "Small encoder", "text_encoder_URLs": ["small.safetensors"]},
        "their_vae": {"VAE_URLs": "other"},
    }
    folders.default("other", {"VAE_URLs": ["their.safetensors"]})
    folders.finetune("mine", {"configs": sets})
    folders.finetune("yours", {"configs": "mine"})
    collection = folders.load()

    mine, yours = collection.get("mine"), collection.get("yours")

    assert list(mine.configs) == ["small_encoder", "their_vae"]
    assert mine.configured(",,,small_encoder").text_encoder_urls == ("small.safetensors",)
    assert mine.configured("their_vae").vae_urls == ("their.safetensors",)
    assert mine.configured("small_encoder").name == "mine"
    assert yours.configured("small_encoder").urls == (f"{HUB}yours_bf16.safetensors",)
    assert mine.configured("") is mine
    assert mine.configured(",,,gone") is mine


def test_an_exported_settings_file_with_a_model_part_is_a_preset(folders):
    folders.finetune(
        "exported",
        {"finetune_source_model": "z_image", "infos": "## Notes", "resolutions": [["1:1", "1024x1024"]]},
        prompt="a lighthouse",
        type="WanGP v12.60 by DeepBeepMeep - x",
        settings_version=2.74,
        model_type="z_image",
        modules=[],
        video_length=81,
        custom_settings=None,
        override_profile=-1,
        perturbation_layers=[9],
        activated_loras=["style.safetensors"],
        loras_multipliers="0.8",
    )

    collection = folders.load()

    assert collection.problems == []
    assert collection.get("exported").notes == ()
    assert collection.get("exported").settings["prompt"] == "a lighthouse"


def test_invisible_presets_are_usable_but_not_listed(folders):
    folders.default("shown", {"name": "B"})
    folders.default("also", {"name": "A"})
    folders.default("hidden", {"visible": False})

    collection = folders.load()

    assert [(label, [preset.id for preset in presets]) for label, presets in collection.grouped()] == [
        ("Z-Image", ["also", "shown"])
    ]
    assert collection.get("hidden").visible is False


def test_byte_order_marks_and_tabs_are_read(folders):
    text = '\ufeff{"model": {"architecture": "z_image", "URLs": ["a.safetensors"]},\t"batch_size": 2}'
    (folders.finetunes / "windows.json").write_text(text, encoding="utf-8")

    preset = folders.load().get("windows")

    assert (preset.name, preset.settings["batch_size"]) == ("windows", 2)


# ---- merging


def test_a_finetune_with_a_defaults_id_overrides_it_key_by_key(folders):
    shipped = folders.default("z_image", {"description": "shipped"}, num_inference_steps=8, batch_size=1)
    override = {"model": {"name": "Mine", "visible": False}, "batch_size": 4}
    mine = folders.finetunes / "z_image.json"
    mine.write_text(json.dumps(override), encoding="utf-8")

    preset = folders.load().get("z_image")

    assert (preset.name, preset.description, preset.visible) == ("Mine", "shipped", False)
    assert preset.urls == (f"{HUB}z_image_bf16.safetensors",)
    assert (preset.settings["num_inference_steps"], preset.settings["batch_size"]) == (8, 4)
    assert preset.files == (shipped, mine)


def test_a_new_architecture_in_an_override_brings_its_own_defaults(folders):
    folders.default("model")
    (folders.finetunes / "model.json").write_text('{"model": {"architecture": "z_image_base"}}', encoding="utf-8")

    preset = folders.load().get("model")

    assert preset.model_def["guidance_max_phases"] == 1
    assert preset.settings["num_inference_steps"] == 30


def test_a_broken_override_leaves_the_default_as_it_is(folders):
    folders.default("z_image")
    path = folders.finetune("z_image", {"URLs": "nowhere"})

    collection = folders.load()

    assert collection.get("z_image").urls == (f"{HUB}z_image_bf16.safetensors",)
    assert len(collection.problems) == 1
    assert str(path) in collection.problems[0]


def test_the_users_folder_may_be_missing(folders, tmp_path):
    folders.default("z_image")

    collection = load_presets([folders.defaults, tmp_path / "none"], folders.families)

    assert list(collection.presets) == ["z_image"]


# ---- mistakes


def mistake(folders, write):
    """The message for one and the same mistake in defaults/ (raised) and in finetunes/ (a problem, file left out)."""
    path = write(folders.finetune)
    collection = folders.load()
    assert path.stem not in collection.presets
    (problem,) = [line for line in collection.problems if str(path) in line]
    with pytest.raises(UserError) as shown:
        collection.get(path.stem)
    assert str(shown.value) in problem
    path.unlink()

    path = write(folders.default)
    with pytest.raises(UserError, match=f"^{path.parent}") as raised:
        folders.load()
    assert str(shown.value).replace(str(folders.finetunes), str(folders.defaults)) == str(raised.value)
    return str(raised.value)


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


# ---- sizes of files


def published(preset):
    return {(role, url.rpartition("/")[2]): size for (role, url), size in preset.published.items()}


def test_sizes_are_stated_by_place_for_alternatives_in_their_order(folders):
    sizes = {"transformer": [2, 1.25], "modules": 0.5, "text_encoder": 3, "VAE": 0.1}
    urls = [HUB + "a_bf16.safetensors", HUB + "a_int8.safetensors"]
    folders.default("sized", {"URLs": urls, "modules": [[HUB + "m.safetensors"]], "gigabytes": sizes})

    preset = folders.load().get("sized")

    assert published(preset) == {
        ("transformer", "a_bf16.safetensors"): 2 * 10**9,
        ("transformer", "a_int8.safetensors"): 1_250_000_000,
        ("module", "m.safetensors"): 5 * 10**8,
        ("text_encoder", "qwen3_bf16.safetensors"): 3 * 10**9,
        ("vae", "ZImageTurbo_VAE_bf16.safetensors"): 10**8,
    }
    wants = {want.role: want.published for want in choose_files(preset, "int8").wants}
    assert (wants["transformer"], wants["text_encoder"], wants["companion"]) == (1_250_000_000, None, None)
    assert choose_files(preset).wants[0].published == 2 * 10**9


def test_each_module_may_state_a_size_for_each_of_its_alternatives(folders):
    modules = [[HUB + "a.safetensors", HUB + "a_int8.safetensors"], [HUB + "b.safetensors"]]
    folders.default("sized", {"modules": modules, "gigabytes": {"modules": [[3.1, 1.9], 2]}})

    preset = folders.load().get("sized")

    stated = {name: size / 10**9 for (role, name), size in published(preset).items() if role == "module"}
    assert stated == {"a.safetensors": 3.1, "a_int8.safetensors": 1.9, "b.safetensors": 2}
    wants = [want for want in choose_files(preset, "int8").wants if want.role == "module"]
    assert [want.published for want in wants] == [1_900_000_000, 2_000_000_000]


def test_a_preset_that_takes_anothers_files_takes_their_sizes(folders):
    folders.default("owner", {"gigabytes": {"transformer": 2, "text_encoder": 3}})
    folders.default("middle", {"URLs": "owner"})
    folders.default("user", {"URLs": "middle", "gigabytes": {"VAE": 0.1}})

    found = published(folders.load().get("user"))

    assert found == {
        ("transformer", "owner_bf16.safetensors"): 2 * 10**9,
        ("vae", "ZImageTurbo_VAE_bf16.safetensors"): 10**8,
    }


def test_a_size_does_not_outlast_the_file_it_was_stated_of(folders):
    folders.default(
        "z_image", {"gigabytes": {"transformer": 2, "VAE": 0.1}, "configs": {"own": {"VAE_URLs": ["v.sft"]}}}
    )
    (folders.finetunes / "z_image.json").write_text(json.dumps({"model": {"URLs": ["mine.safetensors"]}}))

    preset = folders.load().get("z_image")

    assert published(preset) == {("vae", "ZImageTurbo_VAE_bf16.safetensors"): 10**8}
    assert published(preset.configured("own")) == {}


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


def test_a_circle_of_references_is_told_as_a_circle(folders):
    folders.default("z_image")
    folders.finetune("a", {"URLs": "b"})
    folders.finetune("b", {"URLs": "a"})

    collection = folders.load()

    assert list(collection.presets) == ["z_image"]
    assert '"URLs" refers to itself: a -> b -> a' in collection.problems[0]
    with pytest.raises(UserError, match="refers to"):
        collection.get("a")


def test_an_override_that_closes_a_circle_through_defaults_is_the_one_left_out(folders):
    folders.default("z_image")
    folders.default("z_image_control", {"URLs": "z_image"})
    folders.finetune("z_image", {"URLs": "z_image_control"})

    collection = folders.load()

    assert set(collection.presets) == {"z_image", "z_image_control"}
    assert len(collection.problems) == 1


def test_an_override_that_breaks_a_default_which_refers_to_it_is_the_one_left_out(folders):
    folders.default("control", {"modules": [["union.safetensors"]]})
    borrower = folders.default("tile", {"modules": ["control"]})
    override = folders.finetune("control", {"modules": [["one.safetensors"], ["two.safetensors"]]})

    collection = folders.load()

    assert collection.get("tile").modules == (("union.safetensors",),)
    assert collection.problems == [
        f'{override}: with this file, {borrower}: "modules" asks for "control", but "control" has a list of 2. '
        "This file is left out."
    ]


def test_two_files_of_one_kind_with_one_id_are_an_error(folders, tmp_path):
    folders.default("z_image")
    first, second = folders.finetune("mine"), tmp_path / "more" / "mine.json"
    second.parent.mkdir()
    second.write_text(first.read_text(encoding="utf-8"), encoding="utf-8")

    collection = load_presets([folders.defaults, folders.finetunes, second.parent], folders.families)

    assert collection.problems == [
        f"{second}: {first} already has this preset id. Rename or remove one of the two files. This file is left out."
    ]
    assert collection.get("mine").files == (first,)


def test_ids_that_differ_only_in_case_are_an_error(folders):
    folders.default("z_image")
    folders.default("Z_Image")
    if len(list(folders.defaults.iterdir())) == 1:
        pytest.skip("file names ignore case here, so there cannot be two")

    with pytest.raises(UserError, match="already has this preset id"):
        folders.load()


def test_a_foreign_architecture_in_finetunes_does_not_hide_the_others(folders):
    folders.default("z_image")
    folders.finetune("wan", {"architecture": "t2v"})

    collection = folders.load()

    assert list(collection.presets) == ["z_image"]
    assert 'unknown architecture "t2v"' in collection.problems[0]


def test_an_unknown_preset_is_told_with_the_closest_ids(folders):
    folders.default("z_image")
    folders.default("z_image_base")

    with pytest.raises(UserError) as error:
        folders.load().get("z_imagebase")

    assert error.value.message == 'There is no preset "z_imagebase".'
    assert "z_image_base" in error.value.hint


def test_an_unknown_preset_like_no_other_is_told_with_those_there_are(folders):
    folders.default("z_image")

    with pytest.raises(UserError, match=r"Known: z_image\."):
        folders.load().get("qqq")


# ---- what is told and then let be


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


# ---- choice of files


def gpu(capability):
    return DeviceInfo("cuda", "GPU", capability, 2**34, "test")


ALTERNATIVES = ["m_bf16.safetensors", "m_fp8.safetensors", "m_quanto_fp16_int8.safetensors", "M_quanto_BF16_INT8.sft"]


@pytest.mark.parametrize(
    ("urls", "preference", "capability", "chosen"),
    [
        (ALTERNATIVES, "", 89, "m_bf16.safetensors"),
        (ALTERNATIVES, "bf16", 89, "m_bf16.safetensors"),
        (ALTERNATIVES, "int8", 89, "M_quanto_BF16_INT8.sft"),
        (ALTERNATIVES, "int8", 75, "m_quanto_fp16_int8.safetensors"),
        (ALTERNATIVES, "fp8", 89, "M_quanto_BF16_INT8.sft"),  # no fp8 file is named bf16, an int8 one is
        (ALTERNATIVES[:2], "int8", 89, "m_fp8.safetensors"),
        (ALTERNATIVES[:1], "int8", 89, "m_bf16.safetensors"),
        (["svdq-int4.safetensors", "svdq-fp4.safetensors"], "fp8", 120, "svdq-int4.safetensors"),
    ],
)
def test_one_alternative_is_chosen_by_wan2gps_rule(folders, urls, preference, capability, chosen):
    folders.default("z_image", {"URLs": [HUB + url for url in urls]})

    plan = choose_files(folders.load().get("z_image"), preference, gpu(capability))

    assert plan.transformer == HUB + chosen


def test_a_demanded_number_type_decides_between_alternatives(folders):
    folders.default("z_image", {"URLs": [HUB + url for url in ALTERNATIVES], "dtype": "fp16"})

    plan = choose_files(folders.load().get("z_image"), "int8", gpu(89))

    assert plan.transformer == HUB + "m_quanto_fp16_int8.safetensors"


def test_the_text_encoder_may_have_its_own_preference(folders):
    folders.default("z_image")
    preset = folders.load().get("z_image")

    assert choose_files(preset, "int8").text_encoder == f"{QWEN}qwen3_quanto_bf16_int8.safetensors"
    assert choose_files(preset, "int8", text_encoder_preference="").text_encoder == f"{QWEN}qwen3_bf16.safetensors"


def test_a_plan_lists_every_file_once_with_its_folder(folders):
    folders.default("z_image", {"modules": [["union.safetensors"]], "preload_URLs": [f"{HUB}a.json|%lora_dir"]})

    wants = choose_files(folders.load().get("z_image")).wants

    listed = [(want.role, want.url.rsplit("/", 1)[-1], want.subfolder) for want in wants]
    assert listed == [
        ("transformer", "z_image_bf16.safetensors", ""),
        ("module", "union.safetensors", ""),
        ("text_encoder", "qwen3_bf16.safetensors", "Qwen3"),
        ("vae", "ZImageTurbo_VAE_bf16.safetensors", ""),
        ("companion", "tokenizer.json", "Qwen3"),
        ("companion", "tokenizer_config.json", "Qwen3"),
        ("companion", "vocab.json", "Qwen3"),
        ("companion", "config.json", "Qwen3"),
        ("companion", "merges.txt", "Qwen3"),
        ("companion", "ZImageTurbo_VAE_bf16_config.json", ""),
        ("companion", "ZImageTurbo_scheduler_config.json", ""),
        ("preload", "a.json", "loras"),
    ]
    assert len(set(wants)) == len(wants)


@pytest.mark.parametrize(
    ("condition", "true_for", "false_for"),
    [
        ("<89", [75, 86], [89, 120]),
        (">=75&<90", [75, 89], [70, 90]),
        ("<=50+>89", [50, 90], [51, 89]),
        ("89", [89], [88, 90]),
        ("= 89 + 120", [89, 120], [100]),
    ],
)
def test_attention_conditions_compare_the_compute_capability(folders, condition, true_for, false_for):
    folders.default("z_image", {"attention": {condition: "sdpa"}})
    preset = folders.load().get("z_image")

    assert [attention_rule(preset, capability) for capability in true_for] == ["sdpa"] * len(true_for)
    assert [attention_rule(preset, capability) for capability in false_for] == [None] * len(false_for)


def test_the_first_attention_condition_that_holds_is_used_and_none_without_a_gpu(folders):
    folders.default("z_image", {"attention": {"<80": "sdpa", "<90": "sage", ">0": "flash"}})
    preset = folders.load().get("z_image")

    assert [attention_rule(preset, capability) for capability in (75, 86, 120)] == ["sdpa", "sage", "flash"]
    assert attention_rule(preset, None) is None


def test_a_loras_strength_is_read_as_numbers():
    assert LoraChoice("a.safetensors", "0.8").strength() == 0.8
    assert LoraChoice("a.safetensors", "1,0.5").strength() == ((1.0, 0.5),)


def test_listing_presets_imports_nothing_large():
    code = (
        "import sys; from pathlib import Path; from shared.app.families import load_families;"
        "from shared.app.presets import load_presets; import shared.app.settings;"
        "load_presets([Path('defaults')], load_families(Path('models')));"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'PIL', 'huggingface_hub', 'gradio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
