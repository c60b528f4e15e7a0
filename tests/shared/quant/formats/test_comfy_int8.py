"""ComfyUI's int8 layers against comfy-kitchen's layout, both ways, and files that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorWiseINT8Layout
from torch import Tensor

from shared.quant.errors import CheckpointError, UnknownFormatError, UserError
from shared.quant.formats import comfy_int8, format_of, marker_tensor, read_checked
from tests.support.packed_model import layer_of

State = dict[str, Tensor]
MARKER = {"format": "int8_tensorwise"}


def kitchens(weight: Tensor, **options: Any) -> tuple[State, Tensor]:
    """What comfy-kitchen saves of a weight, and what it dequantizes it to."""
    codes, params = TensorWiseINT8Layout.quantize(weight, **options)
    quantized = QuantizedTensor(codes, "TensorWiseINT8Layout", params)
    return quantized.state_dict("weight"), TensorWiseINT8Layout.dequantize(codes, params)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # theirs, ours, marker
    "tensor": ({}, {"per_row": False}, {}),
    "row": ({"per_channel": True}, {}, {"per_row": True}),
    "ConvRot": (
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"rotation": 64},
        {"convrot": True, "convrot_groupsize": 64},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("place", ["tensor", "nested", "header"])
def test_reads_what_comfy_kitchen_dequantizes(tmp_path: Path, variant: str, place: str) -> None:
    options, _, said = VARIANTS[variant]
    tensors, expected = kitchens(torch.randn(24, 128), **options)
    metadata = None
    if place == "tensor":
        tensors["comfy_quant"] = marker_tensor(MARKER | said)
    elif place == "nested":
        tensors["comfy_quant"] = marker_tensor(MARKER | {"params": said})
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {"blocks.0": MARKER | said}})}

    layer = layer_of(tmp_path / "c.safetensors", tensors, metadata)

    assert format_of(layer) is comfy_int8
    assert comfy_int8.shape(layer) == (24, 128)
    assert torch.equal(comfy_int8.read(layer).dequantize(torch.float32), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_writes_what_comfy_kitchen_writes(variant: str) -> None:
    theirs, ours, said = VARIANTS[variant]
    weight = torch.randn(24, 128)
    expected, _ = kitchens(weight, **theirs)

    tensors = comfy_int8.quantize(weight, **ours)

    marker = json.loads(bytes(tensors.pop("comfy_quant").tolist()))
    assert marker.items() >= (MARKER | said).items()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("options", "error"), [({}, 0.010), ({"per_row": False}, 0.013), ({"rotation": None}, 0.010)])
def test_what_is_written_reads_back_within_the_documented_error(
    tmp_path: Path, options: dict[str, Any], error: float
) -> None:
    weight = torch.randn(64, 384)

    packed = comfy_int8.read(layer_of(tmp_path / "c.safetensors", comfy_int8.quantize(weight, **options)))

    assert (packed.dequantize(torch.float32) - weight).norm() / weight.norm() < error


def test_rotation_spreads_an_outlier() -> None:
    weight = torch.randn(8, 256)
    weight[:, 7] = 60.0

    errors = []
    for rotation in (0, 256):
        tensors = comfy_int8.quantize(weight, rotation=rotation)
        scale = tensors["weight_scale"]
        errors.append(scale.mean())

    assert errors[1] < errors[0] / 4


def test_the_writer_chooses_the_largest_group_that_fits() -> None:
    sizes = [
        json.loads(bytes(comfy_int8.quantize(torch.randn(4, n), rotation=None)["comfy_quant"].tolist()))[
            "convrot_groupsize"
        ]
        for n in (3840, 384, 36)
    ]

    assert sizes == [256, 64, 4]


@pytest.mark.parametrize("options", [{"rotation": 256}, {"rotation": 64, "per_row": False}, {"rotation": 8}])
def test_impossible_rotations_are_not_written(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ConvRot needs"):
        comfy_int8.quantize(torch.randn(4, 384), **options)


def test_block_scales_are_read_by_their_shape(tmp_path: Path) -> None:
    codes, grid = torch.randint(-127, 128, (8, 12), dtype=torch.int8), torch.rand(2, 3) + 0.1
    marker = marker_tensor({"format": "int8_blockwise", "group_size": 4})
    tensors = {"weight": codes, "weight_scale": grid, "input_scale": torch.tensor(7.0), "comfy_quant": marker}

    weight = comfy_int8.read(layer_of(tmp_path / "c.safetensors", tensors)).dequantize(torch.float32)

    assert all(weight[n, k] == codes[n, k] * grid[n // 4, k // 4] for n in range(8) for k in range(12))


@pytest.mark.parametrize("suffix", ["weight_scale", "scale_weight"])
def test_without_a_marker_a_scale_beside_int8_is_enough(tmp_path: Path, suffix: str) -> None:
    tensors = {"weight": torch.ones(4, 8, dtype=torch.int8), suffix: torch.tensor(0.5)}

    layer = layer_of(tmp_path / "c.safetensors", tensors)

    assert format_of(layer) is comfy_int8
    assert comfy_int8.read(layer).dequantize(torch.float32).unique().tolist() == [0.5]


def marked(**entries: Any) -> Callable[[State], State]:
    return lambda tensors: tensors | {"comfy_quant": marker_tensor(MARKER | entries)}


FAULTS: dict[str, tuple[Callable[[State], State], str]] = {
    "no weight": (lambda t: {n: x for n, x in t.items() if n != "weight"}, "marked as int8 but has no weight"),
    "no scale": (lambda t: {n: x for n, x in t.items() if n != "weight_scale"}, "has no weight_scale"),
    "another type": (lambda t: t | {"weight": t["weight"].float()}, r"F32 \[8, 128\], expected I8"),
    "a vector": (lambda t: t | {"weight": t["weight"][0].clone()}, r"I8 \[128\], expected I8 with two dimensions"),
    "NaN": (lambda t: t | {"weight_scale": torch.full((8, 1), torch.nan)}, "NaN or infinity"),
    "zero": (lambda t: t | {"weight_scale": torch.zeros(())}, "zero for 8 of 8 rows"),
    "odd rotation": (marked(convrot=True, convrot_groupsize=32), "groups of 32 columns are impossible for 128"),
    "default rotation": (marked(convrot=True), "groups of 256 columns are impossible for 128"),
    "rotation in words": (marked(convrot=True, convrot_groupsize="all"), "convrot_groupsize is 'all', not a number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_files_are_named(tmp_path: Path, fault: str) -> None:
    change, says = FAULTS[fault]
    layer = layer_of(tmp_path / "odd.safetensors", change(comfy_int8.quantize(torch.randn(8, 128))))

    with pytest.raises(CheckpointError, match=says) as error:
        read_checked(comfy_int8, layer)

    assert str(error.value).startswith(f"{tmp_path / 'odd.safetensors'}: blocks.0: ")


def test_unknown_markers_are_quoted(tmp_path: Path) -> None:
    tensors = comfy_int8.quantize(torch.randn(8, 128)) | {"comfy_quant": marker_tensor({"format": "int9"})}

    with pytest.raises(UnknownFormatError, match="int9"):
        format_of(layer_of(tmp_path / "c.safetensors", tensors))


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be quantized"):
        comfy_int8.quantize(torch.full((2, 4), torch.inf))
