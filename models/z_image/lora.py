"""LoRA: low-rank additions beside the transformer's linears, never merged, so that any weight format can carry them.

A file gives pairs down (rank, in) and up (out, rank) for modules under one of many namings; the layer's result gains
strength * alpha / rank * up(down(x)). Our linears are fused, so the pairs of q, k and v are stacked into one: their
downs on top of each other, their ups side by side in the rows that are theirs.
Sources of the namings: formats.md section 6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from models.z_image.keys import Slot, diffusers_names, slot_of
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import LayerMismatchError, UnknownFormatError, UserError

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lycoris_",
)
_PART = re.compile(
    r"(?P<module>.+?)[._]?(?:lora_(?P<ab>A|B|down|up)|lora_linear_layer\.(?P<lin>down|up))"
    r"(?:\.default)?\.weight"
)
_UNSUPPORTED = re.compile(r"\.(lokr_|hada_|dora_scale|lora_magnitude_vector|diff(_b)?$)")


@dataclass
class Pair:
    """One module's down and up matrices as the file has them."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class LoraFile:
    """Pairs by the file's own module names (prefix removed)."""

    path: Path
    pairs: dict[str, Pair]
    unread: tuple[str, ...]  # names of tensors that are no part of a pair


@dataclass(frozen=True)
class Match:
    """What of a LoRA file found its place. Counted in modules."""

    file: str
    matched: int
    unmatched: tuple[str, ...]


@dataclass
class Branches:
    """The low-rank additions of one linear; called by torch after the linear's forward."""

    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # down (r, in), up (out, r) with all scales in it

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        for i, (down, up) in enumerate(self.parts):
            if down.device != x.device or down.dtype != x.dtype:
                down, up = self.parts[i] = (down.to(x.device, x.dtype), up.to(x.device, x.dtype))
            output = output + nn.functional.linear(nn.functional.linear(x, down), up)
        return output


def read(path: Path) -> LoraFile:
    """Collect a LoRA file's pairs.

    Raises UnknownFormatError for LoKr, LoHa, DoRA and full differences, LayerMismatchError for a half pair.
    """
    state = Checkpoint.open(path).load()
    odd = next((n for n in state if _UNSUPPORTED.search(n)), None)
    if odd:
        raise UnknownFormatError(
            f"{path}: {odd} is LoKr, LoHa, DoRA or a full difference; this version adds plain LoRA.",
            "Convert it to plain LoRA, or leave it out.",
        )
    pairs, unread = _collect(state)
    halves = [m for m, p in pairs.items() if p.down is None or p.up is None]
    if halves:
        raise LayerMismatchError(
            f"{path}: {len(halves)} modules have only one of their two matrices (first: {halves[0]}).",
            "The file is truncated; download it again.",
        )
    return LoraFile(path, pairs, tuple(unread))


