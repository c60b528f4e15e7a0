"""quanto int8 layers against optimum-quanto, both ways, and files that are wrong."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight
from torch import Tensor

from shared.quant.errors import CheckpointError, UnknownFormatError, UserError
from shared.quant.formats import format_of, quanto_int8, read_checked
from tests.support.packed_model import layer_of

State = dict[str, Tensor]


def quantos(weight: Tensor) -> State:
    """The tensors that optimum-quanto makes of a weight."""
    quantized = quantize_weight(weight, qint8, axis=0, scale=AbsmaxOptimizer()(weight, qint8, axis=0))
    one = torch.ones((), dtype=weight.dtype)
    return {
        "weight._data": quantized._data,
        "weight._scale": quantized._scale,
        "input_scale": one,
        "output_scale": one.clone(),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reads_what_quanto_dequantizes(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 64).to(dtype)
    weight[3] = 0
    tensors = quantos(weight)

    layer = layer_of(tmp_path / "q.safetensors", tensors)

    assert format_of(layer) is quanto_int8
    assert quanto_int8.shape(layer) == (24, 64)
    assert quanto_int8.describe(layer) == {"format": "quanto int8"}
    expected = tensors["weight._scale"] * tensors["weight._data"]
    assert torch.equal(quanto_int8.read(layer).dequantize(dtype), expected)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_for_all_rows_is_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = quantos(torch.randn(8, 16)) | {"weight._scale": torch.full(shape, 0.5)}
    tensors["input_scale"] = torch.ones(shape)  # as mmgp's reader and writer turn it

    packed = quanto_int8.read(layer_of(tmp_path / "q.safetensors", tensors))

    assert torch.equal(packed.dequantize(torch.float32), tensors["weight._data"] * 0.5)


def test_what_is_written_reads_back_within_the_documented_error(tmp_path: Path) -> None:
    weight = torch.randn(64, 384)
    weight[5] = 0

    tensors = quanto_int8.quantize(weight)
    packed = quanto_int8.read(layer_of(tmp_path / "q.safetensors", tensors))

    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        "weight._data": (torch.int8, (64, 384)),
        "weight._scale": (torch.bfloat16, (64, 1)),
        "input_scale": (torch.bfloat16, ()),
        "output_scale": (torch.bfloat16, ()),
    }
    assert (packed.dequantize(torch.float32) - weight).norm() / weight.norm() < 0.009
    assert not packed.dequantize(torch.float32)[5].any()


def test_the_header_says_what_mmgp_wants_to_know() -> None:
    header = quanto_int8.header(["a.b"], {"dim": 384})

    assert header["quantization_format"] == "quanto"
    decoded = {name: json.loads(base64.b64decode(header[name])) for name in header if name.endswith("_base64")}
    assert decoded == {
        "quantization_map_base64": {"a.b": {"weights": "qint8", "activations": "none"}},
        "config_base64": {"dim": 384},
    }


FAULTS: dict[str, tuple[Callable[[State], State], str]] = {
    "no scale": (lambda t: {"weight._data": t["weight._data"]}, r"blocks\.0: .*has no weight\._scale"),
    "NaN": (lambda t: t | {"weight._scale": t["weight._scale"] * torch.nan}, "NaN or infinity"),
    "infinite": (lambda t: t | {"weight._scale": t["weight._scale"] / 0}, "NaN or infinity"),
    "zero": (lambda t: t | {"weight._scale": t["weight._scale"] * 0}, "zero for 8 of 8 rows"),
    "another type": (
        lambda t: t | {"weight._scale": torch.ones(8, 1, dtype=torch.int32)},
        "is I32, expected one of F32",
    ),
    "too many scales": (lambda t: t | {"weight._scale": torch.ones(9, 1)}, r"is \[9, 1\], which fits no blocks"),
    "no scales": (lambda t: t | {"weight._scale": torch.ones(0, 1)}, r"is \[0, 1\], which fits no blocks"),
    "a vector": (lambda t: t | {"weight._data": torch.ones(8, dtype=torch.int8)}, r"\[8\], expected two dimensions"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_files_are_named(tmp_path: Path, fault: str) -> None:
    change, says = FAULTS[fault]
    layer = layer_of(tmp_path / "odd.safetensors", change(quantos(torch.randn(8, 16))))

    with pytest.raises(CheckpointError, match=says) as error:
        read_checked(quanto_int8, layer)

    assert "odd.safetensors" in str(error.value)


def test_other_quanto_types_are_not_taken_for_int8(tmp_path: Path) -> None:
    tensors = quantos(torch.randn(8, 16)) | {"weight._data": torch.ones(8, 8, dtype=torch.uint8)}

    with pytest.raises(UnknownFormatError, match=r"weight\._data is U8"):
        format_of(layer_of(tmp_path / "q.safetensors", tensors))


@pytest.mark.parametrize("weight", [torch.full((2, 4), torch.nan), torch.ones(4), torch.ones(0, 4)])
def test_what_cannot_be_quantized_is_refused(weight: Tensor) -> None:
    with pytest.raises(UserError, match="cannot be quantized"):
        quanto_int8.quantize(weight)
