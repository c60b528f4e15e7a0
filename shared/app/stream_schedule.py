"""Which blocks of a model stay on a GPU, and how long a pass waits for the copies of the others: arithmetic, no torch.

The streamer (streamer/) works as follows, and `simulate` plays the same with a copy rate and computing times:

    blocks  run in a fixed order, pass after pass; some are resident, the others are copied to the GPU for each pass
    ring    of `depth` buffers: one block computes in its buffer while the next streamed one is copied to another
    copies  one after the other; each begins when the copy before has ended and its buffer's last block has computed
    compute a block begins when the block before has ended and its own copy has arrived

A pass takes at least as long as its computing, and as its copying. With depth 2 it takes little more than the longer of
the two: what is added, the exposed copy time, is what `simulate` tells. The host is taken to be ahead of the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DEPTH = 2  # buffers of the ring: one computes, one fills; a third would hide nothing more of equal blocks
HOST_TABLE_BYTES = 64 * 2**20  # an embedding table below this is not worth the way to the host and back
ALIGNMENT = 256  # bytes; every tensor of a block begins at a multiple, which serves all kernels


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a pass. nbytes: of its weights. seconds: it computes."""

    nbytes: int
    seconds: float
    resident: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTime:
    """One pass through all blocks. seconds: from its first to its last moment on the GPU.

    exposed_seconds: of these it computed nothing, for want of weights. copied_bytes: of the blocks that were streamed.
    """

    seconds: float
    compute_seconds: float
    exposed_seconds: float
    copied_bytes: int


def simulate(
    blocks: Sequence[Block], copy_rate: float, *, depth: int = DEPTH, passes: int = 3, wraps: bool = True
) -> list[PassTime]:
    """Time `passes` passes through `blocks`; the first begins with an empty ring, the last is as all later ones.

    copy_rate: bytes per second to the GPU. depth: buffers of the ring, from 1 on. wraps: whether the first blocks of
    the next pass are fetched during the last blocks of this one; else a pass begins its copies when it begins.
    """
    if copy_rate <= 0 or depth < 1:
        raise ValueError(f"copy_rate must be above 0 and depth at least 1, got {copy_rate} and {depth}")
    copied_at = computed_at = 0.0
    freed = [0.0] * depth  # when each buffer's last block has computed, the longest free first
    times = []
    for _ in range(passes):
        began = computed_at
        exposed, copied = 0.0, 0
        if not wraps:
            copied_at = max(copied_at, began)
            freed = [max(at, began) for at in freed]
        for block in blocks:
            ready = computed_at
            if not block.resident:
                copied_at = max(copied_at, freed.pop(0)) + block.nbytes / copy_rate
                ready = copied_at
                copied += block.nbytes
            start = max(computed_at, ready)
            exposed += start - computed_at
            computed_at = start + block.seconds
            if not block.resident:
                freed.append(computed_at)
        times.append(
            PassTime(
                seconds=computed_at - began,
                compute_seconds=sum(block.seconds for block in blocks),
                exposed_seconds=exposed,
                copied_bytes=copied,
            )
        )
    return times


def choose_resident(sizes: Sequence[int], budget: int, *, depth: int = DEPTH) -> tuple[bool, ...]:
    """Which of a model's blocks stay on the GPU when `budget` bytes are for blocks and ring together.

    All if they fit. Else as many as fit beside a ring for the largest streamed block, spread evenly over the pass, so
    that each copy has several blocks' computing to hide behind.
    """
    if sum(sizes) <= budget:
        return (True,) * len(sizes)
    for count in range(len(sizes) - 1, 0, -1):
        chosen = _spread(len(sizes), count)
        if held_bytes(sizes, chosen, depth=depth) <= budget:
            return chosen
    return (False,) * len(sizes)


def held_bytes(sizes: Sequence[int], resident: Sequence[bool], *, depth: int = DEPTH) -> int:
    """Bytes on the GPU with these blocks resident: they, and the ring for the others."""
    streamed = [size for size, stays in zip(sizes, resident, strict=True) if not stays]
    return sum(sizes) - sum(streamed) + min(depth, len(streamed)) * max(streamed, default=0)


def _spread(length: int, count: int) -> tuple[bool, ...]:
    return tuple((i + 1) * count // length > i * count // length for i in range(length))
