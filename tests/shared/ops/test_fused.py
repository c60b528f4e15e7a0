"""Triton's operations: their numbers on its interpreter, and when they stand in for torch's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from shared import ops
from shared.ops import eager, triton_ready
from tests.support.triton_process import needs_triton, run_interpreted

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    triton_ready._why_not_on_card.cache_clear()
    ops._on_gpu.cache_clear()


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_operations_agree_with_their_eager_twins_on_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("triton_cases.py"))


def test_a_cpu_and_gradients_are_served_by_torch() -> None:
    x = torch.zeros(1, 2, 4)

    assert ops.implementation(x) is eager
    assert "needs an NVIDIA GPU" in str(triton_ready.why_not(CPU))


def test_a_card_without_triton_is_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    assert triton_ready.why_not(GPU) == "the package triton is not installed"
    assert ops._on_gpu(GPU) is eager


def test_an_old_card_is_told_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))

    assert triton_ready.why_not(GPU) == "needs compute capability 8.0, this GPU has 7.5"


def test_a_triton_that_does_not_work_is_found_once_and_its_fault_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def trial(device: torch.device) -> str:
        tried.append(device)
        return "Triton does not work here (no C compiler)"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(triton_ready, "_trial", trial)

    reasons = {triton_ready.why_not(GPU) for _ in range(3)}

    assert reasons == {"Triton does not work here (no C compiler)"}
    assert tried == [GPU]


def test_triton_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(triton_ready.SWITCH, "0")

    assert triton_ready.why_not(GPU) == "turned off by ZIMAGE_TRITON=0"
