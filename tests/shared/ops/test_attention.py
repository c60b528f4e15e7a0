"""Ways to compute attention: each gets its own layout, the fastest right one is taken, none in spite of a remedy."""

from __future__ import annotations

import sys
import time
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.ops import attention
from shared.ops.attention import BACKENDS, SDPA, Backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_and_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TOKENS", 32)
    attention.fastest.cache_clear()


def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    time.sleep(0.01)
    return attention.sdpa(q, k, v)


def by_tokens(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """As those packages want it: (B, S, H, E)."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize(
    ("name", "module", "function", "stand_in"),
    [
        ("flash", "flash_attn", "flash_attn_func", by_tokens),
        ("flash3", "flash_attn_interface", "flash_attn_func", lambda q, k, v: (by_tokens(q, k, v), None)),
        ("xformers", "xformers", "ops", None),
        ("sage", "sageattention", "sageattn", None),
        ("sage2", "sageattention", "sageattn", None),
    ],
)
def test_each_package_gets_the_layout_it_wants(
    name: str, module: str, function: str, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sageattn(q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, is_causal: bool) -> Tensor:
        assert (tensor_layout, is_causal) == ("HND", False)
        return attention.sdpa(q, k, v)

    package = ModuleType(module)
    if name == "xformers":
        stand_in = ModuleType("xformers.ops")
        stand_in.memory_efficient_attention = by_tokens  # type: ignore[attr-defined]
    setattr(package, function, stand_in or sageattn)
    monkeypatch.setitem(sys.modules, module, package)
    q, k, v = (torch.randn(2, 3, 5, 16) for _ in range(3))

    torch.testing.assert_close(BACKENDS[name].run(q, k, v), attention.sdpa(q, k, v))


def test_the_fastest_is_taken_and_the_times_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SDPA", sluggish := Backend("sdpa", slow))
    quick = Backend("quick", attention.sdpa)

    found = attention.fastest((sluggish, quick), CPU, torch.float32, 2, 16)

    assert found.backend is quick
    assert found.words.startswith("sdpa ") and " ms, quick " in found.words


def test_what_fails_or_is_wrong_is_passed_over_and_named() -> None:
    def fails(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor execution")

    def is_wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.full_like(q, float("nan"))

    found = attention.fastest((Backend("a", fails), Backend("b", is_wrong)), CPU, torch.float32, 2, 16)

    assert found.backend is SDPA
    assert "a fails (no kernel image is available)" in found.words
    assert "b gives wrong numbers (relative error nan)" in found.words


def test_those_that_round_are_known_as_such() -> None:
    assert {name for name, backend in BACKENDS.items() if backend.rounds} == {"sage", "sage2"}


def test_a_remedy_by_plain_products_is_seen() -> None:
    assert not attention.plain_is_wanted()
    with sdpa_kernel(SDPBackend.MATH):
        assert attention.plain_is_wanted()
