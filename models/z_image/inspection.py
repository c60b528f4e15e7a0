"""What a checkpoint is, in a person's words, from its header alone: torch-free, so it answers at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from models.z_image import lora_names
from models.z_image.control_config import release_of
from models.z_image.control_loader import find_control_prefix, plan_control, read_control_config
from models.z_image.keys import find_prefix, relative_of
from models.z_image.loader import plan_layers, read_config
from models.z_image.vae_names import PREFIXES as VAE_PREFIXES
from shared.quant.checkpoint import Checkpoint, TensorInfo
from shared.quant.errors import CheckpointError
from shared.quant.formats import Layer, format_of, layers_of

# Names of transformers, quanto (whose table may be packed too) and llama.cpp.
_EMBEDDING_MARKS = ("embed_tokens.weight", "embed_tokens.weight._data", "token_embd.weight")
# Of the models that carry such names, only Qwen3 normalises queries per head.
_QWEN3_MARKS = ("layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight")
_QWEN3_LAYER = re.compile(r"(?:layers|blk)\.(\d+)\.")

_OMNI = " Omni / Edit"
_RELATED = {
    "siglip_embedder.1.weight": f"Z-Image{_OMNI}",
}


def describe(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the file is if it belongs to this family, else None.

    Keys: kind (transformer, control, text_encoder, vae, lora, or checkpoint for all in one), summary, naming, prefix,
    sizes, formats (how the weights are kept -> layers; plain number types too), problems. A transformer's like: the
    preset whose settings it takes, "" where tensors do not tell.
    """
    for judge in (_transformer, _control, _lora, _text_encoder, _vae):
        found = judge(checkpoint)
        if found is not None:
            return found
    return None


def _transformer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    tensors = checkpoint.tensors
    prefix = find_prefix(tensors)
    if prefix is None:
        return None
    parts = [role for role, mark in (("text encoder", "text_encoders."), ("VAE", "vae.")) if _any(tensors, mark)]
    plan = plan_layers(checkpoint)
    formats, problems = _formats(part.layer for places in plan.values() for part in places)
    sizes: dict[str, Any] = {}
    if not problems:
        try:
            config = read_config(checkpoint, plan)
            sizes = {f.name: getattr(config, f.name) for f in fields(config)}
        except CheckpointError as error:
            problems.append(error.message)
    relative = relative_of(n[len(prefix) :] for n in tensors if n.startswith(prefix))
    is_omni = sizes.get("siglip_feat_dim", 0) > 0
    published = sizes.get("dim") == 3840 and sizes.get("n_layers") == 30
    return {
        "kind": "checkpoint" if parts and prefix else "transformer",
        "summary": f"Z-Image{_OMNI if is_omni else ''} transformer{' (6B)' if published else ''}"
        + (f", {relative}" if relative and not is_omni else ""),
        "naming": _naming(tensors),
        "prefix": prefix,
        "contains": ["transformer", *parts],
        "like": _preset_like(sizes) if published and not is_omni else "",
        "sizes": sizes,
        "formats": formats,
        "problems": problems,
    }


def _naming(names: Iterable[str]) -> str:
    """Whose names its tensors have: nunchaku's are diffusers' but for the fused feed_forward.net.0.proj."""
    listed = list(names)
    if any(".feed_forward.net.0.proj." in name for name in listed):
        return "nunchaku"
    return "diffusers" if any(name.endswith("layers.0.attention.norm_q.weight") for name in listed) else "official"


def _preset_like(sizes: Mapping[str, Any]) -> str:
    """Whose settings a network of the published sizes takes. Turbo and Base have the same tensors: Turbo's."""
    return "z_image_twinflow_turbo" if sizes.get("has_second_time") else "z_image"


def _formats(layers: Iterable[Layer]) -> tuple[dict[str, int], list[str]]:
    """How many layers are kept how ("SVDQ int4, rank 128", "BF16"), and what is wrong with those that are unclear."""
    counts: Counter[str] = Counter()
    problems: list[str] = []
    for layer in layers:
        try:
            packed = format_of(layer)
            counts[_words(packed.describe(layer)) if packed else _plain_type(layer)] += 1
        except CheckpointError as error:
            if len(problems) < 5:
                problems.append(error.message)
    return dict(counts.most_common()), problems


