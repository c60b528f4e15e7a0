"""Presets are built of their files: settings, model keys, configs, and the sizes that are stated."""

import json

from shared.app.presets import choose_files
from tests.support.preset_folders import HUB


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


def test_a_size_does_not_outlast_the_file_it_was_stated_of(folders):
    folders.default(
        "z_image", {"gigabytes": {"transformer": 2, "VAE": 0.1}, "configs": {"own": {"VAE_URLs": ["v.sft"]}}}
    )
    (folders.finetunes / "z_image.json").write_text(json.dumps({"model": {"URLs": ["mine.safetensors"]}}))

    preset = folders.load().get("z_image")

    assert published(preset) == {("vae", "ZImageTurbo_VAE_bf16.safetensors"): 10**8}
    assert published(preset.configured("own")) == {}


def test_a_preset_that_takes_anothers_files_takes_their_sizes(folders):
    folders.default("owner", {"gigabytes": {"transformer": 2, "text_encoder": 3}})
    folders.default("middle", {"URLs": "owner"})
    folders.default("user", {"URLs": "middle", "gigabytes": {"VAE": 0.1}})

    found = published(folders.load().get("user"))

    assert found == {
        ("transformer", "owner_bf16.safetensors"): 2 * 10**9,
        ("vae", "ZImageTurbo_VAE_bf16.safetensors"): 10**8,
    }
