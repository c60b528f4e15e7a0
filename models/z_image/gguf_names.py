"""What tensors are called in GGUF files, beyond the names that the safetensors files have too.

A text encoder converted by llama.cpp (`general.architecture` qwen3) uses llama.cpp's names:

    token_embd       embed_tokens          blk.N.attn_q, attn_k, attn_v      layers.N.self_attn.q_proj, k_proj, v_proj
    output_norm      norm                  blk.N.attn_output                 layers.N.self_attn.o_proj
    output           (language head)       blk.N.attn_q_norm, attn_k_norm    layers.N.self_attn.q_norm, k_norm
                                           blk.N.attn_norm, ffn_norm         layers.N.input_, post_attention_layernorm
                                           blk.N.ffn_gate, ffn_up, ffn_down  layers.N.mlp.gate_, up_, down_proj

For Qwen3 llama.cpp leaves the rows of q and k in Hugging Face's order (those of Llama it permutes).

A transformer exported by stable-diffusion.cpp from a file in diffusers naming may hold q, k and v as `qkv.weight`,
`qkv.weight.1` and `qkv.weight.2`.
Sources: formats.md 5; llama.cpp gguf-py/gguf/tensor_mapping.py; stable-diffusion.cpp src/name_conversion.cpp.
"""

from __future__ import annotations

import re

from shared.quant import gguf_file
from shared.quant.checkpoint import Checkpoint

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(\w+)")
_QKV = re.compile(r"(.*attention\.)qkv\.weight(?:\.([12]))?")


def with_hugging_face_names(checkpoint: Checkpoint) -> Checkpoint:
    """A llama.cpp text encoder under the names of transformers (`model.layers.0.mlp.up_proj.weight`); others as is."""
    if "token_embd.weight" not in checkpoint.tensors or not gguf_file.is_gguf(checkpoint.path):
        return checkpoint
    return gguf_file.renamed(checkpoint, hugging_face_name)


def hugging_face_name(name: str) -> str:
    """A llama.cpp tensor's name in transformers; a name that is not llama.cpp's stays."""
    block = _BLOCK.fullmatch(name)
    if block and block[2] in _LAYER:
        return f"model.layers.{block[1]}.{_LAYER[block[2]]}.{block[3]}"
    module, _, parameter = name.rpartition(".")
    return f"{_TOP[module]}.{parameter}" if module in _TOP else name


def with_split_qkv(checkpoint: Checkpoint) -> Checkpoint:
    """stable-diffusion.cpp's numbered qkv tensors under diffusers' names (to_q, to_k, to_v); others as is."""
    numbered = {m[1] for name in checkpoint.tensors if (m := _QKV.fullmatch(name)) and m[2]}
    if not numbered or not gguf_file.is_gguf(checkpoint.path):
        return checkpoint

    def rename(name: str) -> str:
        match = _QKV.fullmatch(name)
        return f"{match[1]}to_{'qkv'[int(match[2] or 0)]}.weight" if match and match[1] in numbered else name

    return gguf_file.renamed(checkpoint, rename)
