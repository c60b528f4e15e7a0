"""Every type of block against the gguf package's own decoder, bit for bit."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from shared.quant.errors import CheckpointError
from shared.quant.gguf_file import BLOCKS
from shared.quant.packing import Packed, join_rows
from shared.quant.packings.gguf import GgufBlocks, is_readable
from tests.support.gguf_blocks import F16_PLACES, random_blocks


def packed(type_name: str, rows: int = 6, blocks_per_row: int = 2, seed: int = 0) -> Packed:
    columns = blocks_per_row * BLOCKS[type_name][0]
    blocks = torch.from_numpy(random_blocks(type_name, rows, columns, seed))
    return Packed(GgufBlocks(type_name, columns), (rows, columns), {"blocks": blocks})


@pytest.mark.parametrize("type_name", F16_PLACES)
def test_every_bit_agrees_with_the_gguf_package(type_name: str) -> None:
    weight = packed(type_name, rows=37)

    ours = weight.dequantize(torch.float32)

    theirs = torch.from_numpy(dequantize(weight.tensors["blocks"].numpy(), GGMLQuantizationType[type_name]))
    assert theirs.std() > 0
    assert torch.equal(ours, theirs)


def test_long_weights_are_unpacked_piece_by_piece_without_a_seam() -> None:
    weight = packed("Q6_K", rows=520, blocks_per_row=4)
    assert weight.shape[0] * weight.shape[1] > 2**19

    ours = weight.dequantize(torch.bfloat16)

    theirs = torch.from_numpy(dequantize(weight.tensors["blocks"].numpy(), GGMLQuantizationType.Q6_K))
    assert torch.equal(ours, theirs.bfloat16())


@pytest.mark.parametrize("type_name", ["Q8_0", "Q5_1", "Q4_K", "IQ2_XXS"])
def test_rows_are_taken_and_joined_as_slices_of_the_matrix(type_name: str) -> None:
    one, other = packed(type_name), packed(type_name, seed=1)
    whole = one.dequantize(torch.float32)

    taken = one.take_rows(2, 5)
    joined = join_rows([one, other])

    assert taken.tensors["blocks"].data_ptr() == one.tensors["blocks"][2].data_ptr(), "rows are taken without a copy"
    assert torch.equal(taken.dequantize(torch.float32), whole[2:5])
    assert joined is not None
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([whole, other.dequantize(torch.float32)]))


def test_different_types_are_not_joined() -> None:
    assert join_rows([packed("Q4_0", blocks_per_row=8), packed("Q4_K", blocks_per_row=1)]) is None


def test_blocks_may_run_on_from_row_to_row() -> None:
    blocks = torch.from_numpy(random_blocks("Q4_K", 1, 24 * 64)).view(-1, 144)
    weight = Packed(GgufBlocks("Q4_K", 64), (24, 64), {"blocks": blocks})
    whole = torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType.Q4_K)).view(24, 64)

    assert torch.equal(weight.dequantize(torch.float32), whole)
    assert torch.equal(weight.take_rows(8, 16).dequantize(torch.float32), whole[8:16])
    with pytest.raises(CheckpointError, match=r"Rows 8 to 15 .* cut through a block"):
        weight.take_rows(8, 15)


def test_types_that_nothing_unpacks_are_known() -> None:
    assert is_readable("MXFP4")
    assert not is_readable("Q8_1")
