"""From weights on disk to a transformer on the CPU: sizes from the file, names and shapes strict, no needless copy."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.z_image.config import TransformerConfig, config_from_shapes
from models.z_image.control_loader import CONTROL_PREFIX, load_control
from models.z_image.gguf_names import with_split_qkv
from models.z_image.keys import diffusers_names, find_prefix, is_dropped, relative_of, slot_of, split_parameter
from shared.quant.assemble import MAPPED_FROM, Storage, fill
from shared.quant.checkpoint import Checkpoint
from shared.quant.collection import collection_put_off
from shared.quant.errors import CheckpointError, LayerMismatchError, UnknownFormatError
from shared.quant.formats import layers_of
from shared.quant.layer_plan import Part, Plan, check, shapes
from shared.quant.number_checks import NumberChecks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.z_image.transformer import ZImageTransformer


def plan_layers(checkpoint: Checkpoint) -> Plan:
    """Map every transformer layer of a file onto our modules. Raises LayerMismatchError when there is none."""
    prefix = find_prefix(checkpoint.tensors)
    if prefix is None:
        first = ", ".join(list(checkpoint.tensors)[:3]) or "nothing"
        raise LayerMismatchError(
            f"{checkpoint.path}: no Z-Image transformer in this file (its tensors begin with {first}).",
            "`wgp.py inspect FILE` says what it looks like.",
        )
    checkpoint = with_split_qkv(checkpoint)
    names = [n for n in checkpoint.tensors if n.startswith(prefix) and not is_dropped(n[len(prefix) :])]
    plan: Plan = {}
    for module, layer in layers_of(checkpoint, names).items():
        slot = slot_of(module[len(prefix) :])
        plan.setdefault(slot.module, []).append(Part(layer, slot.blocks, slot.of))
    return plan


def read_config(checkpoint: Checkpoint, plan: Plan) -> TransformerConfig:
    """Sizes from shapes, and from the header's `config` what shapes do not show."""
    try:
        config = config_from_shapes(shapes(plan))
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise LayerMismatchError(
            f"{checkpoint.path}: cannot read the model's sizes, {error} is missing or of another shape.",
            "The file looks truncated; download it again.",
        ) from error
    try:
        text = checkpoint.metadata.get("config") or _unpacked(checkpoint.metadata.get("config_base64"))
        return config.with_json(text) if text else config
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: the config in its header is not usable ({error}).", "Get the file from elsewhere."
        ) from error


@collection_put_off()
def load_transformer(
    paths: str | Path | Sequence[str | Path],
    dtype: torch.dtype,
    *,
    compute: str = "auto",
    keep_mapped: bool = False,
    keep_apart: bool = False,
) -> ZImageTransformer:
    """Build the transformer that a checkpoint describes and fill it, in `dtype`, on the CPU, ready to run.

    paths: one file, index or folder; of a list the first is the transformer, the second a ControlNet. A ControlNet in
    the transformer's own file is loaded too, unless a second file replaces it.
    compute: how packed layers are multiplied, see shared/quant/kernels.
    keep_mapped: for a model that stays on the CPU: of a large file no weight is copied that can be read as it lies, see
    Storage's join and widen. keep_apart: for a GPU onto which our own offloaders lay a block's tensors side by side:
    rows that stand apart in a large file are not joined here, see Storage's stack.
    Raises LayerMismatchError listing missing, unexpected and misshapen tensors, UnknownFormatError for a packing that
    is not known, CheckpointError for impossible numbers; in a large file the model's `number_checks` do so later.
    """
    files = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if len(files) > 2:
        raise UnknownFormatError(
            f"{files[2]}: a second module file; one ControlNet at a time can be loaded.",
            "Leave one out of the preset's modules.",
        )
    checkpoint = Checkpoint.open(files[0])
    whole = plan_layers(checkpoint)
    plan = {module: parts for module, parts in whole.items() if not module.startswith(CONTROL_PREFIX)}
    config = read_config(checkpoint, plan)
    model = _without_weights(config)
    checks = NumberChecks()
    storage = _storage(checkpoint, dtype, compute, checks, keep_mapped=keep_mapped, keep_apart=keep_apart)
    fill(model, plan, storage, source=str(checkpoint.path), name_missing=_file_names, hint=_hint_for(config))
    if len(files) > 1 or len(plan) < len(whole):
        branch = Checkpoint.open(files[1]) if len(files) > 1 else checkpoint
        storage = _storage(branch, dtype, compute, checks, keep_mapped=keep_mapped, keep_apart=keep_apart)
        model.control = load_control(branch, config, storage)
    model.number_checks = checks
    return model.eval().requires_grad_(False)


def _storage(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    compute: str,
    checks: NumberChecks,
    *,
    keep_mapped: bool,
    keep_apart: bool,
) -> Storage:
    is_large = checkpoint.nbytes >= MAPPED_FROM
    stays_mapped = keep_mapped and is_large
    return Storage(
        dtype=dtype,
        compute=compute,
        join=not stays_mapped,
        stack=keep_apart and is_large,
        widen=stays_mapped,
        cast_later=is_large,
        checks=checks if is_large else None,
    )


def check_transformer(
    checkpoint: Checkpoint, plan: Plan, config: TransformerConfig
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Whether a file fills a whole transformer, from its header, with load_transformer()'s errors.

    Returns our module (or bare parameter) -> suffix -> shape.
    """
    model = _without_weights(config)
    return check(model, plan, source=str(checkpoint.path), name_missing=_file_names, hint=_hint_for(config))


def _without_weights(config: TransformerConfig) -> ZImageTransformer:
    """The network of these sizes on the meta device."""
    from models.z_image.omni import OmniTransformer
    from models.z_image.transformer import ZImageTransformer
    from shared.quant.unfilled import unfilled

    with unfilled():
        return OmniTransformer(config) if config.siglip_feat_dim else ZImageTransformer(config)


def _unpacked(text: str | None) -> str | None:
    """mmgp keeps JSON in a header as base64."""
    return base64.b64decode(text, validate=True).decode() if text else None


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under diffusers' names, fused rows split: what we write for others to read."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, parameter = split_parameter(name)
        theirs = diffusers_names(module)
        for their, rows in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            result[their + parameter] = rows.contiguous()
    return result


def _hint_for(config: TransformerConfig) -> Callable[[Sequence[str]], str]:
    if config.siglip_feat_dim:
        return lambda _: "It is a Z-Image Omni or Edit checkpoint, and not a whole one; get it from elsewhere."
    return _hint


def _hint(unexpected: Sequence[str]) -> str:
    relative = relative_of(unexpected)
    if relative:
        return f"It looks like {relative}, which this version cannot load."
    return "The file is truncated, or belongs to another model; `wgp.py inspect FILE` says what it looks like."


def _file_names(module: str, suffix: str, blocks: Sequence[int]) -> str:
    """What a file would call the missing blocks of our parameter (all of them when `blocks` is empty)."""
    names = diffusers_names(module)
    absent = [names[i] for i in blocks] if blocks and len(names) > 1 else names
    return " + ".join(f"{n}.{suffix}" if suffix else n for n in absent)
