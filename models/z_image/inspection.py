"""What a checkpoint is, in a person's words, from its header alone: torch-free, so it answers at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from models.z_image.config import config_from_shapes
from models.z_image.keys import find_prefix, is_dropped, relative_of, slot_of, split_parameter
from shared.quant.checkpoint import Checkpoint, TensorInfo

# Marker in a tensor's name or type -> how its numbers are packed (formats.md sections 2 to 5).
_PACKED_NAMES = (
    (".qweight", "SVDQ (nunchaku)"),
    (".weight._data", "quanto int8"),
    (".weight_scale_2", "NVFP4"),
    (".comfy_quant", "comfy_quant"),
    (".scale_weight", "FP8 scaled"),
    (".weight_scale", "scaled"),
)

_RELATED = {
    "control_all_x_embedder.2-1.weight": "Z-Image Fun ControlNet",
    "siglip_embedder.1.weight": "Z-Image Omni / Edit",
}


def describe(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the file is if it belongs to this family, else None.

    Keys: kind (transformer, control, text_encoder, vae, lora or checkpoint for all in one), summary, naming, prefix,
    sizes, formats (number type -> tensors), packing, problems.
    """
    names = checkpoint.tensors
    for judge in (_transformer, _control, _lora, _text_encoder, _vae):
        found = judge(names)
        if found is not None:
            return found
    return None


def _transformer(tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
    prefix = find_prefix(tensors)
    if prefix is None:
        return None
    own = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    parts = [role for role, mark in (("text encoder", "text_encoders."), ("VAE", "vae.")) if _any(tensors, mark)]
    packing = sorted({words for n in own for mark, words in _PACKED_NAMES if n.endswith(mark)})
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in own.items():
        module, parameter = split_parameter(name)
        shapes.setdefault(slot_of(module).module + parameter, tensor.shape)
    problems = []
    sizes: dict[str, Any] = {}
    try:
        config = config_from_shapes(shapes)
        sizes = {f.name: getattr(config, f.name) for f in fields(config)}
    except (KeyError, ValueError, ZeroDivisionError) as error:
        if not packing:
            problems.append(f"sizes cannot be read: {error} is missing")
    relative = relative_of(n for n in own if not is_dropped(n))
    published = sizes.get("dim") == 3840 and sizes.get("n_layers") == 30
    return {
        "kind": "checkpoint" if parts and prefix else "transformer",
        "summary": "Z-Image transformer" + (" (6B)" if published else "") + (f", {relative}" if relative else ""),
        "naming": "diffusers" if f"{prefix}layers.0.attention.to_q.weight" in tensors else "official",
        "prefix": prefix,
        "contains": ["transformer", *parts],
        "sizes": sizes,
        "formats": dict(Counter(t.dtype for t in own.values())),
        "packing": packing,
        "problems": problems,
    }


def _control(tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
    for mark, words in _RELATED.items():
        if mark in tensors:
            layers = {n.split(".")[1] for n in tensors if n.startswith("control_layers.")}
            return _plain(tensors, "control", words, sizes={"control_layers": len(layers)})
    return None


def _lora(tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
    kinds = {".lora_": "LoRA", ".lokr_": "LoKr", ".hada_": "LoHa"}
    kind = next((words for mark, words in kinds.items() if any(mark in n for n in tensors)), None)
    ours = any("adaLN_modulation" in n or "context_refiner" in n or _layer_of_ours(n) for n in tensors)
    if kind is None or not ours:
        return None
    ranks = {t.shape[0] for n, t in tensors.items() if (".lora_A." in n or ".lora_down." in n) and len(t.shape) == 2}
    return _plain(tensors, "lora", f"Z-Image {kind}", sizes={"ranks": sorted(ranks)})


def _layer_of_ours(name: str) -> bool:
    flat = name.replace(".", "_")
    return "_attention_" in flat and "layers_" in flat and ("to_q" in flat or "qkv" in flat or "attention_out" in flat)


def _text_encoder(tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
    embedding = next((t for n, t in tensors.items() if n.endswith("embed_tokens.weight")), None)
    if embedding is None or not any(n.endswith("layers.0.self_attn.q_norm.weight") for n in tensors):
        return None
    layers = {n.split("layers.")[1].split(".")[0] for n in tensors if "layers." in n}
    sizes = {"vocabulary": embedding.shape[0], "hidden": embedding.shape[-1], "layers": len(layers)}
    fits = ", the size Z-Image uses" if embedding.shape[-1] == 2560 and len(layers) == 36 else ""
    return _plain(tensors, "text_encoder", f"Qwen3 text encoder{fits}", sizes=sizes)


def _vae(tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
    conv = tensors.get("decoder.conv_in.weight")
    if conv is None or "encoder.conv_in.weight" not in tensors:
        return None
    naming = "diffusers" if "decoder.up_blocks.0.resnets.0.conv1.weight" in tensors else "ldm"
    sizes = {"latent_channels": conv.shape[1]}
    return _plain(tensors, "vae", f"AutoencoderKL, {naming} naming", sizes=sizes) | {"naming": naming}


def _plain(tensors: Mapping[str, TensorInfo], kind: str, summary: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    packing = sorted({words for n in tensors for mark, words in _PACKED_NAMES if n.endswith(mark)})
    formats = dict(Counter(t.dtype for t in tensors.values()))
    return {"kind": kind, "summary": summary, "sizes": dict(sizes), "formats": formats, "packing": packing,
            "problems": []}  # fmt: skip


def _any(tensors: Mapping[str, TensorInfo], prefix: str) -> bool:
    return any(n.startswith(prefix) for n in tensors)
