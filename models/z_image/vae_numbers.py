"""The type of a VAE's numbers: that of its file until a part is first used, then the one that is computed in.

A CPU decodes with a copy in bfloat16 (quick_decoder.py), and only an editor has anything to encode: most of a VAE that
was widened to float32 when it was opened would never be looked at.
"""

from __future__ import annotations

from typing import Any

import torch

# diffusers ships no types: its modules are known by the attributes used here.
Module = Any


def computed_in(vae: Module) -> torch.dtype:
    """What the VAE computes in, whatever its weights still are."""
    dtype: torch.dtype = getattr(vae, "_cast_when_used", None) or next(vae.parameters()).dtype
    return dtype


def cast_when_used(vae: Module, dtype: torch.dtype) -> None:
    """Leave the weights as they lie in the file until made_ready()."""
    vae._cast_when_used = dtype


def made_ready(vae: Module, *parts: Module | None) -> None:
    """Cast what is left to cast of these parts of the VAE."""
    dtype = getattr(vae, "_cast_when_used", None)
    for part in parts:
        if dtype is not None and part is not None and any(p.dtype != dtype for p in part.parameters()):
            part.to(dtype)
