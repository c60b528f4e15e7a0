"""SVDQuant by nunchaku's engine: activations rounded to 4 bits, the low-rank branch fused into both of its kernels.

The engine reads tensors in the tiles that its files have (svdq_tiling.py): a weight that came in one piece is left as
it lies, others are joined or put back into tiles when the kernel is chosen. The package of that name on the package
index is a statistics library: the engine is known by its compiled module.

    INT4  compute capability 7.5 to 8.9: cores for 4-bit integers     FP4  12.0: cores for 4-bit floats

Source: nunchaku 3a3cc3d, ops/quantize.py, ops/gemm.py, models/linear.py; capabilities: utils.py and its documentation.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

from shared.quant.kernels import Kernel, register
from shared.quant.packing import Packed
from shared.quant.packings import svdq_tiles
from shared.quant.packings.svdq import Svdq

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shared.quant.linear import PackedLinear

CAPABILITIES = {"int4": ((7, 5), (8, 9)), "fp4": ((12, 0), (12, 1))}  # first and last


def engine_is_here() -> bool:
    """Whether the package called nunchaku is the engine."""
    spec = PathFinder.find_spec("nunchaku")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return bool(places) and PathFinder.find_spec("nunchaku._C", places) is not None


def _refuse(layer: PackedLinear, device: torch.device) -> str | None:
    import torch

    packing = layer.packing
    assert isinstance(packing, Svdq)
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, the device is {device.type}"
    found = torch.cuda.get_device_capability(device)
    first, last = CAPABILITIES[packing.kind]
    if not first <= found <= last:
        wanted = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
        return f"{packing.kind.upper()} needs compute capability {wanted}, this GPU has {found[0]}.{found[1]}"
    if layer.weight.dtype.itemsize != 2:
        return "takes activations of 16 bits"
    if not engine_is_here():
        return "the engine is not installed (wgp.py doctor says where it comes from)"
    return None


def _arrange(packed: Packed) -> Packed:
    assert isinstance(packed.packing, Svdq)
    if svdq_tiles.are_the_engine_s(packed.tensors):
        return packed
    tensors = svdq_tiles.for_the_engine(packed.tensors, has_row_scales=packed.packing.kind == "fp4")
    return Packed(packed.packing, packed.shape, tensors)


def _laid_out(layer: PackedLinear) -> bool:
    return svdq_tiles.are_the_engine_s(layer.packed.tensors)


def _run(layer: PackedLinear, x: Tensor) -> Tensor:
    from nunchaku.ops.gemm import svdq_gemm_w4a4_cuda  # type: ignore[import-not-found]
    from nunchaku.ops.quantize import svdq_quantize_w4a4_act_fuse_lora_cuda  # type: ignore[import-not-found]

    packed = _arrange(layer.packed)
    assert isinstance(packed.packing, Svdq)
    tensors, fp4 = packed.tensors, packed.packing.kind == "fp4"
    tokens = x.reshape(-1, layer.in_features).contiguous()
    rounded, scales_x, branch = svdq_quantize_w4a4_act_fuse_lora_cuda(
        tokens, lora_down=tensors["proj_down"].to(x.dtype), smooth=tensors["smooth_factor"].to(x.dtype), fp4=fp4
    )
    result = tokens.new_empty(len(tokens), layer.out_features)
    scales = tensors["wscales"].view(-1, layer.out_features)
    svdq_gemm_w4a4_cuda(
        act=rounded,
        wgt=tensors["qweight"],
        out=result,
        ascales=scales_x,
        wscales=scales.view(scales_x.dtype) if fp4 else scales.to(x.dtype),
        lora_act_in=branch,
        lora_up=tensors["proj_up"].to(x.dtype),
        fp4=fp4,
        wcscales=tensors["wcscales"].to(x.dtype) if "wcscales" in tensors else None,
    )
    if layer.bias is not None:
        result += layer.bias
    return result.view(*x.shape[:-1], layer.out_features)


register(
    Kernel(
        name="nunchaku", packing="svdq", compute="native", priority=30, refuse=_refuse, run=_run, arrange=_arrange,
        laid_out=_laid_out,
    )
)  # fmt: skip