def _words(description: Mapping[str, Any]) -> str:
    rank = description.get("rank")
    return f"{description['format']}, rank {rank}" if rank else str(description["format"])


def _plain_type(layer: Layer) -> str:
    info = layer.tensors.get("weight") or next(iter(layer.tensors.values()))
    return info.dtype


def _control(checkpoint: Checkpoint) -> dict[str, Any] | None:
    tensors = checkpoint.tensors
    for mark, words in _RELATED.items():
        if mark in tensors:
            return _plain(checkpoint, "control", words, sizes={})
    if find_control_prefix(tensors) is None:
        return None
    try:
        config = read_control_config(checkpoint, plan_control(checkpoint))
    except CheckpointError as error:
        found = _plain(checkpoint, "control", "Z-Image Fun ControlNet", sizes={})
        return found | {"problems": [*found["problems"], error.message]}
    sizes = {"control_layers": len(config.places), "channels": config.in_channels, "inpaints": config.can_inpaint}
    return _plain(checkpoint, "control", f"Z-Image {release_of(config)}", sizes=sizes)


def _lora(checkpoint: Checkpoint) -> dict[str, Any] | None:
    tensors = checkpoint.tensors
    parts = {key.part for key in map(lora_names.parse, tensors) if key}
    kinds = {"lokr_w2": "LoKr", "lokr_w2_a": "LoKr", "hada_w1_a": "LoHa", "down": "LoRA", "diff": "full differences"}
    kind = next((words for part, words in kinds.items() if part in parts), None)
    if kind and "magnitude" in parts:
        kind = "DoRA" if kind == "LoRA" else f"DoRA on {kind}"
    ours = any("adaLN_modulation" in n or "context_refiner" in n or _layer_of_ours(n) for n in tensors)
    if kind is None or not ours:
        return None
    ranks = {t.shape[0] for n, t in tensors.items() if (".lora_A." in n or ".lora_down." in n) and len(t.shape) == 2}
    return _plain(checkpoint, "lora", f"Z-Image {kind}", sizes={"ranks": sorted(ranks)})


def _layer_of_ours(name: str) -> bool:
    flat = name.replace(".", "_")
    return "_attention_" in flat and "layers_" in flat and ("to_q" in flat or "qkv" in flat or "attention_out" in flat)


def _text_encoder(checkpoint: Checkpoint) -> dict[str, Any] | None:
    tensors = checkpoint.tensors
    embedding = next((t for n, t in tensors.items() if n.endswith(_EMBEDDING_MARKS)), None)
    if embedding is None or not any(n.endswith(_QWEN3_MARKS) for n in tensors):
        return None
    layers = {m[1] for n in tensors if (m := _QWEN3_LAYER.search(n))}
    sizes = {"vocabulary": embedding.shape[0], "hidden": embedding.shape[-1], "layers": len(layers)}
    fits = ", the size Z-Image uses" if embedding.shape[-1] == 2560 and len(layers) == 36 else ""
    return _plain(checkpoint, "text_encoder", f"Qwen3 text encoder{fits}", sizes=sizes)


def _vae(checkpoint: Checkpoint) -> dict[str, Any] | None:
    tensors = checkpoint.tensors
    prefix = next((p for p in VAE_PREFIXES if f"{p}decoder.conv_in.weight" in tensors), None)
    if prefix is None or f"{prefix}encoder.conv_in.weight" not in tensors:
        return None
    naming = "diffusers" if f"{prefix}decoder.up_blocks.0.resnets.0.conv1.weight" in tensors else "ldm"
    conv = tensors[f"{prefix}decoder.conv_in.weight"]
    sizes = {"latent_channels": conv.shape[1] if len(conv.shape) == 4 else 0}
    facts = {"naming": naming, "prefix": prefix}
    return _plain(checkpoint, "vae", f"AutoencoderKL, {naming} naming", sizes=sizes) | facts


def _plain(checkpoint: Checkpoint, kind: str, summary: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    formats, problems = _formats(layers_of(checkpoint, checkpoint.tensors).values())
    return {"kind": kind, "summary": summary, "sizes": dict(sizes), "formats": formats, "problems": problems}


def _any(tensors: Mapping[str, TensorInfo], prefix: str) -> bool:
    return any(n.startswith(prefix) for n in tensors)
