"""GGUF headers that the gguf package wrote, and headers that something broke."""

from __future__ import annotations

import os
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError
from tests.support.gguf_blocks import random_blocks
from tests.support.gguf_packages import package_file

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


def text(value: str) -> bytes:
    return U64.pack(len(value)) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + U32.pack(kind) + value


def listing(name: str, dimensions: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(U64.pack(n) for n in dimensions)
    return text(name) + U32.pack(len(dimensions)) + sizes + U32.pack(kind) + U64.pack(offset)


def raw_file(
    path: Path, *, tensors: Sequence[bytes] = (), keys: Sequence[bytes] = (), data: int = 0, version: int = 3,
    counts: tuple[int, int] | None = None, alignment: int = 32,
) -> Path:  # fmt: skip
    """A file byte by byte, right or wrong. counts: (tensors, keys) as the header claims them."""
    claimed = counts or (len(tensors), len(keys))
    header = b"GGUF" + U32.pack(version) + U64.pack(claimed[0]) + U64.pack(claimed[1]) + b"".join([*keys, *tensors])
    path.write_bytes(header + bytes(-len(header) % alignment) + bytes(data))
    return path


def test_reads_what_the_package_wrote(typical: Path) -> None:
    theirs = {t.name: t for t in GGUFReader(typical).tensors}

    checkpoint = Checkpoint.open(typical)
    loaded = checkpoint.load()

    assert {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()} == {
        "a.weight": ("GGUF_Q8_0", (6, 64)),
        "b.weight": ("GGUF_Q4_K", (4, 512)),
        "plain": ("F32", (6, 64)),
        "half": ("F16", (6, 64)),
        "brain": ("BF16", (6, 64)),
    }
    for name, info in checkpoint.tensors.items():
        assert (info.offset, info.nbytes) == (theirs[name].data_offset, theirs[name].n_bytes)
        assert loaded[name].contiguous().view(torch.uint8).numpy().tobytes() == theirs[name].data.tobytes()
    assert loaded["a.weight"].shape == (6, 68)
    assert [loaded[n].dtype for n in ("plain", "half", "brain")] == [torch.float32, torch.float16, torch.bfloat16]
    assert torch.equal(
        loaded["brain"].float(), torch.from_numpy(dequantize(theirs["brain"].data, theirs["brain"].tensor_type))
    )
    assert checkpoint.metadata == {
        "general.architecture": "lumina2", "note": "hello", "words": "[80 elements]", "n": "[3, 4]",
    }  # fmt: skip


def test_pad_tokens_written_as_bytes_are_bf16(tmp_path: Path) -> None:
    token = torch.randn(1, 384).bfloat16()
    path = package_file(tmp_path / "m.gguf", {"cap_pad_token": (token.view(torch.int8).numpy(), "I8")})

    checkpoint = Checkpoint.open(path)

    assert (checkpoint.tensors["cap_pad_token"].dtype, checkpoint.tensors["cap_pad_token"].shape) == ("BF16", (1, 384))
    assert torch.equal(checkpoint.load()["cap_pad_token"], token)


def test_an_original_shape_wins(tmp_path: Path) -> None:
    blocks = random_blocks("Q4_K", 6, 256)
    shape_key = "comfy.gguf.orig_shape."
    path = package_file(
        tmp_path / "m.gguf",
        {"x.weight": (blocks, "Q4_K"), "conv": (numpy.zeros((8, 6), numpy.float32), "F32")},
        {f"{shape_key}x.weight": [24, 64], f"{shape_key}conv": [2, 2, 2, 2, 3]},
    )

    checkpoint = Checkpoint.open(path)

    assert checkpoint.tensors["x.weight"].shape == (24, 64)
    assert checkpoint.load()["conv"].shape == (2, 2, 2, 2, 3)
    assert checkpoint.load()["x.weight"].shape == (6, 144), "blocks run over the ends of rows, so they come as they are"


def test_a_folder_of_one_gguf_file_is_that_file(typical: Path) -> None:
    assert Checkpoint.open(typical.parent).path == typical


def test_a_vocabulary_is_passed_over_quickly(tmp_path: Path) -> None:
    words = key("tokenizer.ggml.tokens", 9, U32.pack(8) + U64.pack(300_000) + text("token") * 300_000)
    path = raw_file(tmp_path / "m.gguf", keys=[words])
    tracemalloc.start()
    began = time.process_time()

    Checkpoint.open(path)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert time.process_time() - began < 2


# ------------------------------------------------------------------------------------------------------ refusing


ONE = listing("w", [32, 2])  # F32, 256 bytes


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        pytest.param({"version": 1}, "version 1; versions 2 and 3", id="old version"),
        pytest.param({"version": 0x03000000}, "big-endian", id="byte order"),
        pytest.param({"counts": (2**60, 0)}, "claims 1,152,921,504,606,846,976 tensors", id="absurd tensors"),
        pytest.param({"counts": (0, 2**40)}, "claims 1,099,511,627,776 keys", id="absurd keys"),
        pytest.param({"counts": (5, 0)}, r"claims \d+ more bytes", id="fewer tensors than claimed"),
        pytest.param({"keys": [U64.pack(2**63)]}, "a key of 9,223,372,036,854,775,808 bytes", id="absurd key"),
        pytest.param({"keys": [key("k", 8, U64.pack(10**6))]}, r"claims 1,000,000 more bytes \(k\)", id="long text"),
        pytest.param({"keys": [key("k", 9, U32.pack(6) + U64.pack(2**62))]}, "more bytes", id="absurd array"),
        pytest.param({"keys": [key("k", 9, U32.pack(8) + U64.pack(2**62))]}, "more bytes", id="absurd texts"),
        pytest.param(
            {"keys": [key("k", 9, U32.pack(8) + U64.pack(2) + text("a") + U64.pack(2**62))]},
            "more bytes",
            id="text in array",
        ),
        pytest.param(
            {"keys": [key("k", 9, U32.pack(9) + U64.pack(1))]}, "array of the unknown type 9", id="nested arrays"
        ),
        pytest.param({"keys": [key("k", 99, b"")]}, "unknown value type 99", id="unknown value"),
        pytest.param({"keys": [key("k", 0, b"a"), key("k", 0, b"a")]}, "lists the key 'k' twice", id="key twice"),
        pytest.param({"keys": [U64.pack(1) + b"\xff" + U32.pack(0) + b"a"]}, "not UTF-8", id="no text"),
        pytest.param({"keys": [key("split.count", 2, b"\x03\x00")]}, "one of 3 pieces", id="a shard"),
        pytest.param({"keys": [key("general.alignment", 4, U32.pack(33))]}, "alignment is 33", id="odd alignment"),
        pytest.param({"keys": [key("general.alignment", 4, U32.pack(0))]}, "alignment is 0", id="no alignment"),
        pytest.param({"keys": [key("general.alignment", 8, text("x"))]}, "alignment is 'x'", id="alignment of text"),
        pytest.param({"tensors": [ONE], "data": 255}, r"w ends at byte \d+, the file has", id="truncated data"),
        pytest.param({"tensors": [ONE, ONE], "data": 512}, "lists 'w' twice", id="tensor twice"),
        pytest.param({"tensors": [ONE, listing("v", [32], 0, 128)], "data": 512}, "v overlaps w", id="overlap"),
        pytest.param({"tensors": [listing("w", [32], 0, 8)], "data": 512}, "multiple of 32 bytes", id="crooked offset"),
        pytest.param({"tensors": [listing("w", [32], 0, 2**63)], "data": 512}, "ends at byte", id="absurd offset"),
        pytest.param({"tensors": [listing("w", [2**40, 2**40])], "data": 512}, "ends at byte", id="absurd size"),
        pytest.param({"tensors": [listing("w", [2**63, 0])], "data": 512}, "impossible shape", id="zero dimension"),
        pytest.param({"tensors": [listing("w", [48, 2], 8)], "data": 512}, r"\[2, 48\] for Q8_0", id="half a block"),
        pytest.param({"tensors": [listing("w", [1] * 9)], "data": 512}, "9 dimensions", id="nine dimensions"),
        pytest.param({"tensors": [listing("w", [32], 77)], "data": 512}, "number type 77", id="unknown type"),
        pytest.param(
            {
                "tensors": [ONE],
                "keys": [key("comfy.gguf.orig_shape.w", 9, U32.pack(5) + U64.pack(2) + struct.pack("<ii", 8, 9))],
                "data": 512,
            },
            r"orig_shape\.w is \[8, 9\], the tensor has 64 numbers",
            id="another shape",
        ),
    ],
)
def test_broken_headers_are_named_in_bounded_memory(tmp_path: Path, parts: dict, says: str) -> None:
    path = raw_file(tmp_path / "m.gguf", **parts)
    tracemalloc.start()

    with pytest.raises(CheckpointError, match=says) as error:
        Checkpoint.open(path)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value)
    assert peak < 1_000_000


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF\x03\0\0\0", b"GGUF" + b"\0" * 19])
def test_a_stump_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)

    with pytest.raises(CheckpointError, match=f"a GGUF file of only {len(content)} bytes"):
        Checkpoint.open(tmp_path / "m.gguf")


