"""Numbers no picture comes from (NaN, infinity, one value everywhere) are found, and what made them is made again.

Where they come from, as reported by users: float16 overflows in this network's residual stream, an attention kernel
fails for one model on one card, a text encoder answers NaN on a new GPU, a packed weight's kernel rounds too much.
All of them end in a black picture, minutes later and without a word. So:

    judged          features of the prompts, latents after each step, the decoded picture; picture by picture
    repeated        the step, once for each safer way to compute that is left, the steps before it unchanged
    left to hosts   what needs the weights loaded again in another type: NumbersError tells that nothing else helped

Judging costs one pass over the latents and no waiting. On an NVIDIA GPU a verdict travels to the host on its own and
is looked at when it has arrived, a step or two later; the walk then goes back. Samplers have a memory (of velocities,
of noise), so a walk is taken back by walking it again on recorded velocities, exactly, without the network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.quant import kernels
from shared.quant.errors import NumbersError
from shared.quant.linear import PackedLinear

if TYPE_CHECKING:
    from shared.samplers import Predict

log = logging.getLogger(__name__)

# Verdicts, worst last where several pictures are judged at once.
FINE, FLAT, NOT_FINITE = 0, 1, 2
_WORDS = {FLAT: "one value everywhere", NOT_FINITE: "NaN or infinite numbers"}

_PLAIN_ATTENTION = "attention by plain matrix products"


def judge(values: Tensor) -> Tensor:
    """The worst verdict over the pictures of a batch (first axis), as a 0-dim int8 on the values' own device."""
    low, high = values.flatten(1).aminmax(dim=1)  # NaN in either when there is one
    finite = torch.isfinite(low) & torch.isfinite(high)
    verdict = torch.where(finite, (low == high) * FLAT, NOT_FINITE)
    return verdict.amax().to(torch.int8)


def verdict_now(values: Tensor) -> int:
    """The same, waited for."""
    return int(judge(values))


class _Verdict(Protocol):
    """A verdict that may not be known yet."""

    def arrived(self) -> bool: ...

    def read(self) -> int: ...


class _Known:
    """Of a device that computes while it is asked: known at once."""

    def __init__(self, values: Tensor) -> None:
        self._verdict = int(judge(values).numpy())  # it lies in the host's memory already

    def arrived(self) -> bool:
        return True

    def read(self) -> int:
        return self._verdict


