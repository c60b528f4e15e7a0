"""Out of memory: how it is told from other errors, what is freed, and what is said when nothing helps."""

from __future__ import annotations

import gc
import sys
import traceback

from shared.quant.errors import RunError

# What was going on, by stage, in words.
DOING = {
    "load": "loading the model",
    "text": "reading the prompt",
    "denoise": "drawing",
    "decode": "decoding the picture",
}


def free_memory(error: BaseException) -> None:
    """Let go of what a failed attempt has left: the tensors its frames hold, and memory that torch keeps for reuse."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch is not None and torch.backends.mps.is_available():
        torch.mps.empty_cache()


def given_up(stage: str, size: str, preset: str, tried: list[str], error: BaseException) -> RunError:
    """The error to end with. tried: what was done already, in words. size: of the picture, WIDTHxHEIGHT."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    before = f" Tried already: {'; '.join(tried)}." if tried else ""
    return RunError(
        f"Memory ran out while {DOING[stage]} with {preset} at {size}: {first}.{before}",
        "Take a smaller picture or a packed model (wgp.py doctor names one), or close other programs.",
    )
