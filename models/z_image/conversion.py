"""What the converter (shared/quant/convert/) has to know of Z-Image: its layers and their names in each file.

Names: the table in keys.py. Recipes are written for the official ones, and hold for the layers of a ControlNet too,
whose file keeps its own: those of a transformer behind `control_`, split or fused as they were.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.z_image.control_loader import CONTROL_EMBEDDER, CONTROL_PREFIX, check_control, find_control_prefix
from models.z_image.keys import diffusers_names, find_prefix
from models.z_image.loader import check_transformer, plan_layers, read_config
from models.z_image.prompts import calibration_prompts
from shared.quant.checkpoint import Checkpoint
from shared.quant.convert import Model, Place, Places
from shared.quant.errors import UserError
from shared.quant.formats import quanto_int8, svdq
from shared.quant.layout import Carried
from shared.quant.targets import DEFAULT_RANK, Naming

if TYPE_CHECKING:
    from torch import Tensor

    from models.z_image.lora import LoraFile, Match
    from shared.quant.packings.svdq import Kind

__all__ = [
    "CHECKPOINT_PREFIX",
    "RECIPES",
    "calibration_prompts",
    "companions",
    "companions_header",
    "header",
    "merge",
    "open_model",
    "places",
]

RECIPES = Path(__file__).with_name("recipes")

# What stands before names in ComfyUI's all-in-one checkpoints.
CHECKPOINT_PREFIX = "model.diffusion_model."
ENCODER_PREFIX = "text_encoders.qwen3_4b.transformer.model."
VAE_PREFIX = "vae."

_QKV, _W13 = "attention.qkv", "feed_forward.w13"
_REFINERS = ("noise_refiner.", "context_refiner.")


def open_model(path: Path) -> Model:
    """The transformer or ControlNet in a file, checked to be whole. Raises what load_transformer() raises."""
    checkpoint = Checkpoint.open(path)
    if find_prefix(checkpoint.tensors) is None and find_control_prefix(checkpoint.tensors) is not None:
        plan, wanted, given = check_control(checkpoint)
        is_split = any(".attention.to_q." in name for name in checkpoint.tensors)
        return Model(checkpoint, plan, wanted, given, control_places("diffusers" if is_split else "official"))
    plan = plan_layers(checkpoint)
    config = read_config(checkpoint, plan)
    wanted = check_transformer(checkpoint, plan, config)
    return Model(checkpoint, plan, wanted, config.as_diffusers(), places)


def companions(text_encoder: Path | None, vae: Path | None) -> tuple[Carried, ...]:
    """These models' tensors, by their names in ComfyUI's checkpoints. Raises UserError for a file that has none."""
    carried: list[Carried] = []
    wanted = (
        (text_encoder, "text encoder", "embed_tokens.", ENCODER_PREFIX),
        (vae, "VAE", "decoder.conv_in.", VAE_PREFIX),
    )
    for path, kind, landmark, prefix in wanted:
        if path is None:
            continue
        checkpoint = Checkpoint.open(path)
        own = next((n.split(landmark)[0] for n in checkpoint.tensors if f".{landmark}" in f".{n}"), None)
        if own is None or path.suffix.lower() == ".gguf":
            raise UserError(
                f"{path}: no {kind} in safetensors, which is what a checkpoint takes.",
                "`wgp.py inspect FILE` says more.",
            )
        names = [name for name in checkpoint.tensors if name.startswith(own)]
        carried += [Carried(f"{prefix}{name[len(own) :]}", checkpoint, name) for name in names]
    return tuple(carried)


def companions_header(vae: Path | None) -> dict[str, str]:
    """What the header of a checkpoint says for them, since no file can lie beside each of its parts."""
    if vae is None:
        return {}
    from models.z_image.autoencoder import given_config
    from models.z_image.vae_names import CONFIG_KEY

    given = given_config(Checkpoint.open(vae))
    return {CONFIG_KEY: json.dumps(given)} if given else {}


def merge(model: Model, loras: Sequence[tuple[Path, float]]) -> tuple[Model, list[Match]]:
    """The model with these LoRA files (path, strength) added to its weights, and how much of each found its place.

    Raises UserError for a file that matches nothing, what lora.read() raises for one that cannot be used.
    """
    from models.z_image import lora
    from models.z_image.lora_file import place

    shapes = {
        f"{module}.{suffix}" if suffix else module: shape
        for module, suffixes in model.shapes.items()
        for suffix, shape in suffixes.items()
    }
    merges: list[LoraMerge] = []
    matches = []
    for path, strength in loras:
        file = lora.read(path)
        matches.append(lora.match(file, shapes))
        modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
        merges.append(LoraMerge(file, strength, shapes, frozenset(place(file, modules).transformer)))
    return replace(model, merges=(*model.merges, *merges)), matches


@dataclass(frozen=True)
class LoraMerge:
    """A LoRA file as shared/quant/convert/ wants it: one module's differences at a time."""

    file: LoraFile
    strength: float
    shapes: Mapping[str, tuple[int, ...]]
    modules: frozenset[str]

    def delta(self, module: str, suffix: str, base: Callable[[], Tensor]) -> Tensor | None:
        """What is added to this parameter of the module, float32; None for nothing. base: the module's weight."""
        from models.z_image import lora

        name = f"{module}.{suffix}"
        wanted = {n: shape for n, shape in self.shapes.items() if n in (f"{module}.weight", f"{module}.bias")}
        found = lora.deltas(self.file, self.strength, wanted, lambda _name: base())
        return next((delta for changed, delta in found if changed == name), None)


