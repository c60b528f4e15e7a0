"""A stand-in for a Wan2GP checkout, in a process of its own: starts up, loads a model and draws as the host does.

    python dropin_host.py DEMO_FOLDER        in a folder that holds models/z_image, shared/quant and shared/samplers

Prints one JSON object. Everything of ours that it imports must come from that folder; the four modules of the host
that ours may use are written by the test beside them. What the host does and in which order: Wan2GP at 8681e9f7.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def start_up() -> tuple[Any, dict[str, Any]]:
    """What a host asks a handler between its start and the first picture. Returns the handler and the answers."""
    handler = importlib.import_module("models.z_image.z_image_handler").family_handler
    answers: dict[str, Any] = {"family": handler.query_model_family()}
    parser = argparse.ArgumentParser()
    handler.register_lora_cli_args(parser, "loras")
    args = parser.parse_args(["--lora-dir-z-image", "mine"])
    answers["types"] = handler.query_supported_types()
    answers["equivalents"], answers["compatible"] = handler.query_family_maps()
    answers["infos"] = handler.query_family_infos()
    answers["by_type"] = {}
    for architecture in answers["types"]:
        model_def = dict(handler.query_model_def(architecture, {"name": "a preset", "architecture": architecture}))
        settings: dict[str, Any] = {"prompt": "kept"}
        handler.update_default_settings(architecture, model_def, settings)
        handler.fix_settings(architecture, 2.74, model_def, settings)
        factors, bias = handler.get_rgb_factors(architecture)
        answers["by_type"][architecture] = {
            "definition": sorted(model_def),
            "settings": settings,
            "files": handler.query_model_files(None, architecture, model_def),
            "lora_dir": handler.get_lora_dir(architecture, args, "loras"),
            "preview": [len(factors), len(factors[0]), len(bias)],
        }
    answers["heavy"] = sorted({"torch", "transformers", "diffusers", "mmgp"} & set(sys.modules))
    return handler, answers


def draw(handler: Any, demo: Path) -> dict[str, Any]:
    """Load the demo as the host loads a model, and draw: once whole, once interrupted."""
    import torch

    torch.manual_seed(0)
    model_def = handler.query_model_def("z_image", {}) | {"text_encoder_folder": str(demo / "text_encoder")}
    processor, modules = handler.load_model(
        [str(demo / "transformer.safetensors")],
        "z_image",
        "z_image",
        model_def,
        quantizeTransformer=False,
        text_encoder_quantization="",
        dtype=torch.bfloat16,
        VAE_dtype=torch.float16,
        mixed_precision_transformer=False,
        save_quantized=False,
        submodel_no_list=[1],
        text_encoder_filename=str(demo / "text_encoder" / "model.safetensors"),
        profile=4,
        lm_decoder_engine="legacy",
        vae_upsampler_profile=None,
    )
    processor._interrupt = False
    modules["transformer"].cache = None  # the host's step cache
    loras, multipliers = processor.get_loras_transformer(modules["transformer"], "z_image", None)

    calls: list[tuple[int, list[int] | None, Any]] = []

    def callback(step: int, latent: Any, first: bool, *rest: Any, **more: Any) -> None:
        calls.append((step, None if latent is None else list(latent.shape), rest[0] if rest else None))

    keywords = host_keywords() | {"callback": callback}
    pictures = processor.generate(**keywords)

    def interrupt(step: int, latent: Any, first: bool, *rest: Any, **more: Any) -> None:
        processor._interrupt = step == 0

    interrupted = processor.generate(**keywords | {"callback": interrupt})
    return {
        "modules": {name: isinstance(module, torch.nn.Module) for name, module in modules.items()},
        "denoiser": getattr(processor, "transformer", None) is modules["transformer"],
        "extra_loras": [list(loras), list(multipliers)],
        "shape": list(pictures.shape),
        "range": [float(pictures.min()), float(pictures.max())],
        "spread": float(pictures.std()),
        "calls": calls,
        "interrupted": interrupted is None,
        "lora_steps": sys.modules["shared.utils.loras_mutipliers"].schedules,
        "lora_step": modules["transformer"]._lora_step_no,
    }


def host_keywords() -> dict[str, Any]:
    """What the host passes to generate() for a picture (a selection of its some 110 keywords)."""
    return {
        "input_prompt": "a red circle in the middle of a blue background",
        "alt_prompt": "",
        "n_prompt": "",
        "image_start": None,
        "input_frames": None,
        "input_frames2": None,
        "input_masks": None,
        "input_ref_images": None,
        "input_ref_masks": None,
        "input_video": None,
        "context_scale": None,
        "denoising_strength": 1.0,
        "masking_strength": 1.0,
        "frame_num": 1,
        "width": 64,
        "height": 64,
        "batch_size": 2,
        "fit_into_canvas": 1,
        "shift": 3.0,
        "sample_solver": "",
        "sampling_steps": 2,
        "guide_scale": 0,
        "guide2_scale": 0,
        "guide_phases": 0,
        "NAG_scale": 1.0,
        "NAG_tau": 3.5,
        "NAG_alpha": 0.5,
        "loras_slists": {"phase1": [1.0]},
        "lset_name": "",
        "VAE_tile_size": (False, 0),
        "vae_upsampler": None,
        "seed": 3,
        "set_progress_status": None,
        "offloadobj": None,
        "image_mode": 1,
        "video_prompt_type": "",
        "model_mode": 0,
        "model_type": "z_image",
        "custom_settings": None,
        "gen_cache": {},
        "attention_sparsity": 0,
        "joint_pass": True,
        "cfg_star_switch": 0,
        "cfg_zero_step": -1,
        "enable_RIFLEx": False,
    }


def origins() -> dict[str, str]:
    """Where every imported module of ours came from."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("models", "shared")}
    return {name: module.__file__ for name, module in sorted(ours.items()) if getattr(module, "__file__", None)}


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    handler, result = start_up()
    if len(sys.argv) > 1:
        result["drawn"] = draw(handler, Path(sys.argv[1]))
    result["origins"] = origins()
    sys.stdout.write(json.dumps(result, default=list) + "\n")
