"""Prompt to picture in three stages: encode, denoise (a generator, one Step at a time), decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

import shared.samplers as samplers
from models.z_image import autoencoder, safety
from models.z_image.conditions import Beginning
from models.z_image.cuda_graph import GraphedForwards
from models.z_image.decoding import Decoding
from models.z_image.lora import LoraSet
from models.z_image.noise import NoiseSource
from models.z_image.prediction import Predictor, Prompts
from models.z_image.request import GenerateRequest
from models.z_image.step_cache import StepCache
from models.z_image.text_encoder import TextEncoder
from models.z_image.transformer import Captions, ZImageTransformer
from shared.ops.upload import upload
from shared.quant.errors import NumbersError

T = TypeVar("T")


def _nothing() -> None:
    """What there is to forget while no walk is on."""


def _nobody(_note: str) -> None:
    """Whom notes are told to when no one asked."""


@dataclass(frozen=True, slots=True)
class Step:
    """State after one step of the sampler."""

    index: int  # 0-based
    total: int
    sigma: float  # noise level that is left, 0 after the last step
    latents: Tensor  # (B, 16, h, w) float32


@dataclass
class Report:
    """What a generation really did. Seconds are wall-clock, the device waited for."""

    forwards: int = 0  # calls of the network per picture; a guided step counts two
    saved: int = 0  # forwards that a step cache spared, of the same walk
    sigmas: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was done otherwise than asked, in words
    safer: dict[str, str] = field(default_factory=dict)  # remedies for bad numbers that are on: name -> in words


class ZImagePipeline:
    """The three modules at work on `device`; where their weights lie between calls is an offloader's business.

    safer: remedies that an earlier drawing had to take, see safety.Safeguard.
    """

    def __init__(
        self,
        transformer: ZImageTransformer,
        text_encoder: TextEncoder,
        vae: Any,
        device: torch.device,
        safer: Iterable[str] = (),
    ) -> None:
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.vae = vae
        self.decoding = Decoding(vae)
        self.device = device
        self.loras = LoraSet(transformer, lambda: text_encoder.model)
        self.safeguard = safety.Safeguard(safer)
        self.recordings: GraphedForwards | None = None  # set by whoever leaves the weights where they are
        self._forget: Callable[[], None] = _nothing  # of the walk that is on
        self.report = Report()
        self._tell: Callable[[str], None] = _nobody
        self._undecoded: tuple[GenerateRequest, Tensor] | None = None  # drawn, and not yet a picture

    def __call__(
        self,
        request: GenerateRequest,
        on_step: Callable[[Step], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_begin: Callable[[int], None] = lambda steps: None,
        on_repeat: Callable[[int], None] = lambda step: None,
        tell: Callable[[str], None] = lambda note: None,
    ) -> Tensor | None:
        """Draw a batch: (B, 3, H, W) float32 in [-1, 1], or None when should_stop() turned true between steps.

        on_begin: told the number of steps before the first of them. on_repeat: told the step (0-based) that is made
        again, with all after it, because of bad numbers; on_step then comes again too. tell: told the report's notes.
        Raises NumbersError naming the stage whose numbers stay bad, see safety.py.
        """
        self.report, self._tell = Report(safer=dict(self.safeguard.on)), tell
        self._undecoded = None
        try:
            return self._draw(request, on_step, should_stop, on_begin, on_repeat)
        finally:
            self._tell = _nobody

    def _draw(
        self,
        request: GenerateRequest,
        on_step: Callable[[Step], None] | None,
        should_stop: Callable[[], bool],
        on_begin: Callable[[int], None],
        on_repeat: Callable[[int], None],
    ) -> Tensor | None:
        self.loras.begin(request.steps)  # the prompt is encoded at the first step's strengths
        positive, negative = self._timed("text", lambda: self.encode(request))
        latents: Tensor | None = None
        began = time.perf_counter()
        try:
            for step in self.denoise(request, positive, negative, on_begin, on_repeat):
                latents = step.latents
                if on_step is not None:
                    on_step(step)
                if should_stop():
                    return None
        except NumbersError:
            self.transformer.number_checks.finish()  # a file's bad scale, if that is why, is what the user should hear
            raise
        self._seconds("denoise", began)
        assert latents is not None  # a request has at least one step
        if should_stop():
            return None
        self._undecoded = request, latents
        return self.decode_drawn(request.tile)

    def decode_drawn(self, tile: int) -> Tensor | None:
        """The pictures of latents that are drawn and not decoded yet, as __call__ returns them; None without any.

        For whoever makes room after memory ran out in the decoder. tile: see decode().
        """
        if self._undecoded is None:
            return None
        request, latents = self._undecoded
        exact = request.precision == "exact"
        pictures = self._timed("decode", lambda: self._decode_safely(latents, tile, exact=exact))
        self._undecoded = None
        return pictures if request.start is None else request.start.finish(pictures)

    def encode(self, request: GenerateRequest) -> tuple[Tensor, Tensor | None]:
        """Features (tokens, width) of the prompt, and of the negative prompt when the guidance will need it."""
        prompts = [request.prompt] + ([request.negative_prompt] if request.needs_negative else [])
        features = [self._features(prompt, request) for prompt in prompts]
        return features[0], features[1] if len(features) > 1 else None

    @torch.no_grad()
    def denoise(
        self,
        request: GenerateRequest,
        positive: Tensor,
        negative: Tensor | None = None,
        on_begin: Callable[[int], None] = lambda steps: None,
        on_repeat: Callable[[int], None] = lambda step: None,
    ) -> Iterator[Step]:
        """Yield a Step after each step of the request's sampler, from the seeds' noise or the request's start.

        A step whose numbers turned out bad comes again, and those after it; see safety.walk. The last comes when the
        transformer's number_checks are done, which may raise CheckpointError.
        """
        shape = (self.transformer.config.in_channels, request.height // 8, request.width // 8)
        source = NoiseSource(request.seeds, shape, request.variation)
        begun = self._begin(request, source.start().to(self.device))
        self.report.sigmas = list(begun.sigmas)
        total = len(begun.sigmas) - 1
        self.loras.begin(total)
        on_begin(total)  # before the captions are refined: a host sets its LoRAs' strengths of the first step in it
        recordings = self.recordings
        if recordings is not None:
            recordings.begin()
        predict = Predictor(
            recordings or self.transformer, self._prompts(request, positive, negative), sigmas=begun.sigmas,
            guidance=request.guidance, nag=request.nag, exact=request.precision == "exact",
            signals=None if request.control is None else request.control.begin(self.encode_pictures),
            constrain=begun.constrain,
            cache=StepCache(request.step_cache, lambda: self.loras.strengths) if request.step_cache else None,
        )  # fmt: skip
        self._forget = predict.forget
        strengths = self.loras.factor_strengths

        def sample(ask: samplers.Predict) -> Iterator[Tensor]:
            source = NoiseSource(request.seeds, shape, request.variation)
            source.start()
            walk = samplers.get(request.sampler)
            return walk.sample(ask, begun.latents, begun.sigmas, lambda: upload(source.draw(), self.device))

        def ask(*question: Any) -> Tensor:
            with self.safeguard.computing():
                return predict(*question)

        def go_back(step: int) -> None:
            self.loras.set_step(step)
            on_repeat(step)
            if recordings is not None:  # a remedy is at work, which may change from forward to forward
                recordings.stop()
            predict.forget()
            predict.set_prompts(self._prompts(request, positive, negative))

        checks = self.transformer.number_checks
        checks.start()
        walk = safety.walk(
            sample, ask, total, go_back=go_back, helped=self._helped,
            remedies=lambda: self.safeguard.remedies(self.transformer, self.device),
        )  # fmt: skip
        try:
            for index, latents in walk:
                self.report.forwards, self.report.saved = predict.forwards, predict.saved
                checks.poll()
                if index + 1 == total:
                    checks.finish()
                yield Step(index, total, begun.sigmas[index + 1], latents)
                if self.loras.set_step(index + 1):
                    predict.set_prompts(self._prompts(request, positive, negative))
                if self.loras.factor_strengths != strengths:
                    strengths = self.loras.factor_strengths
                    predict.forget()
        finally:
            self._forget = _nothing  # and let go of what the walk held in memory

    def weights_changed(self) -> None:
        """Told by a host between steps: its own LoRAs have other strengths from the next step on."""
        self._forget()

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, 16, H/8, W/8) float32 on the pipeline's device."""
        with self.safeguard.computing():
            return autoencoder.encode(self.vae, pictures.to(self.device)).to(self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor, tile: int = 0, *, exact: bool = True) -> Tensor:
        """Latents (B, 16, h, w) to pictures (B, 3, 8h, 8w) in [-1, 1], one at a time: a batch needs no more memory.

        exact: in the VAE's own type; else, beside a bfloat16 transformer, in bfloat16 where that is quicker.
        """
        quick = not exact and self.transformer.dtype == torch.bfloat16
        return self.decoding.decode(latents, tile, self.device, quick=quick)

    def _prompts(self, request: GenerateRequest, positive: Tensor, negative: Tensor | None) -> Prompts:
        """The features refined, for each picture."""
        count = len(request.seeds)

        def refine(features: list[Tensor]) -> Captions:
            with self.safeguard.computing():
                return self.transformer.encode_captions(features, exact=request.precision == "exact")

        early = None
        if request.diversity.active:
            early = refine([request.diversity.disturb(positive, seed) for seed in request.seeds])
        return Prompts(
            positive=refine([positive]).repeat(count),
            negative=None if negative is None else refine([negative]).repeat(count),
            early=early,
            early_end=request.diversity.end,
        )

    def _encode_text(self, prompt: str, request: GenerateRequest) -> Tensor:
        """(tokens, width) of one prompt, on the device, whatever its numbers."""
        return self.text_encoder.encode([prompt], self.device, long_prompt=request.long_prompt, tell=self._note)[0]

    def _features(self, prompt: str, request: GenerateRequest) -> Tensor:
        """(tokens, width) of one prompt, on the device."""

        def encode() -> Tensor:
            with self.safeguard.computing():
                return self._encode_text(prompt, request)

        return safety.attempt(
            lambda: encode()[None], f"the text encoder's features of {prompt!r:.60}", helped=self._helped,
            remedies=lambda: self.safeguard.remedies(self.text_encoder.model, self.device),
        )[0]  # fmt: skip

    def _decode_safely(self, latents: Tensor, tile: int, *, exact: bool) -> Tensor:
        def decode() -> Tensor:
            with self.safeguard.computing():
                return self.decode(latents, tile, exact=exact or self.safeguard.is_plain)

        pictures = safety.attempt(
            decode, "the decoded picture", helped=self._helped, may_be_flat=True,
            remedies=lambda: self.safeguard.remedies(self.vae, self.device),
        )  # fmt: skip
        if safety.verdict_now(pictures) == safety.FLAT:
            self._note("The picture is of one colour all over, also when decoded in another way.")
        return pictures

    def _helped(self, remedy: safety.Remedy, what: str) -> None:
        self.safeguard.keep(remedy)
        self.report.safer = dict(self.safeguard.on)
        self._note(f"Bad numbers in {what}; made again with {remedy.words}, which helped.")

    def _note(self, note: str) -> None:
        if note not in self.report.notes:
            self.report.notes.append(note)
            self._tell(note)

    def _begin(self, request: GenerateRequest, noise: Tensor) -> Beginning:
        sigmas = request.noise_levels()
        if request.start is None:
            return Beginning(sigmas, noise)
        return request.start.begin(noise, sigmas, self.encode_pictures)

    def _timed(self, stage: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        self._seconds(stage, began)
        return result

    def _seconds(self, stage: str, began: float) -> None:
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.synchronize(self.device)
        self.report.seconds[stage] = time.perf_counter() - began
