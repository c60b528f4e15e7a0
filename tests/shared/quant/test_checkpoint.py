"""Headers that the safetensors library wrote, and headers that something broke."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError
from shared.quant.mapping import is_mapped

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8,
    "I64": torch.int64, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    state = {f"t_{name}": torch.arange(12).view(3, 4).to(dtype) for name, dtype in DTYPES.items()}
    state["empty"], state["scalar"] = torch.zeros(0, 4), torch.tensor(2.5)
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})

    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    loaded = checkpoint.load()

    assert {n: (i.dtype, i.shape) for n, i in checkpoint.tensors.items() if n.startswith("t_")} == {
        f"t_{name}": (name, (3, 4)) for name in DTYPES
    }
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.nbytes == sum(t.numel() * t.element_size() for t in state.values())
    assert all(torch.equal(loaded[n].view(torch.uint8), t.view(torch.uint8)) for n, t in state.items() if t.dim() == 2)
    assert float(loaded["scalar"]) == 2.5


@pytest.mark.parametrize("by", ["index", "folder"])
def test_shards_are_one_checkpoint(tmp_path: Path, by: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({"b": torch.full((3,), 2.0)}, tmp_path / "m-00002-of-00002.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}})
    )

    checkpoint = Checkpoint.open(index if by == "index" else tmp_path)

    assert set(checkpoint.tensors) == {"a", "b"}
    assert torch.equal(checkpoint.load(["b"])["b"], torch.full((3,), 2.0))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))

    with pytest.raises(CheckpointError, match=r"shard gone\.safetensors is missing"):
        Checkpoint.open(tmp_path)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))

    with pytest.raises(CheckpointError, match="outside its folder"):
        Checkpoint.open(folder)


def test_a_pickle_is_refused_and_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    for name in ("a.pt", "a.ckpt", "disguised.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(), protocol=2))
        with pytest.raises(CheckpointError, match="pickle"):
            Checkpoint.open(tmp_path / name)
    for protocol in range(2, 6):
        (tmp_path / "p.safetensors").write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        with pytest.raises(CheckpointError, match="pickle"):
            Checkpoint.open(tmp_path / "p.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "zip.safetensors")
    with pytest.raises(CheckpointError, match="pickle"):
        Checkpoint.open(tmp_path / "zip.safetensors")

    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        pytest.param({"a": entry()}, b"\0" * 4, "take 8 bytes but 4 follow", id="truncated data"),
        pytest.param({"a": entry()}, b"\0" * 9, "take 8 bytes but 9 follow", id="trailing bytes"),
        pytest.param(
            {"a": entry(shape=(3,))},
            b"\0" * 8,
            "12 bytes, but its offsets span 8",
            id="shape against offsets",
        ),
        pytest.param({"a": entry(offsets=(4, 12))}, b"\0" * 12, "starts at byte 4", id="gap"),
        pytest.param({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "starts at byte 4", id="overlap"),
        pytest.param({"a": entry(dtype="F128")}, b"\0" * 8, "unknown number type 'F128'", id="unknown dtype"),
        pytest.param({"a": entry(shape=(-2,))}, b"\0" * 8, "impossible shape", id="negative shape"),
        pytest.param({"a": entry(offsets=(8, 0))}, b"\0" * 8, "offsets span -8", id="reversed offsets"),
        pytest.param({"a": {"dtype": "F32"}}, b"", "lacks dtype, shape or data_offsets", id="half an entry"),
        pytest.param(b'{"a": 1, "a": 2}', b"", "lists 'a' twice", id="twice"),
        pytest.param(b"{not json", b"", "not readable JSON", id="no JSON"),
        pytest.param(b"[" * 5000, b"", "not readable JSON", id="deep nesting"),
        pytest.param(b"[]", b"", "not an object", id="a list"),
        pytest.param({"__metadata__": 3}, b"", "__metadata__ is a int", id="metadata no object"),
    ],
)
def test_broken_headers_are_named(tmp_path: Path, header: object, data: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(write(tmp_path / "a.safetensors", header, data))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "only 0 bytes", id="empty"),
        pytest.param(b"\x01\x02", "only 2 bytes", id="two bytes"),
        pytest.param(struct.pack("<Q", 1 << 60) + b"{}", "claims 1,152,921,504,606,846,976 bytes", id="absurd length"),
        pytest.param(b"GGUF" + b"\0" * 20, "GGUF file", id="gguf"),
        pytest.param(b"<!DOCTYPE html>" + b" " * 20, "web page", id="html"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", id="lfs"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(path)


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x10280])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    header = {"__metadata__": {"note": ""}, "a": entry()}
    header["__metadata__"] = {"note": "x" * (length - len(json.dumps(header)))}
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", length) + json.dumps(header).encode() + b"\0" * 8)

    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04")
    assert list(Checkpoint.open(path).tensors) == ["a"]


def test_a_folder_with_two_models_asks_which(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")

    with pytest.raises(CheckpointError, match=r"found a\.safetensors, b\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_number_type_that_torch_lacks_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.safetensors", {"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, bytes(3)
    )

    with pytest.raises(CheckpointError, match="w is F6_E2M3, which this version of torch does not have"):
        Checkpoint.open(path).load()


def test_a_file_that_became_shorter_after_it_was_opened_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3000), "b": torch.ones(3000)}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "m.safetensors")
    with (tmp_path / "m.safetensors").open("r+b") as stream:
        stream.truncate(13000)

    with pytest.raises(CheckpointError, match="it ends before b, but did not when it was opened"):
        checkpoint.load(["b"])
    with pytest.raises(CheckpointError, match="it ends before b, but did not when it was opened"):
        checkpoint.read_bytes("b")


def test_numbers_that_begin_anywhere_are_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    path = write(tmp_path / "m.safetensors", header, b"abc" + torch.tensor([1.5, -2.0]).numpy().tobytes())

    assert torch.equal(Checkpoint.open(path).load()["b"], torch.tensor([1.5, -2.0]))


def test_a_large_tensor_at_an_odd_address_stays_mapped_and_multiplies_as_a_copy_of_it(tmp_path: Path) -> None:
    weight = torch.randn(1024, 520).bfloat16()
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [3, 3 + weight.nbytes]},
    }
    data = b"abc" + weight.view(torch.uint8).numpy().tobytes()

    loaded = Checkpoint.open(write(tmp_path / "m.safetensors", header, data)).load()["b"]

    assert is_mapped(loaded) and loaded.data_ptr() % 2
    assert torch.equal(loaded, weight)
    x = torch.randn(40, 520).bfloat16()
    assert torch.equal(torch.nn.functional.linear(x, loaded), torch.nn.functional.linear(x, weight))
