"""A plan: which of a file's layers fills which of our modules; and whether they fit, strictly, by headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.quant.errors import LayerMismatchError
from shared.quant.formats import Layer, format_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Part:
    """A file's layer and the rows of one of our modules that it fills.

    Its i-th equal block of rows is block `blocks[i]` of our module's `of` equal blocks.
    """

    layer: Layer
    blocks: tuple[int, ...] = (0,)
    of: int = 1

    @property
    def in_order(self) -> bool:
        return list(self.blocks) == sorted(self.blocks)


# Our module's (or bare parameter's) name -> what fills it, in the file's order.
Plan = dict[str, list[Part]]
# How a file would call the blocks of our parameter that are missing: (module, suffix, blocks) -> words.
NameMissing = Callable[[str, str, Sequence[int]], str]


def shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Our parameter names -> shapes, of the first part that fills each; packed weights as the matrix they stand for."""
    result: dict[str, tuple[int, ...]] = {}
    for module, parts in plan.items():
        layer = parts[0].layer
        packed = format_of(layer)
        for suffix, info in layer.tensors.items():
            result[join_name(module, suffix)] = info.shape
        if packed is not None:
            result[f"{module}.weight"] = packed.shape(layer)
    return result


def check(
    model: nn.Module,
    plan: Plan,
    *,
    source: str,
    name_missing: NameMissing | None = None,
    hint: Callable[[Sequence[str]], str] | None = None,
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Whether the plan fills every parameter of the model once, from headers alone.

    source: the file, for errors. hint: given the names nothing here takes, what to tell the user. Raises
    LayerMismatchError listing the first five missing, doubled, unexpected and misshapen tensors each.
    Returns our module (or bare parameter) -> suffix -> shape, of everything the model has to be given.
    """
    wanted = _wanted(model)
    _check(plan, wanted, source, name_missing or _plain_names, hint)
    return wanted


def _wanted(model: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """Module (or bare parameter) -> suffix -> shape, of everything the model has to be given."""
    wanted: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        module, _, suffix = name.rpartition(".")
        key, suffix = (module, suffix) if suffix in ("weight", "bias") else (name, "")
        wanted.setdefault(key, {})[suffix] = tuple(parameter.shape)
    return wanted


def _check(
    plan: Plan,
    wanted: Mapping[str, Mapping[str, tuple[int, ...]]],
    source: str,
    name_missing: NameMissing,
    hint: Callable[[Sequence[str]], str] | None,
) -> None:
    missing, twice, misshapen = [], [], []
    for module, parameters in wanted.items():
        parts = plan.get(module, [])
        filled = [block for p in parts for block in p.blocks]
        if len(filled) > len(set(filled)):
            twice.append(" + ".join(p.layer.module for p in parts))
            continue
        absent = sorted(set(range(parts[0].of)) - set(filled)) if parts else []
        for suffix, shape in parameters.items():
            if not parts or absent:
                missing.append(name_missing(module, suffix, absent))
                continue
            for part in parts:
                found = _shape(part.layer, suffix)
                rows = shape[0] * len(part.blocks) // part.of
                if found is None:
                    missing.append(join_name(part.layer.module, suffix))
                # The pad tokens are (1, dim) in most files and (dim,) in some.
                elif found not in ((rows, *shape[1:]), shape[1:] if shape[0] == 1 else None):
                    expected = [rows, *shape[1:]]
                    misshapen.append(f"{join_name(part.layer.module, suffix)} is {list(found)}, expected {expected}")
    unexpected = [n for m, parts in plan.items() for p in parts for n in _unexpected(p.layer, wanted.get(m, {}))]
    groups = (("missing", missing), ("given twice", twice), ("unexpected", unexpected), ("of another shape", misshapen))
    problems = [
        f"{len(found)} {what} ({', '.join(found[:5])}{', ...' if len(found) > 5 else ''})"
        for what, found in groups
        if found
    ]
    if problems:
        advice = hint(unexpected) if hint else "The file is truncated or belongs to another model."
        raise LayerMismatchError(f"{source}: tensors do not fit: {'; '.join(problems)}.", advice)


def _shape(layer: Layer, suffix: str) -> tuple[int, ...] | None:
    packed = format_of(layer)
    if packed is not None and suffix == "weight":
        return packed.shape(layer)
    return layer.tensors[suffix].shape if suffix in layer.tensors else None


def _unexpected(layer: Layer, parameters: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of a layer's tensors that neither the model nor the layer's format takes."""
    packed = format_of(layer)
    taken = set(parameters) | (packed.SUFFIXES if packed is not None and parameters else set())
    return [info.name for suffix, info in layer.tensors.items() if suffix not in taken]


def join_name(module: str, suffix: str) -> str:
    """A parameter's whole name; of a bare one the suffix is ""."""
    return f"{module}.{suffix}" if suffix else module


def _plain_names(module: str, suffix: str, _blocks: Sequence[int]) -> str:
    return join_name(module, suffix)
