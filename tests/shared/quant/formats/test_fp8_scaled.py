"""Scaled FP8 layers in every spelling against comfy-kitchen's layout, and files that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout
from safetensors.torch import save_file
from torch import Tensor

from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError, UnknownFormatError, UserError
from shared.quant.formats import format_of, fp8_scaled, layers_of, marker_tensor, read_checked
from shared.quant.mapping import is_mapped
from tests.support.packed_model import layer_of

State = dict[str, Tensor]
KINDS = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def kitchens(weight: Tensor, kind: str) -> tuple[State, Tensor]:
    """What comfy-kitchen saves of a weight, and what it dequantizes it to."""
    codes, params = TensorCoreFP8Layout.quantize(weight, dtype=KINDS[kind])
    quantized = QuantizedTensor(codes, "TensorCoreFP8Layout", params)
    return quantized.state_dict("weight"), TensorCoreFP8Layout.dequantize(codes, params)


def marker_as(place: str, tensors: State, said: Any) -> tuple[State, dict[str, str] | None]:
    if place == "tensor":
        return tensors | {"comfy_quant": marker_tensor(said)}, None
    if place == "legacy":
        return {
            "weight": tensors["weight"],
            "scale_weight": tensors["weight_scale"],
            "scale_input": torch.ones(()),
        }, None
    if place == "names":
        return tensors, None
    entry = said["format"] if place == "header, a bare word" else said
    return tensors, {"_quantization_metadata": json.dumps({"layers": {"blocks.0": entry}})}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["tensor", "header", "header, a bare word", "names", "legacy"])
def test_reads_what_comfy_kitchen_dequantizes(tmp_path: Path, kind: str, place: str) -> None:
    tensors, expected = kitchens(torch.randn(24, 64), kind)

    layer = layer_of(tmp_path / "f.safetensors", *marker_as(place, tensors, {"format": f"float8_{kind}"}))

    assert format_of(layer) is fp8_scaled
    assert fp8_scaled.shape(layer) == (24, 64)
    assert fp8_scaled.describe(layer) == {"format": f"FP8 scaled {kind}"}
    assert torch.equal(fp8_scaled.read(layer).dequantize(torch.float32), expected)


def test_the_scale_of_activations_is_no_part_of_the_weight(tmp_path: Path) -> None:
    tensors, expected = kitchens(torch.randn(24, 64), "e4m3fn")

    layer = layer_of(tmp_path / "f.safetensors", tensors | {"input_scale": torch.tensor(3.0)})

    packed = fp8_scaled.read(layer)
    assert packed.tensors.keys() == {"codes", "scale"}
    assert torch.equal(packed.dequantize(torch.float32), expected)


SCALES: dict[str, tuple[Tensor, Callable[[int, int], tuple[int, ...]]]] = {  # scales, and where W[n, k] finds its own
    "one in a row": (torch.tensor([0.5]), lambda n, k: (0,)),
    "rows": (torch.rand(8) + 0.1, lambda n, k: (n,)),
    "rows, upright": (torch.rand(8, 1) + 0.1, lambda n, k: (n, 0)),
    "blocks": (torch.rand(2, 3) + 0.1, lambda n, k: (n // 4, k // 4)),
    "groups of a row": (torch.rand(8, 3, 1) + 0.1, lambda n, k: (n, k // 4, 0)),
    "bfloat16": (torch.rand(8).bfloat16() + 0.1, lambda n, k: (n,)),
}


@pytest.mark.parametrize("shape", SCALES)
def test_scales_of_every_shape_find_their_numbers(tmp_path: Path, shape: str) -> None:
    scale, place = SCALES[shape]
    codes = torch.randn(8, 12).to(torch.float8_e4m3fn)

    layer = layer_of(tmp_path / "f.safetensors", {"weight": codes, "weight_scale": scale})

    weight = fp8_scaled.read(layer).dequantize(torch.float32)
    assert all(weight[n, k] == codes[n, k].float() * scale[place(n, k)].float() for n in range(8) for k in range(12))


@pytest.mark.parametrize(
    ("options", "marker", "error"),
    [
        ({}, {"format": "float8_e4m3fn"}, 0.029),
        ({"kind": "e5m2"}, {"format": "float8_e5m2"}, 0.057),
        ({"per_row": True}, {"format": "float8_e4m3fn_rowwise"}, 0.029),
        ({"block": 32}, {"format": "float8_e4m3fn_blockwise", "group_size": 32}, 0.029),
        ({"legacy": True}, None, 0.029),
    ],
)
def test_what_is_written_reads_back_within_the_documented_error(
    tmp_path: Path, options: dict[str, Any], marker: dict[str, Any] | None, error: float
) -> None:
    weight = torch.randn(64, 384) * 0.02

    tensors = fp8_scaled.quantize(weight, **options)

    assert ("comfy_quant" in tensors) == (marker is not None)
    if marker is not None:
        assert json.loads(bytes(tensors["comfy_quant"].tolist())) == marker
    packed = fp8_scaled.read(layer_of(tmp_path / "f.safetensors", tensors))
    assert (packed.dequantize(torch.float32) - weight).norm() / weight.norm() < error


def test_scales_of_blocks_are_read_without_a_copy(tmp_path: Path) -> None:
    layer = layer_of(tmp_path / "f.safetensors", fp8_scaled.quantize(torch.randn(64, 384), block=32))

    packed = fp8_scaled.read(layer)

    assert packed.tensors["scale"].shape == (2, 12)
    assert all(is_mapped(tensor) for tensor in packed.tensors.values())


def test_zeros_stay_zeros(tmp_path: Path) -> None:
    for options in ({}, {"per_row": True}, {"block": 4}):
        packed = fp8_scaled.read(
            layer_of(tmp_path / "f.safetensors", fp8_scaled.quantize(torch.zeros(8, 8), **options))
        )
        assert not packed.dequantize(torch.float32).any()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_mark_of_a_whole_file_belongs_to_no_layer(tmp_path: Path, prefix: str) -> None:
    state = fp8_scaled.file_marker() | {
        f"b.{n}": t for n, t in fp8_scaled.quantize(torch.ones(2, 4), legacy=True).items()
    }
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "f.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "f.safetensors")

    assert layers_of(checkpoint, checkpoint.tensors).keys() == {f"{prefix}b"}


@pytest.mark.parametrize("options", [{"block": 5}, {"kind": "e5m2", "per_row": True}])
def test_what_no_file_can_hold_is_not_written(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"do not divide|no file format has"):
        fp8_scaled.quantize(torch.randn(8, 8), **options)


FAULTS: dict[str, tuple[Callable[[State], State], str]] = {
    "no weight": (lambda t: {n: x for n, x in t.items() if n != "weight"}, "marked as FP8 but has no weight"),
    "no scale": (lambda t: {n: x for n, x in t.items() if n != "weight_scale"}, "has no weight_scale"),
    "another type": (lambda t: t | {"weight": t["weight"].to(torch.int8)}, r"I8 \[8, 16\], expected F8_E4M3 or"),
    "a vector": (lambda t: t | {"weight": t["weight"][0].clone()}, r"\[16\], expected .* two dimensions"),
    "exponents": (lambda t: t | {"weight_scale": torch.ones(8, 1, dtype=torch.uint8)}, "weight_scale is U8, expected"),
    "NaN": (lambda t: t | {"weight_scale": torch.tensor(torch.nan)}, "NaN or infinity"),
    "zero": (lambda t: t | {"weight_scale": torch.zeros(())}, "zero for 8 of 8 rows"),
    "one zero": (lambda t: t | {"weight_scale": torch.arange(8.0)}, "zero for 1 of 8 rows"),
    "odd blocks": (lambda t: t | {"weight_scale": torch.ones(3, 4)}, r"is \[3, 4\], which fits no blocks"),
    "rotated": (
        lambda t: t | {"comfy_quant": marker_tensor({"format": "float8_e4m3fn", "convrot": True})},
        "rotated FP8 weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_files_are_named(tmp_path: Path, fault: str) -> None:
    change, says = FAULTS[fault]
    layer = layer_of(tmp_path / "odd.safetensors", change(fp8_scaled.quantize(torch.randn(8, 16))))
    assert format_of(layer) is fp8_scaled

    with pytest.raises(CheckpointError, match=says) as error:
        read_checked(fp8_scaled, layer)

    assert str(error.value).startswith(f"{tmp_path / 'odd.safetensors'}: blocks.0: ")


def test_unknown_markers_are_quoted(tmp_path: Path) -> None:
    tensors = fp8_scaled.quantize(torch.randn(8, 16)) | {"comfy_quant": marker_tensor({"format": "float8_e3m4"})}

    with pytest.raises(UnknownFormatError, match="float8_e3m4"):
        format_of(layer_of(tmp_path / "f.safetensors", tensors))


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be quantized"):
        fp8_scaled.quantize(torch.full((2, 4), torch.nan))
