"""Bad numbers are found picture by picture, and the step that made them is made again in a safer way, once each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image import safety
from models.z_image.noise import NoiseSource
from models.z_image.pipeline import Step, ZImagePipeline
from models.z_image.request import GenerateRequest
from models.z_image.safety import FINE, FLAT, NOT_FINITE, Remedy
from models.z_image.transformer import ZImageTransformer
from models.z_image.z_image_main import model_factory
from shared import samplers
from shared.quant import kernels
from shared.quant.errors import NumbersError
from shared.quant.linear import PackedLinear
from shared.quant.packings import int8
from shared.samplers import schedules
from tests.support.tiny_model import TINY, randomise, relative_error

REQUEST = GenerateRequest(prompt="a red fox", width=32, height=48, seeds=(3, 4), steps=4)


# ------------------------------------------------------------------------------------------------ verdicts


def spoilt(value: float) -> Tensor:
    values = torch.randn(2, 16, 4, 4)
    values[1, 3, 2, 1] = value
    return values


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        pytest.param(torch.randn(2, 16, 4, 4), FINE, id="noise"),
        pytest.param(spoilt(math.nan), NOT_FINITE, id="one NaN in the second picture"),
        pytest.param(spoilt(-math.inf), NOT_FINITE, id="one infinity"),
        pytest.param(spoilt(math.nan).bfloat16(), NOT_FINITE, id="bfloat16"),
        pytest.param(torch.stack([torch.full((3, 8, 8), -1.0), torch.rand(3, 8, 8)]), FLAT, id="one of two is black"),
        pytest.param(torch.full((1, 3, 8, 8), math.nan), NOT_FINITE, id="NaN everywhere"),
        pytest.param(torch.tensor([-1.0, 1.0]).expand(1, 8, 2), FINE, id="two colours"),
    ],
)
def test_a_batch_is_as_bad_as_its_worst_picture(values: Tensor, verdict: int) -> None:
    assert safety.verdict_now(values) == verdict


class Late:
    """A verdict that arrives when two steps more have been begun, as from a GPU that is behind."""

    begun: list[Late]
    waited: int

    def __init__(self, values: Tensor) -> None:
        self.verdict = safety.verdict_now(values)
        Late.begun.append(self)

    def arrived(self) -> bool:
        return Late.begun.index(self) <= len(Late.begun) - 3

    def read(self) -> int:
        Late.waited += not self.arrived()
        return self.verdict


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[Late]:
    Late.begun, Late.waited = [], 0
    monkeypatch.setitem(safety._VERDICTS, "cpu", Late)
    return Late


# --------------------------------------------------------------------------------------------------- walks


class Flow:
    """A velocity field that answers NaN at one call unless it computes safely."""

    def __init__(self, bad_call: int | None = None) -> None:
        self.bad_call, self.safe, self.calls = bad_call, False, 0

    def __call__(self, latents: Tensor, sigma: float, target: float | None = None) -> Tensor:
        self.calls += 1
        velocity = torch.sin(3 * latents) + sigma
        return velocity * math.nan if self.calls - 1 == self.bad_call and not self.safe else velocity

    def remedy(self, name: str = "safe", *, works: bool = True) -> Remedy:
        return Remedy(name, f"the {name} way", lambda: self._set(works), lambda: self._set(False))

    def _set(self, safe: bool) -> None:
        self.safe = safe


def walk_with(
    flow: Flow, sampler: str, remedies: list[Remedy], steps: int = 6, back: Callable[[int], None] = lambda step: None
) -> tuple[list[tuple[int, Tensor]], list[str]]:
    """Every (index, latents), and what helped."""
    sigmas = schedules.simple(steps, 3.0)
    helped: list[str] = []

    def sample(ask: Callable[..., Tensor]) -> Iterator[Tensor]:
        source = NoiseSource((5, 6), (16, 4, 4))
        return samplers.get(sampler).sample(ask, source.start(), sigmas, source.draw)

    path = safety.walk(
        sample, flow, steps, remedies=lambda: iter(remedies), go_back=back,
        helped=lambda remedy, what: helped.append(f"{remedy.name}: {what}"),
    )  # fmt: skip
    return list(path), helped


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "res_multistep", "er_sde", "lcm", "unified"])
def test_a_repaired_walk_ends_where_an_undisturbed_one_does(sampler: str) -> None:
    good, flow = Flow(), Flow(bad_call=3)
    expected, _ = walk_with(good, sampler, [])

    found, helped = walk_with(flow, sampler, [flow.remedy()])

    assert torch.equal(found[-1][1], expected[-1][1])
    assert [index for index, _ in found] == list(range(6))
    assert len(helped) == 1
    assert flow.calls <= good.calls + 2  # the bad step alone was asked again


def test_what_arrives_late_takes_the_walk_back_to_the_step_it_is_about(late: type[Late]) -> None:
    expected, _ = walk_with(Flow(), "er_sde", [])
    late.begun.clear()
    flow = Flow(bad_call=1)
    backs: list[int] = []

    found, helped = walk_with(flow, "er_sde", [flow.remedy()], back=backs.append)

    assert torch.equal(found[-1][1], expected[-1][1])
    assert [index for index, _ in found] == [0, 1, 2, 1, 2, 3, 4, 5]
    assert backs == [1]
    assert helped == ["safe: the latents after step 2 of 6"]


def test_nobody_waits_for_a_verdict_before_the_last_step(late: type[Late]) -> None:
    waited = []
    flow = Flow()
    sigmas = schedules.simple(6, 3.0)

    def sample(ask: Callable[..., Tensor]) -> Iterator[Tensor]:
        return samplers.get("euler").sample(ask, torch.randn(1, 16, 4, 4), sigmas, lambda: torch.zeros(()))

    path = safety.walk(
        sample, flow, 6, remedies=lambda: iter(()), go_back=lambda step: None, helped=lambda remedy, what: None
    )
    waited = [late.waited for _ in path]

    assert waited == [0, 0, 0, 0, 0, 2]


def test_a_last_step_that_is_bad_is_never_handed_out(late: type[Late]) -> None:
    flow = Flow(bad_call=5)

    found, helped = walk_with(flow, "euler", [flow.remedy()])

    assert [index for index, _ in found] == list(range(6))
    assert bool(found[-1][1].isfinite().all())
    assert helped == ["safe: the latents after step 6 of 6"]


def test_each_way_is_tried_once_and_undone_when_it_does_not_help() -> None:
    flow = Flow(bad_call=2)
    log: list[str] = []

    def way(name: str) -> Remedy:
        return Remedy(name, f"the {name} way", lambda: log.append(f"+{name}"), lambda: log.append(f"-{name}"))

    def always_bad(latents: Tensor, sigma: float) -> Tensor:
        return flow(latents, sigma) * (math.nan if sigma < 0.95 else 1)

    with pytest.raises(NumbersError, match=r"latents after step \d of 6\..*first.*second"):
        walk_with(always_bad, "euler", [way("first"), way("second")])  # type: ignore[arg-type]
    assert log == ["+first", "-first", "+second", "-second"]


# ------------------------------------------------------------------------------------------------ pipeline


@pytest.fixture
def pipeline(model_folder: Path) -> ZImagePipeline:
    return model_factory(model_filename=model_folder / "transformer.safetensors", dtype=torch.float32).pipeline


def spoil_fast_attention(monkeypatch: pytest.MonkeyPatch, when: Callable[[Tensor], bool]) -> None:
    """Let torch's attention answer NaN for queries of which when() is true, unless plain products were asked for."""
    attend = F.scaled_dot_product_attention

    def broken(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = attend(q, *args, **kwargs)
        return result * math.nan if torch.backends.cuda.flash_sdp_enabled() and when(q) else result

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)


