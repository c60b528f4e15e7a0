"""The handler against a frozen table of Wan2GP's values, and in a stub host that replays the real one's start-up."""

import argparse
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from models.z_image.z_image_handler import family_handler

ROOT = Path(__file__).resolve().parents[3]
HUB = "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/"

# Values of Wan2GP's models/z_image/z_image_handler.py at 8681e9f7, read off by hand. Change them only when it does.
ARCHITECTURES = ["z_image", "z_image_base", "z_image_control", "z_image_control2", "z_image_control2_1"]
OWN_ARCHITECTURE = "z_image_omni"  # Wan2GP has none for these models
COMMON_DEF = {
    "image_outputs": True,
    "guidance_max_phases": 0,
    "fit_into_canvas_image_refs": 0,
    "profiles_dir": [],
    "vae_upsamplers": {"flux_vae_pid": [1, 2]},
    "excluded_spatial_upsamplers": ["flux_pid"],
    "text_encoder_folder": "Qwen3",
    "text_encoder_URLs": [
        HUB + "Qwen3/qwen3_bf16.safetensors",
        HUB + "Qwen3/qwen3_quanto_bf16_int8.safetensors",
    ],
    "flow_shift": False,
    "NAG": False,
}
CONTROL_DEF = {
    "control_net_weight_name": "Control",
    "control_net_weight_size": 1,
    "guide_preprocessing": {
        "selection": ["", "PV", "DV", "EV", "V"],
        "labels": {"V": "Use Z-Image Raw Format"},
    },
    "mask_preprocessing": {"selection": [""], "visible": False},
}
CONTROL2_DEF = CONTROL_DEF | {
    "mask_preprocessing": {"selection": ["", "A", "NA"], "visible": False},
    "parent_model_type": "z_image_control",
    "inpaint_support": True,
    "inpaint_video_prompt_type": "VA",
}
# Keys that Wan2GP's own handler does not set: samplers, which a host offers as it does for other families, and whether
# a model made to do without guidance may have it, and which attention spoils its pictures, which a host ignores.
OURS = ("sample_solvers", "guidance_optional", "unsafe_attention")
MODEL_DEFS = {
    "z_image": COMMON_DEF | {"NAG": True},
    "z_image_base": COMMON_DEF | {"guidance_max_phases": 1, "flow_shift": True},
    "z_image_control": COMMON_DEF | CONTROL_DEF,
    "z_image_control2": COMMON_DEF | CONTROL2_DEF,
    "z_image_control2_1": COMMON_DEF | CONTROL2_DEF,
}
TURBO_SETTINGS = {
    "image_mode": 1,
    "guidance_scale": 0,
    "num_inference_steps": 8,
    "NAG_scale": 1.0,
    "NAG_tau": 3.5,
    "NAG_alpha": 0.5,
}
DEFAULT_SETTINGS = {
    "z_image": TURBO_SETTINGS,
    "z_image_base": {"image_mode": 1, "guidance_scale": 4, "num_inference_steps": 30, "flow_shift": 6.0},
    "z_image_control": TURBO_SETTINGS | {"control_net_weight": 0.75},
    "z_image_control2": TURBO_SETTINGS | {"control_net_weight": 0.75},
    "z_image_control2_1": TURBO_SETTINGS | {"control_net_weight": 0.75},
}
MODEL_FILES = {
    "repoId": "DeepBeepMeep/Z-Image",
    "sourceFolderList": ["Qwen3", ""],
    "fileList": [
        ["tokenizer.json", "tokenizer_config.json", "vocab.json", "config.json", "merges.txt"],
        [
            "ZImageTurbo_VAE_bf16_config.json",
            "ZImageTurbo_VAE_bf16.safetensors",
            "ZImageTurbo_scheduler_config.json",
        ],
    ],
}
# name -> parameters by position, as the host calls them (contract C1)
METHODS = {
    "query_supported_types": [],
    "query_family_maps": [],
    "query_model_family": [],
    "query_family_infos": [],
    "register_lora_cli_args": ["parser", "lora_root"],
    "get_lora_dir": ["base_model_type", "args", "lora_root"],
    "query_model_def": ["base_model_type", "model_def"],
    "query_model_files": ["computeList", "base_model_type", "model_def"],
    "load_model": [
        "model_filename",
        "model_type",
        "base_model_type",
        "model_def",
        "quantizeTransformer",
        "text_encoder_quantization",
        "dtype",
        "VAE_dtype",
        "mixed_precision_transformer",
        "save_quantized",
        "submodel_no_list",
        "text_encoder_filename",
        "kwargs",
    ],
    "update_default_settings": ["base_model_type", "model_def", "ui_defaults"],
    "fix_settings": ["base_model_type", "settings_version", "model_def", "ui_defaults"],
    "get_rgb_factors": ["base_model_type"],
}


def test_methods_have_the_names_and_parameters_the_host_calls():
    found = {name: list(inspect.signature(getattr(family_handler, name)).parameters) for name in METHODS}

    assert found == METHODS


