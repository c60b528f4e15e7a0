"""Calibration: draw some pictures with the model that is to be converted, and watch what its linears are fed with.

On a CPU the weights of a large model stay in their file, and each block lets go of its pages once it has run: what is
in memory is one block, not twelve gigabytes. They are read anew at each step, from the disk where the system has
no memory left over to keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.loading import ModelHolder
from shared.app.plan import Choice, Machine, find_machine, make_plan, requested_device
from shared.app.presets import Preset
from shared.app.settings import GenerationSettings
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from shared.app.context import AppContext
    from shared.quant.inputs import InputRecorder

FIRST_SEED = 1000
# Larger pictures show a layer more tokens, not others; on a CPU they take minutes each.
_MOST_PIXELS = 512 * 512
_CALIBRATION_SIZE = "512x512"
# From this size on weights stay mapped from disk on the CPU, in their own type, whatever type would be faster.
_MAPPED_FROM = 4 * 2**30
_TYPES = {"BF16": "bfloat16", "F32": "float32"}

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """What to draw: picture i with prompt i, over and over, and seed FIRST_SEED + i. loras: to be merged, strengths."""

    source: Path
    like: Preset
    prompts: Sequence[str]
    count: int
    loras: Sequence[tuple[Path, float]] = ()


def watch(ctx: AppContext, drawings: Drawings, say: Say) -> InputRecorder:
    """Draw with the source in the place of the preset's transformer; what its linears took, by our modules' names.

    Nothing is decoded or saved. say: what is going on, in words. Raises UserError when the preset's other files are not
    on this machine.
    """
    import torch

    from shared.quant.inputs import InputRecorder

    preset = replace(drawings.like, urls=(str(drawings.source.resolve()),), modules=(), loras=(), configs={})
    machine = _machine(find_machine(preset, requested_device(ctx)), drawings.source)
    plans = [make_plan(ctx, preset, _settings(preset, drawings, i), machine) for i in range(drawings.count)]
    missing = [file.url for file in plans[0].missing]
    if missing:
        raise UserError(
            f"--calibrate draws with the preset {preset.id}, whose {missing[0]} is not on this machine.",
            f"Draw a picture with it first (wgp.py generate PROMPT --preset {preset.id}), or name another with --like.",
        )
    holder = ModelHolder(ctx)
    try:
        model = holder.ensure(plans[0], say)
        processor: Any = model.processor
        network = processor.transformer
        at_once = block_by_block(network) if _is_large(drawings.source) else nullcontext()
        with InputRecorder(network) as recorder, at_once, torch.no_grad():
            for number, plan in enumerate(plans, 1):
                say(f"Calibrating, picture {number} of {len(plans)}")
                _draw(processor, plan.settings)
    finally:
        holder.release()
    return recorder


@contextmanager
def block_by_block(network: nn.Module) -> Iterator[None]:
    """Meanwhile each block of the network, member of a list of modules, lets go of its mapped weights once it has run.

    Weights in memory of their own are left alone.
    """
    from torch import nn

    from shared.quant.mapping import forget

    blocks = [block for part in network.modules() if isinstance(part, nn.ModuleList) for block in part]
    handles = [
        block.register_forward_hook(lambda own, _inputs, _output: forget((*own.parameters(), *own.buffers())) and None)
        for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_large(source: Path) -> bool:
    return Checkpoint.open(source).nbytes >= _MAPPED_FROM


def _draw(processor: Any, settings: GenerationSettings) -> None:
    """All steps, and then no more: the decoder is not what is watched."""
    steps = settings.num_inference_steps
    processor._interrupt = False

    def on_step(step: int, _latents: Any = None, _first: bool = False, total: int | None = None) -> None:
        nonlocal steps
        steps = total or steps
        if step == steps - 1:
            processor._interrupt = True

    processor.generate(**settings.host_kwargs(), callback=on_step)


def _settings(preset: Preset, drawings: Drawings, index: int) -> GenerationSettings:
    asked: dict[str, Any] = {
        "prompt": drawings.prompts[index % len(drawings.prompts)],
        "seed": FIRST_SEED + index,
        "batch_size": 1,
        "activated_loras": [str(path.resolve()) for path, _ in drawings.loras],
        "loras_multipliers": " ".join(f"{strength:g}" for _, strength in drawings.loras),
    }
    settings = GenerationSettings.build(preset, {}, asked)
    if settings.width * settings.height > _MOST_PIXELS:
        settings = GenerationSettings.build(preset, {}, asked | {"resolution": _CALIBRATION_SIZE})
    return settings


def _machine(machine: Machine, source: Path) -> Machine:
    """The same, but on a CPU a large file is computed in its own type: then its weights take no memory of their own."""
    checkpoint = Checkpoint.open(source)
    types = {info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2}
    if machine.device.kind != "cpu" or not _is_large(source) or len(types) > 1 or not types <= _TYPES.keys():
        return machine
    return replace(machine, dtype=Choice(_TYPES[types.pop()], "the file's own, so that its weights stay on the disk"))
