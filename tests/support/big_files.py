"""Files of the 6B model's real sizes and names, of random numbers: for what needs the size and not the picture.

They lie in a folder as a download would put them, so that the shipped presets draw with them:

    wgp.py generate "..." --preset z_image --ckpts FOLDER            bf16: 12.3 GB, text encoder 8.0 GB, VAE 0.2 GB
    wgp.py generate "..." --preset z_image_int8 --ckpts FOLDER       int8: 6.9 GB, text encoder 4.4 GB, VAE 0.2 GB
    ... --preset z_image_nunchaku_r256_int4                          SVDQuant: 4.5 GB and the int8 text encoder
    ... --preset z_image_nunchaku_r128_fp4                           SVDQuant: 4.2 GB and the int8 text encoder

The int8 files are laid out as mmgp writes the published ones: quanto's tensors, diffusers' names, the linears of the 30
layers packed and the refiners not, and a header of odd length, so that no number begins where a CPU would like it to.

The tokenizer is the demo's. Numbers are taken from a pool of 2^24 normal ones, whose length is prime, so that no two
rows of a matrix are alike, and scaled so that every layer keeps the size of what goes through it.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from models.z_image.config import TransformerConfig
from models.z_image.keys import diffusers_names, split_parameter
from models.z_image.transformer import ZImageTransformer
from models.z_image.variants import (
    SCHEDULER_CONFIG_FILE,
    TEXT_ENCODER_FILES,
    TEXT_ENCODER_FOLDER,
    TOKENIZER_FILES,
    VAE_CONFIG_FILE,
    VAE_FILE,
)
from shared.quant.formats import svdq

TRANSFORMER_FILE = "ZImageTurbo_bf16.safetensors"
INT8_TRANSFORMER_FILE = "ZImageTurbo_quanto_bf16_int8.safetensors"

POOL = 16_777_259  # a prime just above 2^24
_DEMO = Path(__file__).parents[2] / "models" / "z_image" / "demo"

# Qwen/Qwen3-4B config.json.
QWEN3 = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip

# Flux's VAE: diffusers' config.json.
VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]
Kind = Literal["bf16", "int8", "int4", "fp4"]
# Which matrices the published int8 files pack: formats.md 2, from mmgp's rule.
_PACKED_LAYERS = re.compile(r"layers\.")
_PACKED_WORDS = re.compile(r"model\.layers\.")
# nunchaku's linears of a block, and the diffusers names of the matrices that each stacks.
_STACKS = {
    "attention.to_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.to_out.0": ("attention.to_out.0",),
    "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),
    "feed_forward.net.2": ("feed_forward.w2",),
}
_BLOCK = re.compile(r"(?:layers|noise_refiner|context_refiner)\.\d+\.")
_RANKS = {"int4": 256, "fp4": 128}
SVDQ_FILES = {kind: f"svdq-{kind}_r{rank}-z-image-turbo.safetensors" for kind, rank in _RANKS.items()}
# What a code of each kind is worth on average.
_CODE_SIZE = {"int4": 4.6, "fp4": 2.5}
_ONE_IN_E4M3 = b"\x38"
# The bytes of one tensor in some pieces: (name, shape) -> pieces.
Fill = Callable[[str, tuple[int, ...]], Iterator[bytes]]


def transformer_shapes() -> dict[str, tuple[int, ...]]:
    """The 6B transformer in the official names: qkv in one, w1 and w3 apart."""
    with torch.device("meta"):
        model = ZImageTransformer(TransformerConfig())
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("feed_forward.w13.weight"):
            rows, columns = parameter.shape
            shapes |= {name.replace("w13", half): (rows // 2, columns) for half in ("w1", "w3")}
        else:
            shapes[name] = tuple(parameter.shape)
    return shapes


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    """Qwen3-4B in Hugging Face's names."""
    from transformers import Qwen3Config, Qwen3Model

    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config(**QWEN3))
    return {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters()}


