"""Bare FP8: what torch casts, whatever else of the file was cast along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.quant.errors import UnknownFormatError
from shared.quant.formats import format_of, fp8_plain
from tests.support.packed_model import layer_of, same_bytes

KINDS = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_torch_casts(tmp_path: Path, kind: str) -> None:
    weight = (torch.randn(24, 64) * 0.05).to(KINDS[kind])

    layer = layer_of(tmp_path / "f.safetensors", {"weight": weight, "bias": torch.randn(24).to(KINDS[kind])})

    assert format_of(layer) is fp8_plain
    assert fp8_plain.shape(layer) == (24, 64)
    assert fp8_plain.describe(layer) == {"format": f"FP8 {kind}"}
    assert torch.equal(fp8_plain.read(layer).dequantize(torch.float32), weight.float())


@pytest.mark.parametrize("tensors", [{"weight": torch.ones(8)}, {"bias": torch.ones(8)}], ids=["a norm", "a bias"])
def test_what_is_no_matrix_is_plain(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    layer = layer_of(tmp_path / "f.safetensors", {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()})

    assert format_of(layer) is None


def test_exotic_floats_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError, match="F8_E4M3FNUZ"):
        format_of(layer_of(tmp_path / "f.safetensors", {"weight": torch.ones(8, 8).to(torch.float8_e4m3fnuz)}))


@pytest.mark.parametrize("kind", KINDS)
def test_writes_what_torch_casts(kind: str) -> None:
    weight = torch.randn(8, 16)

    assert same_bytes(fp8_plain.quantize(weight, kind=kind)["weight"], weight.to(KINDS[kind]))
