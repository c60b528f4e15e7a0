"""Broken files end in a UserError or in a whole object: a short run of tests/fuzz, and what its long runs found."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError
from tests.fuzz.mutations import Tensors, safetensors_bytes, whole
from tests.fuzz.readers import Reader, readers
from tests.fuzz.runs import run
from tests.fuzz.seeds import as_seed

# Files per reader; those that build a model for each file take longer.
SHORT_RUN = {"safetensors": 200, "gguf": 150, "layers": 200, "lora": 100, "index": 100, "transformer": 15,
             "text_encoder": 15, "vae": 5}  # fmt: skip


@pytest.fixture(scope="module")
def make_reader(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reader]:
    known = readers(tmp_path_factory.mktemp("seeds"))
    made: dict[str, Reader] = {}

    def make(name: str) -> Reader:
        if name not in made:
            made[name] = known[name]()
        return made[name]

    return make


@pytest.mark.parametrize("name", SHORT_RUN)
def test_the_files_that_mutations_start_from_are_whole(
    name: str, make_reader: Callable[[str], Reader], tmp_path: Path
) -> None:
    reader = make_reader(name)
    for file, data in reader.beside.items():
        (tmp_path / file).write_bytes(data)
    path = tmp_path / f"whole{reader.suffix}"

    for seed in reader.seeds:
        path.write_bytes(whole(seed))
        reader.read(path)


@pytest.mark.parametrize(("name", "count"), SHORT_RUN.items())
def test_a_broken_file_is_refused_in_words_or_read_whole(
    name: str, count: int, make_reader: Callable[[str], Reader], tmp_path: Path
) -> None:
    outcomes, finds = run(make_reader(name), count, 5, tmp_path)

    assert not finds, "\n".join(find.words for find in finds)
    assert outcomes["read"] < count, "nothing was broken"


# ---------------------------------------------------------------------------------------- what long runs found


def a_header(entry: dict[str, Any], metadata: dict[str, Any] | None = None) -> bytes:
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}
    return safetensors_bytes(header | ({"__metadata__": metadata} if metadata else {}), bytes(4))


def with_header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        with_header(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}'),
        a_header({"shape": [2**70]}),
        a_header({"shape": [10**4000, 10**4000]}),
        a_header({"shape": [1] * 65}),
        a_header({"shape": [4096] * 100_000}),
        a_header({"data_offsets": [-(10**4200), 10**4200]}),
        with_header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'.encode("utf-16")),
        with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "' + b"\xed\xa0\x80" + b'": 1}'),
    ],
    ids=["5000 digits", "huge", "huge product", "65 axes", "product of minutes", "huge span", "utf-16", "surrogate"],
)  # fmt: skip
def test_numbers_and_text_that_no_header_can_mean_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        Checkpoint.open(path)


def test_metadata_that_are_no_texts_keep_nobody_from_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(a_header({}, metadata={"rank": 4}))  # the safetensors package wants texts

    assert Checkpoint.open(path).load().keys() == {"a"}


def changed(reader: Reader, name: str, tensor: torch.Tensor, metadata: dict[str, str] | None = None) -> bytes:
    """The reader's first good file with another tensor in the place of one."""
    seed = reader.seeds[0]
    assert not isinstance(seed, bytes)
    tensors: Tensors = {**seed[0], **as_seed({name: tensor})}
    return whole((tensors, {**seed[1], **(metadata or {})}))


Q = "diffusion_model.layers.0.attention.to_q"


@pytest.mark.parametrize(
    ("name", "tensor", "replacement", "metadata", "message"),
    [
        ("transformer", "all_x_embedder.2-1.weight", torch.ones(32), {}, "x_embedder.weight as a matrix"),
        ("transformer", "layers.0.attention.norm_q.weight", torch.tensor(1.0), {}, "cannot read the model's sizes"),
        ("transformer", "cap_pad_token", torch.ones(1, 32), {"config": '{"a":' * 3000}, "nested too deeply"),
        ("transformer", "layers.0.feed_forward.w2.weight", torch.ones(32, 0), {}, "ffn_dim above 0"),
        ("text_encoder", "model.layers.0.self_attn.q_norm.weight", torch.ones(0), {}, "not a Qwen3 text encoder"),
        ("text_encoder", "model.layers.0.self_attn.q_norm.weight", torch.ones(7), {}, "not a Qwen3 text encoder"),
        ("text_encoder", "model.layers.0.self_attn.k_proj.weight", torch.ones(1, 16), {}, "not a Qwen3 text encoder"),
        ("vae", "encoder.down_blocks.0.resnets.0.conv2.weight", torch.ones(0, 4, 3, 3), {}, "not an AutoencoderKL"),
        ("lora", f"{Q}.alpha", torch.ones(3), {}, r"alpha .* impossible shape \[3\]"),
        ("lora", f"{Q}.lora_A.weight", torch.ones(32), {}, r"down .* impossible shape \[32\]"),
        ("lora", f"{Q}.lora_A.weight", torch.ones(0, 32), {}, r"down .* impossible shape \[0, 32\]"),
        ("lora", "x", torch.ones(1), {"lora_adapter_metadata": '{"lora_alpha": [8]}'}, "are no numbers"),
        ("lora", "x", torch.ones(1), {"lora_adapter_metadata": '{"alpha_pattern": {"(": 8}}'}, "are no numbers"),
        ("lora", "x", torch.ones(1), {"lora_adapter_metadata": '{"a":' * 3000}, "are no JSON"),
    ],
)  # fmt: skip
def test_shapes_and_settings_that_crashed_a_reader_are_named(
    make_reader: Callable[[str], Reader], tmp_path: Path, name: str, tensor: str, replacement: torch.Tensor,
    metadata: dict[str, str], message: str,
) -> None:  # fmt: skip
    reader = make_reader(name)
    path = tmp_path / f"m{reader.suffix}"
    path.write_bytes(changed(reader, tensor, replacement, metadata))

    with pytest.raises(CheckpointError, match=message):
        reader.read(path)


def test_a_deeply_nested_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": ' + "[" * 5000)

    with pytest.raises(CheckpointError, match="not a shard index"):
        Checkpoint.open(path)
    path.write_text(json.dumps({"weight_map": {"a": 1}}))
    with pytest.raises(CheckpointError, match="not a shard index"):
        Checkpoint.open(path)
