"""The network's forwards from recordings: one launch for hundreds, where pictures have the same size.

    first forward of a shape    as usual: compiles, allocates, works out the factors of the run's times
    second                      as usual; then recorded, replayed, and the two answers compared
    all others                  inputs copied in, replayed, result copied out

The same kernels run on the same numbers, so the answers are the same bits; where they are not, nothing is replayed. It
pays where launching takes longer than computing, below about 1024x1024 on a fast card. Forwards with control, with NAG
or with a target go their usual way.

A recording reads weights where they lay when it was made: nothing for weights that an offloader streams. begin() is
told at each run what weights there are, and drop() when what hangs on them has changed; then all is recorded anew.
Strengths of LoRAs are numbers that Python hands to kernels, so each recording is of the strengths it was made with:
those that stay for some steps are replayed, those that change at every step are not recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.z_image.modulation import Factors, Moment, Timed
from models.z_image.transformer import Captions
from shared.ops.attention import plain_is_wanted

if TYPE_CHECKING:
    from models.z_image.config import TransformerConfig
    from models.z_image.transformer import ZImageTransformer
    from shared.ops.graphs import Recorder, Recording

log = logging.getLogger(__name__)

_MOST = 4  # recordings kept: a picture's size and its second pass's, guided and not

# Picture tokens of a forward, 768x768 pixels: beyond, published gains vanish and recordings keep hundreds of MiB.
USUAL_MOST_TOKENS = 2304


class _HeldTime:
    """The times of a batch (B,) as a forward takes them, written over before each replay."""

    def __init__(self, t: Tensor) -> None:
        self.now = t.clone()

    def take_over(self, t: Tensor) -> None:
        self.now.copy_(t)


class _HeldMoment:
    """A moment whose factors are written over before each replay; a timetable to the network, of one time."""

    def __init__(self, moment: Moment, modules: list[Timed]) -> None:
        self.exact = moment.table.exact
        self._held = {module: _cloned(moment.of(module)) for module in modules}
        table: Any = self
        self.now = Moment(table, 0)

    def embed(self, _embedding: Any) -> None:
        """Nothing is left to be embedded."""

    def factors(self, module: Timed, _row: int | None) -> Any:
        return self._held[module]

    def take_over(self, moment: Moment) -> None:
        targets = [tensor for held in self._held.values() for tensor in _tensors(held)]
        sources = [tensor for module in self._held for tensor in _tensors(moment.of(module))]
        torch._foreach_copy_(targets, sources)


@dataclass
class _Recorded:
    """A recording with the memory it reads. kept: tables that nothing else may hold any more."""

    recording: Recording
    latents: Tensor
    tokens: Tensor
    time: _HeldTime | _HeldMoment
    kept: object

    def replay(self, latents: Tensor, t: Any, captions: Captions) -> Tensor:
        """The forward's answer for these inputs, (B, 16, h, w) float32; overwritten by the next replay."""
        self.latents.copy_(latents)
        self.tokens.copy_(captions.tokens_BLD)
        self.time.take_over(t)
        self.recording.replay()
        return self.recording.out