def test_family_values_equal_wan2gp():
    assert family_handler.query_supported_types() == [*ARCHITECTURES, OWN_ARCHITECTURE]
    assert family_handler.query_model_family() == "z_image"
    assert family_handler.query_family_infos() == {"z_image": (1120, "Z-Image")}
    assert family_handler.query_family_maps() == (
        {"z_image_control2_1": "z_image_control2", "z_image_base": "z_image"},
        {},
    )


def test_omni_is_guided_as_base_is_and_looks_at_reference_pictures():
    found = family_handler.query_model_def(OWN_ARCHITECTURE, {})

    base = family_handler.query_model_def("z_image_base", {})
    assert {key: found[key] for key in base} == base
    assert found["image_ref_choices"]["letters_filter"] == "I"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_definition_equals_wan2gp(architecture):
    found = family_handler.query_model_def(architecture, {})

    assert {key: value for key, value in found.items() if key not in OURS} == MODEL_DEFS[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_settings_equal_wan2gp(architecture):
    settings = {}

    assert family_handler.update_default_settings(architecture, {}, settings) is None
    assert settings == DEFAULT_SETTINGS[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_companion_files_equal_wan2gp(architecture):
    definition = family_handler.query_model_def(architecture, {})

    assert family_handler.query_model_files(list, architecture, definition) == [MODEL_FILES]
    assert family_handler.query_model_files(list, architecture) == [MODEL_FILES]


def test_a_host_may_change_what_it_was_given_without_changing_the_next_answer():
    given = family_handler.query_model_def("z_image_control2", {})
    given["guide_preprocessing"]["selection"].clear()
    given["text_encoder_URLs"].clear()
    files = family_handler.query_model_files(list, "z_image")
    files[0]["fileList"][0].clear()

    again = family_handler.query_model_def("z_image_control2", {})
    assert {key: value for key, value in again.items() if key not in OURS} == MODEL_DEFS["z_image_control2"]
    assert family_handler.query_model_files(list, "z_image") == [MODEL_FILES]


def test_a_preset_with_its_own_text_encoder_and_vae_needs_no_companion_files():
    own_encoder = {"text_encoder_folder": "file:models/z_image/demo/text_encoder"}
    own_vae = {"VAE_URLs": ["vae.safetensors"]}

    assert family_handler.query_model_files(list, "z_image", own_encoder)[0]["sourceFolderList"] == [""]
    assert family_handler.query_model_files(list, "z_image", own_vae)[0]["sourceFolderList"] == ["Qwen3"]
    assert family_handler.query_model_files(list, "z_image", own_encoder | own_vae) == []


def test_loaded_settings_are_made_those_of_a_picture_unless_they_say_otherwise():
    silent, saying = {}, {"image_mode": 2}
    family_handler.fix_settings("z_image", 2.5, {}, silent)
    family_handler.fix_settings("z_image", 2.5, {}, saying)

    assert (silent, saying) == ({"image_mode": 1}, {"image_mode": 2})


def test_preview_colours_have_a_row_for_each_latent_channel():
    factors, bias = family_handler.get_rgb_factors("z_image")

    assert [len(row) for row in factors] == [3] * 16
    assert len(bias) == 3


def test_lora_folder_is_the_flag_or_lies_below_the_root(tmp_path):
    parser = argparse.ArgumentParser()
    family_handler.register_lora_cli_args(parser, str(tmp_path))
    given = parser.parse_args(["--lora-dir-z-image", "elsewhere"])

    assert family_handler.get_lora_dir("z_image", parser.parse_args([]), str(tmp_path)) == str(tmp_path / "z_image")
    assert family_handler.get_lora_dir("z_image", given, str(tmp_path)) == "elsewhere"


def test_importing_the_handler_brings_no_heavy_package():
    code = (
        "import sys, models.z_image.z_image_handler as h; h.family_handler.query_model_def('z_image', {});"
        "print([m for m in ('torch', 'numpy', 'transformers', 'diffusers', 'mmgp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.fixture
def model_factory(monkeypatch):
    """A stand-in for the class behind load_model; returns the list of keywords it was called with."""
    calls = []

    def model_factory(**kwargs):
        calls.append(kwargs)
        return SimpleNamespace(transformer="T", text_encoder="E", vae="V")

    module = ModuleType("models.z_image.z_image_main")
    module.model_factory = model_factory
    monkeypatch.setitem(sys.modules, "models.z_image.z_image_main", module)
    return calls


def test_load_model_passes_everything_on(model_factory):
    host_call = {
        "quantizeTransformer": True,
        "text_encoder_quantization": "int8",
        "dtype": "float16",
        "VAE_dtype": "float64",
        "mixed_precision_transformer": True,
        "save_quantized": True,
        "submodel_no_list": [1, 0],
        "text_encoder_filename": "qwen.safetensors",
        "profile": 4,
        "lm_decoder_engine": "legacy",
        "vae_filename": "vae.safetensors",
        "tokenizer_folder": "Qwen3",
    }

    processor, modules = family_handler.load_model(["a", "b"], "my_finetune", "z_image", {"name": "x"}, **host_call)

    assert modules == {"transformer": "T", "text_encoder": "E", "vae": "V"}
    assert processor.transformer == "T"
    assert model_factory == [
        {"model_filename": ["a", "b"], "model_type": "my_finetune", "base_model_type": "z_image"}
        | {"model_def": {"name": "x"}}
        | host_call
    ]


def test_load_model_computes_in_bfloat16_and_decodes_in_float32_by_default(model_factory):
    import torch

    family_handler.load_model("transformer.safetensors", base_model_type="z_image")

    assert model_factory[0]["dtype"] is torch.bfloat16
    assert model_factory[0]["VAE_dtype"] is torch.float32


HOST_SETTINGS = {"prompt": "", "image_mode": 0, "resolution": "832x480", "guidance_scale": 5, "seed": -1}


class StubHost:
    """Replays what wgp.py does with a handler until a model is loaded (contract C0, steps 2, 6, 7, and C1)."""

    HANDLERS = ("models.z_image.z_image_handler",)

    def __init__(self, argv, defaults_folder, lora_root):
        self.lora_root = lora_root
        self.args = self._parse(argv)
        self.handlers, self.infos = {}, {"unknown": (100, "Unknown")}
        self.equivalents, self.compatible = {}, {}
        self._map_handlers()
        self.definitions = {path.stem: self._define(path) for path in sorted(defaults_folder.glob("*.json"))}

    def _parse(self, argv):
        parser, families = argparse.ArgumentParser(), set()
        for path in self.HANDLERS:
            handler = importlib.import_module(path).family_handler
            if handler.query_model_family() not in families:
                families.add(handler.query_model_family())
                handler.register_lora_cli_args(parser, self.lora_root)
        return parser.parse_args(argv)

    def _map_handlers(self):
        for path in self.HANDLERS:
            handler = importlib.import_module(path).family_handler
            for architecture in handler.query_supported_types():
                assert architecture not in self.handlers
                self.handlers[architecture] = handler
            self.infos.update(handler.query_family_infos())
            equivalents, compatible = handler.query_family_maps()
            self.equivalents.update(equivalents)
            self.compatible.update(compatible)

    def _define(self, path):
        settings = json.loads(path.read_text(encoding="utf-8"))
        model = settings.pop("model")
        definition = self.handlers[model["architecture"]].query_model_def(model["architecture"], model)
        definition.update(model)
        return definition | {"settings": settings}

    def factory_settings(self, model_type):
        definition = self.definitions[model_type]
        handler, base = self.handlers[definition["architecture"]], definition["architecture"]
        settings = dict(HOST_SETTINGS)
        handler.update_default_settings(base, definition, settings)
        settings.update(definition["settings"])
        handler.fix_settings(base, 2.74, definition, settings)
        return settings

    def load(self, model_type, files):
        definition = self.definitions[model_type]
        handler, base = self.handlers[definition["architecture"]], definition["architecture"]
        for repository in handler.query_model_files(lambda name: [name], base, definition):
            assert len(repository["sourceFolderList"]) == len(repository["fileList"])
        return handler.load_model(
            files,
            model_type,
            base,
            definition,
            quantizeTransformer=False,
            text_encoder_quantization="int8",
            dtype="bfloat16",
            VAE_dtype="float16",
            mixed_precision_transformer=False,
            save_quantized=False,
            submodel_no_list=[1],
            text_encoder_filename="qwen3.safetensors",
            profile=4,
            lm_decoder_engine="legacy",
        )


def test_a_host_starts_up_with_the_handler_and_loads_a_shipped_preset(model_factory, tmp_path):
    host = StubHost(["--lora-dir-z-image", str(tmp_path)], ROOT / "defaults", "loras")

    settings = host.factory_settings("z_image_base")
    processor, modules = host.load("z_image_base", ["base.safetensors"])

    assert host.definitions["z_image"]["NAG"] is True
    assert host.infos["z_image"] == (1120, "Z-Image")
    assert host.handlers["z_image"].get_lora_dir("z_image", host.args, "loras") == str(tmp_path)
    assert {key: settings[key] for key in ("num_inference_steps", "guidance_scale", "flow_shift", "image_mode")} == {
        "num_inference_steps": 30,
        "guidance_scale": 4,
        "flow_shift": 6.0,
        "image_mode": 1,
    }
    assert settings["resolution"] == "1024x1024"
    assert set(modules) == {"transformer", "text_encoder", "vae"}
    assert hasattr(processor, "transformer")


def test_settings_of_turbo_and_base_are_interchangeable_in_a_host(tmp_path):
    host = StubHost([], ROOT / "defaults", "loras")

    def canonical(architecture):
        return host.equivalents.get(architecture, architecture)

    assert canonical("z_image_base") == canonical("z_image")
    assert canonical("z_image_control") != canonical("z_image_control2") == canonical("z_image_control2_1")


def test_the_unified_sampler_is_offered_first_for_the_weights_made_for_it_and_nowhere_else() -> None:
    plain = family_handler.query_model_def("z_image", {})["sample_solvers"]
    twinflow = family_handler.query_model_def("z_image", {"unified_solver": True})["sample_solvers"]

    assert plain[0] == ("Euler (default)", "default")
    assert not any("unified" in name for _, name in plain)
    assert twinflow[0][1] == "unified"
