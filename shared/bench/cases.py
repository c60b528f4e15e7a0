"""What can be measured: one row for each case, and the programs that are measured in the same run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shared.quant.errors import UserError


@dataclass(frozen=True, slots=True)
class Case:
    """One case. peers: keys of PEERS that it can run beside us. A case that needs a GPU is refused without CUDA.

    by_preset: it measures the presets that it is given, and leaves the results of others as they are.
    """

    id: str
    what: str
    shapes: str
    metrics: str
    peers: tuple[str, ...] = ()
    needs_gpu: bool = False
    by_preset: bool = False


PEERS = {
    "P1": "diffusers, eager",
    "P2": "diffusers with torch.compile",
    "P3": "diffusers with optimum-quanto's int8",
    "P4": "diffusers with fp8, activations rounded at every call",
    "P5": "diffusers with",
    "P6": "mmgp",
    "P7": "4-bit weights expanded by comfy-kitchen at every call",
}


@dataclass(frozen=True, slots=True)
class Session:
    """A command for a machine with a GPU. minutes: estimated for an H200 by arithmetic, not measured."""

    command: str
    minutes: float
    settles: str


_BIG = "python -m tests.support.big_model write BIG --kind"
_BENCH = "python wgp.py bench --scratch /dev/shm"

# In order of value: who has half an hour gets as far as he gets. What was measured stays when a run is cut short.
SESSIONS: tuple[Session, ...] = (
    Session("python wgp.py doctor --tune", 2, "how Triton's kernels are launched best on this card"),
    Session(f"{_BENCH} --cases B0,B1 --peers P1", 4, "the roofs, bf16 and int8 forwards of every size, diffusers"),
    Session(f"{_BENCH} --cases B2", 6, "every packed format, its error, quanto, dynamic FP8, expanding at every call"),
    Session(f"{_BENCH} --cases B7,B8,B4 --peers P1 --repeats 5", 4, "text encoder, VAE, pictures at a time"),
    Session(f"{_BENCH} --cases B3 --peers P1 --repeats 3", 4, "whole pictures; guidance, NAG, LoRAs, ControlNet"),
    Session(f"{_BIG} bf16 && {_BIG} int8", 2, "the files that whole programs draw with, 32 GB in random numbers"),
    Session(f"{_BENCH} --cases B6 --preset z_image,z_image_int8 --ckpts BIG --repeats 1", 3,
            "cold starts, peaks of memory, second pictures, changes of model"),
    Session(f"{_BENCH} --cases B5 --preset z_image,z_image_int8 --ckpts BIG --repeats 1 --caps 6,3.5,1.5", 8,
            "streaming under caps, diffusers' offloading, mmgp"),
    Session(f"{_BENCH} --cases B1 --peers P1,P2", 8, "diffusers compiled"),
    Session(f"{_BENCH} --cases B9,B10 --repeats 5", 3, "growth; what a LoRA adds"),
    Session(f"{_BIG} int4 && {_BIG} fp4", 1, "SVDQuant files, 9 GB"),
    Session(f"{_BENCH} --cases B5,B6 --preset z_image_nunchaku_r256_int4,z_image_nunchaku_r128_fp4 --ckpts BIG "
            "--peers none --repeats 1 --caps 4,3,1.5", 4, "4-bit goals of memory"),
)  # fmt: skip

# Compiling takes minutes of what a run may take, so this one is asked for by name.
ON_REQUEST = frozenset({"P2"})

_PICTURES = "512x512 to 2048x2048"

CASES: tuple[Case, ...] = (
    Case("B0", "roofs of the GPU: products, attention, copies, launches", "real layers at 1152, 4224, 16512 tokens",
         "TFLOP/s, GB/s, launches/s", needs_gpu=True),
    Case("B1", "one forward in bf16", f"{_PICTURES}, captions of 32, 100, 512 tokens", "ms, share of the roof, error",
         ("P1", "P2"), needs_gpu=True),
    Case("B2", "one forward of packed weights", "1024x1024, every format", "ms, against our own bf16, error",
         ("P2", "P3", "P4", "P7"), needs_gpu=True),
    Case("B3", "a whole picture, warm", "512x512, 1024x1024, 2048x2048, 8 forwards; guided, NAG, LoRAs, ControlNet",
         "s by stage, peak memory", ("P1", "P2"), needs_gpu=True),
    Case("B4", "pictures at a time", "1024x1024 and 512x512, 1 to 16 pictures", "ms for all, pictures/s, peak memory",
         ("P1", "P2"), needs_gpu=True),
    Case("B5", "a cap on GPU memory, the whole program", "1024x1024, 8 forwards, 24 to 1.5 GB", "s, peak memory",
         ("P5", "P6"), needs_gpu=True, by_preset=True),
    Case("B6", "cold start, second pictures, changes of model: the whole program", "1024x1024, 8 forwards",
         "s by stage, peak memory", ("P1",), needs_gpu=True, by_preset=True),
    Case("B7", "text encoder", "20, 100, 512 tokens, and one known already", "ms, error", ("P1",), needs_gpu=True),
    Case("B8", "VAE decode: in one piece, in bands, in tiles", _PICTURES, "ms, peak memory, error", ("P1",),
         needs_gpu=True),
    Case("B9", "growth of time and memory with the picture", _PICTURES, "ms per TFLOP, GB per megapixel", ("P1", "P2"),
         needs_gpu=True),
    Case("B10", "a LoRA of rank 32 on every block", "1024x1024", "ms, error", ("P1",), needs_gpu=True),
    Case("C0", "roofs of one CPU core: products, attention, copies", "real layers at 512 and 1024 tokens", "GFLOP/s"),
    Case("C1", "dispatch: what a forward costs beside its arithmetic", "34 blocks, dim 128, 64 tokens",
         "CPU ms, aten ops, error", ("P1", "P2")),
    Case("C2", "small models", "dim 256, 512, 768; 96 and 320 tokens; float32 and bf16", "CPU ms, error", ("P1", "P2")),
    Case("C3", "one block of real width, in every kind of weight", "dim 3840; 384 to 4224 tokens", "CPU ms, error",
         ("P1", "P2", "P3", "P7")),
    Case("C4", "the whole program on a CPU", "256x256, 2 and 8 forwards and decode", "CPU s, peak memory",
         by_preset=True),
    Case("C5", "opening and mapping a large file", "bf16 in two layouts, twelve other kinds, text encoders, VAE",
         "s, own memory",
         ("P1", "P6")),
    Case("C6", "schedule of streamed weights, simulated", "34 blocks through a link of 12 to 50 GB/s",
         "time not hidden behind arithmetic"),
    Case("C7", "exact counters", "forwards per picture; ops, bytes and host reads per forward", "integers, gated"),
    Case("C8", "text encoder", "100 tokens, two layers of real width", "CPU ms, error", ("P1",)),
    Case("C9", "VAE decode", "128x128 pixels, real width", "CPU ms, error", ("P1",)),
    Case("C10", "a LoRA of rank 32 on one block of real width, another file on the demo", "dim 3840; 1024 tokens",
         "CPU ms, error", ("P1",)),
)  # fmt: skip


def select_cases(text: str) -> list[Case]:
    """Cases by a comma-separated list of ids and patterns (`C*`, `B1,B3`), in the table's order.

    Raises UserError for one that fits nothing.
    """
    wanted = [part.strip().upper() for part in text.split(",") if part.strip()]
    if not wanted:
        raise UserError("--cases names no case.", f"Known: {', '.join(case.id for case in CASES)}; C* takes all of C.")
    for part in wanted:
        if not any(fnmatchcase(case.id, part) for case in CASES):
            close = difflib.get_close_matches(part, [case.id for case in CASES], n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise UserError(f"There is no case {part!r}.", f"{hint}Known: {', '.join(case.id for case in CASES)}.")
    return [case for case in CASES if any(fnmatchcase(case.id, part) for part in wanted)]


def select_peers(text: str | None) -> frozenset[str]:
    """Peers by a comma-separated list, `all` or `none`; None takes all but those of ON_REQUEST.

    Raises UserError for an unknown one.
    """
    if text is None:
        return frozenset(PEERS) - ON_REQUEST
    if text.strip().lower() in ("all", "none"):
        return frozenset(PEERS) if text.strip().lower() == "all" else frozenset()
    wanted = [part.strip().upper() for part in text.split(",") if part.strip()]
    if unknown := [part for part in wanted if part not in PEERS]:
        raise UserError(f"There is no peer {unknown[0]!r}.", f"Known: {_listed()}; all, none.")
    return frozenset(wanted)


def _listed() -> str:
    return ", ".join(f"{name} ({what})" for name, what in PEERS.items())


def table(cases: Sequence[Case] = CASES) -> str:
    """The cases for people, one line each."""
    return "\n".join(
        f"{case.id}  {case.what}; {case.shapes}{'; needs a GPU' if case.needs_gpu else ''}" for case in cases
    )