def test_another_file_under_the_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"lmgg" + b"\0" * 40)

    with pytest.raises(CheckpointError, match="not a GGUF file, it begins with b'lmgg'"):
        Checkpoint.open(tmp_path / "m.gguf")


FUZZ_SEED = [
    [key("general.architecture", 8, text("lumina2")), key("general.alignment", 4, U32.pack(32))],
    [
        key("list", 9, U32.pack(5) + U64.pack(3) + b"\1\0\0\0" * 3),
        key("words", 9, U32.pack(8) + U64.pack(2) + text("a") * 2),
    ],
    [key("comfy.gguf.orig_shape.q", 9, U32.pack(5) + U64.pack(2) + struct.pack("<ii", 8, 64))],
]
FUZZ_TENSORS = [
    listing("q", [256, 2], 12, 0), listing("r", [32, 3], 8, 288), listing("norm", [32], 2, 416),
    listing("x_pad_token", [8], 24, 448), listing("f", [4, 2], 0, 480), listing("b", [8], 30, 512),
]  # fmt: skip
ABSURD = [0, 1, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def read_everything(content: bytes, folder: Path) -> bool:
    """Open and load; True when the file is taken. Anything but a CheckpointError is a bug and goes through."""
    path = folder / "fuzz.gguf"
    path.write_bytes(content)
    try:
        Checkpoint.open(path).load()
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017 - what is raised is what is under test
        return False
    return True


@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "300")), deadline=None)
@given(
    kept=st.lists(st.booleans(), min_size=len(FUZZ_SEED), max_size=len(FUZZ_SEED)),
    changes=st.lists(
        st.tuples(
            st.integers(0, 900),
            st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from(ABSURD).map(U64.pack)),
        ),
        max_size=4,
    ),
    cut=st.one_of(st.none(), st.integers(4, 1200)),
)
def test_whatever_is_broken_ends_in_a_named_error(
    kept: list[bool], changes: list[tuple[int, bytes]], cut: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        keys = [k for group, wanted in zip(FUZZ_SEED, kept, strict=True) if wanted for k in group]
        path = raw_file(Path(folder) / "seed.gguf", keys=keys, tensors=FUZZ_TENSORS, data=544)
        content = bytearray(path.read_bytes())
        for position, value in changes:
            content[4 + position : 4 + position + len(value)] = value

        taken = read_everything(bytes(content[:cut]), Path(folder))

        assert taken or changes or cut is not None, "an unbroken file is read"
