"""Throw broken files at every reader: each must end in a UserError or in a whole object, soon, and in bounded memory.

    python -m tests.fuzz --count 50000 --reader layers      (without --reader: all of them)

A file is a good one, changed by a few of the mutations below: bytes anywhere, the JSON of headers and markers, types,
shapes and names of tensors with offsets that stay consistent (so that deeper code is reached). What a run finds is
printed with the traceback and kept in --keep; finds become tests in tests/shared/quant/test_fuzz.py. A reader that
takes the interpreter down leaves the file that did it in --keep as `last-READER`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import UserError
from shared.quant.formats import Layer, format_of, layers_of, marker_tensor
from tests.support.tiny_model import randomise

SLOW_SECONDS = 1.0  # of processor time, for files of a few kilobytes
MEMORY_BYTES = 2**30  # a reader may map more than the process has at the start

# The smallest Z-Image there can be: fifty thousand of them are loaded.
SMALL: Mapping[str, Any] = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 8,
                            "ffn_dim": 48, "time_dim": 16, "time_hidden_dim": 24, "axes_dims": (4, 6, 6)}  # fmt: skip

Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> dtype, shape, data

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8",
          torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
          torch.float8_e8m0fnu: "F8_E8M0"}  # fmt: skip
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
           "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 3, 15, 16, 31, 64, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63,
            2**64 - 1, 2**64, 10**30, 10**4000, 0.5, -0.0, 1e308, 1e-320, math.nan, math.inf)  # fmt: skip
_TEXTS = ("", "x", "weight", "int8_tensorwise", "nvfp4", "mxfp8", "float8_e4m3fn", "int4", "fp4", "qint8", "nf4", "F32",
          "F4", "F6_E2M3", "{}", "[]", "\ud800", "\0", "é" * 40, "9" * 5000, "../../x", "a.b.c")  # fmt: skip
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_ENDINGS = (b"\0", b"\xff", b"\0" * 8, b"{}", b"\x80", b"\xff" * 8, b"\x7f\xff\xff\xff", b"\1\0\0\0\0\0\0\0")


@dataclass(frozen=True)
class Reader:
    """What reads a file, and good files to begin with: bytes as they are, or tensors and metadata.

    beside: files that belong to it, by name.
    """

    suffix: str
    read: Callable[[Path], object]
    seeds: Sequence[bytes | tuple[Tensors, dict[str, str]]]
    beside: Mapping[str, bytes] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------- mutations


def mutate(seed: bytes | tuple[Tensors, dict[str, str]], rng: random.Random) -> bytes:
    """A file made from a good one by a few changes."""
    if isinstance(seed, bytes):
        data = seed
        if data.startswith(b"{") and rng.random() < 0.7:
            return _change_json_text(data.decode(), rng).encode("utf-8", "surrogatepass")
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            data = _change_bytes(data, rng)
        return data
    tensors, metadata = dict(seed[0]), dict(seed[1])
    for _ in range(rng.randint(1, 3)):
        _change_tensors(tensors, metadata, rng)
    header, body = _header(tensors, metadata)
    if rng.random() < 0.3:
        header = _change_json(header, rng)
    data = safetensors_bytes(header, body, longest=rng.random() < 0.01)
    return _change_bytes(data, rng) if rng.random() < 0.15 else data


def whole(seed: bytes | tuple[Tensors, dict[str, str]]) -> bytes:
    """The good file itself."""
    return seed if isinstance(seed, bytes) else safetensors_bytes(*_header(*seed))


def safetensors_bytes(header: Any, body: bytes, *, longest: bool = False) -> bytes:
    """longest: with a number in it of more digits than Python agrees to read."""
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    if longest:
        text = text.replace(b"[", b"[" + b"9" * 5000, 1)
    return struct.pack("<Q", len(text)) + text + body


def _header(tensors: Tensors, metadata: Mapping[str, str]) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return header, body


def _change_tensors(tensors: Tensors, metadata: dict[str, str], rng: random.Random) -> None:
    """One change that leaves offsets, types and shapes in agreement."""
    if metadata and rng.random() < 0.2:
        key = rng.choice(list(metadata))
        metadata[key] = _change_json_text(metadata[key], rng)
        return
    name = rng.choice(list(tensors))
    dtype, shape, data = tensors[name]
    match rng.randrange(8):
        case 0 if len(tensors) > 1:
            del tensors[name]
        case 1:
            added = [name + ending for ending in ("_2", ".x", "\ud800", "_scale")]
            renamed = rng.choice([*added, *_swapped(name, tensors, rng)])
            tensors[renamed] = tensors.pop(name)
        case 2:
            dtype = rng.choice(list(_WIDTHS))
            tensors[name] = (dtype, shape, _sized(data, math.prod(shape) * _WIDTHS[dtype]))
        case 3 | 4:
            shape = _change_shape(shape, rng)
            tensors[name] = (dtype, shape, _sized(data, math.prod(shape) * _WIDTHS.get(dtype, 1)))
        case 5:
            if data[:1] == b"{":  # a marker: JSON in bytes
                data = _change_json_text(data.decode("utf-8", "replace"), rng).encode("utf-8", "surrogatepass")
                tensors[name] = (dtype, [len(data)], data)
            else:
                tensors[name] = (dtype, shape, _sized(_change_bytes(data or b"\0", rng), len(data)))
        case 6:
            fill = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\x00\x00\xc0\x7f", b"\x7f\x80"))
            tensors[name] = (dtype, shape, (fill * (len(data) + 1))[: len(data)])
        case 7:
            tensors[name + rng.choice((".weight", "_scale", ".comfy_quant", ".alpha"))] = (dtype, shape, data)


def _swapped(name: str, tensors: Tensors, rng: random.Random) -> list[str]:
    """Another tensor's last part on this one's module."""
    other = rng.choice(list(tensors))
    return [f"{name.rpartition('.')[0]}.{other.rpartition('.')[2]}"]


def _change_shape(shape: Sequence[int], rng: random.Random) -> list[int]:
    changed = list(shape)
    match rng.randrange(6):
        case 0:
            changed.reverse()
        case 1:
            changed.append(1)
        case 2 if changed:
            changed.pop(rng.randrange(len(changed)))
        case 3 if changed:
            axis = rng.randrange(len(changed))
            changed[axis] = max(0, changed[axis] + rng.choice((-1, 1, 2, -changed[axis], changed[axis])))
        case 4 if len(changed) > 1:
            changed = [changed[0] * changed[1], *changed[2:]]
        case _:
            changed = [rng.choice((0, 1, 2, 3, 16, 100)) for _ in range(rng.randrange(4))]
    return changed


def _sized(data: bytes, count: int) -> bytes:
    return (data * (count // max(len(data), 1) + 1) + bytes(count))[:count]


def _change_json_text(text: str, rng: random.Random) -> str:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return rng.choice((text[: len(text) // 2], text + "}", "", rng.choice(_TEXTS)))
    if rng.random() < 0.1:
        return rng.choice((text[: rng.randrange(len(text) + 1)], text * 2, "[" * 3000, '{"a":' * 3000, "9" * 5000))
    return json.dumps(_change_json(found, rng))


def _change_json(value: Any, rng: random.Random) -> Any:
    """The value with one of its parts replaced, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        match rng.randrange(6):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(_TEXTS)] = changed[key]
            case _:
                changed[key] = _change_json(changed[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        changed_list = list(value)
        place = rng.randrange(len(changed_list))
        match rng.randrange(5):
            case 0:
                del changed_list[place]
            case 1:
                changed_list.insert(place, changed_list[place])
            case _:
                changed_list[place] = _change_json(changed_list[place], rng)
        return changed_list
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 7, value, -value, 2**32))
    made: tuple[Any, ...] = (None, True, False, [], {}, [value], {"x": value}, [[]], str(value), [1] * 70, [2**40] * 70)
    return rng.choice((rng.choice(_NUMBERS), rng.choice(_TEXTS), rng.choice(made)))


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return rng.choice(_ENDINGS)
    # Most of what a reader believes stands at the beginning.
    place = rng.randrange(len(data)) if rng.random() < 0.5 else min(rng.randrange(600), len(data) - 1)
    match rng.randrange(10):
        case 0 | 7:
            return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        case 1 | 8:
            number = rng.choice([n for n in _NUMBERS if isinstance(n, int) and 0 <= n < 2**64])
            return data[:place] + struct.pack("<Q", number) + data[place + 8 :]
        case 2 | 9:
            number = rng.choice([n for n in _NUMBERS if isinstance(n, int) and 0 <= n < 2**32])
            return data[:place] + struct.pack("<I", number) + data[place + 4 :]
        case 3:
            return data[:place]
        case 4:
            return data[:place] + rng.choice(_ENDINGS) + data[place:]
        case 5:
            return data[:place] + data[place + rng.randrange(1, 40) :]
        case _:
            stop = place + rng.randrange(1, 80)
            return data[:stop] + data[place:stop] + data[stop:]


