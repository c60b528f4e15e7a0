"""Names in Z-Image files and what they are called here.

Our network fuses linears that read the same activations, so one of our linears may be several in a file:

    ours                  official / ComfyUI       diffusers                       nunchaku
    x_embedder            x_embedder               all_x_embedder.2-1              all_x_embedder.2-1
    final_layer           final_layer              all_final_layer.2-1             all_final_layer.2-1
    B.attention.qkv       B.attention.qkv          B.attention.to_q, to_k, to_v    B.attention.to_qkv
    B.attention.out       B.attention.out          B.attention.to_out.0            B.attention.to_out.0
    B.attention.q_norm    B.attention.q_norm       B.attention.norm_q              B.attention.norm_q
    B.feed_forward.w13    B.feed_forward.w1, w3    B.feed_forward.w1, w3           B.feed_forward.net.0.proj (w3 first!)
    B.feed_forward.w2     B.feed_forward.w2        B.feed_forward.w2               B.feed_forward.net.2

Files mix these (fine-tunes keep diffusers names in one file; nunchaku fuses only some), so every name is mapped by
itself. A `Slot` says which equal blocks of rows of our tensor the blocks of the file's tensor become.
Sources: formats.md sections 1.2, 1.3, 3.1; diffusers 0.42.1 loaders/single_file_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# Present in every Z-Image transformer and nowhere else under this exact name.
LANDMARK = "layers.0.adaLN_modulation.0.weight"

# Left over from Lumina 2 in some files; the network has no such weight.
_DROPPED = ("norm_final.weight",)


class Slot(NamedTuple):
    """Where a file's module belongs: its `i`-th block of rows is block `blocks[i]` of `of` in our `module`."""

    module: str
    blocks: tuple[int, ...] = (0,)
    of: int = 1


_ATTENTION_AND_FFN = {
    "attention.to_q": ("attention.qkv", (0,), 3),
    "attention.to_k": ("attention.qkv", (1,), 3),
    "attention.to_v": ("attention.qkv", (2,), 3),
    "attention.qkv": ("attention.qkv", (0, 1, 2), 3),
    "attention.to_qkv": ("attention.qkv", (0, 1, 2), 3),
    "attention.to_out.0": ("attention.out", (0,), 1),
    "attention.to_out": ("attention.out", (0,), 1),
    "attention.norm_q": ("attention.q_norm", (0,), 1),
    "attention.norm_k": ("attention.k_norm", (0,), 1),
    "feed_forward.w1": ("feed_forward.w13", (0,), 2),
    "feed_forward.w3": ("feed_forward.w13", (1,), 2),
    "feed_forward.w13": ("feed_forward.w13", (0, 1), 2),
    "feed_forward.net.0.proj": ("feed_forward.w13", (1, 0), 2),
    "feed_forward.net.2": ("feed_forward.w2", (0,), 1),
}
_BLOCK = re.compile(r"((?:layers|noise_refiner|context_refiner|siglip_refiner)\.\d+)\.(.+)")
_TOP = (("all_x_embedder.2-1", "x_embedder"), ("all_final_layer.2-1", "final_layer"))

# Before the second time embedding in some TwinFlow files (mengqin/ComfyUI-TwinFlow nodes.py).
_EXTENSION = "extended_weights."

# What marks files of other members of the family, and how to name them to a person.
_RELATIVES = (
    ("control_", "a ControlNet file (or a checkpoint merged with one)"),
    ("t_embedder_2.", "a TwinFlow checkpoint with a second time embedding"),
    ("siglip_", "a Z-Image Omni or Edit checkpoint"),
)


def find_prefix(names: Iterable[str]) -> str | None:
    """What precedes every transformer name in a file ("", "model.diffusion_model." ...); None: no transformer here."""
    found = [n.split(LANDMARK) for n in names if LANDMARK in n]
    # quanto keeps a weight in two tensors: ".weight._data" and ".weight._scale".
    prefixes = [p for p, *_, rest in found if (p == "" or p.endswith(".")) and (rest == "" or rest.startswith("."))]
    return min(prefixes, key=len) if prefixes else None


def slot_of(module: str) -> Slot:
    """Our place for a file's module path, prefix and parameter name already removed."""
    block = _BLOCK.fullmatch(module)
    if block:
        name, rest = block.groups()
        ours, blocks, of = _ATTENTION_AND_FFN.get(rest, (rest, (0,), 1))
        return Slot(f"{name}.{ours}", blocks, of)
    module = module.removeprefix(_EXTENSION)
    for theirs, ours in _TOP:
        if module == theirs or module.startswith(f"{theirs}."):
            return Slot(ours + module[len(theirs) :])
    return Slot(module)


def split_parameter(name: str) -> tuple[str, str]:
    """ "layers.0.attention.qkv.weight" -> ("layers.0.attention.qkv", ".weight"); a bare parameter has no suffix."""
    module, dot, parameter = name.rpartition(".")
    return (module, dot + parameter) if dot else (name, "")


def is_dropped(name: str) -> bool:
    return name in _DROPPED


def relative_of(names: Iterable[str]) -> str | None:
    """In words, which other member of the family these left-over names point to."""
    listed = tuple(names)
    for prefix, words in _RELATIVES:
        if any(f".{prefix}" in f".{name}" for name in listed):
            return words
    return None


def diffusers_names(module: str) -> tuple[str, ...]:
    """The diffusers module(s) whose rows, in order, make up our `module`: the inverse of slot_of()."""
    block = _BLOCK.fullmatch(module)
    if block:
        name, rest = block.groups()
        theirs = {
            "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
            "attention.out": ("attention.to_out.0",),
            "attention.q_norm": ("attention.norm_q",),
            "attention.k_norm": ("attention.norm_k",),
            "feed_forward.w13": ("feed_forward.w1", "feed_forward.w3"),
        }.get(rest, (rest,))
        return tuple(f"{name}.{t}" for t in theirs)
    for theirs_top, ours in _TOP:
        if module == ours or module.startswith(f"{ours}."):
            return (theirs_top + module[len(ours) :],)
    return (module,)