def vae_shapes() -> dict[str, tuple[int, ...]]:
    """The VAE in diffusers' names."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        model = AutoencoderKL(**VAE)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    fill: Fill | None,
    *,
    aligned: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A file of tensors by name -> (number type, shape). fill: their bytes; None leaves a sparse file of zeros.

    aligned: the first tensor begins at a multiple of 8 bytes; else at an odd one. metadata: of the header.
    """
    sizes = {"BF16": 2, "F8_E4M3": 1, "I8": 1, "F32": 4}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + sizes[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 if aligned else 1 - len(text) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if fill is None:
            file.truncate(8 + len(text) + end)
            return
        for name, (_, shape) in tensors.items():
            file.writelines(fill(name, shape))


class Numbers:
    """Random numbers of the same kind for every file, in bf16 and as the codes of int8."""

    def __init__(self, seed: int = 0) -> None:
        numbers = torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
        self._bf16 = {scale: (numbers * scale).bfloat16().view(torch.uint8).numpy() for scale in _SCALES}
        self._codes = (numbers * (127 / 4)).round().clamp(-127, 127).to(torch.int8).numpy()
        self._at = 0

    def bf16(self, name: str, shape: tuple[int, ...]) -> Iterator[bytes]:
        """Norms of ones, biases and pad tokens of zeros, weights of normal numbers."""
        count = torch.Size(shape).numel()
        if len(shape) == 1:
            value = 1.0 if name.endswith("weight") else 0.0
            yield torch.full((count,), value, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
            return
        columns = torch.Size(shape[1:]).numel()
        scale = min(_SCALES, key=lambda known: abs(known - columns**-0.5))
        yield from self._pieces(self._bf16[scale], 2, count)

    def quanto(self, name: str, shape: tuple[int, ...]) -> Iterator[bytes]:
        """What bf16() says, and int8 codes behind `_data`, scales behind `_scale`."""
        if name.endswith("_data"):
            yield from self._pieces(self._codes, 1, torch.Size(shape).numel())
        elif name.endswith("_scale"):
            scale = torch.full(shape, 0.02 * 4 / 127, dtype=torch.bfloat16)
            yield scale.view(torch.uint8).numpy().tobytes()
        else:
            yield from self.bf16(name, shape)

    def svdq(self, kind: str) -> Fill:
        """What bf16() says, and nunchaku's tensors: any codes, scales that keep the size, a small correction."""

        def fill(name: str, shape: tuple[int, ...]) -> Iterator[bytes]:
            count, end = torch.Size(shape).numel(), name.rpartition(".")[2]
            columns = shape[0] * (64 if kind == "int4" else 16)
            if end == "qweight":
                yield from self._pieces(self._codes, 1, count)
            elif end == "wscales" and kind == "fp4":
                yield _ONE_IN_E4M3 * count
            elif end == "wscales":
                yield _constant(columns**-0.5 / _CODE_SIZE[kind], count)
            elif end == "wtscale":
                yield _constant(_FP4_SCALE, count)
            elif end.startswith("smooth_factor"):
                yield _constant(1.0, count)
            elif end.startswith("proj_"):
                yield from self._pieces(self._bf16[_SCALES[-1]], 2, count)
            else:
                yield from self.bf16(name, shape)

        return fill

    def _pieces(self, pool: np.ndarray, size: int, count: int) -> Iterator[bytes]:
        """`count` numbers of `size` bytes, where the last ones ended, from the beginning again at the end."""
        while count:
            taken = min(count, POOL - self._at)
            yield pool[self._at * size : (self._at + taken) * size].tobytes()
            count, self._at = count - taken, (self._at + taken) % POOL


# Powers of two near one over the square root of a row's length: a product of them keeps the size of its input.
_SCALES = tuple(2.0**-n for n in range(2, 8))


_FP4_SCALE = 3840**-0.5 / _CODE_SIZE["fp4"]


def _constant(value: float, count: int) -> bytes:
    return torch.full((count,), value, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()


def svdq_tensors(shapes: Shapes, kind: str, rank: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A network of these shapes, in diffusers' names, with its blocks' linears in nunchaku's format."""
    left, tensors = dict(shapes), {}
    for block in sorted({found[0] for name in shapes if (found := _BLOCK.match(name))}):
        for linear, stacked in _STACKS.items():
            matrices = [left.pop(f"{block}{name}.weight") for name in stacked]
            rows, columns = sum(matrix[0] for matrix in matrices), matrices[0][1]
            scales = ("BF16", (columns // 64, rows)) if kind == "int4" else ("F8_E4M3", (columns // 16, rows))
            parts: dict[str, tuple[str, tuple[int, ...]]] = {
                "qweight": ("I8", (rows, columns // 2)), "wscales": scales, "smooth_factor": ("BF16", (columns,)),
                "smooth_factor_orig": ("BF16", (columns,)), "proj_down": ("BF16", (columns, rank)),
                "proj_up": ("BF16", (rows, rank)), **({"wtscale": ("BF16", (1,))} if kind == "fp4" else {}),
            }  # fmt: skip
            tensors |= {f"{block}{linear}.{suffix}": tensor for suffix, tensor in parts.items()}
    return tensors | {name: ("BF16", shape) for name, shape in left.items()}


def write_model(folder: Path, kind: Kind = "bf16") -> None:
    """Write what is not there yet: transformer and text encoder of a kind, VAE, tokenizer, configurations."""
    numbers = Numbers()

    def plain(path: Path, shapes: Shapes) -> None:
        if not path.exists():
            write_safetensors(path, {name: ("BF16", shape) for name, shape in shapes.items()}, numbers.bf16)

    def packed(path: Path, shapes: Shapes, chosen: re.Pattern[str]) -> None:
        if not path.exists():
            write_safetensors(path, _quanto(shapes, chosen), numbers.quanto, aligned=False)

    def quantized(path: Path, kind: Literal["int4", "fp4"]) -> None:
        if not path.exists():
            tensors = svdq_tensors(_in_diffusers_names(transformer_shapes()), kind, _RANKS[kind])
            header = svdq.header(TransformerConfig().as_diffusers(), kind=kind, rank=_RANKS[kind])
            write_safetensors(path, tensors, numbers.svdq(kind), metadata=header)

    encoders = [folder / TEXT_ENCODER_FOLDER / name for name in TEXT_ENCODER_FILES]
    if kind == "bf16":
        plain(folder / TRANSFORMER_FILE, transformer_shapes())
        plain(encoders[0], encoder_shapes())
    else:
        if kind == "int8":
            packed(folder / INT8_TRANSFORMER_FILE, _in_diffusers_names(transformer_shapes()), _PACKED_LAYERS)
        else:
            quantized(folder / SVDQ_FILES[kind], kind)
        packed(encoders[1], encoder_shapes(), _PACKED_WORDS)
    plain(folder / VAE_FILE, vae_shapes())
    (folder / VAE_CONFIG_FILE).write_text(json.dumps(VAE))
    (folder / SCHEDULER_CONFIG_FILE).write_text(json.dumps({"shift": 3.0}))
    for name in TOKENIZER_FILES:
        source, target = _DEMO / "text_encoder" / name, folder / TEXT_ENCODER_FOLDER / name
        if source.exists():
            shutil.copyfile(source, target)
        else:  # vocab.json and merges.txt say again what tokenizer.json says, which is read
            target.write_text("{}")


def _in_diffusers_names(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Our names or the official ones as diffusers', which have q, k and v apart."""
    found: dict[str, tuple[int, ...]] = {}
    for name, (rows, *others) in shapes.items():
        module, suffix = split_parameter(name)
        theirs = diffusers_names(module)
        found |= {their + suffix: (rows // len(theirs), *others) for their in theirs}
    return found


def _quanto(shapes: Shapes, chosen: re.Pattern[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The chosen matrices as quanto's int8, everything else in bf16."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and chosen.match(name):
            tensors |= {f"{name}._data": ("I8", shape), f"{name}._scale": ("BF16", (shape[0], 1))}
        else:
            tensors[name] = ("BF16", shape)
    return tensors
