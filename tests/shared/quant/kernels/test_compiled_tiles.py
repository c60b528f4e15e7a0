"""Compiled code puts nunchaku's tiles in order as torch does, and unpacks them as it unpacks codes in order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared.ops import compiled_ready
from shared.quant import svdq_tiling as tiling
from shared.quant.checkpoint import Checkpoint
from shared.quant.formats import layers_of, svdq
from shared.quant.kernels.compiled_expand import expand
from shared.quant.kernels.resolve import resolve
from shared.quant.kernels.svdq import in_order
from shared.quant.linear import PackedLinear
from shared.quant.mapping import is_mapped
from shared.quant.packing import Packed, join_rows
from shared.quant.packings import svdq_tiles
from shared.quant.packings.svdq import Kind
from tests.shared.quant.packings.test_svdq import KINDS, random_packed
from tests.shared.quant.packings.test_svdq_tiles import tiled

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(compiled_ready.why_not() is not None, reason="nothing is compiled here")


def in_two_pieces(kind: Kind, rows: int = 640, columns: int = 1152) -> Packed:
    """Neither side a multiple of what is unpacked at once."""
    whole = tiled(random_packed(kind, rows, columns, 32))
    joined = join_rows([whole.take_rows(256, rows), whole.take_rows(0, 256)])
    assert joined is not None
    return joined


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_put_in_order_as_torch_does(kind: Kind, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = in_two_pieces(kind)
    with monkeypatch.context() as context:
        context.setattr(tiling, "_COMPILED_FROM", 2**60)
        expected = svdq_tiles.in_order(packed.tensors)
    monkeypatch.setattr(tiling, "_COMPILED_FROM", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    found = svdq_tiles.in_order(packed.tensors)

    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_unpacked_to_what_codes_in_order_are(kind: Kind, dtype: torch.dtype) -> None:
    packed = in_two_pieces(kind)
    found, expected = (torch.empty(packed.shape, dtype=dtype) for _ in range(2))

    scales, expected_scales = expand(packed, found), expand(in_order(packed), expected)

    if scales is None:
        assert torch.equal(found, expected)
        return
    # A code in the middle between two may go either way: compiled_rows.py leaves the order of two products open.
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    apart = (found.int() - expected.int()).abs()
    assert int(apart.max()) <= 1 and float(apart.float().mean()) < 1e-3


def layer_of_a_file(path: Path, packed: Packed) -> Packed:
    save_file({f"layers.0.attention.to_out.0.{suffix}": t for suffix, t in svdq.pack(packed).items()}, path)
    checkpoint = Checkpoint.open(path)
    return svdq.read(layers_of(checkpoint, checkpoint.tensors)["layers.0.attention.to_out.0"])


@pytest.mark.parametrize("compute", ["bf16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_codes_stay_in_the_file_and_the_branch_is_put_in_order_when_used(
    tmp_path: Path, kind: Kind, compute: str
) -> None:
    natural = random_packed(kind, 256, 384, 32)
    layer = PackedLinear(layer_of_a_file(tmp_path / "svdq.safetensors", natural), None, torch.bfloat16)
    other = PackedLinear(natural, None, torch.bfloat16)
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(0)).bfloat16()

    for one in (layer, other):
        (found,) = resolve([nn.ModuleList([one])], CPU, compute)
        assert found.kernel == f"compiled-{compute}"
    large = ("qweight", "wscales", "proj_down", "proj_up")
    assert all(is_mapped(layer.packed.tensors[name]) for name in large), "choosing a kernel reads no weight"
    with torch.inference_mode():
        assert torch.equal(layer(x), other(x))
    kept = layer.packed.tensors
    assert is_mapped(kept["qweight"]) and is_mapped(kept["wscales"])
    assert not any(is_mapped(kept[name]) for name in ("smooth", "down", "up")) and "proj_down" not in kept


@pytest.mark.parametrize("kind", KINDS)
def test_without_compiled_code_the_weight_is_put_in_order_when_used(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_ready, "why_not", lambda: "for this test")
    natural = random_packed(kind, 256, 384, 32)
    layer = PackedLinear(layer_of_a_file(tmp_path / "svdq.safetensors", natural), None, torch.bfloat16)
    other = PackedLinear(natural, None, torch.bfloat16)
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(0)).bfloat16()

    (found,) = resolve([nn.ModuleList([layer])], CPU, "bf16")

    assert found.kernel == "svdq-split" and is_mapped(layer.packed.tensors["qweight"])
    assert torch.equal(layer(x), other(x))
    assert not svdq_tiles.are_tiles(layer.packed.tensors)


def test_codes_of_another_size_than_the_packing_says_are_not_read() -> None:
    packed = in_two_pieces("int4")
    short = Packed(packed.packing, packed.shape, {**packed.tensors, "qweight_1": packed.tensors["qweight_1"][:128]})

    with pytest.raises(ValueError, match="not of the sizes"):
        expand(short, torch.empty(packed.shape))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what is in memory")
def test_what_was_put_in_order_leaves_memory_though_somebody_holds_the_file_s_tensors(tmp_path: Path) -> None:
    packed = layer_of_a_file(tmp_path / "svdq.safetensors", random_packed("int4", 2048, 1024, 256))
    layer = PackedLinear(packed, None, torch.bfloat16, compute="int8")

    layer(torch.randn(1, 1024).bfloat16())

    assert pages_in_memory(packed.tensors["proj_up"]) == 0 < pages_in_memory(packed.tensors["qweight"])
    assert torch.equal(tiling.up_in_order([packed.tensors["proj_up"]]), layer.packed.tensors["up"]), (
        "it can be read again"
    )


def pages_in_memory(tensor: torch.Tensor) -> int:
    """KiB of the pages around a mapped tensor that are this process's now."""
    address, found = tensor.data_ptr(), None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, last = (int(end, 16) for end in words[0].split("-"))
            found = first <= address < last
        elif found and words[0] == "Rss:":
            return int(words[1])
    raise AssertionError("it is not mapped")
