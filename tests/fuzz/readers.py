"""Every reader of files, with good files to begin with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shared.quant.checkpoint import Checkpoint
from shared.quant.formats import Layer, format_of, layers_of, read_checked
from tests.fuzz import seeds
from tests.fuzz.mutations import Tensors
from tests.fuzz.seeds import SMALL


@dataclass(frozen=True)
class Reader:
    """What reads a file, and good files to begin with: bytes as they are, or tensors and metadata.

    beside: files that belong to it, by name.
    """

    suffix: str
    read: Callable[[Path], object]
    seeds: Sequence[bytes | tuple[Tensors, dict[str, str]]]
    beside: Mapping[str, bytes] = field(default_factory=dict)


def readers(folder: Path) -> dict[str, Callable[[], Reader]]:
    """Every reader by name, made when asked for. folder: for the files that packages write."""
    return {
        "safetensors": lambda: Reader(".safetensors", _read_tensors, [seeds.some_tensors()]),
        "gguf": lambda: Reader(".gguf", _read_layers, [seeds.gguf_file(folder)]),
        "layers": lambda: Reader(".safetensors", _read_layers, seeds.packed_layers()),
        "lora": lambda: Reader(".safetensors", _lora_reader(), seeds.loras()),
        "transformer": lambda: Reader(".safetensors", _read_transformer, [seeds.small_transformer()]),
        "text_encoder": lambda: Reader(".safetensors", _read_text_encoder, [seeds.small_text_encoder()]),
        "vae": lambda: Reader(".safetensors", _read_vae, [seeds.small_vae()]),
        "index": lambda: Reader(".safetensors.index.json", Checkpoint.open, [seeds.shard_index()], seeds.shards()),
    }


def _read_tensors(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    loaded = checkpoint.load()
    for name, info in checkpoint.tensors.items():
        # Types that torch packs two to a byte keep their bytes.
        assert tuple(loaded[name].shape) == info.shape or loaded[name].nbytes == info.nbytes, f"{name}: {info}"


def _read_layers(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    _describe(checkpoint)
    for layer in layers_of(checkpoint, checkpoint.tensors).values():
        _read_layer(layer)


def _read_layer(layer: Layer) -> None:
    packed_format = format_of(layer)
    if packed_format is None:
        layer.load(*layer.tensors)
        return
    packed_format.describe(layer)
    shape = packed_format.shape(layer)
    packed = read_checked(packed_format, layer)
    weight = packed.dequantize(torch.float32)
    assert tuple(weight.shape) == tuple(shape) == tuple(packed.shape), f"{layer.module}: {shape}, {weight.shape}"


def _describe(checkpoint: Checkpoint) -> None:
    from shared.app.inspection import describe_checkpoint

    json.dumps(describe_checkpoint(checkpoint, {"z_image": None}))


def _lora_reader() -> Callable[[Path], None]:
    from models.z_image import lora
    from models.z_image.config import TransformerConfig
    from models.z_image.transformer import ZImageTransformer

    model = ZImageTransformer(TransformerConfig(**SMALL))

    def read(path: Path) -> None:
        lora.apply(model, [lora.read(path)], [1.0])

    return read


def _read_transformer(path: Path) -> None:
    from models.z_image.loader import load_transformer

    model = load_transformer(path, torch.bfloat16)
    assert not any(p.is_meta for p in model.parameters())


def _read_text_encoder(path: Path) -> None:
    from models.z_image.text_encoder import load_text_encoder

    model = load_text_encoder(path, torch.bfloat16)
    assert not any(p.is_meta for p in model.parameters())


def _read_vae(path: Path) -> None:
    from models.z_image.autoencoder import load_vae

    model = load_vae(path, torch.float32)
    assert not any(p.is_meta for p in model.parameters())
