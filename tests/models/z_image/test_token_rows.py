"""Tokens through the feed-forward in parts: the same bits, and less memory at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.z_image import token_rows
from models.z_image.block import FeedForward
from models.z_image.modulation import Moment, Timetable
from models.z_image.transformer import ZImageTransformer
from shared.bench.counters import count
from shared.ops import Rounded, Sums, round_rows
from shared.quant.linear import PackedLinear
from shared.quant.packings import int8
from tests.support.tiny_model import TINY, randomise


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "CPU_TOKENS", 12)


def feed_forward(*, packed: bool) -> FeedForward:
    made = FeedForward(64, 128).bfloat16()
    for name, parameter in list(made.named_parameters()):
        parameter.normal_()
        if packed:
            codes, scale = int8.quantize(parameter)
            setattr(
                made, name.split(".")[0], PackedLinear(int8.pack(codes, scale), None, torch.bfloat16, compute="int8")
            )
    return made


@pytest.mark.parametrize(("packed", "rounded"), [(False, False), (True, False), (True, True)])
def test_parts_side_by_side_are_the_whole(packed: bool, rounded: bool, few: None) -> None:
    module, x = feed_forward(packed=packed), torch.randn(2, 35, 64).bfloat16()
    given = round_rows(x, "int8") if rounded else x

    assert torch.equal(module(given), module(given, whole=True))


def test_each_part_has_whole_tokens_and_no_more_than_it_may(few: None) -> None:
    met: list[tuple[int, ...]] = []

    def work(x: Tensor | Rounded) -> Tensor:
        assert isinstance(x, Tensor)
        met.append(tuple(x.shape))
        return x

    x = torch.randn(2, 35, 64)

    assert torch.equal(token_rows.in_parts(work, x), x)  # type: ignore[arg-type]
    assert met == [(1, 12, 64)] * 5 + [(1, 10, 64)]


def test_few_tokens_are_handed_on_as_they_are() -> None:
    x = torch.randn(2, 35, 64)

    assert token_rows.in_parts(lambda given: given, x) is x  # type: ignore[arg-type, return-value]


def test_sums_of_parts_are_the_sums_of_all(few: None) -> None:
    sums, row, column = torch.randint(-99, 99, (70, 8)), torch.rand(70, 1), torch.rand(8, 1)
    whole = Sums(sums.int(), row, column, torch.Size((2, 35, 8)), torch.float32)
    x = torch.arange(70.0).view(2, 35, 1)

    def work(part: Tensor | Rounded) -> Sums:
        at = part[0, :, 0].long()  # type: ignore[index]
        return Sums(sums[at].int(), row[at], column, torch.Size((1, len(at), 8)), torch.float32)

    joined = token_rows.in_parts(work, x)

    assert isinstance(joined, Sums) and joined.shape == whole.shape
    assert torch.equal(joined.restore(), whole.restore())


@pytest.mark.parametrize("exact", [False, True])
def test_a_network_gives_the_same_bits_and_exact_is_never_cut(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(ZImageTransformer(TINY).bfloat16(), seed=1)
    latents, captions = torch.randn(1, 16, 8, 8), [torch.randn(5, TINY.cap_feat_dim).bfloat16()]

    def answer() -> Tensor:
        return model(latents, Moment(Timetable(torch.tensor([0.1]), exact=exact)), captions)

    expected = answer()
    cuts: list[int] = []
    cut = token_rows._cut
    monkeypatch.setattr(token_rows, "_cut", lambda x, tokens: cuts.append(tokens) or cut(x, tokens))
    monkeypatch.setattr(token_rows, "CPU_TOKENS", 12)

    assert torch.equal(answer(), expected)
    assert bool(cuts) is not exact


def test_a_share_of_the_tokens_takes_a_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = feed_forward(packed=False), torch.randn(1, 2048, 64).bfloat16()
    whole = count(lambda: module(x, whole=True)).scratch_bytes
    monkeypatch.setattr(token_rows, "CPU_TOKENS", 128)

    # Both halves and the product of an eighth, and twice what comes out.
    assert count(lambda: module(x)).scratch_bytes < whole / 8 + 2 * x.nbytes
