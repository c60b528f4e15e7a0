"""NVFP4 layers are found, read and written as comfy-kitchen does it, and what cannot be is named."""

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
from shared.quant.formats import Layer, format_of, layers_of, nvfp4, read_checked

Tensors = dict[str, torch.Tensor]

MODULE = "model.diffusion_model.layers.0.attention.out"


def gaussian(rows: int = 160, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02


def comfy_tensors(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """What comfy-kitchen saves for a weight, without any marker, and what it stands for."""
    quantized = QuantizedTensor.from_float(weight, "TensorCoreNVFP4Layout")
    state = {name.removeprefix("."): tensor for name, tensor in quantized.state_dict("weight").items()}
    return state, comfy_kitchen.dequantize_nvfp4(
        state["weight"], state["weight_scale_2"], state["weight_scale"], torch.float32
    )


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


def test_a_file_of_comfy_kitchen_is_read_exactly_from_names_and_types_alone(layer: Callable[..., Layer]) -> None:
    tensors, theirs = comfy_tensors(gaussian())

    found = layer(tensors)

    assert format_of(found) is nvfp4
    assert nvfp4.shape(found) == (160, 96)
    assert nvfp4.describe(found) == {"format": "nvfp4", "group": 16, "spelling": "ComfyUI"}
    assert torch.equal(nvfp4.read(found).dequantize(torch.float32), theirs)


@pytest.mark.parametrize("marker", [{"format": "nvfp4"}, {"format": "nvfp4", "params": {"group_size": 16}}])
def test_a_marker_tensor_is_followed(layer: Callable[..., Layer], marker: dict[str, object]) -> None:
    tensors, theirs = comfy_tensors(gaussian())

    found = layer(tensors | {"comfy_quant": json_bytes(marker)})

    assert format_of(found) is nvfp4
    assert torch.equal(nvfp4.read(found).dequantize(torch.float32), theirs)


@pytest.mark.parametrize("name", [MODULE, MODULE.removeprefix("model.diffusion_model.")])
@pytest.mark.parametrize("entry", ["nvfp4", {"format": "nvfp4", "group_size": 16}])
def test_the_headers_marker_is_followed(layer: Callable[..., Layer], name: str, entry: object) -> None:
    tensors, theirs = comfy_tensors(gaussian())

    found = layer(tensors, {"format_version": "1.0", "layers": {name: entry}})

    assert found.marker["format"] == "nvfp4"
    assert torch.equal(nvfp4.read(found).dequantize(torch.float32), theirs)


def test_padding_is_cut_off_as_the_marker_says(layer: Callable[..., Layer]) -> None:
    tensors, theirs = comfy_tensors(gaussian(130, 250))
    marker = json_bytes({"format": "nvfp4", "orig_shape": [130, 250]})

    found = layer(tensors | {"comfy_quant": marker})

    assert tensors["weight"].shape == (144, 128)
    assert nvfp4.shape(found) == (130, 250)
    assert torch.equal(nvfp4.read(found).dequantize(torch.float32), theirs[:130, :250])


def test_scales_for_activations_are_no_part_of_the_weight(layer: Callable[..., Layer]) -> None:
    tensors, theirs = comfy_tensors(gaussian())

    found = layer(tensors | {"input_scale": torch.tensor(0.123), "weight_scale_2": tensors["weight_scale_2"].view(1)})

    assert torch.equal(nvfp4.read(found).dequantize(torch.float32), theirs)


@pytest.mark.parametrize("calibrated", ["input_absmax", "alpha", None])
def test_lightx2v_spells_it_low_half_first(layer: Callable[..., Layer], calibrated: str | None) -> None:
    weight = gaussian()
    above = 2688 / weight.abs().amax()
    codes, stored = comfy_kitchen.quantize_nvfp4(weight, 1 / above, hi_first=False)
    theirs = comfy_kitchen.dequantize_nvfp4(codes, 1 / above, stored, torch.float32, hi_first=False)
    tensors = {"weight": codes, "weight_scale": stored}
    if calibrated == "alpha":
        tensors |= {"alpha": 1 / (above * 4), "input_global_scale": torch.tensor(4.0)}
    else:
        tensors |= {"weight_global_scale": above}
    if calibrated == "input_absmax":
        tensors |= {"input_absmax": torch.tensor(5.0)}

    found = layer(tensors)

    assert nvfp4.describe(found)["spelling"] == "LightX2V"
    assert torch.equal(nvfp4.read(found).dequantize(torch.float32), theirs)


@pytest.mark.parametrize(("rows", "columns"), [(160, 96), (130, 250), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_bytes_are_comfy_kitchens(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = gaussian(rows, columns).to(dtype)
    weight[0, :16] = 0
    weight[1, :16] = 1e-9

    ours = nvfp4.quantize(weight)

    codes, stored = comfy_kitchen.quantize_nvfp4(weight, ours["weight_scale_2"], pad_16x=True)
    torch.testing.assert_close(ours["weight_scale_2"], weight.float().abs().amax() / 2688, rtol=0, atol=0)
    assert torch.equal(ours["weight"], codes)
    assert torch.equal(ours["weight_scale"].view(torch.uint8), stored.view(torch.uint8))


def test_written_layers_are_read_back_with_the_known_error(layer: Callable[..., Layer]) -> None:
    weight = gaussian(250, 500)

    found = layer(nvfp4.quantize(weight))

    assert format_of(found) is nvfp4
    back = nvfp4.read(found).dequantize(torch.float32)
    assert back.shape == (250, 500)
    assert 0.09 < float((back - weight).norm() / weight.norm()) < 0.1, "4.2 of formats.md says 0.096"


def test_zeros_stay_zeros(layer: Callable[..., Layer]) -> None:
    found = layer(nvfp4.quantize(torch.zeros(16, 32)))

    assert not nvfp4.read(found).dequantize(torch.float32).any()


@pytest.mark.parametrize(
    "weight",
    [torch.full((16, 16), float("nan")), torch.full((16, 16), float("inf")), torch.zeros(16), torch.zeros(0, 16)],
    ids=["NaN", "infinity", "a vector", "nothing"],
)
def test_what_cannot_be_quantized_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(UserError, match="cannot be quantized"):
        nvfp4.quantize(weight)


def _nan_scale(tensors: Tensors) -> None:
    tensors["weight_scale"].view(torch.uint8)[3, 0] = 0x7F


def _negative_scale(tensors: Tensors) -> None:
    tensors["weight_scale"].view(torch.uint8)[3, 0] |= 0x80


def _marked(**entries: object) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update(comfy_quant=json_bytes({"format": "nvfp4", **entries}))


def _without(suffix: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(suffix)


def _with(suffix: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({suffix: tensor})


BAD: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no tensor scale": (_without("weight_scale_2"), "its weight_scale_2 is missing"),
    "two tensor scales": (_with("weight_scale_2", torch.ones(2)), r"weight_scale_2 is \[2\], expected one number"),
    "half a tensor scale": (_with("weight_scale_2", torch.ones((), dtype=torch.float16)), "is F16, expected F32"),
    "zero": (_with("weight_scale_2", torch.zeros(())), "weight_scale_2 is 0.0, expected a positive"),
    "negative": (_with("weight_scale_2", -torch.ones(())), "weight_scale_2 is -1.0, expected a positive"),
    "NaN": (_with("weight_scale_2", torch.tensor(float("nan"))), "weight_scale_2 is nan"),
    "infinity": (_with("weight_scale_2", torch.tensor(float("inf"))), "weight_scale_2 is inf"),
    "NaN in a block": (_nan_scale, "weight_scale holds NaN"),
    "negative block": (_negative_scale, "weight_scale holds NaN or negative"),
    "zero blocks": (lambda t: t["weight_scale"].view(torch.uint8).zero_(), "weight_scale is zero throughout"),
    "scales not padded": (
        lambda t: t.update(weight_scale=t["weight_scale"][:160]),
        r"weight_scale is \[160, 8\], expected \[256, 8\] for 160 x 96",
    ),
    "scales of another layer": (
        lambda t: t.update(weight_scale=torch.ones(256, 16).to(torch.float8_e4m3fn)),
        r"weight_scale is \[256, 16\]",
    ),
    "scales in a row": (lambda t: t.update(weight_scale=t["weight_scale"].flatten()), "expected 2 dimensions"),
    "half a block": (lambda t: t.update(weight=t["weight"][:, :47]), "no whole blocks of 16"),
    "no rows": (lambda t: t.update(weight=t["weight"][:0]), "has 0 rows"),
    "AWQ": (_with("pre_quant_scale", torch.ones(96)), "pre_quant_scale .AWQ., which this version does not apply"),
    "another group": (_marked(group_size=32), "group_size 32, the format has blocks of 16"),
    "an impossible original": (_marked(orig_shape=[161, 96]), r"orig_shape \[161, 96\], it holds 160 x 96"),
    "a far original": (_marked(orig_shape=[160, 64]), r"orig_shape \[160, 64\]"),
    "a senseless original": (_marked(orig_shape="wide"), "orig_shape 'wide'"),
    "marked, but plain": (
        lambda t: t.update(weight=torch.zeros(160, 96), comfy_quant=json_bytes({"format": "nvfp4"})),
        "weight is F32, expected U8",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_named_with_file_and_layer(layer: Callable[..., Layer], case: str) -> None:
    spoil, says = BAD[case]
    tensors, _ = comfy_tensors(gaussian())
    spoil(tensors)

    found = layer(tensors)

    assert format_of(found) is nvfp4
    with pytest.raises(CheckpointError, match=says) as error:
        read_checked(nvfp4, found)
    assert "m.safetensors" in str(error.value) and MODULE in str(error.value)


def test_a_marked_layer_without_scales_is_named(layer: Callable[..., Layer]) -> None:
    found = layer({"weight": torch.zeros(16, 8, dtype=torch.uint8), "comfy_quant": json_bytes({"format": "nvfp4"})})

    with pytest.raises(CheckpointError, match="its weight_scale is missing"):
        nvfp4.shape(found)