def spoil_forward(monkeypatch: pytest.MonkeyPatch, pipeline: ZImagePipeline, call: int) -> None:
    """Let the network answer NaN at one call, unless plain attention was asked for."""
    forward, calls = pipeline.transformer.forward, []

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        bad = len(calls) - 1 == call and torch.backends.cuda.flash_sdp_enabled()
        return forward(*args, **kwargs) * (math.nan if bad else 1)

    monkeypatch.setattr(pipeline.transformer, "forward", broken)


def test_a_step_that_broke_is_drawn_with_plain_attention_and_the_rest_stays(
    pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pipeline(REQUEST)
    spoil_forward(monkeypatch, pipeline, call=2)
    told: list[str] = []
    seen: list[Step] = []

    pictures = pipeline(REQUEST, seen.append, tell=told.append)

    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-4)
    assert [step.index for step in seen] == [0, 1, 2, 3]
    assert pipeline.report.safer == {"attention": "attention by plain matrix products"}
    assert told == pipeline.report.notes
    assert "latents after step 3 of 4" in told[0]
    assert pipeline.report.forwards == 5  # four, and one again


def test_a_remedy_stays_on_and_a_new_pipeline_can_begin_with_it(
    pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_fast_attention(monkeypatch, lambda q: q.shape[-1] == 128)

    pipeline(REQUEST)
    pipeline(REQUEST)

    assert list(pipeline.report.safer) == ["attention"]
    assert pipeline.report.notes == []
    begun = ZImagePipeline(
        pipeline.transformer, pipeline.text_encoder, pipeline.vae, pipeline.device, safer=("attention",)
    )
    begun(REQUEST)
    assert list(begun.report.safer) == ["attention"]
    assert begun.report.notes == []


def test_captions_are_refined_again_before_the_step_that_needed_them(
    pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pipeline(REQUEST)
    spoil_fast_attention(monkeypatch, lambda q: q.shape[0] == 1 and q.shape[-1] == 128)  # captions: one for the batch

    pictures = pipeline(REQUEST)

    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-4)
    assert list(pipeline.report.safer) == ["attention"]


def test_prompts_are_encoded_again_and_bad_features_forgotten(
    pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pipeline.encode(REQUEST)[0]
    pipeline.text_encoder.forget()
    spoil_fast_attention(monkeypatch, lambda q: q.shape[-1] == 16)  # the encoder's heads

    features = pipeline.encode(REQUEST)[0]

    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)
    assert list(pipeline.safeguard.on) == ["attention"]
    assert "text encoder's features of 'a red fox'" in pipeline.report.notes[0]


def test_the_picture_is_decoded_again(pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pipeline(REQUEST)
    spoil_fast_attention(monkeypatch, lambda q: q.shape[1] == 1)  # the VAE's one head

    pictures = pipeline(REQUEST)

    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-4)
    assert "the decoded picture" in pipeline.report.notes[0]


def test_a_kernel_that_rounds_activations_gives_way_to_an_expanding_one(pipeline: ZImagePipeline) -> None:
    linear = pipeline.transformer.layers[1].feed_forward.w2
    packed = _packed(linear)
    pipeline.transformer.layers[1].feed_forward.w2 = packed
    expected = pipeline(REQUEST)
    packed.use(_broken_kernel(packed), pipeline.device)

    pictures = pipeline(REQUEST)

    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-4)
    assert pipeline.report.safer == {"compute": "1 packed layers expanded, not multiplied as they are"}
    assert not packed.kernel(pipeline.device).rounds_activations


