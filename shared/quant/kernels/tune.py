"""Find the fastest launch options of Triton's kernels on this machine's GPU, in less than two minutes.

Every entry of the table (a kernel and a class of sizes, shared/ops/tuning.py) is raced at the published network's
sizes: the options it has now, then candidates, those that differ least first. Options whose numbers are not those of
plain torch are refused; so are those that do not run. The present ones stay unless others are clearly faster.

Most of the time goes into Triton's compiler. An entry may take an equal share of what is left; what it does not use,
the next ones get. So the products of large pictures, which come last, get the most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, get_args

from shared.ops import tuning
from shared.ops.rounding import Kind, Rounded
from shared.ops.tuning import Entries, Launch
from shared.quant.errors import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What a work takes on the device; RuntimeError where it does not run.
Seconds = Callable[[Callable[[], object]], float]

BUDGET_SECONDS = 100.0
FP8_CAPABILITY = 89
CLEARLY_FASTER = 0.97  # of the present options' time: less is a race's noise
LARGEST_ERROR = 0.02  # rounding to neighbouring int8 codes makes 0.5 %, a bfloat16 reference 0.3 %
ROUNDS, LAUNCHES = 3, 10


class Work(NamedTuple):
    """Something that launches the kernel. expected: the same by plain torch.

    check: what is compared with it, where `run` may not be called twice for the same numbers.
    """

    run: Callable[[], Tensor | Rounded]
    expected: Callable[[], Tensor | Rounded]
    check: Callable[[], Tensor | Rounded] | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the table. bound: of its sizes, None for no bound. options: what it has now. make: its works."""

    kernel: str
    bound: int | None
    options: Launch
    candidates: Sequence[Launch]
    make: Callable[[], Sequence[Work]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came out for an entry. seconds: of its works with `options`; before: with those it had, None where these do
    not run. tried: candidates that were compiled. left: those that there was no time for. wrong: refused ones.
    """

    kernel: str
    bound: int | None
    options: Launch
    seconds: float
    before: float | None
    tried: int
    left: int
    wrong: tuple[Launch, ...] = ()

    @property
    def words(self) -> str:
        """In one line."""
        size = "any size" if self.bound is None else f"up to {self.bound}"
        then = f"{1e3 * self.seconds:.3f} ms"
        if self.before is not None and self.seconds < self.before:
            then += f", before {1e3 * self.before:.3f}"
        untried = f", {self.left} not tried for want of time" if self.left else ""
        refused = f", {len(self.wrong)} gave wrong numbers" if self.wrong else ""
        return f"{self.kernel}, {size}: {then} ({self.tried} tried{refused}{untried})"


@dataclass(frozen=True)
class Sizes:
    """Of what is multiplied and normalised; the published network's."""

    width: int = 3840
    hidden: int = 10240
    heads: int = 30
    tokens: int = 4224  # a 1024x1024 picture with its caption, where an entry has no bound
    channels: int = 256  # of the VAE's decoder where most is moved
    many: int = 8448  # for rows: a launch then takes longer than telling the GPU of it


def search(
    entries: Iterable[Entry],
    seconds: Seconds,
    *,
    budget: float = BUDGET_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Found]:
    """Yield what came out for each entry, in order; one that does not run, or finds no memory, is left out.

    budget: seconds by `clock` for all.
    """
    waiting = list(entries)
    ends = clock() + budget
    while waiting:
        entry = waiting.pop(0)
        found = _searched(entry, seconds, clock() + (ends - clock()) / (len(waiting) + 1), clock)
        if found is not None:
            yield found


@dataclass
class _Race:
    """The candidates of one entry so far."""

    times: list[tuple[float, Launch]] = field(default_factory=list)
    wrong: list[Launch] = field(default_factory=list)
    tried: int = 0


def _searched(entry: Entry, seconds: Seconds, ends: float, clock: Callable[[], float]) -> Found | None:
    try:
        works = entry.make()
        expected = [_numbers_of(work.expected()) for work in works]
    except RuntimeError as fault:
        if is_out_of_memory(fault):  # a small card, or one with a model on it
            return None
        raise
    race, before = _Race(), None
    others = [options for options in entry.candidates if options != entry.options]
    for options in (entry.options, *others):
        if race.tried > 1 and clock() >= ends:
            break
        race.tried += 1
        took = _time_if_right(entry.kernel, options, works, expected, seconds)
        if took is None:
            race.wrong.append(options)
        elif took < float("inf"):
            race.times.append((took, options))
            if options is entry.options:
                before = took
    if not race.times:
        return None
    best, options = min(race.times, key=lambda pair: pair[0])
    if before is not None and best > CLEARLY_FASTER * before:
        best, options = before, entry.options
    return Found(
        kernel=entry.kernel,
        bound=entry.bound,
        options=options,
        seconds=best,
        before=before,
        tried=race.tried,
        left=1 + len(others) - race.tried,
        wrong=tuple(race.wrong),
    )


def _time_if_right(
    kernel: str,
    options: Launch,
    works: Sequence[Work],
    expected: Sequence[Tensor],
    seconds: Seconds,
) -> float | None:
    """Seconds of the works under these options; None if one gives wrong numbers, infinity if one does not run."""
    with tuning.trying(kernel, options):
        try:
            for work, right in zip(works, expected, strict=True):
                got = _numbers_of((work.check or work.run)())
                error = float((got - right).norm() / right.norm())
                if not error <= LARGEST_ERROR:  # NaN too
                    return None
            return sum(seconds(work.run) for work in works)
        except RuntimeError:  # out of shared memory, registers or, with large tiles, memory
            return float("inf")


def seconds_on(device: torch.device) -> Seconds:
    """What a GPU takes for a work that is launched: by its own clock, several launches in a row, the least of some."""
    import torch

    def seconds(run: Callable[[], object]) -> float:
        run()
        least = float("inf")
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            begin.record()
            for _ in range(LAUNCHES):
                run()
            end.record()
            end.synchronize()
            least = min(least, begin.elapsed_time(end) / 1e3 / LAUNCHES)
        return least

    return seconds


def entries_for(device: torch.device, capability: int, sizes: Sizes | None = None) -> list[Entry]:
    """What is to be tuned on a device of this compute capability, quick entries first."""
    usual = tuning.of_architecture(capability, tuning.known())
    works = _Works(device, sizes or Sizes())
    widths = product((512, 1024, 2048, 4096), (4, 8))
    numbers = product((2048, 4096, 8192, 16384), (4, 8))
    boxes = product((4, 8, 16), (256, 512, 1024), (4, 8))
    kernels: dict[str, tuple[list[Launch], Callable[[int | None], Sequence[Work]]]] = {
        "row": ([{"num_warps": warps} for warps in (2, 4, 8, 16, 32)], works.rows),
        "stretch": ([{"WIDTH": wide, "num_warps": warps} for wide, warps in widths], works.stretches),
        "map": ([{"NUMBERS": many, "num_warps": warps} for many, warps in numbers], works.maps),
        "expand": ([{"ROWS": tall, "WIDTH": wide, "num_warps": warps} for tall, wide, warps in boxes], works.expanding),
    }
    for kind in get_args(Kind):
        if kind == "int8" or capability >= FP8_CAPABILITY:
            kernels[f"{kind} matmul"] = matmul_candidates(), partial(works.products, kind)
    made = []
    for kernel, (candidates, make) in kernels.items():
        for bound, options in usual.get(kernel, ()):
            near = sorted(candidates, key=lambda other: sum(other[name] != options[name] for name in options))
            made.append(Entry(kernel=kernel, bound=bound, options=options, candidates=near, make=partial(make, bound)))
    return sorted(made, key=lambda entry: "matmul" in entry.kernel and (entry.bound is None) + 1)


def matmul_candidates() -> list[Launch]:
    """Tiles that fill a card's matrix units, and enough stages to hide its memory."""
    sizes = product((16, 64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (3, 4))
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    found = (dict(zip(names, values, strict=True)) for values in sizes)
    # A warp makes between 512 and 8192 results: less leaves it idle, more does not fit its registers.
    return [
        {**options, "GROUP_M": 8}
        for options in found
        if 512 <= options["BLOCK_M"] * options["BLOCK_N"] // options["num_warps"] <= 8192
    ]


def as_entries(found: Iterable[Found], usual: Mapping[str, Entries]) -> dict[str, list[list[object]]]:
    """The measured kernels with all their bounds: what was found in the place of what the table has."""
    best = {(one.kernel, one.bound): one.options for one in found}
    kernels = dict.fromkeys(kernel for kernel, _ in best)
    return {
        kernel: [[bound, best.get((kernel, bound), options)] for bound, options in usual[kernel]] for kernel in kernels
    }


def _numbers_of(answer: Tensor | Rounded) -> Tensor:
    return (answer.restore() if isinstance(answer, Rounded) else answer).float()


class _Works:
    """What is launched for each kernel, on random numbers."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self._device, self._sizes = device, sizes

    def rows(self, bound: int | None) -> list[Work]:
        """Norms, and SwiGLU's rounding for the widest; of the bound's own width where the network's is larger."""
        from shared.ops import eager, fused
        from shared.ops.rounding import round_rows

        sizes = self._sizes
        if bound is None:
            w13 = self._numbers(sizes.tokens, 2 * sizes.hidden)
            return [_work(lambda: fused.swiglu(w13, rounding="int8"), lambda: round_rows(eager.swiglu(w13), "int8"))]
        width, heads = min(bound, sizes.width), sizes.heads
        x, y = self._numbers(1, sizes.many, width), self._numbers(1, sizes.many, width)
        weight, factor = self._numbers(width), self._numbers(1, 1, width)

        def next_norm() -> Rounded:
            stream = eager.gate_residual(x, y, factor, weight, 1e-5)
            return round_rows(eager.rms_norm_modulate(stream, weight, factor, 1e-5), "int8")

        made = [
            _work(
                lambda: fused.rms_norm_modulate(x, weight, factor, 1e-5),
                lambda: eager.rms_norm_modulate(x, weight, factor, 1e-5),
            ),
            _work(
                lambda: fused.gate_residual_norm(x, y, factor, weight, weight, factor, 1e-5, rounding="int8")[1],
                next_norm,
            ),
        ]
        if width == sizes.width:  # queries and keys of a token are one row, too
            qkv, head = self._numbers(1, sizes.many, 3 * width), self._numbers(2, width // heads)
            angles = self._numbers(1, sizes.many, 1, width // heads // 2).float()
            turn = partial(eager.qk_norm_rope, qk_weight=head, rope=_rotations(angles), n_heads=heads, eps=1e-5)
            quick = partial(fused.qk_norm_rope, qk_weight=head, rope=_rotations(angles), n_heads=heads, eps=1e-5)
            used = qkv.clone()  # written over, again and again
            made.append(
                _work(lambda: quick(used)[0], lambda: turn(qkv.clone())[0], check=lambda: quick(qkv.clone())[0])
            )
        return made

    def stretches(self, _bound: int | None) -> list[Work]:
        from shared.ops import eager, fused

        w13 = self._numbers(self._sizes.tokens, 2 * self._sizes.hidden)
        return [_work(lambda: fused.swiglu(w13), lambda: eager.swiglu(w13))]

    def maps(self, _bound: int | None) -> list[Work]:
        """A band of the VAE's decoder: a convolution's result finished, and normalised for the next one."""
        import torch

        from shared.ops.maps import MapOperations, eager, fused

        channels, groups = self._sizes.channels, 32
        x, skip = self._numbers(16, self._sizes.tokens, channels), self._numbers(16, self._sizes.tokens, channels)
        bias, factor = x[0, 0].float(), skip[0, 0].float()

        def settled(by: MapOperations) -> Tensor:
            out = torch.empty_like(x)
            by.settle(x, bias=bias, skip=skip, out=out, groups=groups)
            return out

        def normed(by: MapOperations) -> Tensor:
            out = torch.empty_like(x)
            by.normalise(x, factor, bias, out)
            return out

        return [_work(partial(work, fused), partial(work, eager)) for work in (settled, normed)]

    def expanding(self, _bound: int | None) -> list[Work]:
        """4-bit codes at random, in NVFP4's coding."""
        import torch

        from shared.quant.kernels.triton_expand import FourBits, expand
        from shared.quant.packing import Packed
        from shared.quant.packings.nvfp4 import Nvfp4

        rows, columns = 2 * self._sizes.hidden, self._sizes.width
        codes = self._numbers(rows, columns // 2).view(torch.uint8)[:, : columns // 2].contiguous()
        blocks = self._numbers(rows, columns // 16).abs().to(torch.float8_e4m3fn).view(torch.uint8)
        scale = torch.ones(rows, 1, device=self._device)
        tensors = {"codes": codes, "block_scales": blocks, "tensor_scale": scale}
        packed = Packed(Nvfp4(), (rows, columns), tensors)
        weight = FourBits.of(packed)
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=self._device)
        return [_work(lambda: expand(weight, out), lambda: packed.dequantize(torch.bfloat16))]

    def products(self, kind: Kind, bound: int | None) -> list[Work]:
        """The four products of a block."""
        from shared.ops.rounding import round_rows
        from shared.quant.kernels.triton_matmul import scaled_matmul

        width, hidden = self._sizes.width, self._sizes.hidden
        made = []
        for rows, columns in ((3 * width, width), (width, width), (2 * hidden, width), (width, hidden)):
            a = round_rows(self._numbers(bound or self._sizes.tokens, columns), kind)
            b = round_rows(self._numbers(rows, columns), kind)

            def run(a: Rounded = a, b: Rounded = b) -> Tensor:
                return scaled_matmul(a, b.codes, b.scale)

            made.append(_work(run, lambda a=a, b=b: a.restore() @ b.restore().t()))  # type: ignore[misc]
        return made

    def _numbers(self, *shape: int) -> Tensor:
        import torch

        generator = torch.Generator(self._device).manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator, device=self._device, dtype=torch.bfloat16)


def _rotations(angles: Tensor) -> Tensor:
    import torch

    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def _work(
    run: Callable[[], Tensor | Rounded],
    expected: Callable[[], Tensor | Rounded],
    check: Callable[[], Tensor | Rounded] | None = None,
) -> Work:
    """The same; Triton's own errors, which are no kind of RuntimeError, become one."""
    from shared.ops import triton_ready

    def launched(work: Callable[[], Tensor | Rounded]) -> Tensor | Rounded:
        with triton_ready.launching():
            return work()

    return Work(partial(launched, run), expected, None if check is None else partial(launched, check))
