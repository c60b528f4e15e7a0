"""A model's kernels are chosen once, at load, and every choice can be told; what fails later says how to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.z_image import lora
from shared.quant import kernels
from shared.quant.errors import RunError, UserError
from shared.quant.kernels import Kernel, torch_int8
from shared.quant.kernels.resolve import resolve
from shared.quant.kernels.trial import try_out
from shared.quant.linear import PackedLinear
from tests.shared.quant.kernels.conftest import (
    COLUMNS,
    ROWS,
    MakeLayer,
    pack_fp8,
    pack_int8,
    pack_nvfp4,
)
from tests.support.cpu_kernels import skip_where_cpus_lack

CPU, GPU = torch.device("cpu"), torch.device("cuda")
VNNI = {"avx512_vnni": True}


@pytest.fixture(autouse=True)
def _own_kernels() -> Iterator[None]:
    """What a test registers is gone after it."""
    kernels.available("int8")
    before = list(kernels._registry)
    yield
    kernels._registry[:] = before


@pytest.fixture(autouse=True)
def _a_cpu_with_int8_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: VNNI)


@pytest.fixture
def _a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))


def expand(layer: PackedLinear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.packed.dequantize(x.dtype), layer.bias)


def fast(run: Callable[..., Any] = expand, refusal: str | None = None) -> Kernel:
    kernel = Kernel("fast", "nvfp4", "native", 99, lambda _l, _d: refusal, run)
    kernels.register(kernel)
    return kernel


@pytest.fixture
def _small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_int8, "_LARGE", ROWS)


@pytest.mark.usefixtures("_small_layers_count")
def test_each_layer_gets_its_kernel_and_the_report_says_why(make: MakeLayer) -> None:
    model = nn.ModuleList([make(pack_int8()), make(pack_int8()), make(pack_nvfp4()), nn.Linear(4, 4)])

    of_int8, of_nvfp4 = resolve([model], CPU)

    assert (of_int8.packing, of_int8.kernel, of_int8.compute, of_int8.layers) == ("int8", "torch-int8", "int8", 2)
    assert "avx512_vnni" in str(of_int8)
    assert (of_nvfp4.kernel, of_nvfp4.compute, of_nvfp4.layers) == ("compiled-int8", "int8", 1)
    assert [r.kernel for r in of_nvfp4.refusals] == ["comfy-nvfp4", "triton-int8", "triton-fp8"]
    assert {r.reason for r in of_nvfp4.refusals} == {"needs an NVIDIA GPU, the device is cpu"}
    assert "cpu: torch-int8" in repr(model[0])


def test_bf16_is_the_reference_and_rounds_no_activations(make: MakeLayer) -> None:
    (found,) = resolve([make(pack_int8())], CPU, "bf16")

    assert (found.kernel, found.compute) == ("scale-after", "bf16")
    assert ("torch-int8", "computes in int8, bf16 was asked for") in [(r.kernel, r.reason) for r in found.refusals]


def test_auto_keeps_float32_as_it_is(make: MakeLayer) -> None:
    (found,) = resolve([make(pack_int8(), torch.float32)], CPU)

    assert found.compute == "bf16"
    assert any("kept in float32" in r.reason for r in found.refusals)


def test_auto_takes_nothing_that_is_not_known_to_be_faster(make: MakeLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)

    for packed in (pack_int8(), pack_fp8()):
        (found,) = resolve([make(packed)], CPU)
        assert found.compute == "bf16"
        assert any("not known to be faster here" in r.reason for r in found.refusals)


def test_auto_expands_small_layers_where_rounding_costs_what_it_saves(make: MakeLayer) -> None:
    assert torch_int8._LARGE > COLUMNS
    (found,) = resolve([make(pack_int8())], CPU)

    assert (found.kernel, found.compute) == ("scale-after", "bf16")


def test_what_is_asked_for_is_taken_and_others_say_so(make: MakeLayer) -> None:
    skip_where_cpus_lack("torch-fp8")
    of_fp8, of_int8 = resolve([nn.ModuleList([make(pack_fp8()), make(pack_int8())])], CPU, "fp8")

    assert (of_fp8.kernel, of_fp8.reason) == ("torch-fp8", "asked for")
    assert of_int8.kernel == "scale-after"


def test_asking_for_what_no_layer_can_is_an_error_with_the_reasons(make: MakeLayer) -> None:
    with pytest.raises(UserError) as error:
        resolve([make(pack_nvfp4())], CPU, "native")

    assert str(error.value).startswith(
        "Nothing computes this model's packed weights in native on cpu: "
        "nvfp4: comfy-nvfp4 needs an NVIDIA GPU, the device is cpu."
    ), "kernels of other kinds could not have helped and have nothing to say"
    assert "--compute auto" in error.value.hint


def test_a_model_of_plain_weights_has_nothing_to_choose() -> None:
    assert resolve([nn.Linear(4, 4)], CPU, "int8") == ()


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda layer, x: x.new_zeros(*x.shape[:-1], layer.out_features), "wrong products here (relative error 1,"),
        (lambda layer, x: expand(layer, x) * torch.nan, "wrong products here (relative error nan,"),
        (lambda layer, x: x.no_such_thing, None),
    ],
)
def test_a_trial_finds_out_wrong_kernels(run: Callable[..., Any], reason: str | None, make: MakeLayer) -> None:
    layer = make(pack_nvfp4())

    if reason is None:  # a mistake in a kernel is none of the ways in which libraries fail
        with pytest.raises(AttributeError):
            try_out(fast(run), layer, CPU)
    else:
        assert reason in str(try_out(fast(run), layer, CPU)[0])


def test_a_trial_finds_out_failing_and_slow_kernels(make: MakeLayer) -> None:
    def fail(_layer: PackedLinear, _x: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    def dawdle(layer: PackedLinear, x: Tensor) -> Tensor:
        for _ in range(3):
            expand(layer, x)
        return expand(layer, x)

    layer = make(pack_nvfp4())

    assert try_out(fast(fail), layer, CPU)[0] == "fails here (no kernel image is available)"
    refusal, _ = try_out(fast(dawdle), layer, CPU)
    assert str(refusal).startswith("slower:") and "of compiled-bf16 on this device; --compute native takes it" in str(
        refusal
    )
    layer.compute = "native"
    assert try_out(fast(dawdle), layer, CPU)[0] is None, "asked for, it need not be faster"


@pytest.mark.usefixtures("_a_card")
def test_on_a_gpu_auto_goes_by_the_trial(make: MakeLayer) -> None:
    asked: list[str] = []

    def trial(answer: str | None) -> kernels.Trial:
        def run(kernel: Kernel, _layer: PackedLinear, _device: torch.device) -> tuple[str | None, str]:
            asked.append(kernel.name)
            return answer, "1 ms against 2 ms"

        return run

    fast()
    (passed,) = resolve([nn.ModuleList([make(pack_nvfp4()) for _ in range(3)])], GPU, trial=trial(None))
    assert (passed.kernel, passed.reason, asked) == ("fast", "1 ms against 2 ms", ["fast"]), (
        "layers alike are tried once"
    )

    (failed,) = resolve([make(pack_nvfp4())], GPU, trial=trial("slower: 3 ms against 2 ms"))
    assert failed.kernel == "dequantize"
    assert ("fast", "slower: 3 ms against 2 ms") in [(r.kernel, r.reason) for r in failed.refusals]


@pytest.mark.usefixtures("_a_card")
def test_a_layer_nobody_resolved_takes_no_untried_kernel(make: MakeLayer) -> None:
    fast()

    assert make(pack_nvfp4()).kernel(GPU).name == "dequantize"


def test_a_kernel_that_fails_in_a_forward_is_named_with_the_way_out(make: MakeLayer) -> None:
    def fail(_layer: PackedLinear, _x: Tensor) -> Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")

    layer = make(pack_nvfp4())
    layer.use(fast(fail), CPU)

    words = (
        f"fast failed on a nvfp4 layer of {ROWS} x {COLUMNS} with 3 tokens: CUBLAS_STATUS_NOT_SUPPORTED. --compute bf16"
    )
    with pytest.raises(RunError, match=words):
        layer(torch.zeros(3, COLUMNS, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes"
        ),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_a_full_memory_is_not_blamed_on_a_kernel(make: MakeLayer, error: Exception) -> None:
    def fill(_layer: PackedLinear, _x: Tensor) -> Tensor:
        raise error

    layer = make(pack_nvfp4())
    layer.use(fast(fill), CPU)

    with pytest.raises(type(error)) as raised:
        layer(torch.zeros(3, COLUMNS, dtype=torch.bfloat16))
    assert raised.value is error


@pytest.mark.parametrize(
    ("packed", "compute", "kernel"),
    [
        (pack_int8, "int8", "torch-int8"),
        (lambda: pack_int8(64), "int8", "torch-int8"),
        (pack_int8, "bf16", "scale-after"),
        (pack_fp8, "fp8", "torch-fp8"),
        (pack_fp8, "bf16", "scale-after"),
        (pack_nvfp4, "bf16", "compiled-bf16"),
        (pack_nvfp4, "int8", "compiled-int8"),
    ],
)
def test_a_lora_adds_the_same_on_every_kernel(
    packed: Any, compute: str, kernel: str, make: MakeLayer, tmp_path: Any
) -> None:
    skip_where_cpus_lack(kernel)
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, COLUMNS, generator=generator), torch.randn(ROWS, 4, generator=generator)
    name = "diffusion_model.layers.0.attention.out"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    layer = make(packed(), compute=compute)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attention": nn.ModuleDict({"out": layer})})])})
    (found,) = resolve([model], CPU, compute)
    x = torch.randn(5, COLUMNS, generator=generator).to(torch.bfloat16)
    without = layer(x)

    lora.apply(model, [lora.read(tmp_path / "lora.safetensors")], [0.5])
    added = (layer(x) - without).float()

    assert found.kernel == kernel
    expected = 0.5 * (x.float() @ down.t() @ up.t())
    assert (added - expected).norm() / expected.norm() < 0.01  # bfloat16 sums
    lora.apply(model, [], [])
    assert torch.equal(layer(x), without)


def test_a_kernel_that_must_prove_itself_is_taken_after_a_trial_only(make: MakeLayer) -> None:
    kernels.register(Kernel("new", "nvfp4", "bf16", 99, lambda _l, _d: None, expand, tried=True))
    layer = make(pack_nvfp4(), compute="bf16")

    untried, won = kernels.select(layer, CPU), kernels.select(layer, CPU, lambda _k, _l, _d: (None, "it won"))
    lost = kernels.select(layer, CPU, lambda _k, _l, _d: ("slower", ""))

    assert (untried.kernel.name, won.kernel.name, lost.kernel.name) == ("compiled-bf16", "new", "compiled-bf16")
    assert won.reason == "it won"
    assert "not tried on this device" in [r.reason for r in untried.refusals if r.kernel == "new"]


@pytest.mark.parametrize("compute", ["auto", "bf16", "int8"])
def test_a_kernel_that_must_prove_itself_must_be_faster_whatever_was_asked(make: MakeLayer, compute: str) -> None:
    def slowly(layer: PackedLinear, x: Tensor) -> Tensor:
        for _ in range(20):
            result = expand(layer, x)
        return result

    refusal, _ = try_out(
        Kernel("new", "nvfp4", "bf16", 99, lambda _l, _d: None, slowly, tried=True),
        make(pack_nvfp4(), compute=compute),
        CPU,
    )

    assert refusal is not None and refusal.startswith("slower: ") and "--compute" not in refusal


def test_all_layers_of_a_model_expand_into_the_same_memory(make: MakeLayer) -> None:
    layers = [make(pack_nvfp4()), make(pack_int8())]

    resolve(layers, CPU)

    assert layers[0].scratch is layers[1].scratch
