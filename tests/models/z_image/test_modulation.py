"""Scales and gates worked out once for a run: the same answers, few products, nothing stale; and the two precisions."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.z_image.guidance import ClassifierFreeGuidance, NormalizedAttentionGuidance
from models.z_image.loader import load_transformer
from models.z_image.modulation import Moment, Timetable, norm_weight
from models.z_image.prediction import Predictor, Prompts
from models.z_image.transformer import ZImageTransformer
from tests.support.tiny_model import TINY, relative_error

SIGMAS = [1.0, 0.8, 0.5, 0.0]


@pytest.fixture(params=["fast", "exact"])
def exact(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "exact")


@pytest.fixture
def model(model_folder: Path) -> ZImageTransformer:
    return load_transformer(model_folder / "transformer.safetensors", torch.float32)


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))


def features(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, TINY.cap_feat_dim, generator=generator) for n in lengths]


def predictor(model: ZImageTransformer, *, exact: bool = False, guided: bool = False) -> Predictor:
    prompts = Prompts(
        positive=model.encode_captions(features(7), exact=exact).repeat(2),
        negative=model.encode_captions(features(40), exact=exact).repeat(2) if guided else None,
    )
    return Predictor(
        model, prompts, sigmas=SIGMAS, guidance=ClassifierFreeGuidance(scale=2.0 if guided else 0.0),
        nag=NormalizedAttentionGuidance(), exact=exact,
    )  # fmt: skip


def count_calls(module: nn.Module) -> list[torch.Size]:
    """Shapes that the module is called with from now on."""
    seen: list[torch.Size] = []
    module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape))
    return seen


def test_a_run_s_steps_get_the_answers_of_single_forwards(
    model: ZImageTransformer, latents: Tensor, exact: bool
) -> None:
    predict = predictor(model, exact=exact)

    for sigma in SIGMAS[:-1]:
        single = -model(latents, torch.full((2,), 1 - sigma), features(7) * 2, exact=exact)
        assert relative_error(predict(latents, sigma), single) <= 1e-6
    assert predict.off_schedule == 0


def test_each_block_is_asked_once_for_all_steps(model: ZImageTransformer, latents: Tensor) -> None:
    modulated = [*model.noise_refiner, *model.layers]
    calls = [count_calls(block.adaLN_modulation[0]) for block in modulated]
    embedded = count_calls(model.t_embedder)
    predict = predictor(model)

    for sigma in [*SIGMAS[:-1], *SIGMAS[:-1]]:
        predict(latents, sigma)

    assert calls == [[torch.Size([3, TINY.time_dim])]] * len(modulated)
    assert embedded == [torch.Size([3])]


def test_a_noise_level_that_the_schedule_has_not_is_answered_and_counted(
    model: ZImageTransformer, latents: Tensor
) -> None:
    predict = predictor(model)
    predict(latents, 1.0)

    between = predict(latents, 0.65)

    single = -model(latents, torch.full((2,), 0.35), features(7) * 2)
    assert relative_error(between, single) <= 1e-6
    assert predict.off_schedule == 1


@pytest.mark.parametrize("aim", ["zero", "next", "own"])
def test_every_target_of_the_unified_sampler_is_on_the_timetable(
    model: ZImageTransformer, latents: Tensor, aim: str
) -> None:
    predict = predictor(model)

    for sigma, after in pairwise(SIGMAS):
        target = {"zero": 0.0, "next": after, "own": sigma}[aim]
        answer = predict(latents, sigma, target)
        time, goal = torch.full((2,), 1 - sigma), torch.full((2,), 1 - target if target else 0.0)
        assert relative_error(answer, -model(latents, time, features(7) * 2, target=goal)) <= 1e-6
    assert predict.off_schedule == 0


def test_changed_weights_count_once_the_run_forgets(model: ZImageTransformer, latents: Tensor) -> None:
    predict = predictor(model)
    before = predict(latents, 0.8)

    for block in model.layers:
        block.adaLN_modulation[0].weight.mul_(1.5)
    assert torch.equal(predict(latents, 0.8), before)
    predict.forget()

    single = -model(latents, torch.full((2,), 0.2), features(7) * 2)
    assert relative_error(predict(latents, 0.8), single) <= 1e-6
    assert relative_error(before, single) > 1e-3


@pytest.mark.parametrize("name", ["attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "attention.q_norm"])
def test_what_hooks_make_of_a_norm_is_what_the_block_uses(
    model: ZImageTransformer, latents: Tensor, name: str, exact: bool
) -> None:
    """LoRA files change norms by hooks, and so does an offloader's own LoRA loader."""
    norm = model.layers[0].get_submodule(name)
    time = torch.tensor([0.3, 0.6])

    change = torch.linspace(0.5, 1.5, len(norm.weight))

    handle = norm.register_forward_hook(lambda _norm, _inputs, output: output * change)
    hooked = model(latents, time, features(7) * 2, exact=exact)
    handle.remove()
    plain = model(latents, time, features(7) * 2, exact=exact)
    norm.weight.mul_(change)
    changed = model(latents, time, features(7) * 2, exact=exact)

    assert relative_error(hooked, changed) <= 1e-5
    assert relative_error(plain, changed) > 1e-4