def fuse(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA state dict of any naming under our fused modules' names, as a host's own LoRA loader (mmgp) wants it.

    Alphas are multiplied in. Tensors that are no part of a pair for one of our linears pass through unchanged, so that
    the host reports them.
    """
    linears = _linears(model)
    known = _known_names(linears)
    pairs, unread = _collect(state)
    grouped, _ = _group(pairs, known)
    result = {name: state[name] for name in unread}
    result |= {
        n: t for n, t in state.items() if (part := _PART.fullmatch(_strip(n))) and _place(part["module"], known) is None
    }
    for module, parts in grouped.items():
        down, up = _stack(Path("LoRA"), module, parts, linears[module], 1.0)
        dtype = next(p.down for _, p in parts if p.down is not None).dtype
        result[f"diffusion_model.{module}.lora_A.weight"] = down.to(dtype)
        result[f"diffusion_model.{module}.lora_B.weight"] = up.to(dtype)
    return result


def apply(model: nn.Module, files: Sequence[LoraFile], multipliers: Sequence[float]) -> list[Match]:
    """Set the model's LoRAs to exactly these, replacing earlier ones. Takes effect at the next forward.

    Raises UserError when a file matches nothing, LayerMismatchError when a matrix does not fit; then none are applied.
    """
    linears = _linears(model)
    known = _known_names(linears)
    collected: dict[str, Branches] = {}
    matches = []
    for file, multiplier in zip(files, multipliers, strict=True):
        grouped, unmatched = _group(file.pairs, known)
        if not grouped:
            raise UserError(
                f"{file.path}: none of its {len(file.pairs)} modules belongs to a Z-Image transformer "
                f"(first: {', '.join(list(file.pairs)[:3]) or 'none'}).",
                "It is made for another model.",
            )
        for module, parts in grouped.items():
            branch = _stack(file.path, module, parts, linears[module], multiplier)
            collected.setdefault(module, Branches()).parts.append(branch)
        matches.append(Match(str(file.path), len(file.pairs) - len(unmatched), (*unmatched, *file.unread)))
    for name, linear in linears.items():
        _set_branches(linear, collected.get(name))
    return matches


Grouped = dict[str, list[tuple[Slot, Pair]]]


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def _collect(state: Mapping[str, Tensor]) -> tuple[dict[str, Pair], list[str]]:
    """Pairs by the file's module names without prefix, and the names that are no part of any."""
    pairs: dict[str, Pair] = {}
    unread = []
    for name, tensor in state.items():
        bare = _strip(name)
        part = _PART.fullmatch(bare)
        if part:
            pair = pairs.setdefault(part["module"], Pair())
            if (part["ab"] or part["lin"]) in ("A", "down"):
                pair.down = tensor
            else:
                pair.up = tensor
        elif bare.endswith(".alpha"):
            pairs.setdefault(bare[: -len(".alpha")], Pair()).alpha = float(tensor)
        else:
            unread.append(name)
    return pairs, unread


def _place(module: str, known: Mapping[str, Slot]) -> Slot | None:
    return known.get(module) or known.get(module.replace(".", "_"))


def _group(pairs: Mapping[str, Pair], known: Mapping[str, Slot]) -> tuple[Grouped, list[str]]:
    """Pairs by our fused module, and the file's module names that have no place here."""
    grouped: Grouped = {}
    unmatched = []
    for module, pair in pairs.items():
        slot = _place(module, known)
        if slot is None:
            unmatched.append(module)
        else:
            grouped.setdefault(slot.module, []).append((slot, pair))
    return grouped, unmatched


def _stack(
    path: Path, module: str, parts: list[tuple[Slot, Pair]], linear: nn.Linear, multiplier: float
) -> tuple[Tensor, Tensor]:
    """One (down, up) for a fused linear from the pairs of its parts."""
    rows, columns = linear.out_features, linear.in_features
    downs, ups = [], []
    for slot, pair in parts:
        assert pair.down is not None  # read() refused halves
        assert pair.up is not None
        height = rows // slot.of
        if pair.down.shape[1:] != (columns,) or pair.up.shape != (
            height * len(slot.blocks),
            pair.down.shape[0],
        ):
            raise LayerMismatchError(
                f"{path}: {module} takes {columns} numbers and gives {height * len(slot.blocks)}, the LoRA has "
                f"down {list(pair.down.shape)} and up {list(pair.up.shape)}.",
                "It is made for another model.",
            )
        rank = pair.down.shape[0]
        scale = multiplier * (1.0 if pair.alpha is None else pair.alpha / rank)
        up = torch.zeros(rows, rank)
        for block, part in zip(slot.blocks, pair.up.float().chunk(len(slot.blocks)), strict=True):
            up[block * height : (block + 1) * height] = part * scale
        downs.append(pair.down.float())
        ups.append(up)
    return torch.cat(downs), torch.cat(ups, dim=1)


def _set_branches(linear: nn.Linear, branches: Branches | None) -> None:
    """Replace the forward hook that adds our branches, touching nobody else's."""
    for key, hook in list(linear._forward_hooks.items()):
        if isinstance(hook, Branches):
            del linear._forward_hooks[key]
    if branches is not None:
        linear.register_forward_hook(branches)


def _known_names(linears: dict[str, nn.Linear]) -> dict[str, Slot]:
    """Every name that a file may use for one of our linears, dotted and flattened with underscores, -> its place."""
    names: set[str] = set()
    for module in linears:
        names |= {module, *diffusers_names(module)}
        if module.endswith("attention.qkv"):
            names.add(module.replace(".qkv", ".to_qkv"))
        if module.endswith("attention.out"):
            names.add(module.replace(".out", ".to_out"))
    known = {name: slot_of(name) for name in names}
    return known | {name.replace(".", "_"): slot for name, slot in known.items()}


def _strip(name: str) -> str:
    """Remove every known prefix, however many are stacked."""
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name
