"""Whatever an 8-bit layer looks like, it is read as finite numbers of the claimed shape or refused in words."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.quant.checkpoint import Checkpoint, TensorInfo
from shared.quant.errors import CheckpointError
from shared.quant.formats import Layer, comfy_int8, format_of, fp8_scaled, read_checked

DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64, "I8": torch.int8, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
SHAPES = [(8, 16), (8, 1), (8,), (), (1,), (1, 1), (2, 4), (8, 4, 1), (0, 1), (3, 5), (8, 0), (0, 16)]
NAMES = [
    ["weight", "weight_scale"], ["weight", "scale_weight", "scale_input"], ["weight._data", "weight._scale"],
    ["weight", "bias"], ["weight", "weight_scale", "input_scale", "bias"], ["weight_scale"],
]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, tuple[str, Tensor]]:
    """Tensors by suffix with their type in the file; sensible more often than not."""
    result = {}
    for suffix in draw(st.sampled_from(NAMES)):
        is_scale = "scale" in suffix
        likely = ["F32"] * 6 if is_scale else ["I8", "F8_E4M3", "F8_E5M2"] * 3
        dtype = draw(st.sampled_from(likely + list(DTYPES)))
        shape = draw(st.sampled_from(SHAPES if is_scale else [(8, 16)] * 12 + SHAPES))
        values = torch.full(shape, draw(st.sampled_from([0.5, -2.0, 0.0, 100.0])))
        if is_scale and values.numel():
            values.view(-1)[0] = draw(st.sampled_from([0.1] * 4 + [0.0, math.nan, math.inf]))
        result[suffix] = (dtype, values.to(DTYPES[dtype]))
    return result


markers = st.just({}) | st.fixed_dictionaries(
    {"format": st.sampled_from([*comfy_int8.FORMATS, *fp8_scaled.FORMATS, "int9", 5, None])},
    optional={
        "convrot": st.sampled_from([True, False, "yes"]),
        "convrot_groupsize": st.sampled_from([4, 16, 64, 256, 0, -4, 3, "all", None, 4.0]),
    },
)


@settings(max_examples=400, deadline=None)
@given(tensors(), markers)
def test_any_layer_is_read_or_refused_in_words(data: dict[str, tuple[str, Tensor]], marker: dict[str, Any]) -> None:
    file = Path("f.safetensors")
    checkpoint = SimpleNamespace(path=file, load=lambda names: {n: data[n.removeprefix("m.")][1] for n in names})
    infos = {
        suffix: TensorInfo(f"m.{suffix}", dtype, tuple(t.shape), t.numel() * t.element_size(), file, 0)
        for suffix, (dtype, t) in data.items()
    }
    layer = Layer(cast(Checkpoint, checkpoint), "m", infos, marker)
    try:
        claimed = format_of(layer)
        if claimed is None:
            return
        packed = read_checked(claimed, layer)
    except CheckpointError as error:
        assert str(error).startswith("f.safetensors: m")  # noqa: PT017 - either outcome is right
        return

    weight = packed.dequantize(torch.float32)
    assert tuple(weight.shape) == packed.shape == claimed.shape(layer)
    assert weight.isfinite().all()
