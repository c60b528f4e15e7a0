"""What a plan takes of memory, and where its weights will live: by headers of files, else by published sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared.app.device import DeviceInfo, ram_bytes
from shared.app.memory import (
    STAGES,
    MemoryEstimate,
    ModuleShapes,
    PublishedModule,
    Workload,
    estimate_memory,
    free_ram_bytes,
    free_vram_bytes,
)
from shared.app.memory_plan import Asked, MemoryPlan, Relief, parse_size, plan_memory, unknown_sizes
from shared.app.plan.files import PlannedFile
from shared.app.plan.machine import DTYPE_BYTES, VAE_DTYPE, Machine
from shared.app.plan.requested import Choice, requested_offload, requested_profile
from shared.app.presets import Preset

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.settings import GenerationSettings


def weigh(
    ctx: AppContext,
    preset: Preset,
    settings: GenerationSettings,
    files: Sequence[PlannedFile],
    loras: Sequence[Path],
    machine: Machine,
    relief: Relief | None,
) -> tuple[Choice, MemoryEstimate | None, MemoryPlan | None]:
    """Where weights will live, and the memory it takes: by the headers of files that are here, else as published."""
    device = machine.device
    cap = parse_size(getattr(ctx.args, "max_vram", None) or ctx.config.get("max_vram"))
    asked = Asked(offload=requested_offload(ctx), profile=requested_profile(ctx), cap=cap)
    is_exact = settings.sampling.precision == "exact"
    work = Workload(
        width=round(settings.width * settings.edit.hires_scale),  # the second pass is the larger one
        height=round(settings.height * settings.edit.hires_scale),
        tile_cells=settings.VAE_tile_size,
        compute_bytes=DTYPE_BYTES[machine.dtype.value],
        vae_bytes=DTYPE_BYTES[VAE_DTYPE],
        decode_bytes=None if is_exact else quick_decode_bytes(device, machine.dtype.value),
        is_exact=is_exact,
        guided=settings.guidance_scale > 0,
        on_cpu=device.kind == "cpu",
    )
    estimate = weigh_files(ctx, preset, files, work, loras)
    if estimate is None:
        return Choice(*unknown_sizes(device, asked)), None, None
    placement = plan_memory(
        estimate,
        device,
        ram=ram_bytes(),
        free=free_vram_bytes() if device.kind == "cuda" else free_ram_bytes(),
        asked=asked,
        relief=relief,
    )
    reason = f"{placement.reason}. {' '.join(placement.sentences)}"
    if estimate.published:
        reason = f"by the published sizes: {reason}"
    return Choice(placement.name, reason), estimate, placement


def weigh_files(
    ctx: AppContext, preset: Preset, files: Sequence[PlannedFile], work: Workload, loras: Sequence[Path] = ()
) -> MemoryEstimate | None:
    """What weights and work take: by headers of the files that are here, else by published sizes and shapes.

    None where a size is not known. Raises UserError for a file that is here and broken.
    """
    parts = {role: [f for f in files if f.role == role] for role in ("transformer", "module", "text_encoder", "vae")}
    published = _published(ctx, preset, parts) if parts["text_encoder"] and parts["vae"] else None
    if published is None:
        return None
    known = {role: [part.path for part in found if part.path is not None] for role, found in parts.items()}
    return estimate_memory(
        transformer=[*known["transformer"], *known["module"]],
        text_encoder=next(iter(known["text_encoder"]), None),
        vae=next(iter(known["vae"]), None),
        work=work,
        loras=loras,
        published=published,
    )


def quick_decode_bytes(device: DeviceInfo, dtype: str) -> int | None:
    """Bytes per number that a picture is decoded in, None for the VAE's own.

    A CPU that multiplies bfloat16 and an NVIDIA GPU decode in it beside a transformer that does, unless precision is
    asked for; see models/z_image/decoding.py.
    """
    return 2 if device.kind in ("cpu", "cuda") and dtype == "bfloat16" else None


def published_shapes(ctx: AppContext, preset: Preset) -> Mapping[str, Mapping[str, int]]:
    """What the family knows of its published modules, by name; {} of a family that tells nothing."""
    ask = getattr(ctx.presets.families.handler(preset.architecture), "query_published_shapes", None)
    return ask(preset.architecture) if callable(ask) else {}


def _published(
    ctx: AppContext, preset: Preset, files: Mapping[str, Sequence[PlannedFile]]
) -> dict[str, PublishedModule] | None:
    """By name, the modules that are not all here, as they are published; None if not all of these are known.

    files: by role.
    """
    shapes = published_shapes(ctx, preset)
    found: dict[str, PublishedModule] = {}
    for name in STAGES.values():
        parts = [*files[name], *(files["module"] if name == "transformer" else ())]
        if all(part.path is not None for part in parts):
            continue
        sizes = [part.published if part.bytes is None else part.bytes for part in parts]
        known = [size for size in sizes if size is not None]
        if name not in shapes or len(known) < len(sizes):
            return None
        found[name] = PublishedModule(
            shapes=ModuleShapes(**shapes[name]),
            nbytes=known[0],
            further=tuple(known[1:]),
            is_joined=name != "text_encoder",
            # llama.cpp's writer packs a language model's embedding table like the rest
            packs_table=name == "text_encoder" and parts[0].url.lower().endswith(".gguf"),
        )
    return found
