"""SVDQuant in nunchaku's tiles: rows are cut and joined where they lie, and every way to lie holds the same numbers."""

from __future__ import annotations

import pytest
import torch

from shared.quant.formats import svdq
from shared.quant.packing import Packed, join_rows
from shared.quant.packings import svdq_tiles
from shared.quant.packings.svdq import Kind, Svdq
from tests.shared.quant.packings.test_svdq import KINDS, random_packed


def tiled(packed: Packed) -> Packed:
    """As a file has it."""
    stored = svdq.pack(packed)
    names = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up")
    tensors = {name: stored[name] for name in names} | {"wscales": stored["wscales"].view(packed.shape[0], -1)}
    if packed.packing.kind == "fp4":
        tensors["row_scale"] = packed.tensors["row_scale"]
    return Packed(packed.packing, packed.shape, tensors)


def assert_same_tensors(tensors: svdq_tiles.Tensors, expected: svdq_tiles.Tensors) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_lie_is_put_in_order(kind: Kind) -> None:
    natural = random_packed(kind, 384, 256, 32)
    tiles = tiled(natural).tensors

    ways = [tiles, svdq_tiles.with_branch_in_order(tiles), svdq_tiles.for_the_engine(tiles, has_row_scales=True)]

    for way in ways:
        assert_same_tensors(svdq_tiles.in_order(way), natural.tensors)
    assert svdq_tiles.are_the_engine_s(ways[2]) and not svdq_tiles.are_the_engine_s(ways[1])
    assert ways[1]["qweight"] is tiles["qweight"] and ways[1]["wscales"] is tiles["wscales"]
    again = svdq_tiles.for_the_engine(natural.tensors, has_row_scales=True)
    assert_same_tensors(again, ways[2])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_change_places_without_a_copy(kind: Kind) -> None:
    natural = random_packed(kind, 512, 256, 16)
    whole = tiled(natural)

    swapped = join_rows([whole.take_rows(256, 512), whole.take_rows(0, 256)])

    assert swapped is not None
    for name in ("qweight", "wscales", "proj_up"):
        first, second = svdq_tiles.pieces(swapped.tensors, name)
        assert first.untyped_storage().data_ptr() == whole.tensors[name].untyped_storage().data_ptr()
        assert first.data_ptr() == second.data_ptr() + second.nbytes
    expected = join_rows([natural.take_rows(256, 512), natural.take_rows(0, 256)])
    assert expected is not None
    assert_same_tensors(svdq_tiles.in_order(swapped.tensors), expected.tensors)
    assert_same_tensors(
        svdq_tiles.in_order(svdq_tiles.for_the_engine(swapped.tensors, has_row_scales=True)), expected.tensors
    )
    # Rows of both pieces, and of one.
    for start, stop in ((128, 384), (384, 512), (100, 300)):
        part = swapped.take_rows(start, stop)
        assert_same_tensors(svdq_tiles.in_order(part.tensors), expected.take_rows(start, stop).tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_end_within_a_tile_are_put_in_order_to_be_cut(kind: Kind) -> None:
    natural = random_packed(kind, 256, 128, 16)
    whole = tiled(natural)

    parts = [whole.take_rows(0, 64), whole.take_rows(64, 256)]

    assert not svdq_tiles.are_tiles(parts[0].tensors)
    joined = join_rows(parts)
    assert joined is not None
    assert_same_tensors(joined.tensors, natural.tensors)
    mixed = join_rows([whole.take_rows(0, 128), whole.take_rows(128, 192), whole.take_rows(192, 256)])
    assert mixed is not None
    assert_same_tensors(mixed.tensors, natural.tensors)


@pytest.mark.parametrize("name", svdq_tiles.SHARED)
def test_tiles_of_another_smoothing_or_branch_are_not_joined(name: str) -> None:
    one = tiled(random_packed("int4"))
    other = Packed(one.packing, one.shape, {**one.tensors, name: one.tensors[name] * 2})

    assert join_rows([one, other]) is None


def test_row_scales_of_one_part_are_ones_in_the_other() -> None:
    one = tiled(random_packed("int4"))
    other = Packed(one.packing, one.shape, {**one.tensors, "row_scale": torch.full((256, 1), 3.0)})

    joined = join_rows([one, other])

    assert joined is not None
    assert svdq_tiles.row_scale(joined.tensors).flatten().tolist() == [1.0] * 256 + [3.0] * 256
    assert joined.packing == Svdq("int4")
