"""Forwards from recordings are the same bits as without, and nothing stale is ever replayed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.z_image.cuda_graph import GraphedForwards
from models.z_image.guidance import NormalizedAttentionGuidance
from models.z_image.modulation import Moment, Timetable
from models.z_image.request import GenerateRequest
from models.z_image.transformer import Captions, Nag, ZImageTransformer
from models.z_image.z_image_main import model_factory
from tests.support.fake_graphs import FakeRecorder
from tests.support.only_torch import only_torch
from tests.support.tiny_model import TINY, randomise

TIMES = torch.tensor([0.1, 0.4, 0.7, 0.9])


@pytest.fixture(scope="module", autouse=True)
def _by_torch() -> Iterator[None]:
    with only_torch():
        yield


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def network() -> ZImageTransformer:
    model = randomise(ZImageTransformer(TINY), seed=1)
    assert isinstance(model, ZImageTransformer)
    return model


@pytest.fixture
def recorder() -> FakeRecorder:
    return FakeRecorder()


@pytest.fixture
def graphed(network: ZImageTransformer, recorder: FakeRecorder) -> GraphedForwards:
    return GraphedForwards(network, recorder)


def latents_of(seed: int, size: int = 8, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, size, size, generator=torch.Generator().manual_seed(seed))


def captions_of(network: ZImageTransformer, *lengths: int, seed: int = 0) -> Captions:
    generator = torch.Generator().manual_seed(seed)
    return network.encode_captions([torch.randn(n, TINY.cap_feat_dim, generator=generator) for n in lengths])


def test_every_forward_is_the_same_bits(network: ZImageTransformer, graphed: GraphedForwards) -> None:
    for step, time in enumerate(TIMES):
        captions = captions_of(network, 5, seed=step)  # the same shape, other words
        latents = latents_of(step)

        got = graphed(latents, time[None], captions)

        assert torch.equal(got, network(latents, time[None], captions))
    assert graphed.replayed == 2


def test_a_runs_moments_are_the_same_bits(network: ZImageTransformer, graphed: GraphedForwards) -> None:
    captions = captions_of(network, 5).repeat(2)
    for run in range(2):
        table = Timetable(TIMES + 0.01 * run)
        expected = Timetable(TIMES + 0.01 * run)
        for step in range(len(TIMES)):
            latents = latents_of(step, batch=2)

            got = graphed(latents, Moment(table, step), captions)

            assert torch.equal(got, network(latents, Moment(expected, step), captions))
    assert graphed.replayed == 2 + 3  # the first forward of each run works the factors out, the next is recorded


def test_captions_of_different_length_are_replayed_with_their_mask(
    network: ZImageTransformer, graphed: GraphedForwards
) -> None:
    pairs = [captions_of(network, *lengths) for lengths in ((5, 40), (40, 5))]

    for step in range(6):
        captions, latents = pairs[step % 2], latents_of(step, batch=2)
        assert torch.equal(graphed(latents, TIMES[:2], captions), network(latents, TIMES[:2], captions))

    assert graphed.replayed == 2


def test_each_size_has_a_recording_and_few_are_kept(
    network: ZImageTransformer, graphed: GraphedForwards, recorder: FakeRecorder
) -> None:
    captions = captions_of(network, 5)

    for size in (4, 6, 8, 10, 12):
        for step in range(3):
            latents = latents_of(step, size)
            assert torch.equal(graphed(latents, TIMES[:1], captions), network(latents, TIMES[:1], captions))

    assert recorder.recordings == 5
    assert recorder.dropped == 1  # before the fifth


def test_what_hangs_on_the_weights_is_recorded_anew_after_a_drop(
    network: ZImageTransformer, graphed: GraphedForwards, recorder: FakeRecorder
) -> None:
    captions = captions_of(network, 5)
    before = [graphed(latents_of(0), TIMES[:1], captions) for _ in range(3)][-1]

    hook = network.layers[0].feed_forward.w2.register_forward_hook(lambda _module, _args, out: 2 * out)
    graphed.drop()
    after = [graphed(latents_of(0), TIMES[:1], captions) for _ in range(3)]
    expected = network(latents_of(0), TIMES[:1], captions)
    hook.remove()

    assert recorder.recordings == 2
    assert all(torch.equal(result, expected) for result in after)
    assert not torch.equal(before, expected)


def test_weights_that_were_moved_are_recorded_anew_and_others_are_not(recorder: FakeRecorder) -> None:
    network = randomise(ZImageTransformer(TINY), seed=2)
    assert isinstance(network, ZImageTransformer)
    graphed = GraphedForwards(network, recorder)
    captions = captions_of(network, 5)

    def run() -> Tensor:
        graphed.begin()
        return [graphed(latents_of(0), TIMES[:1], captions) for _ in range(3)][-1]

    first, again = run(), run()
    recorded = recorder.recordings
    weight = network.layers[1].attention.out.weight
    weight.data = weight.data * 2
    moved = run()

    assert torch.equal(first, again) and recorded == 1
    assert recorder.recordings == 2
    assert torch.equal(moved, network(latents_of(0), TIMES[:1], captions)) and not torch.equal(moved, first)


def test_a_stopped_one_records_nothing_more(
    network: ZImageTransformer, graphed: GraphedForwards, recorder: FakeRecorder
) -> None:
    captions = captions_of(network, 5)
    graphed.stop()

    for _ in range(3):
        graphed(latents_of(0), TIMES[:1], captions)

    assert recorder.recordings == 0


def test_what_hangs_on_more_than_its_inputs_is_not_recorded(
    network: ZImageTransformer, graphed: GraphedForwards, recorder: FakeRecorder
) -> None:
    captions = captions_of(network, 5)
    nag = Nag(NormalizedAttentionGuidance(scale=2.0), captions_of(network, 7, seed=1))

    for _ in range(3):
        graphed(latents_of(0), TIMES[:1], captions, nag=nag)
        graphed(latents_of(0), TIMES[:1], captions, target=TIMES[1:2])
        graphed(latents_of(0), TIMES[:1], [torch.zeros(3, TINY.cap_feat_dim)])
    with torch.enable_grad():
        graphed(latents_of(0), TIMES[:1], captions)
        graphed(latents_of(0), TIMES[:1], captions)

    assert recorder.recordings == 0


def test_a_recording_that_fails_is_told_once_and_done_without(
    network: ZImageTransformer, graphed: GraphedForwards, recorder: FakeRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.fault = torch.OutOfMemoryError("no memory left")
    captions = captions_of(network, 5)

    with caplog.at_level(logging.WARNING):
        results = [graphed(latents_of(0), TIMES[:1], captions) for _ in range(4)]

    assert all(torch.equal(result, results[0]) for result in results)
    assert [record.getMessage() for record in caplog.records] == [
        "Forwards are not recorded, but launched kernel by kernel: no memory left"
    ]


def test_a_recording_that_gives_other_numbers_is_not_used(
    network: ZImageTransformer, graphed: GraphedForwards, recorder: FakeRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.off = 1e-6
    captions = captions_of(network, 5)

    with caplog.at_level(logging.WARNING):
        results = [graphed(latents_of(0), TIMES[:1], captions) for _ in range(4)]

    assert all(torch.equal(result, network(latents_of(0), TIMES[:1], captions)) for result in results)
    assert (recorder.recordings, graphed.replayed) == (1, 0)
    assert "other numbers" in caplog.text


def test_large_forwards_are_left_alone(network: ZImageTransformer, recorder: FakeRecorder) -> None:
    graphed = GraphedForwards(network, recorder, most_tokens=16)
    captions = captions_of(network, 5)

    for _ in range(3):
        graphed(latents_of(0, size=8), TIMES[:1], captions)
        graphed(latents_of(0, size=10), TIMES[:1], captions)

    assert (recorder.recordings, graphed.replayed) == (1, 1)


# What the strengths of a LoRA reach in each place: the recorded work, the captions it is given, or its factors.
PLACES = {
    "layers.0.feed_forward.w2": (384, 1024),
    "context_refiner.0.feed_forward.w2": (384, 1024),
    "layers.0.adaLN_modulation.0": (1536, 256),
    "layers.0.ffn_norm1": (384,),
}


@pytest.mark.parametrize(
    ("schedule", "replayed"),
    [
        pytest.param([0.5], 2 + 3, id="one strength"),
        pytest.param([0.8, -0.5], 2, id="two, half of the steps each"),
        pytest.param([1.0, 0.7, 0.4, 0.1], 0, id="another at every step"),
    ],
)
def test_pictures_with_strengths_that_change_by_step_are_the_same_bits(
    model_folder: Path, recorder: FakeRecorder, tmp_path: Path, schedule: list[float], replayed: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for module, shape in PLACES.items():
        if len(shape) == 1:
            state[f"transformer.{module}.diff"] = torch.randn(shape, generator=generator)
            continue
        state[f"transformer.{module}.lora_A.weight"] = torch.randn(8, shape[1], generator=generator) * 0.1
        state[f"transformer.{module}.lora_B.weight"] = torch.randn(shape[0], 8, generator=generator) * 0.1
    save_file(state, tmp_path / "lora.safetensors")
    model = model_factory(model_filename=model_folder / "transformer.safetensors", dtype=torch.float32)
    model.load_loras([tmp_path / "lora.safetensors"], [[schedule]])
    pipeline = model.pipeline
    request = GenerateRequest(prompt="a fox", width=32, height=32, seeds=(3,), steps=4)
    features = pipeline.encode(request)

    def run() -> list[Tensor]:
        return [step.latents for step in pipeline.denoise(request, *features)]

    expected = run()
    pipeline.recordings = GraphedForwards(model.transformer, recorder, lambda: pipeline.loras.strengths)

    for _ in range(2):
        assert all(torch.equal(got, right) for got, right in zip(run(), expected, strict=True))
    assert pipeline.recordings.replayed == replayed


def test_results_stay_when_the_next_forward_comes(network: ZImageTransformer, graphed: GraphedForwards) -> None:
    captions = captions_of(network, 5)
    results = [graphed(latents_of(step), TIMES[:1], captions) for step in range(4)]

    assert all(torch.equal(r, network(latents_of(s), TIMES[:1], captions)) for s, r in enumerate(results))