def places(module: str, naming: Naming, *, packed: bool) -> tuple[Place, ...]:
    """The modules of a file that hold our `module`.

    packed: nunchaku has one name for fused q, k and v where they are packed, three where they are not.
    """
    block, _, _ = module.rpartition(".attention." if ".attention." in module else ".feed_forward.")
    if naming == "official":
        if module.endswith(_QKV):
            return (Place(module, (0, 1, 2), 3, (module,)),)
        if module.endswith(_W13):
            halves = (f"{block}.feed_forward.w1", f"{block}.feed_forward.w3")
            return tuple(Place(name, (i,), 2, (name,)) for i, name in enumerate(halves))
        return (Place(module, (0,), 1, (module,)),)
    if naming == "nunchaku" and block:
        w1_w3 = tuple(place.official[0] for place in places(f"{block}.{_W13}", "official", packed=packed))
        fused = {
            "attention.out": Place(f"{block}.attention.to_out.0", (0,), 1, (module,)),
            _W13: Place(f"{block}.feed_forward.net.0.proj", (1, 0), 2, w1_w3),  # w3 first
            "feed_forward.w2": Place(f"{block}.feed_forward.net.2", (0,), 1, (module,)),
        }
        if packed:
            fused[_QKV] = Place(f"{block}.attention.to_qkv", (0, 1, 2), 3, (module,))
        place = fused.get(module.removeprefix(f"{block}."))
        if place:
            return (place,)
    names = diffusers_names(module)
    official = [place.official[0] for place in places(module, "official", packed=packed)]
    # q, k and v are one official layer, w1 and w3 are two.
    said = official * len(names) if len(official) == 1 else official
    return tuple(Place(name, (i,), len(names), (said[i],)) for i, name in enumerate(names))


def control_places(own: Naming) -> Places:
    """places() of a ControlNet's modules. own: how its file names them, but for what nunchaku's formats pack."""

    def placed(module: str, naming: Naming, *, packed: bool) -> tuple[Place, ...]:
        kept = places(module, naming if naming == "nunchaku" else own, packed=packed)
        return tuple(replace(place, module=their_name(place.module)) for place in kept)

    return placed


def their_name(module: str) -> str:
    """What a ControlNet's file calls a module that a transformer's file would call this."""
    return CONTROL_EMBEDDER if module in ("x_embedder", "all_x_embedder.2-1") else f"{CONTROL_PREFIX}{module}"


def header(
    naming: Naming, formats: Mapping[str, str], config: Mapping[str, object], rank: int | None
) -> dict[str, str]:
    """The `__metadata__` that readers of this kind of file want. formats: packed module in the file -> format."""
    if naming == "diffusers":
        # A ControlNet's reader looks under its plain name.
        places_of_hints = {"config": json.dumps(config)} if "control_layers_places" in config else {}
        return quanto_int8.header(formats, config) | places_of_hints
    if naming == "nunchaku":
        kind: Kind = "fp4" if "svdq_fp4" in formats.values() else "int4"
        skip = not any(module.startswith(_REFINERS) for module in formats)
        return svdq.header(config, kind=kind, rank=rank or DEFAULT_RANK, skip_refiners=skip)
    return {"format": "pt", "config": json.dumps(config)}
