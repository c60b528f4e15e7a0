"""LoRA files on a model: put beside its linears, never merged, so that any weight format can carry them.

    lora_names.py     names in files -> our modules; which other model a file may be for
    lora_file.py      a file taken apart: adapters by module, alpha, the trainer's settings
    lora_changes.py   LoRA, LoKr, LoHa, full differences: what each does to a weight
    lora_layer.py     the hook that adds changes to a linear's output; DoRA
    lora.py           this page: whole files on whole models; the same as dense differences for whoever merges

Merging (the quantizer does, into weights that are not packed yet):

    file = read(path)
    shapes = {"layers.0.attention.qkv.weight": (11520, 3840), ...}     our parameters
    match(file, shapes)                                                how much of it fits; UserError for nothing
    for name, delta in deltas(file, 0.8, shapes, base):                base(name): the parameter, DoRA asks for it
        ...                                                            add delta, float32 and whole, to `name`
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.z_image import lora_names
from models.z_image.keys import Slot
from models.z_image.lora_changes import LowRank
from models.z_image.lora_file import Adapter, Grouped, LoraFile, Match, place, read, take_apart
from models.z_image.lora_layer import Addition, Branches, NormBranches, Strength, Strengths, additions
from shared.quant.errors import LayerMismatchError

__all__ = ["LoraFile", "LoraSet", "Match", "Strength", "apply", "deltas", "fuse", "match", "read"]

logger = logging.getLogger(__name__)

# What is computed once for all steps from the prompt's features: strengths that change over the steps concern it too.
_CAPTION_MODULES = ("context_refiner.", "cap_embedder.")
# What scales and gates of all steps come from, norms aside.
_TIME_MODULES = ("adaLN_modulation", "t_embedder")


@dataclass(frozen=True)
class _Loaded:
    """A file made ready for a model. encoder, linears, norms: what it adds, by our module."""

    match: Match
    linears: Mapping[str, list[Addition]]
    norms: Mapping[str, Tensor]
    encoder: Mapping[str, list[Addition]]


class LoraSet:
    """The LoRA files on a transformer and its text encoder. Changing strengths, also per step, rebuilds nothing.

    text_encoder: the module, or what gives it, asked only when a file has a part for it.
    """

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module | Callable[[], nn.Module] | None = None) -> None:
        self._transformer, self._encoder = transformer, text_encoder
        self._loaded: dict[tuple[Path, int, int], _Loaded] = {}  # by path, time and size; those in use, in order
        self._order: tuple[tuple[Path, int, int], ...] = ()
        self._strengths = Strengths([])

    def apply(self, files: Sequence[Path], strengths: Sequence[Strength]) -> list[Match]:
        """Set the LoRAs to exactly these. Takes effect at the next forward; files that were on already are not read.

        Raises what read() and place() raise, LayerMismatchError for what does not fit; then nothing changes.
        """
        order = tuple((path, *_stamp(path)) for path in files)
        if order != self._order:
            loaded = {key: self._loaded.get(key) or self._read(key[0]) for key in order}
            touched = self.touches_encoder or any(one.encoder for one in loaded.values())
            self._strengths = Strengths(strengths)
            encoder = self._encoder_module() if touched else None
            _attach([loaded[key] for key in order], self._strengths, self._transformer, encoder)
            self._loaded, self._order = loaded, order
        else:
            self._strengths.set(strengths)
        return [self._loaded[key].match for key in order]

    def begin(self, steps: int) -> None:
        """Spread the strengths over a run of `steps` and take the first step's."""
        self._strengths.begin(steps)

    def set_step(self, step: int) -> bool:
        """Take the strengths of `step`, from 0. Returns whether captions refined before must be refined again."""
        changed = self._strengths.set_step(step)
        touched = (module for loaded in self._loaded.values() for module in (*loaded.linears, *loaded.norms))
        return changed and any(module.startswith(_CAPTION_MODULES) for module in touched)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Of each file at the current step."""
        return self._strengths.now

    @property
    def factor_strengths(self) -> tuple[float, ...]:
        """The strengths that scales, gates and norm weights are worked out with now; () where no file changes those."""
        for loaded in self._loaded.values():
            if loaded.norms or any(part in module for module in loaded.linears for part in _TIME_MODULES):
                return self._strengths.now
        return ()

    @property
    def touches_encoder(self) -> bool:
        """Whether prompts encoded without these files have to be encoded again."""
        return any(loaded.encoder for loaded in self._loaded.values())

    @property
    def encoder_state(self) -> str:
        """What tells the encoder with these files at the present strengths from any other; "" when none touches it."""
        parts = []
        for key, strength in zip(self._order, self._strengths.now, strict=True):
            if self._loaded[key].encoder:
                with key[0].open("rb") as file:
                    parts.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()} x {strength}")
        return ", ".join(parts)

    def _read(self, path: Path) -> _Loaded:
        file = read(path)
        return _load(file, self._transformer, self._encoder_module() if file.encoder else None)

    def _encoder_module(self) -> nn.Module | None:
        if self._encoder is not None and not isinstance(self._encoder, nn.Module):
            self._encoder = self._encoder()
        return self._encoder


def apply(model: nn.Module, files: Sequence[LoraFile], strengths: Sequence[Strength]) -> list[Match]:
    """Set a transformer's LoRAs to exactly these, which were read already. Raises as LoraSet.apply() does."""
    loaded = [_load(file, model, None) for file in files]
    _attach(loaded, Strengths(strengths), model, None)
    return [one.match for one in loaded]


