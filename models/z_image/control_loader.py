"""From a Fun ControlNet file to a control branch: sizes and release are read from its tensors, never from its name.

Names in a file: `control_all_x_embedder.2-1`, `control_layers.j.*`, `control_noise_refiner.i.*`, behind any prefix;
what follows is named as in a transformer (keys.py). They may also stand in the transformer's own file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from models.z_image.config import TransformerConfig
from models.z_image.control_config import ControlConfig, Refiner, release_of
from models.z_image.gguf_names import with_split_qkv
from models.z_image.keys import slot_of
from shared.quant.assemble import Storage, fill
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import LayerMismatchError
from shared.quant.formats import layers_of
from shared.quant.layer_plan import Part, Plan, check, shapes

if TYPE_CHECKING:
    from models.z_image.control import ControlBranch

logger = logging.getLogger(__name__)

CONTROL_PREFIX = "control_"
CONTROL_EMBEDDER = "control_all_x_embedder.2-1"
_LANDMARK = "control_layers.0."
_OURS = (
    (CONTROL_EMBEDDER, "x_embedder"),
    ("control_x_embedder", "x_embedder"),
    ("control_layers.", "layers."),
    ("control_noise_refiner.", "noise_refiner."),
)

PUBLISHED_LAYERS = 30  # of the trunk that the published branches belong to


def find_control_prefix(names: Iterable[str]) -> str | None:
    """What precedes every control name in a file ("", "model.diffusion_model." ...); None: no branch here."""
    found = {name.split(_LANDMARK)[0] for name in names if _LANDMARK in name}
    prefixes = [prefix for prefix in found if prefix == "" or prefix.endswith(".")]
    return min(prefixes, key=len) if prefixes else None


def plan_control(checkpoint: Checkpoint) -> Plan:
    """Map every control layer of a file onto our modules. Raises LayerMismatchError when there is none."""
    prefix = find_control_prefix(checkpoint.tensors)
    if prefix is None:
        first = ", ".join(list(checkpoint.tensors)[:3]) or "nothing"
        raise LayerMismatchError(
            f"{checkpoint.path}: no Fun ControlNet in this file (its tensors begin with {first}).",
            "`wgp.py inspect FILE` says what it looks like.",
        )
    checkpoint = with_split_qkv(checkpoint)
    names = [n for n in checkpoint.tensors if n.startswith(f"{prefix}{CONTROL_PREFIX}")]
    plan: Plan = {}
    for module, layer in layers_of(checkpoint, names).items():
        slot = slot_of(_our_name(module[len(prefix) :]))
        plan.setdefault(slot.module, []).append(Part(layer, slot.blocks, slot.of))
    return plan


def read_control_config(checkpoint: Checkpoint, plan: Plan, trunk_layers: int = PUBLISHED_LAYERS) -> ControlConfig:
    """Sizes from shapes; which trunk layers get hints from the header's `config`, else at equal distances.

    Raises LayerMismatchError when the embedder is missing, or there are more layers than the trunk has.
    """
    known = shapes(plan)
    embedder = known.get("x_embedder.weight")
    if embedder is None or len(embedder) != 2:
        raise LayerMismatchError(
            f"{checkpoint.path}: a Fun ControlNet without its embedder (control_all_x_embedder.2-1).",
            "The file looks truncated; download it again.",
        )
    count = 1 + max(int(name.split(".")[1]) for name in known if name.startswith("layers."))
    given = _header_config(checkpoint)
    places = given.get("control_layers_places") or [j * (trunk_layers // count) for j in range(count)]
    if len(set(places)) != count or max(places) >= trunk_layers:
        raise LayerMismatchError(
            f"{checkpoint.path}: {count} control layers for the places {places} of {trunk_layers} transformer layers.",
            "It is made for another model.",
        )
    refiner = _refiner(plan, known)
    refiners = 1 + max((int(n.split(".")[1]) for n in known if n.startswith("noise_refiner.")), default=1)
    return ControlConfig(
        places=tuple(places),
        in_channels=embedder[1] // 4,
        refiner=refiner,
        refiner_places=() if refiner == "plain" else tuple(range(refiners)),
    )


def load_control(checkpoint: Checkpoint, trunk: TransformerConfig, storage: Storage) -> ControlBranch:
    """Build the branch that a checkpoint describes beside a trunk of these sizes and fill it, on the CPU.

    Raises LayerMismatchError for a branch of another model's sizes, UnknownFormatError for a packing not known.
    """
    from models.z_image.control import ControlBranch
    from shared.quant.unfilled import unfilled

    plan = plan_control(checkpoint)
    config = read_control_config(checkpoint, plan, trunk.n_layers)
    plan = _used(plan, config)
    logger.info("%s: %s, %d control layers", checkpoint.path.name, release_of(config), len(config.places))
    with unfilled():
        branch = ControlBranch(trunk, config)
    fill(branch, plan, storage, source=str(checkpoint.path), hint=_hint)
    return branch.eval().requires_grad_(False)


def check_control(
    checkpoint: Checkpoint,
) -> tuple[Plan, dict[str, dict[str, tuple[int, ...]]], dict[str, Any]]:
    """Whether a file fills a whole branch, from its header, beside a trunk of whatever sizes; load_control()'s errors.

    Returns the plan of what is used, our module (or bare parameter) -> suffix -> shape, and what the header's `config`
    has to say for the branch to be read again.
    """
    from models.z_image.control import ControlBranch
    from shared.quant.unfilled import unfilled

    plan = plan_control(checkpoint)
    known = shapes(plan)
    given = _header_config(checkpoint)
    trunk_layers = max(given.get("control_layers_places", ()), default=PUBLISHED_LAYERS - 1) + 1
    config = read_control_config(checkpoint, plan, trunk_layers)
    plan = _used(plan, config)
    try:
        dim, head = known["x_embedder.weight"][0], known["layers.0.attention.q_norm.weight"][0]
        trunk = TransformerConfig(
            dim=dim,
            n_layers=trunk_layers,
            n_refiner_layers=1
            + max((int(n.split(".")[1]) for n in known if n.startswith("noise_refiner.")), default=0),
            n_heads=dim // head,
            ffn_dim=known["layers.0.feed_forward.w2.weight"][1],
            time_dim=known["layers.0.adaLN_modulation.0.weight"][1],
            axes_dims=(head, 0, 0),  # of which the branch has no tensor
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise LayerMismatchError(
            f"{checkpoint.path}: cannot read the ControlNet's sizes, {error} is missing or of another shape.",
            "The file looks truncated; download it again.",
        ) from error
    with unfilled():
        branch = ControlBranch(trunk, config)
    return plan, check(branch, plan, source=str(checkpoint.path), hint=_hint), given


def _count(names: Iterable[str], stage: str) -> int:
    """Blocks of a stage, by the highest number among its names."""
    return max((int(name.split(".")[1]) + 1 for name in names if name.startswith(stage)), default=0)


def _used(plan: Plan, config: ControlConfig) -> Plan:
    """Without a refiner that was never trained: all zeros, which would silence the first hints."""
    if config.refiner != "layers":
        return plan
    return {module: parts for module, parts in plan.items() if not module.startswith("noise_refiner.")}


def _our_name(module: str) -> str:
    for theirs, ours in _OURS:
        if module.startswith(theirs):
            return ours + module[len(theirs) :]
    return module


def _refiner(plan: Plan, known: Mapping[str, tuple[int, ...]]) -> Refiner:
    if "noise_refiner.0.attention_norm1.weight" not in known:
        return "layers"
    projection = plan.get("noise_refiner.0.after_proj")
    if projection is None:
        return "plain"
    return "layers" if all(_is_zero(part) for part in projection) else "own"


def _is_zero(part: Part) -> bool:
    """Whether a layer's weight has no bit set: plain numbers and integer codes alike are then all zero."""
    largest = max(part.layer.tensors.values(), key=lambda info: info.nbytes)
    return not part.layer.checkpoint.read_bytes(largest.name).strip(b"\0")


def _header_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The header's `config`, as diffusers and VideoX-Fun spell it; {} where there is none or it is no object."""
    try:
        given = json.loads(checkpoint.metadata.get("config") or "{}")
    except (ValueError, RecursionError):
        return {}
    places = given.get("control_layers_places") if isinstance(given, dict) else None
    return given if isinstance(places, list) and all(type(place) is int for place in places) else {}


def _hint(_unexpected: object) -> str:
    return "This ControlNet belongs to a model of other sizes, or the file is truncated."
