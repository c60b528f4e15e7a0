"""Names of VAE tensors in ldm files (ComfyUI's ae.safetensors, all-in-one checkpoints) and in diffusers' AutoencoderKL.

ldm                               diffusers
encoder.down.I.block.J.*          encoder.down_blocks.I.resnets.J.*
encoder.down.I.downsample.conv    encoder.down_blocks.I.downsamplers.0.conv
decoder.up.I.block.J.*            decoder.up_blocks.(last - I).resnets.J.*        counted from the other end
decoder.up.I.upsample.conv        decoder.up_blocks.(last - I).upsamplers.0.conv
*.mid.block_1, block_2            *.mid_block.resnets.0, 1
*.mid.attn_1.q, k, v, proj_out    *.mid_block.attentions.0.to_q, to_k, to_v, to_out.0    1x1 convolutions -> matrices
*.mid.attn_1.norm                 *.mid_block.attentions.0.group_norm
*.norm_out, *.nin_shortcut        *.conv_norm_out, *.conv_shortcut
"""

from __future__ import annotations

import re
from collections.abc import Iterable

CONFIG_KEY = "vae_config"  # in the header of a checkpoint of several parts: the VAE's config.json, as far as it matters
PREFIXES = ("first_stage_model.", "vae.", "")  # in front of every name of a file, most telling first
_LANDMARK = "decoder.conv_in.weight"

_RULES = (
    (re.compile(r"^encoder\.down\.(\d+)\.block\.(\d+)\."), r"encoder.down_blocks.\1.resnets.\2."),
    (re.compile(r"^encoder\.down\.(\d+)\.downsample\."), r"encoder.down_blocks.\1.downsamplers.0."),
    (re.compile(r"^decoder\.up\.(\d+)\.block\.(\d+)\."), r"decoder.up_blocks.\1.resnets.\2."),
    (re.compile(r"^decoder\.up\.(\d+)\.upsample\."), r"decoder.up_blocks.\1.upsamplers.0."),
    (re.compile(r"\.mid\.block_1\."), ".mid_block.resnets.0."),
    (re.compile(r"\.mid\.block_2\."), ".mid_block.resnets.1."),
    (re.compile(r"\.mid\.attn_1\.norm\."), ".mid_block.attentions.0.group_norm."),
    (re.compile(r"\.mid\.attn_1\.([qkv])\."), r".mid_block.attentions.0.to_\1."),
    (re.compile(r"\.mid\.attn_1\.proj_out\."), ".mid_block.attentions.0.to_out.0."),
    (re.compile(r"\.norm_out\."), ".conv_norm_out."),
    (re.compile(r"\.nin_shortcut\."), ".conv_shortcut."),
)
_UP_BLOCK = re.compile(r"^decoder\.up\.(\d+)\.")


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name -> the file's name, for every VAE tensor of a file in either naming; {} if it holds no VAE."""
    listed = list(names)
    prefix = next((p for p in PREFIXES if p + _LANDMARK in listed), None)
    if prefix is None:
        return {}
    own = {n[len(prefix) :]: n for n in listed if n.startswith(prefix)}
    last = max((int(m[1]) for n in own if (m := _UP_BLOCK.match(n))), default=0)
    return {_rename(_from_the_other_end(n, last)): original for n, original in own.items()}


def _from_the_other_end(name: str, last: int) -> str:
    return _UP_BLOCK.sub(lambda m: f"decoder.up.{last - int(m[1])}.", name)


def _rename(name: str) -> str:
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name
