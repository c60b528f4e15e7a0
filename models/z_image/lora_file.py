"""A LoRA file: its tensors by module, whatever the dialect, and the change that each module's tensors stand for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.z_image import lora_names
from models.z_image.keys import Slot
from models.z_image.lora_changes import Change, Dense, Hadamard, Kronecker, LowRank
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError, LayerMismatchError, UnknownFormatError, UserError

# diffusers keeps peft's settings in the header under this name; peft writes them beside a file of this other name.
_HEADER_CONFIG = "lora_adapter_metadata"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_VECTORS = ("magnitude", "diff_b", "up_bias")
_LARGEST_SETTING = 2**31  # of ranks and alphas; far above any real one
_NEEDED = ({"down", "up"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})


@dataclass
class Adapter:
    """One module's tensors by part (lora_names.py), and the tensor names in the file.

    module: as the file spells it, without prefix. peft: its trainer's settings, for alphas that are not in the file.
    """

    module: str
    parts: dict[str, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    peft: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file taken apart. unread: tensors that are no part of any adapter."""

    path: Path
    transformer: Mapping[str, Adapter]
    encoder: Mapping[str, Adapter]
    unread: tuple[str, ...]
    total: int  # tensors in the file

    @property
    def names(self) -> list[str]:
        """Of all tensors, as in the file."""
        adapters = (*self.transformer.values(), *self.encoder.values())
        return [*(key for adapter in adapters for key in adapter.keys), *self.unread]


@dataclass(frozen=True)
class Match:
    """What of a LoRA file found its place here: `matched` of its `total` tensors; `unmatched` names the rest."""

    file: str
    matched: int
    total: int
    unmatched: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "file": self.file,
            "matched": self.matched,
            "total": self.total,
            "unmatched": list(self.unmatched),
        }


# Our module -> the adapters that belong to it, which fill different rows.
Grouped = Mapping[str, list[tuple[Slot, Adapter]]]


@dataclass(frozen=True)
class Placed:
    """Where a file's adapters belong."""

    transformer: Grouped
    encoder: Grouped
    match: Match


def read(path: Path) -> LoraFile:
    """Take a LoRA file apart. Raises CheckpointError for a pickle, a broken file and numbers that are not finite,
    UnknownFormatError for a kind that is not offered (OFT, GLoRA, IA3, VeRA).
    """
    checkpoint = Checkpoint.open(path)
    return take_apart(path, checkpoint.load(), _peft_config(checkpoint))


def take_apart(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> LoraFile:
    """read() for tensors that are loaded already. config: peft's settings, for files without alphas."""
    if odd := lora_names.not_offered(state):
        raise UnknownFormatError(
            f"{path}: {odd[0]} belongs to {odd[1]}; LoRA, DoRA, LoKr, LoHa and full differences can be used.",
            "Look for the same style as one of those.",
        )
    adapters: dict[bool, dict[str, Adapter]] = {False: {}, True: {}}
    unread = []
    for name, tensor in state.items():
        key = lora_names.parse(name)
        if key is None:
            unread.append(name)
            continue
        if tensor.is_complex() or not bool(tensor.float().isfinite().all()):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinite numbers, or complex ones.",
                "The file is damaged or its training failed.",
            )
        fresh = Adapter(key.module, peft=None if key.encoder else config)
        adapter = adapters[key.encoder].setdefault(key.module, fresh)
        adapter.parts[key.part] = tensor
        adapter.keys.append(name)
    return LoraFile(path, adapters[False], adapters[True], tuple(unread), len(state))


def place(file: LoraFile, modules: Mapping[str, object], encoder: Mapping[str, object] | None = None) -> Placed:
    """Find every adapter's place among our modules, the transformer's and the text encoder's.

    Raises UserError where none has one, saying which model the file looks like.
    """
    transformer, lost = _group(file.transformer, lora_names.places(modules))
    texts, lost_texts = _group(file.encoder, lora_names.places(encoder or {}, encoder=True))
    unmatched = (*lost, *lost_texts, *file.unread)
    match = Match(str(file.path), file.total - len(unmatched), file.total, unmatched)
    if not transformer and not texts:
        looks_like = lora_names.origin(file.names)
        first = ", ".join(list(file.names)[:3]) or "nothing"
        raise UserError(
            f"{file.path}: 0 of its {file.total} keys belong to a Z-Image model (first: {first}).",
            f"It looks like a LoRA for {looks_like}." if looks_like else "It is made for another model.",
        )
    return Placed(transformer, texts, match)


