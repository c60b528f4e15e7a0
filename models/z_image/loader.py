"""From weights on disk to a transformer on the CPU: sizes from the file, names and shapes strict, no needless copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.z_image.config import TransformerConfig, config_from_shapes
from models.z_image.keys import (
    Slot,
    diffusers_names,
    find_prefix,
    is_dropped,
    relative_of,
    slot_of,
    split_parameter,
)
from shared.quant.checkpoint import Checkpoint, TensorInfo
from shared.quant.errors import LayerMismatchError, UnknownFormatError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.z_image.transformer import ZImageTransformer

PLAIN_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Placement:
    """One tensor of a file and the rows of ours that it fills."""

    info: TensorInfo
    slot: Slot


# Our parameter name -> what fills it, in the file's order.
TensorPlan = dict[str, list[Placement]]


def plan_tensors(checkpoint: Checkpoint) -> TensorPlan:
    """Map every transformer tensor of a file onto our names. Raises LayerMismatchError when there is none."""
    prefix = find_prefix(checkpoint.tensors)
    if prefix is None:
        first = ", ".join(list(checkpoint.tensors)[:3]) or "nothing"
        raise LayerMismatchError(
            f"{checkpoint.path}: no Z-Image transformer in this file (its tensors begin with {first}).",
            "`wgp.py inspect FILE` says what it looks like.",
        )
    plan: TensorPlan = {}
    for name, info in checkpoint.tensors.items():
        if not name.startswith(prefix) or is_dropped(name[len(prefix) :]):
            continue
        module, parameter = split_parameter(name[len(prefix) :])
        slot = slot_of(module)
        plan.setdefault(slot.module + parameter, []).append(Placement(info, slot))
    return plan


def read_config(checkpoint: Checkpoint, plan: TensorPlan) -> TransformerConfig:
    """Sizes from shapes, and from the header's `config` what shapes do not show."""
    shapes = {name: parts[0].info.shape for name, parts in plan.items()}
    try:
        config = config_from_shapes(shapes)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise LayerMismatchError(
            f"{checkpoint.path}: cannot read the model's sizes, {error} is missing or of another shape.",
            "The file looks truncated, or its numbers are packed in a format this version does not read.",
        ) from error
    text = checkpoint.metadata.get("config")
    return config.with_json(text) if text else config


def load_transformer(paths: str | Path | Sequence[str | Path], dtype: torch.dtype) -> ZImageTransformer:
    """Build the transformer that a checkpoint describes and fill it, in `dtype`, on the CPU, ready to run.

    paths: one file, index or folder; of a list the first is the transformer, further ones are modules (ControlNet).
    Weights already of that type and layout stay mapped from disk. Raises LayerMismatchError listing the first five
    missing, unexpected and misshapen tensors each, UnknownFormatError for packed numbers.
    """
    import torch

    from models.z_image.transformer import ZImageTransformer

    files = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if len(files) > 1:
        raise UnknownFormatError(
            f"{files[1]}: module files (ControlNet) cannot be loaded by this version.",
            "Choose a preset without modules.",
        )
    checkpoint = Checkpoint.open(files[0])
    plan = plan_tensors(checkpoint)
    _refuse_packed(checkpoint, plan)
    config = read_config(checkpoint, plan)
    with torch.device("meta"):
        model = ZImageTransformer(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    _check(checkpoint, plan, expected)
    for name, parts in plan.items():
        _assign(model, name, _join(checkpoint, parts, expected[name], dtype))
    return model.eval().requires_grad_(False)


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under diffusers' names, fused rows split: what we write for others to read."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, parameter = split_parameter(name)
        theirs = diffusers_names(module)
        for their, rows in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            result[their + parameter] = rows.contiguous()
    return result


def _join(checkpoint: Checkpoint, parts: list[Placement], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Put a parameter's blocks in our order and into `dtype`; one whole tensor of that type is passed through."""
    import torch

    tensors = checkpoint.load(p.info.name for p in parts)
    blocks = {
        block: rows
        for part in parts
        for block, rows in zip(part.slot.blocks, tensors[part.info.name].chunk(len(part.slot.blocks)), strict=True)
    }
    if len(parts) == 1 and parts[0].slot.blocks == tuple(sorted(parts[0].slot.blocks)):
        joined = tensors[parts[0].info.name]
    else:
        joined = torch.cat([blocks[i] for i in sorted(blocks)])
    return joined.reshape(shape).to(dtype)


def _assign(model: ZImageTransformer, name: str, tensor: Tensor) -> None:
    import torch

    module, _, parameter = name.rpartition(".")
    owner = model.get_submodule(module)
    setattr(owner, parameter, torch.nn.Parameter(tensor, requires_grad=False))


def _refuse_packed(checkpoint: Checkpoint, plan: TensorPlan) -> None:
    odd = [p.info for parts in plan.values() for p in parts if p.info.dtype not in PLAIN_DTYPES]
    if odd:
        kinds = ", ".join(sorted({i.dtype for i in odd}))
        raise UnknownFormatError(
            f"{checkpoint.path}: {len(odd)} tensors are stored as {kinds} (first: {odd[0].name}); "
            f"this version reads {', '.join(PLAIN_DTYPES)}.",
            "Use the bf16 file of the same model.",
        )


def _check(checkpoint: Checkpoint, plan: TensorPlan, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Every parameter filled exactly once by tensors of the right shape, and nothing left over."""
    missing, twice, misshapen = [], [], []
    for name, shape in expected.items():
        parts = plan.get(name, [])
        filled = [block for p in parts for block in p.slot.blocks]
        if len(filled) > len(set(filled)):
            twice.append(" + ".join(p.info.name for p in parts))
            continue
        if not parts or len(filled) < parts[0].slot.of:
            missing.append(_file_names(name, parts))
            continue
        for part in parts:
            rows = shape[0] * len(part.slot.blocks) // part.slot.of
            # The pad tokens are (1, dim) in most files and (dim,) in some.
            if part.info.shape not in ((rows, *shape[1:]), shape[1:] if shape[0] == 1 else None):
                misshapen.append(f"{part.info.name} is {list(part.info.shape)}, expected {[rows, *shape[1:]]}")
    unexpected = [p.info.name for name, parts in plan.items() if name not in expected for p in parts]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:5])}{', ...' if len(found) > 5 else ''})"
        for what, found in (
            ("missing", missing),
            ("given twice", twice),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if found
    ]
    if problems:
        relative = relative_of(name for name in plan if name not in expected)
        hint = (
            f"It looks like {relative}, which this version cannot load."
            if relative
            else "The file is truncated, or belongs to another model; `wgp.py inspect FILE` says what it looks like."
        )
        raise LayerMismatchError(
            f"{checkpoint.path}: tensors do not fit a Z-Image transformer: {'; '.join(problems)}.", hint
        )


def _file_names(name: str, parts: Iterable[Placement]) -> str:
    """How a parameter that is not complete would be called in a file: the missing rows' names if some are there."""
    module, parameter = split_parameter(name)
    names = diffusers_names(module)
    present = {block for p in parts for block in p.slot.blocks}
    absent = [n for i, n in enumerate(names) if i not in present] if present else names
    return " + ".join(n + parameter for n in absent)
