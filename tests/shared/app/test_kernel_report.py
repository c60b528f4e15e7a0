"""Every kind of packed weight is multiplied once; refusals keep their reasons, broken kernels are found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shared.app.kernel_report import PROBES, KernelChoice, Probe, kernel_choices
from shared.quant import kernels
from shared.quant.formats import nvfp4
from shared.quant.kernels import COMPUTES, Kernel

CPU = torch.device("cpu")
NVFP4 = tuple(probe for probe in PROBES if probe.label == "NVFP4")


@pytest.fixture(autouse=True)
def _own_kernels() -> Iterator[None]:
    """What a test registers is gone after it."""
    kernels.available("nvfp4")
    before = list(kernels._registry)
    yield
    kernels._registry[:] = before


def native(run: Callable[..., Any], refusal: str | None = None) -> Kernel:
    return Kernel(
        name="native-fp4",
        packing="nvfp4",
        compute="native",
        priority=50,
        refuse=lambda _l, _d: refusal,
        run=run,
        known=lambda _l, _d: "three times as fast on this device",
    )


def of_nvfp4() -> KernelChoice:
    (choice,) = kernel_choices(CPU, torch.bfloat16, NVFP4)
    return choice


def fail(*_: Any) -> Any:
    raise RuntimeError("no kernel image is available\nfor this device")


def test_every_packing_is_multiplied_rightly_on_a_cpu() -> None:
    choices = kernel_choices(CPU, torch.float32)

    assert [choice.label for choice in choices] == [probe.label for probe in PROBES]
    assert {choice.problem for choice in choices} == {""}
    assert all(choice.error is not None and choice.error < 1e-4 for choice in choices)
    assert {c.label: c.kernel for c in choices}["SVDQuant INT4"] == "compiled-bf16"


def test_a_refusal_is_told_with_its_reason() -> None:
    kernels.register(native(fail, "needs compute capability 10.0"))

    found = of_nvfp4()

    assert found.kernel.startswith("compiled-") and not found.problem
    assert ("native-fp4", "needs compute capability 10.0") in [(r.kernel, r.reason) for r in found.refused]


def test_a_kernel_that_accepts_comes_before_expanding() -> None:
    kernels.register(native(lambda layer, x: x @ layer.dequantize().to(x.dtype).t()))

    found = of_nvfp4()

    waiting = ("compiled-int8", "compiled-bf16", "dequantize")
    assert (found.kernel, found.waiting, found.expands) == ("native-fp4", waiting, False)
    assert found.reason == "three times as fast on this device"


def test_what_was_asked_for_is_what_is_told() -> None:
    asked = {compute: kernel_choices(CPU, torch.bfloat16, PROBES[:1], compute=compute)[0] for compute in COMPUTES[:4]}

    assert (asked["bf16"].kernel, asked["bf16"].expands) == ("scale-after", True)
    assert (asked["int8"].kernel, asked["int8"].expands) == ("torch-int8", False)
    assert asked["fp8"].kernel == "scale-after" and not asked["fp8"].problem


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (fail, "no kernel image is available"),
        (lambda layer, x: torch.zeros(x.shape[0], layer.out_features), "wrong"),
        (lambda layer, x: torch.full((x.shape[0], layer.out_features), torch.nan), "wrong"),
    ],
)
def test_a_chosen_kernel_that_does_not_work_is_found_out(run: Callable[..., Any], words: str) -> None:
    kernels.register(native(run))

    problem = of_nvfp4().problem

    assert words in problem and "\n" not in problem


def test_a_missing_library_is_a_problem_of_that_packing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_weight: torch.Tensor) -> Any:
        raise ImportError("No module named 'fancy'")

    monkeypatch.setattr(nvfp4, "quantize", missing)

    first, second = kernel_choices(CPU, torch.bfloat16, (*NVFP4, Probe(label="MXFP8", format="mxfp8")))

    assert "fancy" in first.problem and (first.kernel, first.error) == ("", None)
    assert second.problem == ""
