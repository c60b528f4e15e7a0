"""Good files to begin with, each of a few kilobytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.quant.formats import marker_tensor
from tests.fuzz.mutations import Tensors, whole
from tests.support.tiny_model import randomise

# The smallest Z-Image there can be: fifty thousand of them are loaded.
SMALL: Mapping[str, Any] = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 8,
                            "ffn_dim": 48, "time_dim": 16, "time_hidden_dim": 24, "axes_dims": (4, 6, 6)}  # fmt: skip

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8",
          torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
          torch.float8_e8m0fnu: "F8_E8M0"}  # fmt: skip
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def as_seed(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {
        name: (_TYPES[t.dtype], list(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def some_tensors() -> tuple[Tensors, dict[str, str]]:
    tensors = as_seed({"a.weight": torch.ones(4, 8), "a.bias": torch.ones(4), "b": torch.ones(2, 3, dtype=torch.int8)})
    return tensors, {"format": "pt", "config": '{"dim": 3}'}


def packed_layers() -> list[tuple[Tensors, dict[str, str]]]:
    """A layer of each writable format, with markers as the ecosystem writes them, and what only others write."""
    from shared.quant.targets import targets

    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    seeds = []
    for name, target in targets().items():
        if target.gguf:
            continue
        made = target.quantize(weight, 1, 16)
        tensors = as_seed({f"layers.0.attention.out.{suffix}": tensor for suffix, tensor in made.items()})
        seeds.append((tensors, _header_metadata(name)))
        marker = made.get("comfy_quant")
        if marker is not None:  # the same told by the header alone
            bare = {n: t for n, t in tensors.items() if not n.endswith("comfy_quant")}
            layers = {"layers.0.attention.out": json.loads(bytes(marker.tolist()))}
            seeds.append((bare, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}))
    return [*seeds, (_bitsandbytes_layer(), {})]


def _header_metadata(name: str) -> dict[str, str]:
    from models.z_image.config import TransformerConfig
    from models.z_image.conversion import header

    naming = {"int8": "diffusers", "svdq_int4": "nunchaku", "svdq_fp4": "nunchaku"}.get(name, "official")
    return dict(header(naming, {"layers.0.attention.out": name}, TransformerConfig(**SMALL).as_diffusers(), 16))


def _bitsandbytes_layer() -> Tensors:
    """nf4, nested: 64 x 64 numbers in blocks of 64, magnitudes in one block of 256."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64], "nested_blocksize": 256,
             "nested_dtype": "float32", "nested_offset": 0.1}  # fmt: skip
    return as_seed({
        "layers.0.attention.out.weight": torch.arange(2048).remainder(256).to(torch.uint8)[:, None],
        "layers.0.attention.out.weight.quant_map": torch.linspace(-1, 1, 16),
        "layers.0.attention.out.weight.absmax": torch.arange(64).to(torch.uint8),
        "layers.0.attention.out.weight.nested_quant_map": torch.linspace(0, 1, 256),
        "layers.0.attention.out.weight.nested_absmax": torch.ones(1),
        "layers.0.attention.out.weight.quant_state.bitsandbytes__nf4": marker_tensor(state),
    })  # fmt: skip


def gguf_file(folder: Path) -> bytes:
    """By the gguf package: packed and plain tensors, keys of every kind, a shape told by a key."""
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).numpy()
    path = folder / "seed.gguf"
    writer = GGUFWriter(path, "lumina2")
    writer.add_string("config", "{}")
    writer.add_uint32("general.alignment", 32)
    writer.add_array("comfy.gguf.orig_shape.flat.weight", [8, 32])
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"] * 20)
    writer.add_tensor("norm.weight", numpy.ones(8, numpy.float32))
    for name, kind in (("a", "Q8_0"), ("flat", "Q4_0"), ("c", "Q5_1"), ("d", "F16")):
        packed = GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", quantize(weight, packed), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def loras() -> list[tuple[Tensors, dict[str, str]]]:
    dim, ffn = SMALL["dim"], SMALL["ffn_dim"]

    def pair(name: str, a: str, b: str, rows: int = dim, columns: int = dim) -> dict[str, torch.Tensor]:
        return {f"{name}.{a}.weight": torch.ones(4, columns), f"{name}.{b}.weight": torch.ones(rows, 4)}

    split = pair("diffusion_model.layers.0.attention.to_q", "lora_A", "lora_B")
    fused = pair("lora_unet_layers_0_attention_qkv", "lora_down", "lora_up", 3 * dim)
    peft = pair("base_model.model.layers.0.feed_forward.w2", "lora_A", "lora_B", dim, ffn)
    return [
        (as_seed({**split, "diffusion_model.layers.0.attention.to_q.alpha": torch.tensor(2.0)}), {}),
        (as_seed({**fused, "lora_unet_layers_0_attention_qkv.alpha": torch.tensor(4.0)}), {"ss_network_dim": "4"}),
        (as_seed(peft), {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 8}'}),
    ]


def small_transformer() -> tuple[Tensors, dict[str, str]]:
    from models.z_image.config import TransformerConfig
    from models.z_image.loader import to_diffusers
    from models.z_image.transformer import ZImageTransformer

    config = TransformerConfig(**SMALL)
    state = to_diffusers(randomise(ZImageTransformer(config), 1).to(torch.bfloat16).state_dict())
    return as_seed(state), {"config": json.dumps(config.as_diffusers())}


def small_text_encoder() -> tuple[Tensors, dict[str, str]]:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    state = Qwen3Model(config).to(torch.bfloat16).state_dict()
    return as_seed({f"model.{name}": tensor for name, tensor in state.items()}), {}


def small_vae() -> tuple[Tensors, dict[str, str]]:
    from diffusers import AutoencoderKL

    vae: nn.Module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,), layers_per_block=1, latent_channels=16, norm_num_groups=2, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    told = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "norm_num_groups": 2}
    return as_seed(vae.state_dict()), {"vae_config": json.dumps(told)}


def shard_index() -> bytes:
    first, second = _SHARDS
    return json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": first, "b": second}}).encode()


def shards() -> dict[str, bytes]:
    return {name: whole((as_seed({key: torch.ones(1)}), {})) for name, key in zip(_SHARDS, "ab", strict=True)}