# ------------------------------------------------------------------------------------------------------ readers


def readers(folder: Path) -> dict[str, Callable[[], Reader]]:
    """Every reader by name, made when asked for. folder: for the files that packages write."""
    return {
        "safetensors": lambda: Reader(".safetensors", _read_tensors, [_some_tensors()]),
        "gguf": lambda: Reader(".gguf", _read_layers, [_gguf_file(folder)]),
        "layers": lambda: Reader(".safetensors", _read_layers, _packed_layers()),
        "lora": lambda: Reader(".safetensors", _lora_reader(), _loras()),
        "transformer": lambda: Reader(".safetensors", _read_transformer, [_small_transformer()]),
        "text_encoder": lambda: Reader(".safetensors", _read_text_encoder, [_small_text_encoder()]),
        "vae": lambda: Reader(".safetensors", _read_vae, [_small_vae()]),
        "index": lambda: Reader(".safetensors.index.json", Checkpoint.open, [_shard_index()], _shards()),
    }


def as_seed(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {
        name: (_TYPES[t.dtype], list(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
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
    packed = packed_format.read(layer)
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


# -------------------------------------------------------------------------------------------------------- seeds


def _some_tensors() -> tuple[Tensors, dict[str, str]]:
    tensors = as_seed({"a.weight": torch.ones(4, 8), "a.bias": torch.ones(4), "b": torch.ones(2, 3, dtype=torch.int8)})
    return tensors, {"format": "pt", "config": '{"dim": 3}'}


def _packed_layers() -> list[tuple[Tensors, dict[str, str]]]:
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


def _gguf_file(folder: Path) -> bytes:
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


def _loras() -> list[tuple[Tensors, dict[str, str]]]:
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


def _small_transformer() -> tuple[Tensors, dict[str, str]]:
    from models.z_image.config import TransformerConfig
    from models.z_image.loader import to_diffusers
    from models.z_image.transformer import ZImageTransformer

    config = TransformerConfig(**SMALL)
    state = to_diffusers(randomise(ZImageTransformer(config), 1).to(torch.bfloat16).state_dict())
    return as_seed(state), {"config": json.dumps(config.as_diffusers())}


def _small_text_encoder() -> tuple[Tensors, dict[str, str]]:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    state = Qwen3Model(config).to(torch.bfloat16).state_dict()
    return as_seed({f"model.{name}": tensor for name, tensor in state.items()}), {}


def _small_vae() -> tuple[Tensors, dict[str, str]]:
    from diffusers import AutoencoderKL

    vae: nn.Module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,), layers_per_block=1, latent_channels=16, norm_num_groups=2, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    told = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "norm_num_groups": 2}
    return as_seed(vae.state_dict()), {"vae_config": json.dumps(told)}


def _shard_index() -> bytes:
    first, second = _SHARDS
    return json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": first, "b": second}}).encode()


def _shards() -> dict[str, bytes]:
    return {name: whole((as_seed({key: torch.ones(1)}), {})) for name, key in zip(_SHARDS, "ab", strict=True)}


# --------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Find:
    """A file that broke the promise, and how."""

    data: bytes
    words: str


def run(reader: Reader, count: int, seed: int, folder: Path, *, most: int = 20) -> tuple[Counter[str], list[Find]]:
    """Read `count` broken files; what came of them, by kind, and up to `most` finds of different places."""
    rng = random.Random(seed)
    path = folder / f"input{reader.suffix}"
    for name, data in reader.beside.items():
        (folder / name).write_bytes(data)
    outcomes: Counter[str] = Counter()
    finds: dict[str, Find] = {}
    for _ in range(count):
        data = mutate(rng.choice(reader.seeds), rng)
        path.write_bytes(data)
        began = time.process_time()
        try:
            reader.read(path)
            outcome = "read"
        except UserError as error:
            str(error).encode("utf-8", "backslashreplace")  # it can be shown
            outcome = type(error).__name__
        except Exception as error:  # noqa: BLE001 - finding these is the purpose
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
            finds.setdefault(outcome, Find(data, traceback.format_exc(limit=-6)))
        seconds = time.process_time() - began
        if seconds > SLOW_SECONDS:
            outcome = "slow"
            finds.setdefault(outcome, Find(data, f"took {seconds:.1f} s of processor time"))
        outcomes[outcome] += 1
        if len(finds) >= most:
            break
    return outcomes, list(finds.values())


def _limit_memory() -> None:
    """Let allocations beyond the limit fail as MemoryError instead of swapping (Linux; elsewhere without effect)."""
    if sys.platform != "linux":
        return
    import resource

    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))


