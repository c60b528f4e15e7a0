"""GGUF files of our own writer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import quantize

from shared.quant import gguf_file
from shared.quant.checkpoint import Checkpoint


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    numbers = torch.randn(6, 64)
    blocks = torch.from_numpy(quantize(numbers.numpy(), GGMLQuantizationType.Q4_1))
    state = {"plain": numbers, "half": numbers.half(), "brain": numbers.bfloat16(), "norm.weight": numbers[0]}

    gguf_file.write(
        tmp_path / "m.gguf",
        {**state, "w.weight": gguf_file.Source("GGUF_Q4_1", (6, 64), lambda: blocks)},
        metadata={"general.name": "tiny"},
    )

    reader = GGUFReader(tmp_path / "m.gguf")
    theirs = {t.name: t for t in reader.tensors}
    assert reader.fields["general.architecture"].contents() == "lumina2"
    assert reader.fields["general.name"].contents() == "tiny"
    assert {n: t.tensor_type.name for n, t in theirs.items()} == {
        "plain": "F32", "half": "F16", "brain": "BF16", "norm.weight": "F32", "w.weight": "Q4_1",
    }  # fmt: skip
    assert [t.shape.tolist() for t in theirs.values()] == [[64, 6], [64, 6], [64, 6], [64], [64, 6]]
    assert all(theirs[n].data.tobytes() == t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in state.items())
    assert theirs["w.weight"].data.tobytes() == blocks.numpy().tobytes()
    assert torch.equal(Checkpoint.open(tmp_path / "m.gguf").load()["brain"], state["brain"])


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gguf_file.write(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def fail() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        gguf_file.write(path, {"a": torch.zeros(3), "b": gguf_file.Source("F32", (4,), fail)})

    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        pytest.param(torch.ones(3, dtype=torch.int64), "a is torch.int64", id="integers"),
        pytest.param(torch.tensor(1.0), "1 to 4 dimensions", id="scalar"),
        pytest.param(gguf_file.Source("GGUF_Q9", (4, 32), lambda: torch.ones(1)), "GGUF_Q9 is no type", id="type"),
        pytest.param(gguf_file.Source("GGUF_F32", (4, 32), lambda: torch.ones(1)), "GGUF_F32 is no type", id="plain"),
        pytest.param(gguf_file.Source("GGUF_Q8_0", (4, 33), lambda: torch.ones(1)), "rows of a multiple", id="columns"),
        pytest.param(gguf_file.Source("F32", (4, 32), lambda: torch.ones(1)), "of 4 bytes came", id="another size"),
        pytest.param(
            gguf_file.Source("F16", (4,), lambda: torch.ones(4).bfloat16()), "torch.bfloat16 of 8 bytes came", id="bf16"
        ),
    ],
)
def test_what_no_gguf_file_holds_is_refused_and_nothing_is_left(tmp_path: Path, tensor: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        gguf_file.write(tmp_path / "m.gguf", {"a": tensor})  # type: ignore[dict-item]

    assert not list(tmp_path.iterdir())