class _Travelling:
    """Of an NVIDIA GPU: copied to pinned memory behind the work that makes it, no one waits."""

    def __init__(self, values: Tensor) -> None:
        self._host = judge(values).to("cpu", non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def arrived(self) -> bool:
        return bool(self._event.query())

    def read(self) -> int:
        self._event.synchronize()
        return int(self._host.numpy())


class _Kept:
    """Of other GPUs: stays there until the end, where it is waited for."""

    def __init__(self, values: Tensor) -> None:
        self._verdict = judge(values)

    def arrived(self) -> bool:
        return False

    def read(self) -> int:
        return int(self._verdict)


_VERDICTS: dict[str, Callable[[Tensor], _Verdict]] = {"cpu": _Known, "cuda": _Travelling}


class Verdicts:
    """The verdicts over the steps of a walk, in order."""

    def __init__(self) -> None:
        self._found: list[_Verdict] = []
        self._fine = 0  # the first so many are known to be

    def add(self, latents: Tensor) -> None:
        self._found.append(_VERDICTS.get(latents.device.type, _Kept)(latents))

    def first_bad(self, *, wait: bool) -> tuple[int, int] | None:
        """(step, verdict) of the first step that is known to be bad. wait: until all are known."""
        while self._fine < len(self._found):
            found = self._found[self._fine]
            if not wait and not found.arrived():
                return None
            if (verdict := found.read()) != FINE:
                return self._fine, verdict
            self._fine += 1
        return None

    def forget_from(self, step: int) -> None:
        del self._found[step:]


@dataclass(frozen=True, slots=True)
class Remedy:
    """A safer way to compute. name: what a host remembers it by. words: what is done, for a person.

    apply: turns it on, until undo.
    """

    name: str
    words: str
    apply: Callable[[], None]
    undo: Callable[[], None]


class Safeguard:
    """The safer ways to compute that a model in memory has, and which of them are on.

    remembered: the names of those that are to be on from the beginning; "attention" is known here.
    on: the remedies that are to stay, by name, in words.
    """

    def __init__(self, remembered: Iterable[str] = ()) -> None:
        self._plain_attention = "attention" in remembered
        self.on = {"attention": _PLAIN_ATTENTION} if self._plain_attention else {}

    @property
    def is_plain(self) -> bool:
        """Whether the plain way is to be taken wherever a quicker one has been found."""
        return self._plain_attention

    def computing(self) -> AbstractContextManager[object]:
        """Put this around whatever computes with attention."""
        return sdpa_kernel(SDPBackend.MATH) if self._plain_attention else nullcontext()

    def remedies(self, module: nn.Module, device: torch.device) -> Iterator[Remedy]:
        """What is not on yet for a module that computes on `device`, gentlest first. Undo one before the next."""
        if not self._plain_attention:
            yield Remedy(
                "attention",
                _PLAIN_ATTENTION,
                lambda: self._set_attention(plain=True),
                lambda: self._set_attention(plain=False),
            )
        packed = [layer for layer in module.modules() if isinstance(layer, PackedLinear)]
        rounding = [layer for layer in packed if layer.kernel(device).rounds_activations]
        if rounding:
            yield Remedy(
                "compute",
                f"{len(rounding)} packed layers expanded, not multiplied as they are",
                lambda: _expand(rounding, device),
                lambda: None,  # expanding is right in any case, and the way back would lay the weights out anew
            )

    def keep(self, remedy: Remedy) -> None:
        """This one helped, and is to stay."""
        self.on[remedy.name] = remedy.words
        log.warning("Bad numbers; computing with %s from now on.", remedy.words)

    def _set_attention(self, *, plain: bool) -> None:
        self._plain_attention = plain


def attempt(
    work: Callable[[], Tensor],
    what: str,
    *,
    remedies: Callable[[], Iterator[Remedy]],
    helped: Callable[[Remedy, str], None],
    may_be_flat: bool = False,
) -> Tensor:
    """work()'s result, judged and waited for; made again with one remedy after the other while it is bad.

    what: the result in words. helped: told the remedy that did, and of what. may_be_flat: return a result that stays
    flat, as some pictures are meant to be. Else raises NumbersError.
    """
    result = work()
    verdict = verdict_now(result)
    if verdict == FINE:
        return result
    tried = []
    for remedy in remedies():
        remedy.apply()
        again = work()
        if verdict_now(again) == FINE:
            helped(remedy, what)
            return again
        remedy.undo()
        tried.append(remedy.words)
    if verdict == FLAT and may_be_flat:
        return result
    raise _bad_numbers(what, verdict, tried)


def walk(
    sample: Callable[[Predict], Iterator[Tensor]],
    predict: Predict,
    steps: int,
    *,
    remedies: Callable[[], Iterator[Remedy]],
    go_back: Callable[[int], None],
    helped: Callable[[Remedy, str], None],
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, latents) after each step of a sampler's walk; a step with bad numbers comes again, repaired.

    sample: begins the walk anew, with the same noise each time, asking the given function for velocities. go_back:
    told the step that is made again, before it is. helped: told the remedy that did, and of what. A step that comes
    again takes the place of the earlier and of all after it. The last step is right when it is yielded.
    Raises NumbersError naming the step.
    """
    tape = _Tape(predict)
    places: list[int] = []  # on the tape, where each step begins
    verdicts = Verdicts()
    path = sample(tape)
    index = 0
    while index < steps:
        places[index:] = [tape.place]
        latents = next(path)
        verdicts.add(latents)
        bad = verdicts.first_bad(wait=index + 1 == steps)
        if bad is not None:
            index, verdict = bad
            what = f"the latents after step {index + 1} of {steps}"
            tried = []
            for remedy in remedies():
                remedy.apply()
                go_back(index)
                tape.rewind(places[index])
                path = sample(tape)
                latents = next(islice(path, index, None))
                if verdict_now(latents) == FINE:
                    helped(remedy, what)
                    break
                remedy.undo()
                tried.append(remedy.words)
            else:
                raise _bad_numbers(what, verdict, tried)
            verdicts.forget_from(index)
            verdicts.add(latents)
        yield index, latents
        index += 1


class _Tape:
    """A predict() that remembers its answers, to give them again from the beginning."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self._answers: list[Tensor] = []
        self.place = 0  # of the next answer

    def __call__(self, *question: Any) -> Tensor:
        if self.place == len(self._answers):
            self._answers.append(self._predict(*question))
        self.place += 1
        return self._answers[self.place - 1]

    def rewind(self, place: int) -> None:
        """Begin again; from `place` on answers are new."""
        del self._answers[place:]
        self.place = 0


def _expand(layers: Iterable[PackedLinear], device: torch.device) -> None:
    """Have these layers multiplied by a kernel that leaves activations as they are and reads weights as they lie."""
    for layer in layers:
        layer.use(
            next(
                kernel
                for kernel in kernels.available(layer.packing.name)
                if not kernel.rounds_activations and kernel.reads(layer) and kernel.refuse(layer, device) is None
            ),
            device,
        )


def _bad_numbers(what: str, verdict: int, tried: Iterable[str]) -> NumbersError:
    others = ", nor with ".join(tried)
    again = f" It is no better with {others}." if others else ""
    return NumbersError(
        f"Not drawn: {_WORDS[verdict]} in {what}.{again}",
        "Weights or their number format do not suit this device; try another dtype or file.",
    )