def test_asking_a_bfloat16_norm_gives_its_weight_to_the_bit() -> None:
    norm = nn.RMSNorm(256, eps=1e-5, dtype=torch.bfloat16).requires_grad_(False)
    norm.weight.normal_(generator=torch.Generator().manual_seed(3))

    norm.register_forward_hook(lambda _norm, _inputs, output: output)

    assert torch.equal(norm_weight(norm), norm.weight)


class Seen(TorchDispatchMode):
    """Counts the operations that reach torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("guided", [False, True])
def test_a_later_step_computes_only_what_pixels_need_and_reads_nothing_back(
    model: ZImageTransformer, latents: Tensor, guided: bool
) -> None:
    predict = predictor(model, guided=guided)
    with torch.no_grad():
        predict(latents, 1.0)

        with Seen() as seen:
            predict(latents, 0.8)

    read_back = {"aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal"}
    known_before = {
        "aten.cos",
        "aten.sin",
        "aten.polar",
        "aten.arange",
        "aten.tanh",
        "aten.lift_fresh",
        "aten.ones_like",
    }
    assert not (read_back | known_before) & seen.operations.keys()
    blocks = len(model.noise_refiner) + len(model.layers)
    assert seen.operations["aten.mm"] == 4 * blocks  # qkv, out, w13, w2
    assert seen.operations["aten.addmm"] == 2  # the first and the last layer


def test_exact_bfloat16_is_diffusers_to_the_bit(
    model_folder: Path, reference_transformer: ZImageTransformer2DModel, latents: Tensor
) -> None:
    ours = load_transformer(model_folder / "transformer.safetensors", torch.bfloat16)
    theirs = ZImageTransformer2DModel.from_config(reference_transformer.config).eval()
    theirs.load_state_dict(reference_transformer.state_dict())
    theirs = theirs.to(torch.bfloat16)
    x, time = latents.bfloat16(), torch.tensor([0.3, 0.3])
    captions = [f.bfloat16() for f in features(7)] * 2

    with torch.no_grad():
        answer = ours(x, time, captions, exact=True)
        expected = torch.stack(theirs(list(x[:, :, None]), time, captions, return_dict=False)[0])[:, :, 0]

    assert torch.equal(answer, expected.float())


def test_fast_bfloat16_is_no_further_from_float32_than_the_reference_s_rounding(
    model_folder: Path, latents: Tensor
) -> None:
    rounded = load_transformer(model_folder / "transformer.safetensors", torch.bfloat16)
    wide = load_transformer(model_folder / "transformer.safetensors", torch.float32)
    for ours, theirs in zip(wide.parameters(), rounded.parameters(), strict=True):
        ours.copy_(theirs)
    x, time = latents.bfloat16(), torch.tensor([0.3, 0.6])
    captions = [f.bfloat16() for f in features(7)] * 2

    truth = wide(x.float(), time, [f.float() for f in captions])
    fast, exact = (relative_error(rounded(x, time, captions, exact=e), truth) for e in (False, True))

    assert fast <= 1.1 * exact


def test_training_goes_through_a_timetable_too(model: ZImageTransformer, latents: Tensor) -> None:
    model.requires_grad_(True)

    model(latents, torch.tensor([0.3, 0.6]), features(7) * 2).square().mean().backward()

    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not unused
    assert model.layers[0].adaLN_modulation[0].weight.grad.abs().sum() > 0


def test_a_row_serves_all_pictures_and_no_row_means_one_each(model: ZImageTransformer, latents: Tensor) -> None:
    times = torch.tensor([0.3, 0.6])
    captions = model.encode_captions(features(7)).repeat(2)
    table = Timetable(times)

    both = model(latents, Moment(table), captions)
    alone = [model(latents, Moment(table, row), captions)[row] for row in (0, 1)]

    assert relative_error(both, torch.stack(alone)) <= 1e-6
