"""A text encoder and a VAE of the published sizes in sparse files; see sparse_files.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.z_image.bench.sparse_files import KINDS, Stored, write_safetensors
from models.z_image.bench.stages import QWEN3, QWEN3_LAYERS, VAE

_VOCABULARY = 151_936


def write_text_encoder(path: Path, kind: str = "", sizes: Mapping[str, Any] | None = None) -> int:
    """Qwen3-4B, or a Qwen3 of other sizes, in bf16 and Hugging Face's names; its length in bytes.

    kind: one of KINDS with tensors of its own for each matrix, for the linears of the layers.
    """
    from transformers import Qwen3Config, Qwen3Model

    given = sizes or {**QWEN3, "vocab_size": _VOCABULARY, "num_hidden_layers": QWEN3_LAYERS}
    with torch.device("meta"):
        model: nn.Module = Qwen3Model(Qwen3Config(**given))
    pack = KINDS[kind].packed if kind else None
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors: dict[str, Stored] = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if pack is not None and module in linears:
            rows, columns = parameter.shape
            tensors |= {f"model.{module}.{suffix}": stored for suffix, stored in pack(rows, columns).items()}
        else:
            tensors[f"model.{name}"] = Stored("BF16", tuple(parameter.shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_safetensors(path, tensors, {})


def write_vae(path: Path, config: Mapping[str, Any] | None = None) -> int:
    """The published VAE, or one of another config, in bf16 and diffusers' names; its length in bytes."""
    from diffusers import AutoencoderKL

    given = dict(config or VAE)
    with torch.device("meta"):
        model = AutoencoderKL(**given)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {name: given[name] for name in ("scaling_factor", "shift_factor", "norm_num_groups")}
    path.with_name(f"{path.stem}_config.json").write_text(json.dumps(told), encoding="utf-8")
    tensors = {name: Stored("BF16", tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    return write_safetensors(path, tensors, {})
