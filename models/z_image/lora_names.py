"""Names in LoRA files: which part of which module a tensor is, where that module is here, and whose file it may be.

A name is a prefix, a module, and what the tensor is for it. Trainers differ in all three:

    transformer. | diffusion_model. | lora_unet_ | lycoris_ | base_model.model. | nothing       prefix
    layers.0.attention.to_q | layers.0.attention.qkv | layers_0_attention_to_q                  module, fused or not
    .lora_A.weight | .lora_down.weight | .lora.down.weight | .lora_A.default.weight | .alpha    what it is

Sources: formats.md section 6; peft 0.21.2 and lycoris-lora 4.1.3 as they write; diffusers 0.42.1
loaders/lora_conversion_utils.py, which lists the spellings of Z-Image trainers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from models.z_image.keys import Slot, diffusers_names, slot_of

_TRANSFORMER_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lycoris_",
)
# "lora_te_model_", "text_encoder.", "text_encoders.qwen3_4b.transformer.model." and what peft adds in between.
_ENCODER_PREFIX = re.compile(
    r"(?:lora_te\d?_|text_encoders?\d?\.)(?:qwen3_4b\.)?(?:(?:transformer|base_model|model)[._])*"
)

_ADAPTER = r"(?:\.(?!weight|bias)\w+)?"  # the name that peft gives an adapter, "default" mostly
_DOWN = rf"(?:(?:lora_A|lora_down){_ADAPTER}|lora\.(?:A|down)|lora_linear_layer\.down)"
_UP = rf"(?:(?:lora_B|lora_up){_ADAPTER}|lora\.(?:B|up)|lora_linear_layer\.up)"

# What a tensor is for its module, as the end of its name.
_ENDS = {
    "down": rf"{_DOWN}(?:\.weight)?",
    "up": rf"{_UP}(?:\.weight)?",
    "up_bias": rf"{_UP}\.bias",
    "alpha": "alpha",
    "magnitude": rf"(?:dora_scale|lora_magnitude_vector{_ADAPTER}(?:\.weight)?)",
    **{f"lokr_{factor}": f"lokr_{factor}" for factor in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    **{f"hada_{factor}": f"hada_{factor}" for factor in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "diff": "(?:diff|w_norm)",
    "diff_b": "(?:diff_b|b_norm)",
}
_PARTS = {part: re.compile(rf"(?P<module>.+)\.{end}") for part, end in _ENDS.items()}

# Kinds of adapters that are recognised and not offered: the mark in their names, and what to call them.
_NOT_OFFERED = (
    (re.compile(r"\.oft_|\.boft_"), "OFT"),
    (re.compile(r"\.a[12]\.weight$|\.b[12]\.weight$|\.bm[12]\.weight$"), "GLoRA"),
    (re.compile(r"\.on_input$|\.ia3_"), "IA3"),
    (re.compile(r"\.lora_mid\.|\.lokr_t2$|\.hada_t[12]$"), "a convolution's Tucker form"),
    (re.compile(r"\.vera_lambda"), "VeRA"),
)

# Modules that only one other model has, mostly in flattened names ("_" for "."); the first row found names it.
_ORIGINS: tuple[tuple[str, str], ...] = (
    (r"joint_blocks_\d", "Stable Diffusion 3"),
    (r"double_stream_blocks_\d", "HiDream"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"double_blocks\.\d+\.img_attn_qkv", "HunyuanVideo"),
    (r"single_transformer_blocks_\d+_attn_to_qkv_mlp_proj", "FLUX.2"),
    (r"double_blocks_\d|single_blocks_\d|single_transformer_blocks_\d", "FLUX.1"),
    (r"transformer_blocks_\d+_(?:img_mlp|txt_mlp|img_mod|txt_mod|attn_add_[qkv]_proj)", "Qwen-Image"),
    (r"down_blocks_\d+_attentions_\d+_transformer_blocks_[2-9]|lora_te2_|input_blocks_[78]_1_transformer_blocks_[2-9]",
     "Stable Diffusion XL"),
    (r"down_blocks_\d|input_blocks_\d|up_blocks_\d+_attentions|mid_block_attentions", "Stable Diffusion 1.5, 2 or XL"),
    (r"blocks_\d+_(?:cross_attn_[qkvo]|ffn_[02]|self_attn_[qkvo](?:_|$))", "Wan"),
    (r"transformer_blocks_\d+_(?:attn2|audio_attn)", "LTX-Video or PixArt"),
    (r"blocks_\d+_adaln_modulation|blocks_\d+_(?:cross_attn|self_attn)_(?:[qkv]|output)_proj", "Cosmos or Anima"),
    (r"layers_\d+_self_attn_[qkvo]_proj|layers_\d+_mlp_(?:gate|up|down)_proj", "a language model"),
)  # fmt: skip


class Key(NamedTuple):
    """What a tensor's name says. module: without prefix, as the file spells it. encoder: of the text encoder."""

    module: str
    part: str
    encoder: bool


def parse(name: str) -> Key | None:
    """Take a tensor's name apart; None where it ends like no part of a LoRA."""
    encoder = _ENCODER_PREFIX.match(name)
    bare = name[encoder.end() :] if encoder else _without_prefix(name)
    for part, pattern in _PARTS.items():
        if found := pattern.fullmatch(bare):
            return Key(found["module"], part, encoder is not None)
    return None


def not_offered(names: Iterable[str]) -> tuple[str, str] | None:
    """(first name, kind) of an adapter of a kind that is not offered, if there is one."""
    return next(((n, kind) for n in names for pattern, kind in _NOT_OFFERED if pattern.search(n)), None)


def places(modules: Collection[str], *, encoder: bool = False) -> Mapping[str, Slot]:
    """Every name a file may use for one of our modules, dotted and flattened with underscores -> its place.

    modules: our linears and norms. encoder: they are the text encoder's, which has one naming.
    """
    known: dict[str, Slot] = {}
    for module in modules:
        if encoder:
            known[module] = Slot(module)
        else:
            known |= {name: slot_of(name) for name in _spellings(module)}
    return known | {_flat(name): slot for name, slot in known.items()}


def find_place(module: str, known: Mapping[str, Slot]) -> Slot | None:
    """Our place for a file's module, if it has one."""
    return known.get(module) or known.get(_flat(module))


def origin(names: Iterable[str]) -> str | None:
    """The model that a LoRA with these tensor names was probably made for, Z-Image and its like left out."""
    spellings = {spelling for name in names for spelling in (name, _flat(name))}
    return next((model for pattern, model in _ORIGINS if any(re.search(pattern, s) for s in spellings)), None)


def _spellings(module: str) -> set[str]:
    names = {module, *diffusers_names(module)}
    block, _, rest = module.rpartition(".attention.")
    if rest == "qkv":
        names.add(f"{block}.attention.to_qkv")
    if rest == "out":
        names.add(f"{block}.attention.to_out")
    block, _, rest = module.rpartition(".feed_forward.")
    if rest == "w13":
        names.add(f"{block}.feed_forward.net.0.proj")
    if rest == "w2":
        names.add(f"{block}.feed_forward.net.2")
    return names


def _without_prefix(name: str) -> str:
    """Remove every known prefix, however many are stacked."""
    while prefix := next((p for p in _TRANSFORMER_PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name


def _flat(name: str) -> str:
    return name.replace(".", "_")
