"""Whole pictures on a GPU: one, warm, by stages; and many at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.z_image.bench import forwards, stages, twins
from models.z_image.bench.stand import Stand, Value
from models.z_image.config import TransformerConfig

_CAPTION = 100


def warm(
    stand: Stand,
    config: TransformerConfig | None = None,
    text: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    sides: tuple[int, ...] = (512, 1024, 2048),
    text_layers: int = stages.QWEN3_LAYERS - 1,
) -> None:
    """Prompt to picture with 8 forwards, everything loaded: whole, and our stages alone."""
    both = twins.make(config or TransformerConfig(), torch.bfloat16, stand.device)
    encode, their_encode = stages.encoders(stand, text or stages.QWEN3, text_layers, _CAPTION)
    decode, their_decode = stages.decoders(stand, vae or stages.VAE)
    int8 = twins.packed(both.ours, "int8", stand.folder)
    for side in sides:
        given = twins.scene(both.config, width=side, height=side, caption=_CAPTION, device=stand.device)
        ours = _picture(encode, partial(twins.our_loop, both.ours), decode, given)
        contenders: dict[str, Callable[[], Tensor]] = {"ours": ours}
        contenders["ours int8"] = _picture(encode, partial(twins.our_loop, int8), decode, given)
        contenders["P1"] = _picture(their_encode, partial(twins.their_loop, both.theirs), their_decode, given)
        if stand.wants("P2"):
            fast = forwards.compiled(both.theirs)
            contenders["P2"] = _picture(their_encode, partial(twins.their_loop, fast), their_decode, given)
        facts: dict[str, dict[str, Value]] = {
            who: {"forwards": twins.TURBO_STEPS, "peak_mb": stages.peak_mb(work)} for who, work in contenders.items()
            if stand.wants(who)
        }  # fmt: skip
        whole = stand.compare(f"{side}x{side}", contenders, reference="P1", facts=facts)
        latents = twins.our_loop(both.ours, given)()
        parts: dict[str, Callable[[], Any]] = {
            "ours text": encode,
            "ours denoise": twins.our_loop(both.ours, given),
            "ours decode": partial(decode, latents),
        }
        alone = stand.compare(f"{side}x{side}, stages", parts)
        stand.record(f"{side}x{side}, stages", "ours rest", {"ms": round(whole["ours"] - sum(alone.values()), 4)})


def batches(
    stand: Stand, config: TransformerConfig | None = None, side: int = 1024, counts: tuple[int, ...] = (1, 2, 4, 8, 16)
) -> None:
    """One forward of several pictures of one caption; ms are for all of them together."""
    both = twins.make(config or TransformerConfig(), torch.bfloat16, stand.device)
    one = twins.scene(both.config, width=side, height=side, caption=_CAPTION, device=stand.device)
    int8 = twins.packed(both.ours, "int8", stand.folder)
    for count in counts:
        given = replace(one, latents=one.latents.repeat(count, 1, 1, 1))
        contenders: dict[str, Callable[[], Any]] = {
            "ours": twins.our_forward(both.ours, given),
            "ours int8": twins.our_forward(int8, given),
            "P1": twins.their_forward(both.theirs, given),
        }
        facts: dict[str, dict[str, Value]] = {
            who: {"pictures": count, "peak_mb": stages.peak_mb(work)} for who, work in contenders.items()
            if stand.wants(who)
        }  # fmt: skip
        stand.compare(f"{count} pictures", contenders, reference="P1", facts=facts)


def growth(
    stand: Stand, config: TransformerConfig | None = None, sides: tuple[int, ...] = (512, 768, 1024, 1536, 2048)
) -> None:
    """Straight lines through time over arithmetic, and through peak memory over megapixels, by least squares."""
    both = twins.make(config or TransformerConfig(), torch.bfloat16, stand.device)
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for side in sides:
        given = twins.scene(both.config, width=side, height=side, caption=_CAPTION, device=stand.device)
        contenders: dict[str, Callable[[], Any]] = {
            "ours": twins.our_forward(both.ours, given),
            "P1": twins.their_forward(both.theirs, given),
        }
        peaks = {who: stages.peak_mb(work) for who, work in contenders.items() if stand.wants(who)}
        tflop = twins.forward_flops(both.config, given) / 1e12
        taken = stand.compare(f"{side}x{side}", contenders, facts={who: {"peak_mb": mb} for who, mb in peaks.items()})
        for who, ms in taken.items():
            points.setdefault(who, []).append((tflop, ms, side * side / 1e6, peaks[who]))
    for who, measured in points.items():
        tflops, times, megapixels, megabytes = zip(*measured, strict=True)
        start, slope = _line(tflops, times)
        base, each = _line(megapixels, megabytes)
        figures = {"ms_at_0": start, "ms_per_tflop": slope, "mb_at_0": base, "mb_per_megapixel": each}
        stand.record("fit", who, {name: float(f"{value:.4g}") for name, value in figures.items()})


def _line(x: tuple[float, ...], y: tuple[float, ...]) -> tuple[float, float]:
    """(value at 0, slope) of the line nearest to the points."""
    points = torch.tensor([x, [1.0] * len(x)], dtype=torch.float64).T
    slope, start = torch.linalg.lstsq(points, torch.tensor(y, dtype=torch.float64)[:, None]).solution.flatten().tolist()
    return start, slope


def _picture(
    encode: Callable[[], Tensor],
    loop_of: Callable[[twins.Scene], Callable[[], Tensor]],
    decode: Callable[[Tensor], Tensor],
    given: twins.Scene,
) -> Callable[[], Tensor]:
    def draw() -> Tensor:
        return decode(loop_of(replace(given, features=encode()))())

    return draw
