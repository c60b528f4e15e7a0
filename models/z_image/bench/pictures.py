"""Whole pictures on a GPU: one, warm, by stages; and many at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.z_image.bench import forwards, stages, twins
from models.z_image.bench.stand import Stand, Value
from models.z_image.bench.variations import BASE_STEPS, variations
from models.z_image.config import TransformerConfig

_CAPTION = 100
_REPEATS = 5  # of growth: every size is measured elsewhere, too


def warm(
    stand: Stand,
    config: TransformerConfig | None = None,
    text: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    sides: tuple[int, ...] = (512, 1024, 2048),
    text_layers: int = stages.QWEN3_LAYERS - 1,
    varied: int = 1024,
    base_steps: int = BASE_STEPS,
) -> None:
    """Prompt to picture with 8 forwards, everything loaded: whole, and our stages alone; then what people add to it.

    varied: side of the picture that guidance, NAG, LoRAs and a ControlNet are tried on.
    """
    both = twins.make(config or TransformerConfig(), torch.bfloat16, stand.device)
    _whole(stand, both, text or stages.QWEN3, text_layers, vae or stages.VAE, sides)
    given = twins.scene(both.config, width=varied, height=varied, caption=_CAPTION, device=stand.device)
    variations(stand, both, given, f"{varied}x{varied}", base_steps)


def _whole(
    stand: Stand, both: twins.Twins, text: dict[str, Any], text_layers: int, vae: dict[str, Any], sides: tuple[int, ...]
) -> None:
    encode, their_encode = stages.encoders(stand, text, text_layers, _CAPTION)
    decode, their_decode = stages.decoders(stand, vae)
    int8 = twins.packed(both.ours, "int8", stand.folder)
    for side in sides:
        given = twins.scene(both.config, width=side, height=side, caption=_CAPTION, device=stand.device)
        ours = _picture(encode, partial(twins.our_loop, both.ours), decode, given)
        contenders: dict[str, Callable[[], Tensor]] = {"ours": ours}
        contenders["ours int8"] = _picture(encode, partial(twins.our_loop, int8), decode, given)
        contenders["P1"] = _picture(their_encode, partial(twins.their_loop, both.theirs), their_decode, given)
        if stand.wants("P2"):
            contenders["P2"] = twins.lazily(
                lambda given=given: _picture(  # type: ignore[misc]
                    their_encode, partial(twins.their_loop, forwards.compiled(both.theirs)), their_decode, given
                )
            )
        facts: dict[str, dict[str, Value]] = {who: {"forwards": twins.TURBO_STEPS} for who in contenders}
        whole = stand.compare(f"{side}x{side}", contenders, reference="P1", facts=facts, memory=True, pictures=True)
        latents = twins.our_loop(both.ours, given)()
        parts: dict[str, Callable[[], Any]] = {
            "ours text": encode,
            "ours denoise": twins.our_loop(both.ours, given),
            "ours decode": partial(decode, latents),
        }
        alone = stand.compare(f"{side}x{side}, stages", parts)
        if "ours" in whole and len(alone) == len(parts):
            stand.record(f"{side}x{side}, stages", "ours rest", {"ms": round(whole["ours"] - sum(alone.values()), 4)})


def batches(
    stand: Stand,
    config: TransformerConfig | None = None,
    sizes: tuple[tuple[int, int], ...] = ((1024, 1), (1024, 2), (1024, 4), (1024, 8), (1024, 16), (512, 1), (512, 8)),
) -> None:
    """One forward of several pictures of one caption; ms are for all of them together.

    sizes: (side, pictures at a time).
    """
    both = twins.make(config or TransformerConfig(), torch.bfloat16, stand.device)
    int8 = twins.packed(both.ours, "int8", stand.folder)
    for side, count in sizes:
        one = twins.scene(both.config, width=side, height=side, caption=_CAPTION, device=stand.device)
        given = replace(one, latents=one.latents.repeat(count, 1, 1, 1))
        contenders: dict[str, Callable[[], Any]] = {
            "ours": twins.our_forward(both.ours, given),
            "ours int8": twins.our_forward(int8, given),
            "P1": twins.their_forward(both.theirs, given),
        }
        if stand.wants("P2"):
            contenders["P2"] = _compiled(both, given)
        facts: dict[str, dict[str, Value]] = {who: {"pictures": count} for who in contenders}
        row = f"{count} pictures" + (f" of {side}x{side}" if side != 1024 else "")
        taken = stand.compare(row, contenders, reference="P1", facts=facts, memory=True)
        for who, ms in taken.items():
            stand.record(f"{row}, rate", who, {"pictures_per_s": float(f"{1e3 * count / ms:.4g}")})


def growth(
    stand: Stand,
    config: TransformerConfig | None = None,
    sizes: tuple[tuple[int, int], ...] = ((512, 1), (768, 1), (1024, 1), (1024, 4), (1536, 1), (2048, 1)),
) -> None:
    """Straight lines through time over arithmetic, and through peak memory over megapixels, by least squares.

    sizes: (side, pictures at a time).
    """
    both = twins.make(config or TransformerConfig(), torch.bfloat16, stand.device)
    points: dict[str, list[tuple[float, float, float]]] = {}
    peaks: dict[str, list[tuple[float, float]]] = {}
    for side, count in sizes:
        one = twins.scene(both.config, width=side, height=side, caption=_CAPTION, device=stand.device)
        given = replace(one, latents=one.latents.repeat(count, 1, 1, 1))
        contenders: dict[str, Callable[[], Any]] = {
            "ours": twins.our_forward(both.ours, given),
            "P1": twins.their_forward(both.theirs, given),
        }
        if stand.wants("P2"):
            contenders["P2"] = _compiled(both, given)
        megapixels, tflop = count * side * side / 1e6, count * twins.forward_flops(both.config, one) / 1e12
        facts: dict[str, Value] = {"megapixels": round(megapixels, 3), "gflop": round(1e3 * tflop, 3)}
        row = f"{side}x{side}" + (f", {count} pictures" if count > 1 else "")
        taken = stand.compare(row, contenders, facts=dict.fromkeys(contenders, facts), repeats=_REPEATS, memory=True)
        for who, ms in taken.items():
            points.setdefault(who, []).append((tflop, ms, megapixels))
        for found in stand.rows:
            if found.row == row and "peak_mb" in found.values:
                peaks.setdefault(found.who, []).append((megapixels, float(found.values["peak_mb"])))
    for who, measured in points.items():
        figures = dict(zip(("ms_at_0", "ms_per_tflop"), _line([(x, y) for x, y, _ in measured]), strict=True))
        if len(peaks.get(who, ())) > 1:
            figures |= zip(("mb_at_0", "mb_per_megapixel"), _line(peaks[who]), strict=True)
        stand.record("fit", who, {name: float(f"{value:.4g}") for name, value in figures.items()})


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(value at 0, slope) of the line nearest to the points (x, y)."""
    x = torch.tensor([[x, 1.0] for x, _ in points], dtype=torch.float64)
    y = torch.tensor([[y] for _, y in points], dtype=torch.float64)
    slope, start = torch.linalg.lstsq(x, y).solution.flatten().tolist()
    return start, slope


def _compiled(both: twins.Twins, given: twins.Scene) -> Callable[[], Tensor]:
    return twins.lazily(lambda: twins.their_forward(forwards.compiled(both.theirs), given))


def _picture(
    encode: Callable[[], Tensor],
    loop_of: Callable[[twins.Scene], Callable[[], Tensor]],
    decode: Callable[[Tensor], Tensor],
    given: twins.Scene,
) -> Callable[[], Tensor]:
    def draw() -> Tensor:
        return decode(loop_of(replace(given, features=encode()))())

    return draw