class GraphedForwards:
    """Calls a transformer as its forward() is called, from a recording where there is one.

    replayed: forwards that came from one, for reports. strengths: tells those of the LoRAs, now. most_tokens: of the
    pictures of a forward that is recorded, padding aside; None for any number.
    """

    def __init__(
        self,
        transformer: ZImageTransformer,
        recorder: Recorder,
        strengths: Callable[[], tuple[float, ...]] = tuple,
        *,
        most_tokens: int | None = None,
    ) -> None:
        self.replayed = 0
        self._transformer, self._recorder = transformer, recorder
        self._strengths, self.most_tokens = strengths, most_tokens
        self._recorded: dict[Hashable, _Recorded] = {}
        self._seen: set[Hashable] = set()
        self._weights: tuple[int, ...] = ()  # where they lay
        self._stopped = False

    @property
    def config(self) -> TransformerConfig:
        return self._transformer.config

    @property
    def dtype(self) -> torch.dtype:
        return self._transformer.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the recordings keep."""
        return self._recorder.nbytes

    def __call__(self, latents: Tensor, t: Any, captions: Any, control: Any = None, **options: Any) -> Tensor:
        """See ZImageTransformer.forward."""
        key = None if control is not None else self._key(latents, t, captions, options)
        if key is None:
            return self._transformer(latents, t, captions, control, **options)
        if key not in self._seen or not self._is_known(t):
            self._seen.add(key)
            return self._transformer(latents, t, captions, **options)
        if key not in self._recorded:
            answer = self._transformer(latents, t, captions, **options)
            self._record(key, latents, t, captions, options, answer)
            return answer
        self.replayed += 1
        return self._recorded[key].replay(latents, t, captions).clone()

    def begin(self) -> None:
        """A run begins: what was recorded of weights that lie elsewhere by now is forgotten."""
        self._seen.clear()  # strengths that come once in every run are not worth a recording
        tensors = (*self._transformer.parameters(), *self._transformer.buffers())
        weights = tuple(tensor.data_ptr() for tensor in tensors)
        if weights != self._weights:
            self.drop()
            self._weights = weights

    def drop(self) -> None:
        """Forget all recordings and give their memory back."""
        self._weights = ()
        self._recorded.clear()
        self._seen.clear()
        self._recorder.drop()

    def stop(self) -> None:
        """Record and replay nothing from now on: what is computed may change within a forward."""
        self.drop()
        self._stopped = True

    def _key(self, latents: Tensor, t: Any, captions: Any, options: dict[str, Any]) -> Hashable | None:
        """What makes two forwards the same work on other numbers; None for one that is not recorded."""
        if self._stopped or not isinstance(captions, Captions) or torch.is_grad_enabled():
            return None
        exact = bool(options.get("exact"))
        if any(value is not None for name, value in options.items() if name != "exact"):
            return None
        if isinstance(t, Moment):
            if t.row is None:
                return None
            exact = t.table.exact
        tokens = latents[:, 0].numel() // self.config.patch_size**2
        if self.most_tokens is not None and tokens > self.most_tokens:
            return None
        same_work = exact, plain_is_wanted(), self._strengths()
        return type(t), latents.shape, latents.dtype, captions.lengths, captions.tokens_BLD.dtype, same_work

    def _is_known(self, t: Any) -> bool:
        """Whether an earlier forward has worked out what the network makes of this moment; a plain time needs none."""
        return not isinstance(t, Moment) or all(t.table.knows(module) for module in self._modules())

    def _modules(self) -> Iterator[Any]:
        """Those that ask for their factors."""
        yield from self._transformer.noise_refiner
        yield from self._transformer.layers
        yield self._transformer.final_layer

    def _record(
        self, key: Hashable, latents: Tensor, t: Any, captions: Captions, options: dict[str, Any], answer: Tensor
    ) -> None:
        """Record this shape's forward, and keep it if it gives the answer that launching has given, to the bit."""
        network, patch = self._transformer, self.config.patch_size
        if len(self._recorded) == _MOST:
            self.drop()
        # Brought to the device now, since copying from the CPU cannot be recorded; the forward finds the same.
        tables = network.rope.for_image(
            captions.lengths, latents.shape[2] // patch, latents.shape[3] // patch, latents.device
        )
        held, tokens = latents.clone(), captions.tokens_BLD.clone()
        time = _HeldMoment(t, list(self._modules())) if isinstance(t, Moment) else _HeldTime(t)
        still = Captions(tokens, captions.lengths)
        try:
            recording = self._recorder.record(lambda: network(held, time.now, still, **options))
        except RuntimeError as fault:  # out of memory is one
            log.warning("Forwards are not recorded, but launched kernel by kernel: %s", str(fault).partition("\n")[0])
            self.stop()
            return
        recorded = _Recorded(recording, held, tokens, time, tables)
        # As integers, so that NaN equals NaN: bad numbers are safety.py's business.
        if not torch.equal(recorded.replay(latents, t, captions).view(torch.int32), answer.view(torch.int32)):
            log.warning("Forwards are launched kernel by kernel: a recording gave other numbers than launching did.")
            self.stop()
            return
        self._recorded[key] = recorded
        log.info("Recorded a forward of %s latents; recordings keep %d MiB", tuple(held.shape), self.nbytes >> 20)


def _tensors(factors: Factors | Tensor) -> list[Tensor]:
    return [factors] if isinstance(factors, Tensor) else [part for part in factors if isinstance(part, Tensor)]


def _cloned(factors: Factors | Tensor) -> Factors | Tensor:
    if isinstance(factors, Tensor):
        return factors.clone()
    return Factors._make(part.clone() if isinstance(part, Tensor) else part for part in factors)