def change_of(path: Path, adapter: Adapter, rows: int, columns: int) -> Change | None:
    """What the adapter does to its (rows, columns) of weight; None when it only has a bias or a magnitude.

    Raises LayerMismatchError for a part that is missing or of another shape.
    """
    parts = adapter.parts
    for needed in _NEEDED:
        if needed & parts.keys() and not needed <= parts.keys():
            raise _incomplete(path, adapter, sorted(needed - parts.keys()))
    _check_shapes(path, adapter)
    change: Change | None = None
    if "down" in parts:
        down, up = _matrix(parts["down"]), _matrix(parts["up"])
        if down.shape[0] != up.shape[-1]:
            raise LayerMismatchError(
                f"{path}: {adapter.module} has down {list(down.shape)} and up {list(up.shape)}: their ranks differ.",
                "The file is damaged.",
            )
        change = LowRank(down, up, _scale(adapter, down.shape[0]))
    elif "hada_w1_a" in parts:
        a1, b1, a2, b2 = (_matrix(parts[f"hada_{name}"]) for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        change = Hadamard(a1, b1, a2, b2, _scale(adapter, b1.shape[0]))
    elif any(part.startswith("lokr_") for part in parts):
        change = _kronecker(path, adapter)
    elif "diff" in parts:
        change = Dense(_matrix(parts["diff"]))
    if change is not None and (change.rows, change.columns) != (rows, columns):
        raise LayerMismatchError(
            f"{path}: {adapter.module} takes {columns} numbers and gives {rows} here; the file's takes "
            f"{change.columns} and gives {change.rows}.",
            "It is made for a model of another size, or for another model with layers of the same names.",
        )
    return (change.as_low_rank() or change) if isinstance(change, Hadamard) else change


def bias_of(path: Path, adapter: Adapter, rows: int) -> Tensor | None:
    """What the adapter adds to its rows of the bias, float32; None for nothing."""
    added = [t.float().flatten() for part, t in adapter.parts.items() if part == "diff_b"]
    if "up_bias" in adapter.parts:
        added.append(adapter.parts["up_bias"].float().flatten() * _scale(adapter, adapter.parts["down"].shape[0]))
    for tensor in added:
        if tensor.numel() != rows:
            raise LayerMismatchError(
                f"{path}: {adapter.module} gives {rows} numbers here; the file's bias has {tensor.numel()}.",
                "It is made for another model.",
            )
    return torch.stack(added).sum(0) if added else None


def _group(
    adapters: Mapping[str, Adapter], known: Mapping[str, Slot]
) -> tuple[dict[str, list[tuple[Slot, Adapter]]], list[str]]:
    """Adapters by our module, and the tensor names of those without a place."""
    grouped: dict[str, list[tuple[Slot, Adapter]]] = {}
    lost: list[str] = []
    for adapter in adapters.values():
        slot = lora_names.find_place(adapter.module, known)
        if slot is None:
            lost += adapter.keys
        else:
            grouped.setdefault(slot.module, []).append((slot, adapter))
    return {module: list(_without_repeats(given)) for module, given in grouped.items()}, lost


def _without_repeats(given: Sequence[tuple[Slot, Adapter]]) -> Iterator[tuple[Slot, Adapter]]:
    """Some trainers write a layer twice, as q, k, v and again as qkv: the parts are taken, the repetition is not."""
    taken: set[int] = set()
    for slot, adapter in sorted(given, key=lambda pair: len(pair[0].blocks)):
        if taken.isdisjoint(slot.blocks):
            taken.update(slot.blocks)
            yield slot, adapter


def _kronecker(path: Path, adapter: Adapter) -> Kronecker:
    parts = adapter.parts
    ranks = []
    factors: list[tuple[Tensor, Tensor | None]] = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            factors.append((_matrix(parts[name]), None))
        elif {f"{name}_a", f"{name}_b"} <= parts.keys():
            factors.append((_matrix(parts[f"{name}_a"]), _matrix(parts[f"{name}_b"])))
            ranks.append(parts[f"{name}_b"].shape[0])
        else:
            raise _incomplete(path, adapter, [name])
    (w1, w1_b), (w2, w2_b) = factors
    if w1_b is not None:
        w1 = w1.float() @ w1_b.float()  # small: a few thousand numbers
    # LyCORIS: of two whole factors alpha means nothing. peft scales those too.
    rank = ranks[-1] if ranks else None
    return Kronecker(w1, w2, w2_b, _scale(adapter, rank) if ranks or adapter.peft else 1.0)


def _scale(adapter: Adapter, rank: int | None) -> float:
    """alpha / rank; 1 where neither the file nor the trainer's settings say alpha."""
    settings = adapter.peft or {}
    alpha = float(adapter.parts["alpha"]) if "alpha" in adapter.parts else None
    if alpha is None:
        alpha = _setting(settings, adapter.module, "lora_alpha", "alpha")
        rank = int(_setting(settings, adapter.module, "r") or 0) or rank
    if alpha is None or not rank:
        return 1.0
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _setting(settings: Mapping[str, Any], module: str, *names: str) -> float | None:
    """A number of peft's settings for a module, which patterns may change."""
    patterns = settings.get("rank_pattern" if names == ("r",) else "alpha_pattern") or {}
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(?:.*\.)?{pattern}", module):
            return float(value)
    return next((float(settings[name]) for name in names if settings.get(name) is not None), None)


def _peft_config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """peft's settings from the header or from beside the file, without a component's prefix; None if there are none."""
    text = checkpoint.metadata.get(_HEADER_CONFIG)
    beside = checkpoint.path.with_name(_PEFT_CONFIG)
    if text is None and checkpoint.path.name == _PEFT_FILE and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint.path}: the trainer's settings are no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{checkpoint.path}: the trainer's settings are a {type(found).__name__}, not an object.")
    settings = {name.removeprefix("transformer."): value for name, value in found.items()}
    if not _usable(settings):
        raise CheckpointError(f"{checkpoint.path}: rank or alpha in the trainer's settings are no numbers.")
    return settings


