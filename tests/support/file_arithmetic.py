"""Bytes of the 6B model's files in every format, counted from its tensors' shapes, without the file's header."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from math import prod

import torch

from models.z_image.config import TransformerConfig
from models.z_image.transformer import ZImageTransformer
from shared.quant.recipe import Recipe
from tests.support.shipped_presets import PLAIN, ROOT

Shapes = Mapping[str, tuple[int, ...]]
Cost = Callable[[str, tuple[int, ...]], float]  # bytes of one tensor, by name and shape
TRUNK = r"layers\.\d+\.(attention\.(qkv|out)|feed_forward\.w(13|2)|adaLN_modulation\.0)\.weight"
BLOCKS = TRUNK.replace("layers", "(layers|noise_refiner|context_refiner)")
ATTENTION_AND_FFN = BLOCKS.replace("|adaLN_modulation\\.0", "")

GGUF_BYTES = {
    "Q8_0": 34 / 32,
    "Q4_0": 18 / 32,
    "Q6_K": 210 / 256,
    "Q5_K": 176 / 256,
    "Q4_K": 144 / 256,
}  # a number, scales included


@cache
def transformer_shapes() -> Shapes:
    """Every tensor of the 6B model under our names, q, k, v and w1, w3 fused."""
    with torch.device("meta"):
        model = ZImageTransformer(TransformerConfig())
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@cache
def encoder_shapes() -> Shapes:
    """Qwen3-4B, sizes of its config.json; its output matrix is its embedding table."""
    linears = {
        "self_attn.q_proj": (4096, 2560),
        "self_attn.k_proj": (1024, 2560),
        "self_attn.v_proj": (1024, 2560),
        "self_attn.o_proj": (2560, 4096),
        "mlp.gate_proj": (9728, 2560),
        "mlp.up_proj": (9728, 2560),
        "mlp.down_proj": (2560, 9728),
    }
    vectors = {
        "input_layernorm": 2560,
        "post_attention_layernorm": 2560,
        "self_attn.q_norm": 128,
        "self_attn.k_norm": 128,
    }
    layer = linears | {name: (size,) for name, size in vectors.items()}
    layers = {f"layers.{i}.{name}.weight": shape for i in range(36) for name, shape in layer.items()}
    return layers | {"embed_tokens.weight": (151936, 2560), "norm.weight": (2560,)}


def bf16(name: str, shape: tuple[int, ...]) -> float:
    return 2 * prod(shape)


def fp8(name: str, shape: tuple[int, ...]) -> float:
    """A file cast with everything in it."""
    return prod(shape)


def packed(pattern: str, cost: Cost) -> Cost:
    """`cost` for the weights whose whole name fits, bf16 for the rest."""
    return lambda name, shape: (cost if re.fullmatch(pattern, name) else bf16)(name, shape)


def int8_rows(scale_bytes: int) -> Cost:
    return lambda name, shape: prod(shape) + scale_bytes * shape[0]


def svdq(kind: str, rank: int) -> Cost:
    """Codes, scales of groups, two smoothing vectors, the low-rank pair; FP4 has a further scale: qkv one per row."""

    def cost(name: str, shape: tuple[int, ...]) -> float:
        rows, columns = shape
        scales = rows * columns // 64 * 2 if kind == "int4" else rows * columns // 16
        further = 0 if kind == "int4" else 2 * rows if "qkv" in name else 2
        return rows * columns // 2 + scales + further + 4 * columns + 2 * rank * (rows + columns)

    return packed(ATTENTION_AND_FFN, cost)


@cache
def mixed_recipe() -> Recipe:
    return Recipe.load(ROOT / "models" / "z_image" / "recipes" / "nvfp4_mixed.json", ("nvfp4", "mxfp8", "bf16"))


def nvfp4_mixed(name: str, shape: tuple[int, ...]) -> float:
    """By the layer map of the recipe; blocks of 16 (NVFP4) and 32 (MXFP8) with a scale byte each."""
    if ".w13." in name:
        half = (shape[0] // 2, shape[1])
        return sum(nvfp4_mixed(name.replace("w13", which), half) for which in ("w1", "w3"))
    kept = mixed_recipe().format_of(name.removesuffix(".weight")) if name.endswith(".weight") else "bf16"
    numbers = prod(shape)
    return {"bf16": numbers * 2, "mxfp8": numbers + numbers // 32, "nvfp4": numbers // 2 + numbers // 16 + 4}[kept]


def mxfp8(name: str, shape: tuple[int, ...]) -> float:
    """By the layer list of the card: all of the blocks, but for these."""
    if ".w13." in name:
        half = (shape[0] // 2, shape[1])
        return sum(mxfp8(name.replace("w13", which), half) for which in ("w1", "w3"))
    critical = (
        r"layers\.29\.attention\.qkv|layers\.2[2-9]\.adaLN_modulation\.0|context_refiner\.[01]\.attention\.out|"
        r"context_refiner\.1\.feed_forward\.w2|noise_refiner\.1\.(attention\.(qkv|out)|feed_forward\.w2)|"
        r"noise_refiner\.[01]\.feed_forward\.w3"
    )
    kept = re.fullmatch(rf"({critical})\.weight", name) or not re.fullmatch(BLOCKS.replace("(13|2)", "[123]"), name)
    return bf16(name, shape) if kept else prod(shape) * 33 / 32


def sd_cpp_q4_0(name: str, shape: tuple[int, ...]) -> float:
    """stable-diffusion.cpp's layout: blocks packed, one refiner in Q8_0 (the published size says so), the rest F32."""
    if len(shape) == 1 or not re.fullmatch(BLOCKS, name):
        return 4 * prod(shape)
    return prod(shape) * GGUF_BYTES["Q8_0" if name.startswith("context_refiner") else "Q4_0"]


