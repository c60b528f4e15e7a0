"""Every figure this program is to reach: a row of the results page each, measured or not.

Published figures are from their sources' own pages (named in `peer`); floors are arithmetic over what the hardware can
do at best. A goal that is two things ("and") is two rows. Ratios are of one run: the peer's figure over ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor as whole
from typing import Literal

from shared.bench.floors import ATTENTION, DEVICE_MEMORY, Loaded, Network, Streamed, Work, together

Hardware = Literal["H200", "GPU", "CPU"]
WORST = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Where a goal's figure stands in the results.

    case, row, who, key: of our figure; with WORST for a row, that of our rows which is furthest from the goal. per:
    another of its values to divide it by. versus: the contender whose figure is divided by ours (ours by it, if
    `inverse`), from `versus_row` where that is another row. bound: what the figure or the quotient is held against.
    at_most: else at least. scale: makes our figure one in `unit`. floor: what the machine itself would need, by its
    measured roofs: the figure is then its percentage of ours (`scale` makes ours ms), or, if `inverse`, how many times
    as long ours takes.
    """

    case: str
    row: str
    bound: float
    who: str = "ours"
    key: str = "ms"
    per: str = ""
    versus: str = ""
    versus_row: str = ""
    inverse: bool = False
    at_most: bool = True
    scale: float = 1.0
    unit: str = "ms"
    floor: Work | Streamed | Loaded | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """section: heading of the page. floor, peer: what is known beforehand, in words. check: None if no case tells.

    reason: why it is not reached, where that is known.
    """

    section: str
    metric: str
    goal: str
    hardware: Hardware
    check: Check | None = None
    floor: str = ""
    peer: str = ""
    reason: str = ""


SPEED, MEMORY, GROWTH, COLD, CPU = (
    "Speed on an H200",
    "Memory at 1024x1024",
    "Growth",
    "Cold start",
    "One CPU core",
)


def _speed(
    metric: str, goal: str, check: Check, floor: str = "", peer: str = "", work: Work | None = None
) -> tuple[Goal, ...]:
    """A goal for an H200, and where its work is known the same as a share of the roofs measured there.

    The share is the one that the goal is of the floor by ASSUMED rates, so that it holds on a card of other rates.
    """
    first = Goal(section=SPEED, metric=metric, goal=goal, hardware="H200", check=check, floor=floor, peer=peer)
    if work is None:
        return (first,)
    at_best = work.at(ASSUMED)
    assert at_best is not None  # rates of everything are assumed
    to_ms = 1e3 if check.unit == "s" else 1.0
    share = whole(100 * at_best / (check.bound * to_ms))
    held = replace(check, bound=share, at_most=False, unit="%", scale=1.0, floor=work)
    return (first, replace(first, metric=f"{metric}, of this machine's roofs", goal=f">= {share} %", hardware="GPU",
                           check=held, floor="100 %", peer=""))  # fmt: skip


def _cpu(metric: str, goal: str, check: Check, floor: str = "", peer: str = "", reason: str = "") -> Goal:
    return Goal(
        section=CPU, metric=metric, goal=goal, hardware="CPU", check=check, floor=floor, peer=peer, reason=reason
    )


def _faster(case: str, row: str, bound: float, versus: str, *, who: str = "ours", key: str = "ms") -> Check:
    """At least `bound` times as fast as another contender of the row."""
    return Check(case=case, row=row, bound=bound, who=who, versus=versus, key=key, at_most=False, unit="x")


def _within(case: str, row: str, bound: float, versus: str, *, who: str = "ours") -> Check:
    """At most `bound` times the time of another contender of the row."""
    return Check(case=case, row=row, bound=bound, who=who, versus=versus, inverse=True, unit="x")


_MIB = 2**20 / 1e9

# What an H200 was taken to do before anybody measured: GFLOP and GB per ms.
ASSUMED: Mapping[str, float] = {"bf16": 790.0, "int8": 1300.0, "fp8": 1300.0, ATTENTION: 600.0, DEVICE_MEMORY: 4.3}

