"""quanto int8, as optimum-quanto and mmgp (Wan2GP's `*_quanto_bf16_int8.safetensors`) save it.

    M.weight._data    I8    (out, in)   codes, -128..127
    M.weight._scale   BF16  (out, 1)    per row; W = _data * _scale
    M.bias            BF16  (out,)      if the layer has one
    M.input_scale, M.output_scale       scalars that quanto always writes; for quantized activations, which are off

Scalars are () or (1,). The header names the quantized modules in `quantization_map_base64`; tensors say the same, so
it is written for mmgp and not needed to read. Sources: formats.md 2; optimum-quanto 0.2.7, mmgp 3.8.2.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from shared.quant.formats import Layer
from shared.quant.formats.scales import check_scale, matrix_of, read_scale

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.packing import Packed

NAME = "quanto int8"
DATA, SCALE = "weight._data", "weight._scale"
SUFFIXES = frozenset({DATA, SCALE, "input_scale", "output_scale"})


def claims(layer: Layer) -> bool:
    return DATA in layer.tensors and layer.tensors[DATA].dtype == "I8"


def shape(layer: Layer) -> tuple[int, int]:
    found = layer.tensors[DATA].shape
    if len(found) != 2:
        raise layer.fail(f"{DATA} is {list(found)}, expected two dimensions.")
    return found[0], found[1]


def describe(layer: Layer) -> dict[str, Any]:
    return {"format": NAME}


def read(layer: Layer) -> Packed:
    from shared.quant.packings import int8

    shape(layer)
    codes = layer.load(DATA)[0]
    scale = read_scale(layer, SCALE, codes)
    return int8.pack(codes, scale)


def check(layer: Layer, packed: Packed) -> None:
    """Raises CheckpointError for scales that no weight can have."""
    check_scale(layer, SCALE, packed)


def quantize(weight: Tensor, *, scale_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """weight (out, in) as this format's tensors. scale_dtype: bfloat16 unless told, as in published files.

    Errors: see int8.quantize(). Raises UserError when the weight is no matrix of finite numbers.
    """
    import torch

    from shared.quant.packings import int8

    scale_dtype = scale_dtype or torch.bfloat16
    codes, scale = int8.quantize(matrix_of(weight), scale_dtype=scale_dtype)
    unused = {name: torch.ones((), dtype=scale_dtype) for name in ("input_scale", "output_scale")}
    return {DATA: codes, SCALE: scale, **unused}


def header(modules: Iterable[str], config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Metadata that mmgp needs to read a file. modules: paths of the quantized ones. config: of the model."""
    quantized = {"weights": "qint8", "activations": "none"}
    metadata = {"quantization_format": "quanto", "quantization_map_base64": _encode(dict.fromkeys(modules, quantized))}
    if config is not None:
        metadata["config_base64"] = _encode(config)
    return metadata


def _encode(value: Any) -> str:
    return base64.b64encode(json.dumps(value, ensure_ascii=False).encode()).decode()