def main(arguments: Iterable[str] | None = None) -> int:
    """Command line; exit code 1 when something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", action="append", help="repeatable; all without it")
    parser.add_argument("--count", type=int, default=50_000, help="files for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-finds")
    args = parser.parse_args(None if arguments is None else list(arguments))
    args.keep.mkdir(parents=True, exist_ok=True)
    known = readers(args.keep)
    found_any = False
    for name in args.reader or known:
        reader = known[name]()
        began, used = time.monotonic(), time.process_time()
        folder = args.keep / f"last-{name}"
        folder.mkdir(exist_ok=True)
        _limit_memory()
        outcomes, finds = run(reader, args.count, args.seed, folder)
        seconds, cpu = time.monotonic() - began, time.process_time() - used
        lines = [f"{name}: {sum(outcomes.values()):,} files in {seconds:.0f} s ({cpu:.0f} s of CPU)"]
        lines += [f"  {times:>7,}  {outcome}" for outcome, times in outcomes.most_common()]
        for number, find in enumerate(finds):
            path = args.keep / f"{name}-{number}{reader.suffix}"
            path.write_bytes(find.data)
            lines += [f"  {path}", find.words]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        found_any |= bool(finds)
    return int(found_any)


if __name__ == "__main__":
    sys.exit(main())