def _packed(linear: nn.Module) -> PackedLinear:
    codes, scale = int8.quantize(linear.weight.detach())
    return PackedLinear(int8.pack(codes, scale), None, torch.float32)


def _broken_kernel(layer: PackedLinear) -> kernels.Kernel:
    return kernels.Kernel(
        name="broken", packing=layer.packing.name, compute="int8", priority=0, refuse=lambda _layer, _device: None,
        run=lambda own, x: torch.full((*x.shape[:-1], own.out_features), math.nan, dtype=x.dtype),
    )  # fmt: skip


def test_what_nothing_helps_names_the_step_and_what_was_tried(
    pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.transformer.final_layer.linear.bias.data.fill_(math.nan)

    with pytest.raises(NumbersError, match=r"latents after step 1 of 4\. It is no better with attention by plain"):
        pipeline(REQUEST)
    assert pipeline.report.safer == {}
    assert [remedy.name for remedy in pipeline.safeguard.remedies(pipeline.vae, pipeline.device)] == ["attention"]


def test_a_picture_of_one_colour_is_kept_and_said(pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "decode", lambda *_, **__: torch.full((2, 3, 48, 32), -1.0))

    pictures = pipeline(REQUEST)

    assert pictures is not None and len(pictures) == 2
    assert "one colour all over" in pipeline.report.notes[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_are_cast_to_the_vaes_type(model_folder: Path, dtype: torch.dtype) -> None:
    path = model_folder / "transformer.safetensors"
    pipeline = model_factory(model_filename=path, dtype=torch.float32, VAE_dtype=dtype).pipeline

    assert bool(pipeline.decode(torch.randn(1, 16, 4, 4)).isfinite().all())


# ------------------------------------------------------------------------------------------------- float16


def forward_in(dtype: torch.dtype, change: Callable[[ZImageTransformer], None]) -> Tensor:
    """A tiny network's answer in a type, after a change of its weights."""
    model = randomise(ZImageTransformer(TINY), 1)
    change(model)
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    caption = torch.randn(5, TINY.cap_feat_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.to(dtype)(latents, torch.tensor([0.3]), [caption])


def test_a_feed_forward_beyond_float16_is_computed_right_in_it() -> None:
    def strong(model: ZImageTransformer) -> None:
        for layer in model.layers:
            layer.feed_forward.w13.weight.data *= 400  # products of some 10^5 where 65504 is the end

    expected = forward_in(torch.float32, strong)

    assert relative_error(forward_in(torch.float16, strong), expected) < 0.01


def test_a_stream_beyond_float16_stays_finite() -> None:
    def strong(model: ZImageTransformer) -> None:
        for layer in model.layers:
            layer.attention_norm2.weight.data.fill_(6e4)
            layer.ffn_norm2.weight.data.fill_(6e4)

    assert bool(forward_in(torch.float16, strong).isfinite().all())


def test_float16_agrees_with_float32_on_ordinary_weights() -> None:
    expected = forward_in(torch.float32, lambda model: None)

    assert relative_error(forward_in(torch.float16, lambda model: None), expected) < 0.005
