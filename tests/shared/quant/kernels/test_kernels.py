"""Every kernel gives what the unpacked weight gives, but for the rounding it is for; those of GPUs by their stand-ins.

comfy-kitchen's operations run on its own CPU reference; nunchaku's, which have none, on a model of them written from
their documentation.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import comfy_kitchen
import pytest
import torch
from torch import Tensor

from shared.ops.rounding import round_rows
from shared.quant import kernels, svdq_tiling
from shared.quant.kernels import Kernel, comfy, torch_fp8
from shared.quant.linear import PackedLinear
from shared.quant.packing import Packed, join_rows
from shared.quant.packings.svdq import Svdq
from shared.quant.pieces import stack_rows
from shared.quant.stacked_linear import StackedLinear
from tests.shared.quant.kernels.conftest import (
    COLUMNS,
    ROWS,
    MakeLayer,
    pack_fp8,
    pack_int8,
    pack_mxfp8,
    pack_nvfp4,
    pack_svdq,
    swizzled,
)
from tests.shared.quant.packings.test_svdq import random_packed
from tests.shared.quant.packings.test_svdq_tiles import tiled
from tests.support.cpu_kernels import skip_where_cpus_lack

CPU = torch.device("cpu")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """comfy-kitchen's CPU reference in the place of its CUDA code; its 4-bit product, which has none, written out."""
    monkeypatch.setattr(comfy, "BACKEND", "eager")

    def scaled_mm_nvfp4(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, blocks_a: Tensor, blocks_b: Tensor, *, out_dtype: Any
    ) -> Tensor:
        left = comfy_kitchen.dequantize_nvfp4(a, scale_a, blocks_a, torch.float32)
        right = comfy_kitchen.dequantize_nvfp4(b, scale_b, blocks_b, torch.float32)
        return (left @ right.t()).to(out_dtype)

    def scaled_mm_mxfp8(a: Tensor, b: Tensor, blocks_a: Tensor, blocks_b: Tensor, *, out_dtype: Any) -> Tensor:
        left = comfy_kitchen.dequantize_mxfp8(a, blocks_a, torch.float32)
        right = comfy_kitchen.dequantize_mxfp8(b, blocks_b, torch.float32)
        return (left @ right.t()).to(out_dtype)

    monkeypatch.setattr(comfy_kitchen, "scaled_mm_nvfp4", scaled_mm_nvfp4)
    monkeypatch.setattr(comfy_kitchen, "scaled_mm_mxfp8", scaled_mm_mxfp8)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for nunchaku: reads the tiles by the file format's description, rounds nothing. Keeps its calls."""
    calls: list[dict[str, Any]] = []

    def quantize(x: Tensor, *, lora_down: Tensor, smooth: Tensor, fp4: bool) -> tuple[Tensor, Tensor, Tensor]:
        padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 256))
        down = svdq_tiling.DOWN.to_natural(lora_down, lora_down.shape[1], x.shape[1])
        branch = padded.float() @ down.float().t()
        divided = padded.float() / svdq_tiling.unpack_scales(smooth, x.shape[1], 1).flatten().float()
        scales = torch.empty(x.shape[1] // (16 if fp4 else 64), len(padded))
        return divided, scales.to(torch.float8_e4m3fn if fp4 else x.dtype), branch

    def gemm(*, act: Tensor, out: Tensor, lora_act_in: Tensor, fp4: bool, **tensors: Any) -> None:
        calls.append(tensors)
        kind = "fp4" if fp4 else "int4"
        rows, columns = out.shape[1], act.shape[1]
        scale = tensors["wcscales"]
        words = svdq_tiling.WORDS.to_natural(tensors["wgt"].view(torch.int32), rows, columns // 8)
        natural = {
            "codes": words.view(torch.uint8),
            "scales": svdq_tiling.unpack_scales(tensors["wscales"], rows, len(tensors["wscales"])),
            "row_scale": torch.ones(rows, 1) if scale is None else svdq_tiling.unpack_scales(scale, rows, 1).float(),
        }
        up = svdq_tiling.UP.to_natural(tensors["lora_up"], rows, lora_act_in.shape[1])
        product = act @ Svdq(kind).residual(natural, torch.float32).t() + lora_act_in @ up.float().t()
        out.copy_(product[: len(out)])

    for name, function in (
        ("nunchaku", None),
        ("nunchaku.ops", None),
        ("nunchaku.ops.quantize", ("svdq_quantize_w4a4_act_fuse_lora_cuda", quantize)),
        ("nunchaku.ops.gemm", ("svdq_gemm_w4a4_cuda", gemm)),
    ):
        module = ModuleType(name)
        if function is not None:
            setattr(module, *function)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def kernel_named(name: str, packing: str) -> Kernel:
    return next(k for k in kernels.available(packing) if k.name == name)


def error_of(layer: PackedLinear, name: str, x: Tensor) -> float:
    """Largest relative error of a token: what the kernel makes of it, against the weight unpacked in float32."""
    kernel = kernel_named(name, layer.packing.name)
    expected = x.double() @ layer.packed.dequantize(torch.float32).double().t()
    if layer.bias is not None:
        expected += layer.bias.double()
    layer.use(kernel, x.device)
    got = layer(x)
    assert got.dtype == x.dtype and got.shape == expected.shape
    norms = expected.norm(dim=-1)
    return float(((got.double() - expected).norm(dim=-1) / norms.where(norms > 0, 1)).max())


# Rounding to bfloat16 alone costs a token 0.2 to 0.4 %. int8 adds 0.8 %, E4M3 2.6 %, E2M1 in blocks 9 %, INT4 in groups
# of 64 12 %; the worst of 40 tokens may have a third more.
@pytest.mark.parametrize(
    ("name", "packed", "limit"),
    [
        pytest.param("scale-after", pack_int8, 0.005, id="int8"),
        pytest.param("scale-after", lambda: pack_int8(64), 0.008, id="int8 ConvRot"),
        pytest.param("scale-after", pack_fp8, 0.005, id="fp8"),
        pytest.param("scale-after", lambda: pack_fp8("e5m2", "whole"), 0.005, id="fp8 e5m2"),
        pytest.param("torch-int8", pack_int8, 0.012, id="torch-int8"),
        pytest.param("torch-int8", lambda: pack_int8(64), 0.014, id="torch-int8 ConvRot"),
        pytest.param("torch-fp8", pack_fp8, 0.04, id="torch-fp8"),
        pytest.param("torch-fp8", lambda: pack_fp8(scaled="whole"), 0.04, id="torch-fp8 one scale"),
        pytest.param("torch-fp8", lambda: pack_fp8(scaled="no"), 0.04, id="torch-fp8 no scale"),
        pytest.param("comfy-int8", pack_int8, 0.012, id="comfy-int8"),
        pytest.param("comfy-int8", lambda: pack_int8(64), 0.014, id="comfy-int8 ConvRot"),
        pytest.param("comfy-svdq", pack_svdq, 0.2, id="comfy-svdq"),
        pytest.param("comfy-mxfp8", pack_mxfp8, 0.04, id="comfy-mxfp8"),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_the_product_is_right(name: str, packed: Any, limit: float, make: MakeLayer, activations: Tensor) -> None:
    skip_where_cpus_lack(name)
    with_bias, without = make(packed()), make(packed(), bias=False)

    assert error_of(with_bias, name, activations) < limit
    assert error_of(without, name, activations[0, :1]) < limit


@pytest.mark.parametrize("packed", [pack_nvfp4, partial(pack_nvfp4, low_first=True), pack_mxfp8])
@pytest.mark.usefixtures("on_cpu")
def test_scales_lie_in_files_as_tensor_cores_read_them(packed: Any, make: MakeLayer) -> None:
    x = torch.randn(20, COLUMNS, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    in_rows, lying = make(packed()), make(swizzled(packed()))
    scales = lying.packed.tensors[lying.packing.scales]

    error = error_of(lying, f"comfy-{lying.packing.name}", x)

    assert error == error_of(in_rows, f"comfy-{lying.packing.name}", x) < 0.14
    assert lying.packed.tensors[lying.packing.scales] is scales, "scales were copied"


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.usefixtures("on_cpu")
def test_nvfp4_rows_that_lie_apart_are_multiplied_as_joined_ones(alike: bool) -> None:
    x = torch.randn(20, COLUMNS, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    first = swizzled(pack_nvfp4())
    scale = first.tensors["tensor_scale"] * (1 if alike else 2)
    parts = [first, Packed(first.packing, first.shape, {**first.tensors, "tensor_scale": scale})]
    joined, stacked = join_rows(parts), stack_rows(parts)
    assert joined is not None and stacked is not None
    kernel = kernel_named("comfy-nvfp4", "nvfp4")
    layers = [PackedLinear(joined, None, torch.bfloat16), StackedLinear(stacked, None, torch.bfloat16)]

    for layer in layers:
        layer.use(kernel, torch.device("cuda"))  # laid out at once, as for every GPU

    assert [len(layer.packed.tensors["tensor_scale"]) for layer in layers] == [1 if alike else 2 * ROWS] * 2
    expected, got = (kernel.run(layer, x) for layer in layers)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.usefixtures("on_cpu")
def test_nvfp4_times_nvfp4_is_right_also_for_joined_parts(parts: int, make: MakeLayer) -> None:
    # One tensor scale serves all tokens: they are of one size here, as behind a norm.
    x = torch.randn(20, COLUMNS, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)

    layer = make(pack_nvfp4(parts))

    assert error_of(layer, "comfy-nvfp4", x) < 0.14
    assert len(layer.packed.tensors["tensor_scale"]) == (1 if parts == 1 else ROWS)


@pytest.mark.parametrize("kind", ["int4", "fp4"])
def test_nunchaku_gets_its_tiles(kind: str, engine: list[dict[str, Any]], make: MakeLayer, activations: Tensor) -> None:
    assert error_of(make(pack_svdq(kind)), "nunchaku", activations) < 0.008
    (call,) = engine
    assert (call["wcscales"] is None) == (kind == "int4")


@pytest.mark.parametrize("kind", ["int4", "fp4"])
def test_nunchaku_reads_swapped_rows_of_a_file_without_a_copy(
    kind: str, engine: list[dict[str, Any]], activations: Tensor
) -> None:
    packed = tiled(random_packed(kind, 512, COLUMNS, 32))  # type: ignore[arg-type]
    halves = [packed.take_rows(256, 512), packed.take_rows(0, 256)]
    stacked, joined = stack_rows(halves), join_rows(halves)
    assert stacked is not None and joined is not None
    layer, nunchaku = StackedLinear(stacked, None, torch.bfloat16), kernel_named("nunchaku", "svdq")
    layer.use(nunchaku, torch.device("cuda"))

    y = nunchaku.run(layer, activations)

    kept = dict(layer.named_buffers())
    for name in ("qweight", "wscales", "proj_up"):
        storage = packed.tensors[name].untyped_storage().data_ptr()
        assert all(kept[f"{name}_{i}"].untyped_storage().data_ptr() == storage for i in range(2)), name
    other = PackedLinear(joined, None, torch.bfloat16)
    other.use(nunchaku, torch.device("cuda"))
    assert torch.equal(y, nunchaku.run(other, activations))
    assert len(engine) == 2 and ("wcscales_1" in kept) == (kind == "fp4")


@pytest.mark.parametrize("packed", [lambda: pack_nvfp4(2), pack_mxfp8, pack_svdq, lambda: pack_svdq("fp4")])
def test_a_weight_laid_out_for_a_kernel_is_the_same_weight(packed: Any, make: MakeLayer) -> None:
    before = packed()
    expected = before.dequantize(torch.float32)
    arranging = [k for k in kernels.available(before.packing.name) if k.arrange is not None]
    assert arranging

    for kernel in arranging:
        if kernel.name == "comfy-svdq" and before.packing.kind == "fp4":
            continue
        assert kernel.arrange is not None
        after = kernel.arrange(before)
        tolerance = 2**-8 * expected.abs().max() if "wcscales" in after.tensors else 0  # bfloat16 row scales
        torch.testing.assert_close(after.dequantize(torch.float32), expected, rtol=0, atol=float(tolerance))
        half = after.take_rows(32, 96)
        torch.testing.assert_close(half.dequantize(torch.float32), expected[32:96], rtol=0, atol=float(tolerance))
        layer = make(before)
        layer.use(kernel, torch.device("cuda"))
        assert set(layer.state_dict()) == {*after.tensors, "bias"}
        torch.testing.assert_close(layer.packed.dequantize(torch.float32), expected, rtol=0, atol=float(tolerance))


def test_float16_and_float32_are_left_to_kernels_that_can(make: MakeLayer) -> None:
    for dtype in (torch.float16, torch.float32):
        assert make(pack_int8(), dtype, "bf16").kernel(CPU).name == "dequantize"
    assert make(pack_int8(), torch.bfloat16, "bf16").kernel(CPU).name == "scale-after"


def test_fp16_sums_of_codes_would_overflow(make: MakeLayer) -> None:
    """The reason for the refusal above: the expanded weight does not."""
    layer = make(pack_int8(), torch.float16, bias=False)
    x = torch.full((1, COLUMNS), 30.0, dtype=torch.float16) * layer.packed.tensors["codes"][0].sign()

    assert layer(x).isfinite().all()
    assert not kernel_named("scale-after", "int8").run(layer, x).isfinite().all()


class Card:
    """A GPU that is none: what torch says of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], operations: tuple[str, ...]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        state = {"available": True, "capabilities": list(operations)}
        monkeypatch.setattr(comfy_kitchen, "list_backends", lambda: {"cuda": state})
        comfy._missing.cache_clear()


@pytest.mark.parametrize(
    ("name", "packed", "capability", "words"),
    [
        ("comfy-int8", pack_int8, (7, 0), "needs compute capability 7.5, this GPU has 7.0"),
        ("comfy-int8", pack_int8, (8, 6), "comfy-kitchen has no CUDA code for int8_linear here (it needs cuBLASLt 13)"),
        ("comfy-nvfp4", pack_nvfp4, (9, 0), "needs compute capability 10.0, this GPU has 9.0"),
        ("comfy-svdq", lambda: pack_svdq("fp4"), (12, 0), "multiplies INT4, this weight is FP4"),
        ("nunchaku", pack_svdq, (9, 0), "INT4 needs compute capability 7.5 to 8.9, this GPU has 9.0"),
        ("nunchaku", lambda: pack_svdq("fp4"), (8, 9), "FP4 needs compute capability 12.0 to 12.1, this GPU has 8.9"),
        ("torch-fp8", pack_fp8, (8, 6), "needs compute capability 8.9"),
        ("torch-fp8", lambda: pack_fp8("e5m2"), (8, 9), "multiplies E4M3, this weight is E5M2"),
        ("torch-int8", pack_int8, (7, 5), "needs compute capability 8.0"),
        ("torch-int8", pack_int8, (8, 0), None),
        ("torch-fp8", pack_fp8, (8, 9), None),
    ],
)
def test_what_a_card_lacks_is_said(
    name: str,
    packed: Any,
    capability: tuple[int, int],
    words: str | None,
    make: MakeLayer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Card(monkeypatch, capability, operations=())
    layer = make(packed())

    found = kernel_named(name, layer.packing.name).refuse(layer, torch.device("cuda"))

    comfy._missing.cache_clear()
    assert found == words


def test_a_package_that_is_not_the_engine_does_not_count(make: MakeLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, (8, 9), operations=())
    layer = make(pack_svdq())

    assert "engine is not installed" in str(kernel_named("nunchaku", "svdq").refuse(layer, torch.device("cuda")))


@pytest.mark.parametrize("name", ["torch-int8", "torch-fp8", "comfy-int8"])
def test_a_shape_that_a_card_cannot_multiply_is_refused(
    name: str, make: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(monkeypatch, (12, 0), operations=("int8_linear",))
    layer = make((pack_fp8 if name == "torch-fp8" else pack_int8)().take_rows(0, 4))

    assert "4 x 256 is not a multiple of" in str(
        kernel_named(name, layer.packing.name).refuse(layer, torch.device("cuda"))
    )


def test_scales_that_change_along_a_row_are_expanded(make: MakeLayer, activations: Tensor) -> None:
    packed = pack_int8()
    scale = packed.tensors["scale"].repeat(1, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    layer = make(Packed(packed.packing, packed.shape, {**packed.tensors, "scale": scale}))

    assert layer.kernel(CPU).name == "dequantize"
    assert layer(activations).shape == (2, 20, ROWS)


def test_the_library_is_held_to_its_fast_backend() -> None:
    """Without a GPU insisting fails, where the library itself would go on to its slow code in silence."""
    with pytest.raises(Exception, match="cuda"), comfy.insisted() if not torch.cuda.is_available() else nullcontext():
        raise RuntimeError("cuda is there: nothing to show")


def test_a_torch_without_scales_by_rows_on_cpus_is_passed_over(
    make: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_scale_only(*_args: Any, **_options: Any) -> Tensor:
        raise RuntimeError("Now _scaled_mm only supports per-tensor scaling for CPU backend.")

    monkeypatch.setattr(torch, "_scaled_mm", one_scale_only)
    torch_fp8._refusal_of_cpus.cache_clear()

    found = kernel_named("torch-fp8", "fp8").refuse(make(pack_fp8()), CPU)

    torch_fp8._refusal_of_cpus.cache_clear()
    assert found == f"torch {torch.__version__} has no scales by rows on CPUs"


def test_torch_fp8_takes_tokens_that_are_rounded_already(make: MakeLayer, activations: Tensor) -> None:
    skip_where_cpus_lack("torch-fp8")
    layer = make(pack_fp8())
    kernel = kernel_named("torch-fp8", "fp8")

    assert torch.equal(kernel.run(layer, round_rows(activations, "fp8")), kernel.run(layer, activations))
    assert kernel.takes(layer) is None  # a CPU gains nothing by it