def gguf(usual: str, *, qkv: str = "", w2: str = "") -> Cost:
    """city96's layout: the 30 layers packed, vectors float32, the rest bf16."""

    def cost(name: str, shape: tuple[int, ...]) -> float:
        if len(shape) == 1:
            return 4 * prod(shape)
        if not re.fullmatch(TRUNK, name):
            return bf16(name, shape)
        kind = (qkv if ".qkv." in name else w2 if ".w2." in name else "") or usual
        return prod(shape) * GGUF_BYTES[kind]

    return cost


def gguf_encoder(name: str, shape: tuple[int, ...]) -> float:
    """llama.cpp's Q4_K_M: Q6_K for the embedding table, and for v and down of its "use more bits" layers."""
    if len(shape) == 1:
        return 4 * prod(shape)
    layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
    more = layer < 36 // 8 or layer >= 36 * 7 // 8 or (layer - 36 // 8) % 3 == 2
    six = name.startswith("embed") or (more and ("v_proj" in name or "down_proj" in name))
    return prod(shape) * GGUF_BYTES["Q6_K" if six else "Q4_K"]


TRANSFORMERS: Mapping[str, Cost] = {
    **dict.fromkeys(PLAIN, bf16),
    **dict.fromkeys(("z_image_int8", "z_image_base_int8"), packed(TRUNK, int8_rows(2))),
    **{f"z_image_nunchaku_r{rank}_int4": svdq("int4", rank) for rank in (32, 128, 256)},
    **{f"z_image_nunchaku_r{rank}_fp4": svdq("fp4", rank) for rank in (32, 128)},
    "z_image_nvfp4_mixed": nvfp4_mixed,
    "z_image_fp8_scaled": packed(rf"{BLOCKS}|cap_embedder\.1\.weight", lambda name, shape: prod(shape) + 4),
    **dict.fromkeys(("z_image_fp8", "z_image_fp8_e5m2", "z_image_aio_fp8"), fp8),
    "z_image_mxfp8": mxfp8,
    "z_image_comfy_int8": packed(BLOCKS, int8_rows(4)),
    "z_image_gguf_q8_0": gguf("Q8_0"),
    "z_image_gguf_q6_k": gguf("Q6_K"),
    "z_image_gguf_q5_k_m": gguf("Q5_K", qkv="Q6_K", w2="Q6_K"),
    "z_image_gguf_q4_k_m": gguf("Q4_K", qkv="Q5_K", w2="Q6_K"),
    "z_image_gguf_q4_0": sd_cpp_q4_0,
}

ENCODERS: Mapping[str, Cost] = {
    "qwen3_bf16.safetensors": bf16,
    "qwen_3_4b.safetensors": bf16,
    "qwen3_quanto_bf16_int8.safetensors": packed(r"layers\..*_proj\.weight", int8_rows(2)),
    "Qwen3-4B-Q8_0.gguf": lambda name, shape: prod(shape) * (4 if len(shape) == 1 else GGUF_BYTES["Q8_0"]),
    "Qwen3-4B-Q4_K_M.gguf": gguf_encoder,
    "z-image-turbo-fp8-aio.safetensors": fp8,
}


def total(shapes: Shapes, cost: Cost) -> float:
    return sum(cost(name, shape) for name, shape in shapes.items())