def match(file: LoraFile, shapes: Mapping[str, Sequence[int]]) -> Match:
    """How much of the file belongs to parameters with these names. Raises UserError when nothing does."""
    return place(file, _modules(shapes)).match


def deltas(
    file: LoraFile, strength: float, shapes: Mapping[str, Sequence[int]], base: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Our parameter's name and what the file adds to it: float32, of the parameter's whole shape, one at a time.

    shapes: all parameters by our names. base: the parameter itself, of which DoRA needs the weights. The text encoder's
    part is left out. Raises UserError when nothing matches, LayerMismatchError for what does not fit.
    """
    for module, parts in place(file, _modules(shapes)).transformer.items():
        name, bias_name = f"{module}.weight", f"{module}.bias"
        shape = tuple(shapes[name])
        if len(shape) == 1:
            yield name, strength * _norm_difference(file.path, parts[0][1], shape[0])
            continue
        found = _additions(file.path, 0, parts, shape, partial(base, name))
        if _changes_weight(found):
            yield name, strength * _dense(found, shape, partial(base, name))
        if any(addition.bias is not None for addition in found):
            if bias_name not in shapes:
                raise _no_bias(file.path, module)
            yield bias_name, strength * _dense_bias(found, shape[0])


def fuse(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA state dict of any naming under our fused modules' names, as a host's own LoRA loader (mmgp) wants it.

    Alphas are multiplied in. LoKr, DoRA and LoHa of high rank become full differences, which every loader knows, at the
    price of a weight's memory each. What has no place here passes through unchanged, so that the host reports it; a
    text encoder's part is left out with a warning, as hosts load none.
    """
    file = take_apart(Path("LoRA"), state)
    linears, norms = _linears(model), _norms(model)
    known = lora_names.places([*linears, *norms])
    grouped: dict[str, list[tuple[Slot, Adapter]]] = {}
    result = {name: state[name] for name in file.unread}
    if file.encoder:
        logger.warning("The LoRA's text encoder part (%d modules) is not used by this host.", len(file.encoder))
    for adapter in file.transformer.values():
        slot = lora_names.find_place(adapter.module, known)
        if slot is None:
            result |= {name: state[name] for name in adapter.keys}
        else:
            grouped.setdefault(slot.module, []).append((slot, adapter))
    for module, parts in grouped.items():
        name = f"diffusion_model.{module}"
        dtype = next(t for part, t in parts[0][1].parts.items() if part != "alpha").dtype
        if module in norms:
            result[f"{name}.diff"] = _norm_difference(file.path, parts[0][1], norms[module].weight.shape[0]).to(dtype)
            continue
        linear = linears[module]
        shape = tuple(linear.weight.shape)
        found = _additions(file.path, 0, parts, shape, partial(_weight, linear))
        if all(isinstance(a.change, LowRank) and a.row_gain is None and a.column_gain is None for a in found):
            down, up = _block_diagonal(found, shape[0])
            result |= {f"{name}.lora_A.weight": down.to(dtype), f"{name}.lora_B.weight": up.to(dtype)}
        elif _changes_weight(found):
            result[f"{name}.diff"] = _dense(found, shape, partial(_weight, linear)).to(dtype)
        if any(addition.bias is not None for addition in found):
            result[f"{name}.diff_b"] = _dense_bias(found, shape[0]).to(dtype)
    return result


def _load(file: LoraFile, transformer: nn.Module, encoder: nn.Module | None) -> _Loaded:
    linears, norms = _linears(transformer), _norms(transformer)
    texts = {} if encoder is None else _linears(encoder)
    placed = place(file, {**linears, **norms}, texts)
    return _Loaded(
        match=placed.match,
        linears=_ready(file.path, {m: parts for m, parts in placed.transformer.items() if m in linears}, linears),
        norms={
            module: _norm_difference(file.path, parts[0][1], norms[module].weight.shape[0])
            for module, parts in placed.transformer.items()
            if module in norms
        },
        encoder=_ready(file.path, placed.encoder, texts),
    )


def _ready(path: Path, placed: Grouped, linears: Mapping[str, nn.Linear]) -> dict[str, list[Addition]]:
    result = {}
    for module, parts in placed.items():
        linear = linears[module]
        shape = tuple(linear.weight.shape)
        result[module] = _additions(path, 0, parts, shape, partial(_weight, linear))
    return result


def _attach(loaded: Sequence[_Loaded], strengths: Strengths, transformer: nn.Module, encoder: nn.Module | None) -> None:
    """Replace all hooks of ours by those of these files."""
    _attach_linears(_linears(transformer), [one.linears for one in loaded], strengths)
    if encoder is not None:
        _attach_linears(_linears(encoder), [one.encoder for one in loaded], strengths)
    for name, norm in _norms(transformer).items():
        differences = [(i, one.norms[name]) for i, one in enumerate(loaded) if name in one.norms]
        _set_hook(norm, NormBranches(differences, strengths) if differences else None)


def _attach_linears(
    linears: Mapping[str, nn.Linear], by_file: Sequence[Mapping[str, list[Addition]]], strengths: Strengths
) -> None:
    for name, linear in linears.items():
        found = [replace(a, file=i) for i, one in enumerate(by_file) for a in one.get(name, ())]
        _set_hook(linear, Branches(found, strengths) if found else None)


def _set_hook(module: nn.Module, branches: Branches | NormBranches | None) -> None:
    """Replace the forward hook that adds our branches, touching nobody else's."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, (Branches, NormBranches)):
            del module._forward_hooks[key]
    if branches is not None:
        module.register_forward_hook(branches)


def _additions(
    path: Path, file: int, parts: Sequence[tuple[Slot, Adapter]], shape: Sequence[int], weight: Callable[[], Tensor]
) -> list[Addition]:
    return [a for slot, adapter in parts for a in additions(path, file, slot, adapter, shape, weight)]


def _changes_weight(found: Sequence[Addition]) -> bool:
    return any(t is not None for a in found for t in (a.change, a.row_gain, a.column_gain))


def _dense(found: Sequence[Addition], shape: Sequence[int], weight: Callable[[], Tensor]) -> Tensor:
    """What the additions to one linear come to, (out, in) float32."""
    total = torch.zeros(tuple(shape))
    for addition in found:
        total[addition.row : addition.row + addition.rows] += addition.dense(weight, 0, addition.rows)
    return total


def _dense_bias(found: Sequence[Addition], rows: int) -> Tensor:
    total = torch.zeros(rows)
    for addition in found:
        if addition.bias is not None:
            total[addition.row : addition.row + addition.rows] += addition.bias
    return total


def _block_diagonal(found: Sequence[Addition], rows: int) -> tuple[Tensor, Tensor]:
    """One down (ranks, in) and up (rows, ranks) for low-rank additions to different rows, float32."""
    downs, ups = [], []
    for addition in found:
        change = addition.change
        assert isinstance(change, LowRank)
        up = torch.zeros(rows, change.up.shape[1])
        up[addition.row : addition.row + addition.rows] = change.up.float() * change.scale
        downs.append(change.down.float())
        ups.append(up)
    return torch.cat(downs), torch.cat(ups, dim=1)


def _norm_difference(path: Path, adapter: Adapter, width: int) -> Tensor:
    difference = adapter.parts.get("diff")
    if difference is None or difference.numel() != width:
        raise LayerMismatchError(
            f"{path}: {adapter.module} is a norm of {width} numbers; the file has {', '.join(sorted(adapter.parts))} "
            f"of shape {[list(t.shape) for t in adapter.parts.values()]}.",
            "It is made for another model.",
        )
    return difference.float().flatten()


def _no_bias(path: Path, module: str) -> LayerMismatchError:
    return LayerMismatchError(f"{path}: {module} has no bias here, the file adds to one.", "It is for another model.")


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def _norms(model: nn.Module) -> dict[str, nn.RMSNorm]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.RMSNorm)}


def _modules(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}


def _weight(linear: nn.Linear) -> Tensor:
    """The weight (out, in) in the layer's type, unpacked where it is packed."""
    packed: Any = linear
    return packed.dequantize() if hasattr(linear, "dequantize") else linear.weight


def _stamp(path: Path) -> tuple[int, int]:
    """What tells a file from another that was put in its place; zeros for one that is not there (read() says so)."""
    if not path.is_file():
        return 0, 0
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size
