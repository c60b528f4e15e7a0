"""The Z-Image family as a Wan2GP-style host sees it: `family_handler`, called on the class itself.

All that differs between architectures stands in `variants.py`. Nothing heavy is imported before `load_model`,
so a host can list models and parse arguments at once.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from shared import samplers
from shared.utils.hf import build_hf_url

from . import variants
from .variants import VARIANTS

# What text encoder and VAE come from, by the modules that hold them: the packages load these on demand only.
_LIBRARIES = (
    "accelerate",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
)

if TYPE_CHECKING:
    import argparse

    import torch


class family_handler:
    """Entry points of the Z-Image family; the host looks the class up by exactly this name."""

    @staticmethod
    def query_supported_types() -> list[str]:
        """Architecture ids served here; each must be unique in the whole host."""
        return list(VARIANTS)

    @staticmethod
    def query_family_maps() -> tuple[dict[str, str], dict[str, set[str]]]:
        """(architecture -> its equivalent, both ways; architecture -> ones that also accept its settings)."""
        equivalents = {row.architecture: row.equivalent_to for row in VARIANTS.values() if row.equivalent_to}
        return equivalents, {}

    @staticmethod
    def query_model_family() -> str:
        """Family id under which a host groups these models."""
        return variants.FAMILY

    @staticmethod
    def query_family_infos() -> dict[str, tuple[int, str]]:
        """Family id -> (sort key, low first; label)."""
        return {variants.FAMILY: (variants.FAMILY_ORDER, variants.FAMILY_LABEL)}

    @staticmethod
    def register_lora_cli_args(parser: argparse.ArgumentParser, lora_root: str) -> None:
        """Add the flag for this family's LoRA folder."""
        parser.add_argument(
            "--lora-dir-z-image",
            type=str,
            default=None,
            metavar="DIR",
            help=f"folder of Z-Image LoRA files (default: {os.path.join(lora_root, variants.FAMILY)})",
        )

    @staticmethod
    def get_lora_dir(base_model_type: str, args: Any, lora_root: str) -> str:
        """Folder of this family's LoRA files: the flag's value, else `<lora_root>/z_image`."""
        return getattr(args, "lora_dir_z_image", None) or os.path.join(lora_root, variants.FAMILY)

    @staticmethod
    def query_model_def(base_model_type: str, model_def: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the architecture can do, in the host's keys; the host lays a preset's own keys on top."""
        variant = VARIANTS[base_model_type]
        definition = {
            "image_outputs": True,
            "guidance_max_phases": variant.guidance_max_phases,
            "flow_shift": variant.flow_shift,
            "NAG": variant.nag,
            "sample_solvers": samplers.choices(unified=bool((model_def or {}).get("unified_solver"))),
            "fit_into_canvas_image_refs": 0,
            "profiles_dir": [],
            "vae_upsamplers": {"flux_vae_pid": [1, 2]},
            "excluded_spatial_upsamplers": ["flux_pid"],
            "text_encoder_folder": variants.TEXT_ENCODER_FOLDER,
            "text_encoder_URLs": [
                build_hf_url(variants.REPOSITORY, variants.TEXT_ENCODER_FOLDER, name)
                for name in variants.TEXT_ENCODER_FILES
            ],
        }
        return definition | copy.deepcopy(dict(variant.extra_def))

    @staticmethod
    def query_model_files(
        computeList: Any, base_model_type: str, model_def: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Files needed beside the weights: tokenizer and configurations, and the VAE.

        What belongs to a text encoder folder or a VAE that the preset replaces by its own is left out.
        """
        model_def = model_def or {}
        folders: list[str] = []
        files: list[list[str]] = []
        if model_def.get("text_encoder_folder", variants.TEXT_ENCODER_FOLDER) == variants.TEXT_ENCODER_FOLDER:
            folders.append(variants.TEXT_ENCODER_FOLDER)
            files.append(list(variants.TOKENIZER_FILES))
        if not model_def.get("VAE_URLs"):
            folders.append("")
            files.append([variants.VAE_CONFIG_FILE, variants.VAE_FILE, variants.SCHEDULER_CONFIG_FILE])
        if not folders:
            return []
        return [{"repoId": variants.REPOSITORY, "sourceFolderList": folders, "fileList": files}]

    @staticmethod
    def query_published_shapes(base_model_type: str) -> dict[str, dict[str, int]]:
        """Shapes of the published modules by name, for our own host's plans; Wan2GP does not ask for them."""
        return {name: dict(shapes) for name, shapes in variants.PUBLISHED_SHAPES.items()}

    @staticmethod
    def import_ahead() -> None:
        """Import what load_model() will: seconds, which our own page spends before anybody asks for a picture."""
        import torch

        from shared.ops import compiled_ready

        for name in (f"{__package__}.z_image_main", *_LIBRARIES):
            importlib.import_module(name)
        if not torch.cuda.is_available():
            compiled_ready.why_not()  # loads the CPU's kernels

    @staticmethod
    def load_model(
        model_filename: str | Sequence[str],
        model_type: str | None = None,
        base_model_type: str | None = None,
        model_def: Mapping[str, Any] | None = None,
        quantizeTransformer: bool = False,
        text_encoder_quantization: str | None = None,
        dtype: torch.dtype | None = None,
        VAE_dtype: torch.dtype | None = None,
        mixed_precision_transformer: bool = False,
        save_quantized: bool = False,
        submodel_no_list: Sequence[int] | None = None,
        text_encoder_filename: str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Load the weights; return (pipeline object with `generate`, its modules by name for the offloader).

        model_filename: the transformer's file, or a list: transformer, then module files (ControlNet).
        dtype: for the transformer and text encoder (None: bfloat16). VAE_dtype: None means float32.
        kwargs: `vae_filename`, `tokenizer_folder`, `place_text_encoder`, `prompt_store`, `parts`, `keep_mapped` and
        `keep_apart` from our own host (see model_factory); a Wan2GP host adds `profile` and others. With
        `place_text_encoder` the modules lack the text encoder, which is then loaded when a prompt needs it.
        Raises CheckpointError if a file cannot be used.
        """
        import torch

        from .z_image_main import model_factory

        pipe_processor = model_factory(
            model_filename=model_filename,
            model_type=model_type,
            base_model_type=base_model_type,
            model_def=model_def,
            quantizeTransformer=quantizeTransformer,
            text_encoder_quantization=text_encoder_quantization,
            dtype=torch.bfloat16 if dtype is None else dtype,
            VAE_dtype=torch.float32 if VAE_dtype is None else VAE_dtype,
            mixed_precision_transformer=mixed_precision_transformer,
            save_quantized=save_quantized,
            submodel_no_list=submodel_no_list,
            text_encoder_filename=text_encoder_filename,
            **kwargs,
        )
        modules = {
            "transformer": pipe_processor.transformer,
            "text_encoder": pipe_processor.text_encoder,
            "vae": pipe_processor.vae,
        }
        return pipe_processor, {name: module for name, module in modules.items() if module is not None}

    @staticmethod
    def update_default_settings(
        base_model_type: str, model_def: Mapping[str, Any] | None, ui_defaults: MutableMapping[str, Any]
    ) -> None:
        """Write the architecture's default settings into `ui_defaults`; a preset's own go on top later."""
        ui_defaults["image_mode"] = 1  # the host's number for still images
        ui_defaults.update(VARIANTS[base_model_type].default_settings)

    @staticmethod
    def fix_settings(
        base_model_type: str,
        settings_version: float,
        model_def: Mapping[str, Any] | None,
        ui_defaults: MutableMapping[str, Any],
    ) -> None:
        """Complete settings that were loaded from a file or a picture."""
        ui_defaults.setdefault("image_mode", 1)

    @staticmethod
    def get_rgb_factors(base_model_type: str) -> tuple[list[list[float]] | None, list[float] | None]:
        """(16 x 3 factors, 3 biases) that turn latents into preview colours; the VAE is Flux's."""
        from shared.RGB_factors import get_rgb_factors

        return get_rgb_factors("flux")