# The arithmetic of the 6B model (refiners are bf16 in int8 files), of prompts of 100 tokens, of a picture's decoder
# and of the text encoder's 35 layers.
_NETWORK, _CAPTION = Network(), 100
# Of the prompt that whole programs draw, in its template, by the demo's tokenizer.
PROMPT_TOKENS = 45
_BF16, _BITS8 = ("bf16",), ("int8", "fp8")
_DECODE = {512: Work(products={_BF16: 2520.0}, roofs="B0"), 1024: Work(products={_BF16: 10470.0}, roofs="B0")}
_TEXT = Work(products={_BF16: 730.0}, gigabytes=7.06, roofs="B0")


def _forward(side: int, types: tuple[str, ...] = _BF16, *, forwards: int = 1, pictures: int = 1) -> Work:
    return _NETWORK.work(side, _CAPTION, types, roofs="B0", forwards=forwards, pictures=pictures)


def _picture(side: int, types: tuple[str, ...] = _BF16) -> Work:
    return together(_forward(side, types, forwards=8), _TEXT, _DECODE[side])


_H100 = "SGLang on an H100"
_B200 = "diffusers on a B200 (Unsloth)"

GOALS: tuple[Goal, ...] = (
    *_speed("bf16 forward, 1024x1024", "<= 80 ms", Check(case="B1", row="1024x1024, caption 100", bound=80),
            "71.5 ms", f"90.0 ms {_H100}", work=_forward(1024)),
    *_speed("8-bit forward, 1024x1024", "<= 58 ms",
            Check(case="B2", row="int8, 1024x1024", who="ours int8", bound=58), "41 to 51 ms", "74 ms vLLM-Omni fp8",
            work=_forward(1024, _BITS8)),
    *_speed("int4 r256 forward, 1024x1024", "<= 80 ms, as our bf16",
            Check(case="B2", row="svdq_int4 r256, 1024x1024", who="ours svdq_int4 r256", bound=80), "57 ms"),
    *_speed("fp4 r128 forward, 1024x1024", "<= 80 ms, as our bf16",
            Check(case="B2", row="svdq_fp4 r128, 1024x1024", who="ours svdq_fp4 r128", bound=80), "54 ms"),
    *(goal for kind, name in (("svdq_int4 r256", "int4 r256"), ("svdq_fp4 r128", "fp4 r128")) for goal in _speed(
        f"{name} forward, 1024x1024, against our bf16", "<= 1 x its time",
        _within("B2", f"{kind}, 1024x1024", 1.0, "ours bf16", who=f"ours {kind}"), "1 x")),
    *_speed("bf16 forward, 512x512", "<= 20.5 ms", Check(case="B1", row="512x512, caption 100", bound=20.5), "17.2 ms",
            f"17 ms {_B200}, CUDA graph", work=_forward(512)),
    *_speed("bf16 forward, 2048x2048", "<= 500 ms", Check(case="B1", row="2048x2048, caption 100", bound=500),
            "406 ms", f"598 ms {_H100}", work=_forward(2048)),
    *_speed("picture 1024x1024, 8 forwards, bf16", "<= 0.69 s",
            Check(case="B3", row="1024x1024", bound=0.69, scale=1e-3, unit="s"), "0.587 s",
            f"0.906 s {_H100}, 9 forwards; 0.671 s {_B200}", work=_picture(1024)),
    *_speed("picture 1024x1024, 8 forwards, 8-bit", "<= 0.50 s",
            Check(case="B3", row="1024x1024", who="ours int8", bound=0.5, scale=1e-3, unit="s"), "0.35 to 0.43 s",
            f"0.585 s {_B200}", work=_picture(1024, _BITS8)),
    *_speed("picture 512x512, bf16", "<= 0.185 s", Check(case="B3", row="512x512", bound=0.185, scale=1e-3, unit="s"),
            "0.142 s", f"0.155 s {_B200}, CUDA graph, 9 forwards", work=_picture(512)),
    *_speed("picture 512x512, 8-bit", "<= 0.14 s",
            Check(case="B3", row="512x512", who="ours int8", bound=0.14, scale=1e-3, unit="s"), "0.09 s",
            work=_picture(512, _BITS8)),
    *_speed("pictures per second, 1024x1024, 8 at a time, bf16", ">= 1.5 /s: a forward of all 8 in <= 667 ms",
            Check(case="B4", row="8 pictures", bound=667), "588 ms", f"about 1.2 /s {_H100}",
            work=_forward(1024, pictures=8)),
    *_speed("the same in 8-bit", ">= 2.1 /s: a forward of all 8 in <= 476 ms",
            Check(case="B4", row="8 pictures", who="ours int8", bound=476), "417 ms",
            work=_forward(1024, _BITS8, pictures=8)),
    *_speed("text encoder, 100 tokens", "<= 12 ms", Check(case="B7", row="100 tokens", bound=12), "2 ms",
            f"129 ms {_H100}; 8 ms TensorRT on a GB300", work=_TEXT),
    *_speed("text encoder, prompt known", "<= 0.2 ms",
            Check(case="B7", row="100 tokens", who="ours known prompt", bound=0.2), "0 ms"),
    *_speed("VAE decode, 1024x1024", "<= 25 ms", Check(case="B8", row="1024x1024", bound=25), "13 ms",
            "30 ms TensorRT on a GB300", work=_DECODE[1024]),
    *_speed("VAE decode, 1024x1024, likeness to float32's", "SSIM >= 0.999",
            Check(case="B8", row="1024x1024", key="ssim", bound=0.999, at_most=False, unit=""), "1"),
    *_speed("what a picture of 1024x1024 takes beside its stages", "<= 5 ms",
            Check(case="B3", row="1024x1024, stages", who="ours rest", bound=5), "0 ms", f"25 to 40 ms {_H100}"),
    *_speed("answers the host waits for inside the loop", "0",
            Check(case="C7", row="the loop of 8 steps", key="host_reads", bound=0, unit=""), "0"),
    *_speed("1024x1024 against diffusers eager", ">= 1.5 x", _faster("B1", "1024x1024, caption 100", 1.5, "P1")),
    *_speed("1024x1024 against diffusers compiled, bf16", ">= 1.10 x",
            _faster("B1", "1024x1024, caption 100", 1.1, "P2")),
    *_speed("1024x1024, our int8 against diffusers compiled in bf16", ">= 1.6 x",
            _faster("B1", "1024x1024, caption 100", 1.6, "P2", who="ours int8")),
    *_speed("1024x1024 against quanto, int8", ">= 3 x", _faster("B2", "int8, 1024x1024", 3, "P3", who="ours int8")),
    *_speed("1024x1024, our fp8 against diffusers with dynamic fp8", ">= 1 x",
            _faster("B2", "fp8_scaled, 1024x1024", 1, "P4", who="ours fp8_scaled")),
    *_speed("1024x1024 against expanding at every call", ">= 5 x",
            _faster("B2", "nvfp4, 1024x1024", 5, "P7", who="ours nvfp4")),
    *_speed("512x512 against diffusers eager", ">= 2.0 x", _faster("B1", "512x512, caption 100", 2, "P1")),
    *_speed("512x512 against diffusers compiled", ">= 1.3 x", _faster("B1", "512x512, caption 100", 1.3, "P2")),
    *(
        Goal(section=MEMORY, metric=f"{variant}, all on the GPU", goal=f"<= {most} GB", hardware="GPU", floor=weights,
             check=Check(case="B6", row=f"{preset}, 1024x1024", key="peak_vram_mb", bound=most, scale=_MIB, unit="GB"))
        for variant, preset, most, weights in (
            ("bf16", "z_image", 12.8, "12.31 GB of weights"), ("int8", "z_image_int8", 6.8, "6.30 GB"),
            ("int4 r256", "z_image_nunchaku_r256_int4", 5.0, "4.54 GB"),
            ("fp4 r128", "z_image_nunchaku_r128_fp4", 4.7, "4.20 GB"),
        )
    ),
    *(
        Goal(section=MEMORY, metric=f"VAE decode, {side}x{side}, {how}, beyond its weights", goal="<= 0.5 GB",
             hardware="GPU", check=Check(case="B8", row=f"{side}x{side}", who=f"ours {how}", key="peak_mb", bound=0.5,
                                         scale=1e-3, unit="GB"))
        for side, how in ((1024, "in bands"), (2048, "tiled"))
    ),
    *(
        Goal(section=MEMORY, metric=f"a forward in {name}, streamed in {cap}", hardware="GPU", peer=peer,
             goal="<= 1.1 x computing, or copying what has no room", floor="1 x: the longer of the two",
             check=Check(case="B5", row=f"{preset}, {cap}", key="denoise_seconds", per="forwards", scale=1e3, bound=1.1,
                         inverse=True, unit="x", floor=Streamed(computing=(f"{preset}, no cap", "ours"))))
        for name, preset, cap, peer in (
            ("bf16", "z_image", "6 GB", ""), ("int8", "z_image_int8", "3.5 GB", ""), ("bf16", "z_image", "1.5 GB", ""),
        )
    ),
    *(
        Goal(section=MEMORY, metric=f"{variant}, streamed in {cap} GB", goal=f"<= {slower} x the time without a cap",
             hardware="GPU",
             check=Check(case="B5", row=f"{preset}, {cap} GB", key="denoise_seconds", bound=slower, versus="ours",
                         versus_row=f"{preset}, no cap", inverse=True, unit="x"))
        for variant, preset, cap, slower in (
            ("int4 r256", "z_image_nunchaku_r256_int4", 4, 1.05), ("fp4 r128", "z_image_nunchaku_r128_fp4", 3, 1.10),
        )
    ),
    *(
        Goal(section=MEMORY, metric=f"{name}, streamed in {most:g} GB, {side}", goal=f"<= {most:g} GB", hardware="GPU",
             floor=f"two blocks: {blocks} GB", peer="1.2 GB ComfyUI" if preset == "z_image" else "",
             check=Check(case="B5", row=f"{preset}, {row}", key="peak_vram_mb", bound=most, scale=_MIB, unit="GB"))
        for name, preset, blocks in (
            ("bf16", "z_image", "0.71"), ("int8", "z_image_int8", "0.36"),
            ("int4 r256", "z_image_nunchaku_r256_int4", "0.27"), ("fp4 r128", "z_image_nunchaku_r128_fp4", "0.25"),
        )
        for most, side, row in ((1.5, "1024x1024", "1.5 GB"), (1.9, "2048x2048", "2048x2048, 1.9 GB"))
    ),
    *(
        Goal(section=MEMORY, metric=f"bf16 in 6 GB against diffusers with {way}", goal=f">= {bound} x", hardware="GPU",
             check=_faster("B5", "z_image, 6 GB", bound, f"P5 {way}", key="denoise_seconds"))
        for way, bound in (("sequential offload", 5), ("group offload, blocks", 1.5), ("group offload, leaves", 1.5))
    ),
    Goal(section=MEMORY, metric="bf16 in 6 GB against mmgp's profile 4", goal=">= 1.2 x", hardware="GPU",
         check=_faster("B5", "z_image, 6 GB", 1.2, "P6 profile 4", key="denoise_seconds")),
    Goal(section=MEMORY, metric="int8 in 3 GB over 12 GB/s on a 4090's class, simulated", goal="<= 1.1 x the floor",
         hardware="CPU", floor="1 x: the longer of copying and computing",
         check=Check(case="C6", row="int8, 4090 class, 12 GB/s, in 3 GB", key="over_floor", bound=1.1, unit="x")),
    Goal(section=MEMORY, metric="activations of a forward beyond the weights (C7's count)", goal="<= 0.25 GB",
         hardware="CPU",
         check=Check(case="C7", row="3 of 34 blocks, 1024x1024, bf16", key="scratch_bytes", bound=0.25, scale=1e-9,
                     unit="GB")),
    Goal(section=GROWTH, metric="memory for each further megapixel", goal="<= 0.25 GB", hardware="GPU",
         check=Check(case="B9", row="fit", key="mb_per_megapixel", bound=0.25, scale=1e-3, unit="GB")),
    Goal(section=GROWTH, metric="a block's time per FLOP, 1024x1024 against 512x512, one core", goal="within 25 %",
         hardware="CPU", floor="1 x",
         check=Check(case="C3", row="growth, 512x512", bound=1.25, per="gflop", versus="ours",
                     versus_row="growth, 1024x1024", unit="x")),
    *(
        Goal(section=GROWTH, metric=f"bf16 forward, time per FLOP, {side}x{side} against 2048x2048",
             goal=f"within {percent} %", hardware="GPU", floor="1 x",
             check=Check(case="B1", row="2048x2048, caption 100", bound=1 + percent / 100, per="gflop", versus="ours",
                         versus_row=f"{side}x{side}, caption 100", unit="x"))
        for side, percent in ((768, 12), (512, 25))
    ),
    Goal(section=GROWTH, metric="bf16 forward, time per FLOP, a caption of 512 tokens against one of 100",
         goal="within 5 %", hardware="GPU", floor="1 x",
         check=Check(case="B1", row="1024x1024, caption 100", bound=1.05, per="gflop", versus="ours",
                     versus_row="1024x1024, caption 512", unit="x")),
    Goal(section=GROWTH, metric="8 pictures of 512x512 at a time against one", goal="<= 6.8 x its time", hardware="GPU",
         floor="8 x in arithmetic",
         check=Check(case="B4", row="8 pictures of 512x512", bound=6.8, versus="ours",
                     versus_row="1 pictures of 512x512", inverse=True, unit="x")),
    Goal(section=GROWTH, metric="8 pictures at a time against one", goal="<= 7.84 x its time", hardware="GPU",
         floor="8 x in arithmetic",
         check=Check(case="B4", row="8 pictures", bound=7.84, versus="ours", versus_row="1 pictures", inverse=True,
                     unit="x")),
    Goal(section=GROWTH, metric="16 pictures at a time, 1024x1024, bf16, beyond 12.3 GB of weights", goal="<= 4.2 GB",
         hardware="GPU", check=Check(case="B4", row="16 pictures", key="peak_mb", bound=4.2, scale=1e-3, unit="GB")),
    Goal(section=GROWTH, metric="2048x2048 in int8", goal="<= 7.6 GB", hardware="GPU", floor="6.30 GB of weights",
         check=Check(case="B6", row="z_image_int8, 2048x2048", key="peak_vram_mb", bound=7.6, scale=_MIB, unit="GB")),
    *(
        Goal(section=COLD, metric=f"process start to first picture, {name}", goal=f"<= {most} s", hardware="H200",
             peer="28 s SGLang's load",
             check=Check(case="B6", row=f"{preset}, 1024x1024", key="wall_seconds", bound=most, unit="s"))
        for name, preset, most in (("bf16", "z_image", 6), ("int8", "z_image_int8", 4.5))
    ),
    Goal(section=COLD, metric="loading and first picture, bf16, against diffusers", goal=">= 3 x", hardware="GPU",
         check=_faster("B6", "z_image, 1024x1024", 3, "P1", key="stages_seconds")),
    *(
        Goal(section=COLD, metric=f"loading, {name}, of reading's or the link's rate, whichever is lower",
             goal=">= 70 %", hardware="GPU", floor="100 %",
             check=Check(case="B6", row=f"{preset}, 1024x1024", key="ready_seconds", scale=1e3, bound=70, at_most=False,
                         unit="%", floor=Loaded()))
        for name, preset in (("bf16", "z_image"), ("int8", "z_image_int8"))
    ),
    Goal(section=COLD, metric="first picture after loading, bf16, against the next", goal="<= 1.5 x its time",
         hardware="GPU", check=Check(case="B6", row="one process: z_image, first picture", key="denoise_seconds",
                                     bound=1.5, versus="ours", versus_row="one process: z_image, second picture",
                                     inverse=True, unit="x")),
    Goal(section=COLD, metric="opening 12.3 GB in the official names", goal="<= 0.35 s", hardware="CPU",
         check=Check(case="C5", row="12.3 GB, official names", key="seconds", bound=0.35, unit="s")),
    Goal(section=COLD, metric="own memory after opening it", goal="<= 5 % of the file", hardware="CPU",
         check=Check(case="C5", row="12.3 GB, official names", key="own_mb", bound=5, scale=100 / 12310, unit="%")),
    *(
        Goal(section=COLD, metric=f"opening any kind of file{words}, the slowest, of 0.1 s + 0.02 s/GB",
             goal="<= 100 %", hardware="CPU",
             check=Check(case="C5", row=WORST, who=who, key="of_limit", bound=100, unit="%"))
        for who, words in (("ours", ""), ("ours for a GPU", " for a GPU"))
    ),
    Goal(section=COLD, metric="own memory once every layer was used, of the file, the most of any kind",
         goal="<= 110 %", hardware="CPU",
         check=Check(case="C5", row=WORST, key="used_own_mb", per="gb", scale=0.1, bound=110, unit="%")),
    _cpu("dispatch of 34 blocks (C1)", ">= 3 x diffusers", _faster("C1", "one forward", 3, "P1")),
    _cpu("dispatch of 34 blocks (C1)", "<= 6.3 ms", Check(case="C1", row="one forward", bound=6.3),
         reason="the goal is of a core on which diffusers takes 18.8 ms; the one before is the same as a ratio"),
    _cpu("dim 256, 96 tokens, bf16 (C2)", ">= 2 x diffusers", _faster("C2", "dim 256, 96 tokens, bf16", 2, "P1")),
    _cpu("dim 256, 96 tokens, bf16 (C2)", "<= 1.5 x the bare products",
         _within("C2", "dim 256, 96 tokens, bf16", 1.5, "raw"), "1 x"),
    _cpu("real block, bf16, 1024 tokens (C3)", ">= 1.10 x diffusers", _faster("C3", "bf16, 1024 tokens", 1.1, "P1")),
    _cpu("real block, int8, against diffusers' bf16 (C3)", ">= 1.6 x",
         _faster("C3", "int8, 1024 tokens", 1.6, "P1", who="ours int8")),
    _cpu("real block, int8, against quanto's (C3)", ">= 5 x",
         _faster("C3", "int8, 1024 tokens", 5, "P3", who="ours int8")),
    _cpu("real block, int8, 1024 tokens, of this machine's roofs (C3, C0)", ">= 70 %",
         Check(case="C3", row="int8, 1024 tokens", who="ours int8", bound=70, at_most=False, unit="%",
               floor=_NETWORK.block(1024, ("int8",), roofs="C0")), "100 %"),
    _cpu("real block, nvfp4, against our int8 (C3)", "<= 1.15 x its time",
         _within("C3", "4-bit, 1024 tokens", 1.15, "ours int8", who="ours nvfp4"), "1 x"),
    _cpu("real block, int4 r128, against our int8 (C3)", "<= 1.15 x its time",
         _within("C3", "4-bit, 1024 tokens", 1.15, "ours int8", who="ours int4 r128"), "1 x"),
    _cpu("8 forwards of 256x256, int8 (C4)", "<= 50 s",
         Check(case="C4", row="z_image_int8, 256x256, 8 forwards", key="forwards_cpu_seconds", bound=50, unit="s"),
         floor="35 s at 1,000 GOP/s, which was assumed", peer="80 to 90 s diffusers in bf16, estimated",
         reason="the goal assumes 1,000 GOP/s of int8 products, which this machine's C0 does not reach; the next goal "
         "is the same by measured rates"),
    _cpu("8 forwards of 256x256, int8, of this machine's roofs (C4, C0)", ">= 70 %",
         Check(case="C4", row="z_image_int8, 256x256, 8 forwards", key="forwards_cpu_seconds", bound=70, at_most=False,
               unit="%", scale=1e3, floor=_NETWORK.work(256, PROMPT_TOKENS, ("int8",), roofs="C0", forwards=8,
                                                        refined_in=_BF16)), "100 %"),
    _cpu("RAM of the whole program, int8, 256x256 (C4)", "<= 8.5 GB",
         Check(case="C4", row="z_image_int8, 256x256, 8 forwards", key="peak_rss_mb", bound=8.5, scale=_MIB, unit="GB"),
         "6.9 GB of weights"),
    _cpu("VAE decode 128x128 against diffusers' in float32 (C9)", ">= 2.5 x",
         _faster("C9", "128x128", 2.5, "P1 float32", who="ours fast")),
    _cpu("text encoder, 100 tokens against padded to 512 (C8)", ">= 4 x", _faster("C8", "100 tokens", 4, "P1"),
         "5.12 x: the tokens' ratio"),
)  # fmt: skip