def _usable(settings: Mapping[str, Any]) -> bool:
    """Whether everything that is read of peft's settings is a number, and every pattern a regular expression."""
    patterns = [settings.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(given, dict) for given in patterns):
        return False
    numbers = [settings[name] for name in ("r", "lora_alpha", "alpha") if settings.get(name) is not None]
    numbers += [value for given in patterns for value in given.values()]
    try:
        for pattern in (pattern for given in patterns for pattern in given):
            re.compile(pattern)
        return all(type(n) in (int, float) and math.isfinite(n) and abs(n) < _LARGEST_SETTING for n in numbers)
    except (re.error, OverflowError):
        return False


def _matrix(tensor: Tensor) -> Tensor:
    """A 1x1 convolution's weight is a matrix; float8 and integers are left to the arithmetic that follows."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _check_shapes(path: Path, adapter: Adapter) -> None:
    """Refuse parts that cannot be multiplied: alpha is one number, whatever is no bias or magnitude is a matrix."""
    for part, tensor in adapter.parts.items():
        if part == "alpha":
            fits = tensor.numel() == 1
        else:
            fits = part in _VECTORS or (tensor.ndim >= 2 and tensor.numel() > 0)
        if not fits:
            raise LayerMismatchError(
                f"{path}: {part} of {adapter.module} has the impossible shape {list(tensor.shape)}.",
                "The file is damaged.",
            )


def _incomplete(path: Path, adapter: Adapter, missing: Sequence[str]) -> LayerMismatchError:
    return LayerMismatchError(
        f"{path}: {adapter.module} lacks {', '.join(missing)}.", "The file is truncated; download it again."
    )
