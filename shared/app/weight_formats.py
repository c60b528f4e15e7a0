"""Formats of published weights by their files' names: bits for each parameter, and the GPUs that each is refused on."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """A format of weights: how files of it are named, bits per parameter of a whole file, and where it is refused.

    pattern: of the lower-case file name. packing: beginning of the packing's name (shared/quant/packings), "" for plain
    numbers. from_capability, below_capability: GPUs outside are refused with `refusal`.
    """

    name: str
    pattern: str
    bits: float
    packing: str
    from_capability: int = 0
    below_capability: int = 1000
    refusal: str = ""


_NO_FP4 = "FP4 is fast from compute capability 10.0 on (Blackwell); take INT4 or int8 on this GPU"
_NO_INT4 = "the tensor cores of compute capability 12.0 have no 4-bit integers; take FP4 on this GPU"


def _fp4(name: str, pattern: str, bits: float, packing: str) -> WeightFormat:
    return WeightFormat(name=name, pattern=pattern, bits=bits, packing=packing, from_capability=100, refusal=_NO_FP4)


def _int4(name: str, pattern: str, bits: float) -> WeightFormat:
    return WeightFormat(name=name, pattern=pattern, bits=bits, packing="svdq", below_capability=120, refusal=_NO_INT4)


# First match wins. Bits: published Z-Image files of 6.155e9 parameters (svdq int4 of rank 32, 128, 256: 3.61, 4.01 and
# 4.55 GB, fp4 of rank 32 and 128: 3.80 and 4.20 GB, NVFP4 4.51 GB, NVFP4 + MXFP8 4.84 GB, quanto int8 6.89 GB); others
# from the formats' own definitions.
WEIGHT_FORMATS = (
    _fp4("SVDQuant FP4", r"svdq.*fp4.*r32", 4.9, "svdq"),
    _fp4("SVDQuant FP4", r"svdq.*fp4", 5.5, "svdq"),
    _int4("SVDQuant INT4", r"svdq.*r32", 4.7),
    _int4("SVDQuant INT4", r"svdq.*r256", 5.9),
    _int4("SVDQuant INT4", r"svdq|nunchaku", 5.2),
    _fp4("NVFP4 + MXFP8", r"fp4.*(mixed|mxfp8)", 6.3, "nvfp4"),
    _fp4("NVFP4", r"fp4", 5.9, "nvfp4"),
    WeightFormat(name="MXFP8", pattern=r"mxfp8", bits=8.4, packing="mxfp8"),
    WeightFormat(name="FP8", pattern=r"fp8|e4m3|e5m2|f8_", bits=8.2, packing="fp8"),
    WeightFormat(name="int8", pattern=r"int8|convrot", bits=8.95, packing="int8"),
    WeightFormat(name="nf4", pattern=r"nf4|bnb", bits=5.0, packing="nf4"),
    *(
        WeightFormat(name=f"GGUF Q{number}", pattern=rf"[-_.]i?q{number}[-_.].*gguf$", bits=bits, packing="gguf")
        for number, bits in ((8, 8.5), (6, 6.6), (5, 5.6), (4, 4.7), (3, 3.6), (2, 2.8))
    ),
    WeightFormat(name="fp32", pattern=r"fp32|f32", bits=32, packing=""),
)
PLAIN = WeightFormat(name="16 bit", pattern="", bits=16, packing="")


def format_of_name(url: str) -> WeightFormat:
    """The format of a weights file by its name; plain 16 bit numbers when the name says nothing."""
    name = url.partition("|")[0].partition("?")[0].replace("\\", "/").rsplit("/", 1)[-1].lower()
    return next((f for f in WEIGHT_FORMATS if re.search(f.pattern, name)), PLAIN)
