"""MXFP8 layers are found, read and written as comfy-kitchen does it, told from scaled FP8, and faults are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import save_file

from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError, UserError
from shared.quant.formats import Layer, format_of, layers_of, mxfp8, read_checked

Tensors = dict[str, torch.Tensor]

MODULE = "layers.0.attention.out"


def gaussian(rows: int = 160, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02


def comfy_tensors(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """What comfy-kitchen saves for a weight, without any marker, and what it stands for."""
    quantized = QuantizedTensor.from_float(weight, "TensorCoreMXFP8Layout")
    state = quantized.state_dict("weight")
    return state, comfy_kitchen.dequantize_mxfp8(state["weight"], state["weight_scale"], torch.float32)


def json_bytes(marker: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)


@pytest.fixture
def layer(tmp_path: Path) -> Callable[..., Layer]:
    def write(tensors: Tensors, header: object = None) -> Layer:
        metadata = None if header is None else {"_quantization_metadata": json.dumps(header)}
        save_file({f"{MODULE}.{s}": t.contiguous() for s, t in tensors.items()}, tmp_path / "m.safetensors", metadata)
        checkpoint = Checkpoint.open(tmp_path / "m.safetensors")
        return layers_of(checkpoint, checkpoint.tensors)[MODULE]

    return write


@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8])
def test_a_file_of_comfy_kitchen_is_read_exactly_from_names_and_types_alone(
    layer: Callable[..., Layer], stored: torch.dtype
) -> None:
    tensors, theirs = comfy_tensors(gaussian())
    assert tensors["weight_scale"].dtype == torch.float8_e8m0fnu

    found = layer(tensors | {"weight_scale": tensors["weight_scale"].view(stored)})

    assert format_of(found) is mxfp8
    assert mxfp8.shape(found) == (160, 96)
    assert mxfp8.describe(found) == {"format": "mxfp8", "group": 32}
    assert torch.equal(mxfp8.read(found).dequantize(torch.float32), theirs)


@pytest.mark.parametrize("header", [False, True])
def test_markers_are_followed(layer: Callable[..., Layer], header: bool) -> None:
    tensors, theirs = comfy_tensors(gaussian())
    marker = {"format": "mxfp8", "group_size": 32}

    found = (
        layer(tensors, {"layers": {MODULE: marker}}) if header else layer(tensors | {"comfy_quant": json_bytes(marker)})
    )

    assert found.marker == marker
    assert torch.equal(mxfp8.read(found).dequantize(torch.float32), theirs)


@pytest.mark.parametrize("scale", [torch.ones(()), torch.ones(1), torch.ones(160, 1)])
def test_scaled_fp8_is_left_to_its_own_format(layer: Callable[..., Layer], scale: torch.Tensor) -> None:
    found = layer({"weight": gaussian().to(torch.float8_e4m3fn), "weight_scale": scale})

    assert not mxfp8.claims(found)


def test_padding_is_cut_off_as_the_marker_says(layer: Callable[..., Layer]) -> None:
    tensors, theirs = comfy_tensors(gaussian(130, 250))
    marker = json_bytes({"format": "mxfp8", "orig_shape": [130, 250]})

    found = layer(tensors | {"comfy_quant": marker})

    assert tensors["weight"].shape == (160, 256)
    assert mxfp8.shape(found) == (130, 250)
    assert torch.equal(mxfp8.read(found).dequantize(torch.float32), theirs[:130, :250])


def test_a_scale_for_activations_is_no_part_of_the_weight(layer: Callable[..., Layer]) -> None:
    tensors, theirs = comfy_tensors(gaussian())

    found = layer(tensors | {"input_scale": torch.tensor(0.123)})

    assert torch.equal(mxfp8.read(found).dequantize(torch.float32), theirs)


@pytest.mark.parametrize(("rows", "columns"), [(160, 96), (130, 250), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_bytes_are_comfy_kitchens(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = gaussian(rows, columns).to(dtype)
    weight[0, :32] = 0
    weight[1, :32] = 448 * 2.0**-20  # exactly a power of two away: rounds up to itself
    weight[2, :32] = -1e30

    ours = mxfp8.quantize(weight)

    values, stored = comfy_kitchen.quantize_mxfp8(weight, pad_32x=True)
    assert ours["weight_scale"].dtype == torch.uint8
    assert torch.equal(ours["weight_scale"], stored.view(torch.uint8))
    assert torch.equal(ours["weight"].view(torch.uint8), values.view(torch.uint8))


def test_the_largest_number_of_a_block_never_saturates() -> None:
    """A rounded logarithm takes 448 * (1 + 1e-7) for 448 and clips it; the exact one does not."""
    weight = torch.zeros(32, 32)
    weight[:, 0] = torch.tensor(448.0).nextafter(torch.tensor(500.0)) * 2.0 ** torch.arange(-16, 16)

    ours = mxfp8.quantize(weight)

    assert ours["weight"].float()[:, 0].tolist() == [224.0] * 32


def test_written_layers_are_read_back_with_the_known_error(layer: Callable[..., Layer]) -> None:
    weight = gaussian(250, 500)

    found = layer(mxfp8.quantize(weight))

    assert format_of(found) is mxfp8
    back = mxfp8.read(found).dequantize(torch.float32)
    assert back.shape == (250, 500)
    assert 0.025 < float((back - weight).norm() / weight.norm()) < 0.028, "4.2 of formats.md says 0.027"


def test_zeros_stay_zeros(layer: Callable[..., Layer]) -> None:
    found = layer(mxfp8.quantize(torch.zeros(32, 64)))

    assert not mxfp8.read(found).dequantize(torch.float32).any()


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(UserError, match="holds NaN or infinity"):
        mxfp8.quantize(torch.full((32, 32), float("nan")))


def _nan_scale(tensors: Tensors) -> None:
    tensors["weight_scale"].view(torch.uint8)[3, 0] = 255


def _with(suffix: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({suffix: tensor})


BAD: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "NaN": (_nan_scale, "weight_scale holds NaN"),
    "zeros": (lambda t: t["weight_scale"].view(torch.uint8).zero_(), "weight_scale is zero throughout"),
    "scales of another layer": (
        lambda t: t.update(weight_scale=torch.ones(128, 4, dtype=torch.uint8)),
        r"weight_scale is \[128, 4\], expected \[256, 4\] for 160 x 96",
    ),
    "one scale": (_with("weight_scale", torch.ones(1, dtype=torch.uint8)), "expected 2 dimensions"),
    "half a block": (lambda t: t.update(weight=t["weight"][:, :80]), "no whole blocks of 32"),
    "AWQ": (_with("pre_quant_scale", torch.ones(96)), "pre_quant_scale"),
    "another group": (_with("comfy_quant", json_bytes({"format": "mxfp8", "group_size": 16})), "blocks of 32"),
    "scaled FP8 under this name": (
        lambda t: t.update(comfy_quant=json_bytes({"format": "mxfp8"}), weight_scale=torch.ones(())),
        "weight_scale is F32, expected U8 or F8_E8M0",
    ),
    "the other FP8": (
        lambda t: t.update(comfy_quant=json_bytes({"format": "mxfp8"}), weight=t["weight"].view(torch.float8_e5m2)),
        "weight is F8_E5M2, expected F8_E4M3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_named_with_file_and_layer(layer: Callable[..., Layer], case: str) -> None:
    spoil, says = BAD[case]
    tensors, _ = comfy_tensors(gaussian())
    spoil(tensors)

    found = layer(tensors)

    assert format_of(found) is mxfp8
    with pytest.raises(CheckpointError, match=says) as error:
        read_checked(mxfp8, found)
    assert "m.safetensors" in str(error.value) and MODULE in str(error.value)
