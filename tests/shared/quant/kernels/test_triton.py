"""Triton's products: their numbers on its interpreter, and what they refuse, which needs no Triton."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.ops import triton_ready
from shared.quant import kernels
from shared.quant.kernels.scratch import Scratch
from shared.quant.linear import PackedLinear
from shared.quant.packing import Packed
from tests.shared.quant.kernels.conftest import (
    COLUMNS,
    ROWS,
    MakeLayer,
    pack_fp8,
    pack_int8,
    pack_nvfp4,
    pack_svdq,
    swizzled,
)
from tests.support.triton_process import needs_loops, needs_triton, run_interpreted

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@needs_triton
@needs_loops
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_products_agree_with_float64_on_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("triton_cases.py"))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with 8-bit integers and no 8-bit floats, on which Triton would run."""
    monkeypatch.setattr(triton_ready, "capability", lambda _device: 86)
    monkeypatch.setattr(triton_ready, "why_not", lambda _device: None)


def refusals(layer: PackedLinear, device: torch.device) -> dict[str, str | None]:
    found = kernels.available(layer.packing.name)
    return {k.name: k.refuse(layer, device) for k in found if k.name.startswith("triton")}


def test_without_a_gpu_each_says_so(make: MakeLayer) -> None:
    for packed in (pack_int8(), pack_fp8(), pack_nvfp4(), pack_svdq()):
        assert set(refusals(make(packed), CPU).values()) == {"needs an NVIDIA GPU, the device is cpu"}


@pytest.mark.usefixtures("card")
def test_what_a_card_without_8_bit_floats_can_do(make: MakeLayer) -> None:
    assert refusals(make(pack_fp8()), GPU) == {"triton-fp8": "needs compute capability 8.9"}
    assert refusals(make(pack_int8()), GPU) == {"triton-int8": None}
    for packed in (pack_nvfp4(2), swizzled(pack_nvfp4()), pack_svdq("int4"), pack_svdq("fp4")):
        assert refusals(make(packed), GPU) == {
            "triton-int8": None,
            "triton-fp8": "needs compute capability 8.9",
            "triton-expand": None,
        }


@pytest.mark.usefixtures("card")
def test_what_a_kernel_cannot_read_it_names(make: MakeLayer) -> None:
    packed = pack_int8()
    by_group = Packed(packed.packing, packed.shape, {**packed.tensors, "scale": torch.ones(ROWS, 4)})

    assert refusals(make(by_group), GPU) == {"triton-int8": "its scales change along a row"}
    assert refusals(make(packed.take_rows(0, 8)), GPU) == {"triton-int8": "8 x 256 is not a multiple of 16 both ways"}
    assert refusals(make(pack_fp8("e5m2")), GPU) == {"triton-fp8": "multiplies E4M3, this weight is E5M2"}


def test_rounded_tokens_are_taken_only_where_nothing_else_reads_them(make: MakeLayer) -> None:
    def named(layer: PackedLinear) -> PackedLinear:
        found = kernels.available(layer.packing.name)
        layer.use(next(k for k in found if k.name.startswith("triton")), CPU)
        return layer

    assert named(make(pack_int8())).takes(CPU) == "int8"
    assert named(make(pack_fp8())).takes(CPU) == "fp8"
    assert named(make(pack_nvfp4())).takes(CPU) == "int8"
    assert named(make(pack_int8(64))).takes(CPU) is None  # ConvRot turns them first
    assert named(make(pack_svdq())).takes(CPU) is None  # the branch wants them as they are
    assert make(pack_int8()).takes(CPU) is None  # multiplied by another kernel
    with_lora = named(make(pack_int8()))
    with_lora.register_forward_hook(lambda _module, _args, out: out)
    assert with_lora.takes(CPU) is None


def test_scratch_grows_to_the_largest_and_is_used_again() -> None:
    scratch = Scratch()

    small = scratch.take((4, 8), torch.int8, CPU)
    large = scratch.take((16, COLUMNS), torch.bfloat16, CPU)
    again = scratch.take((4, 8), torch.float32, CPU)

    assert (small.shape, large.shape, again.shape) == ((4, 8), (16, COLUMNS), (4, 8))
    assert scratch.nbytes == 2 * 16 * COLUMNS
    assert again.data_ptr() == large.data_ptr()
