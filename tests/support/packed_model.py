"""Networks of packed layers beside the same networks of plain ones: names of files, forwards, LoRAs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models.z_image import lora
from models.z_image.transformer import ZImageTransformer
from shared.quant.checkpoint import Checkpoint
from shared.quant.formats import Layer, layers_of
from shared.quant.linear import PackedLinear
from tests.support.tiny_model import TINY, relative_error

State = dict[str, torch.Tensor]


def official_names(state: Mapping[str, torch.Tensor]) -> State:
    """diffusers' state dict as the official repository and ComfyUI name it: qkv fused, short names."""
    result: State = {}
    for name, tensor in state.items():
        base, _, which = name.removesuffix(".weight").rpartition(".to_")
        if which in ("q", "k", "v"):
            result[f"{base}.qkv.weight"] = torch.cat([state[f"{base}.to_{c}.weight"] for c in "qkv"])
        else:
            short = re.sub(r"all_(x_embedder|final_layer)\.2-1", r"\1", name)
            short = short.replace("to_out.0", "out").replace("norm_q", "q_norm").replace("norm_k", "k_norm")
            result[short] = tensor.contiguous()
    return result


def linears_of(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Modules whose weights are matrices."""
    return [n.removesuffix(".weight") for n, t in state.items() if n.endswith(".weight") and t.ndim == 2]


def forward(model: ZImageTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 8, 12, generator=generator)
    captions = [torch.randn(12, TINY.cap_feat_dim, generator=generator)]
    with torch.no_grad():
        return model(latents, torch.tensor([0.3]), captions)


def lora_file(path: Path) -> lora.LoraFile:
    """A LoRA on a fused and a plain linear, strong enough to matter."""
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for module, rows, columns in (("attention.to_v", 384, 384), ("feed_forward.w2", 384, 1024)):
        name = f"diffusion_model.layers.1.{module}"
        pairs[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
        pairs[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    save_file(pairs, path)
    return lora.read(path)


def assert_same_network(packed: ZImageTransformer, plain: ZImageTransformer, tmp_path: Path) -> None:
    """Equal forwards, before and after a LoRA, and packed tensors that no cast touches. Changes both models.

    Both run in float32: the sums are the same but for their order, as the packed weights are the plain ones exactly.
    """
    assert any(isinstance(m, PackedLinear) for m in packed.modules())
    before = forward(packed)
    assert relative_error(before, forward(plain)) <= 1e-5

    file = lora_file(tmp_path / "lora.safetensors")
    for model in (packed, plain):
        assert lora.apply(model, [file], [0.7])[0].matched == 4
    changed = forward(packed)
    assert relative_error(changed, before) > 1e-3
    assert relative_error(changed, forward(plain)) <= 1e-5
    for model in (packed, plain):
        lora.apply(model, [], [])
    assert torch.equal(forward(packed), before)

    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.to(torch.bfloat16)
    buffers = {
        f"{name}.{buffer}": tensor
        for name, module in packed.named_modules()
        if isinstance(module, PackedLinear)
        for buffer, tensor in module.named_buffers()
    }
    assert all(t.dtype == state[n].dtype and same_bytes(t, state[n]) for n, t in buffers.items())
    packed.to(torch.float32).load_state_dict(state)
    assert relative_error(forward(packed), before) <= 1e-5


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """torch.equal, which float8 lacks."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def layer_of(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> Layer:
    """Tensors by suffix -> the one layer of a file that holds them, under a module's name."""
    save_file({f"blocks.0.{suffix}": tensor for suffix, tensor in tensors.items()}, path, metadata=metadata)
    checkpoint = Checkpoint.open(path)
    return layers_of(checkpoint, checkpoint.tensors)["blocks.0"]
