"""The pieces of flow training: noise levels, stages, rates, batches of captions, and the tokenizer they need."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from training.scenes import sample_scene
from training.tokenizer import SPECIAL_TOKENS, TEMPLATE, build_tokenizer
from training.train_flow import (
    TextToLatents,
    build_text_encoder,
    draw_sigmas,
    encode_prompt,
    muon_matrices,
    parse_stages,
    relative_rate,
    share_buffer,
    share_gradient_buffer,
    share_matrices,
    word_scenes,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(captions=2000)


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    text = TEMPLATE.format(prompt="a teal héart, 漢字 \U0001f600\n\ttabs")

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= 1000


def test_chat_template_renders_the_prompt_template(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a red ring"}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )

    assert rendered == TEMPLATE.format(prompt="a red ring")


def test_template_takes_eight_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt("", tokenizer)

    assert len(ids) == 8
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[3]]) == [SPECIAL_TOKENS[1], SPECIAL_TOKENS[2]]


@pytest.mark.parametrize(("long", "low", "high"), [(False, 1, 32), (True, 33, 64)])
def test_batch_needs_no_mask(tokenizer: PreTrainedTokenizerFast, long: bool, low: int, high: int) -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, held_out=False) for _ in range(24)]

    used, rows = word_scenes(scenes, tokenizer, rng, long)

    assert len(used) == len(rows) == 24
    assert all(low <= len(row) <= high for row in rows)


def test_padding_on_the_right_does_not_change_features() -> None:
    torch.manual_seed(0)
    encoder = build_text_encoder(300, layers=2).eval()
    ids = torch.tensor([[5, 6, 7, 8]])

    with torch.no_grad():
        alone = encoder(input_ids=ids).last_hidden_state
        padded = encoder(input_ids=torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], 1)).last_hidden_state

    torch.testing.assert_close(padded[:, :4], alone, rtol=1e-4, atol=1e-5)


def test_sigmas_lie_between_0_and_1_and_favour_noise() -> None:
    sigmas = draw_sigmas(4000, torch.Generator().manual_seed(0))

    assert float(sigmas.min()) > 0
    assert float(sigmas.max()) <= 1
    assert 0.75 < float(sigmas.median()) < 0.95


def test_stages_are_read_from_text() -> None:
    first, second = parse_stages("0:128x128*1*24;600:256x128*3*12,128x256*1*8")

    assert (first.first_step, first.sizes, first.batches) == (0, ((128, 128),), (24,))
    assert second.sizes == ((256, 128), (128, 256))
    assert second.weights == (0.75, 0.25)


def test_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [relative_rate(step, 1000, 400) for step in (0, 99, 599, 800, 1000)]

    assert rates == pytest.approx([0.01, 1.0, 1.0, 0.5, 0.0])


def test_gradients_accumulate_in_the_shared_buffer() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    parameters = list(layers.parameters())
    flat = share_gradient_buffer(parameters)

    layers(torch.ones(1, 2)).sum().backward()

    assert flat.numel() == 13
    torch.testing.assert_close(flat, torch.cat([p.grad.flatten() for p in parameters]))
    assert float(flat[-1]) == 1.0  # the last bias


def test_workers_share_the_matrices_evenly() -> None:
    model = TextToLatents(300)

    shares = share_matrices(muon_matrices(model.transformer), 2)

    sizes = [sum(p.numel() for p in share) for share in shares]
    assert sum(sizes) == sum(
        p.numel()
        for n, p in model.named_parameters()
        if n.startswith("transformer.") and ("feed_forward" in n or "attention.qkv" in n or "attention.out" in n)
    )
    assert max(sizes) < 1.1 * min(sizes)


def test_parameters_in_one_buffer_keep_their_values_and_follow_it() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    parameters = list(layers.parameters())
    before = [p.detach().clone() for p in parameters]

    flat = share_buffer(parameters)

    for parameter, value in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    flat.zero_()
    assert all(float(p.detach().abs().sum()) == 0 for p in parameters)
