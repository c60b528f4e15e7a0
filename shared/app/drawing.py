"""Pictures and their latents, drawn from one model for measuring: nothing is saved, nothing is announced.

`draw` works in this process, `draw_elsewhere` in one of its own: memory that one model has taken then says nothing
about the next, and a model that does not fit takes only its own process down. On Linux such processes are copies of one
that has imported what drawing takes, which takes seconds, and done nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.quant.errors import RunError, UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from numpy.typing import NDArray

    from shared.app.context import AppContext


# What every drawing imports and takes seconds for. A name that is not there is passed over.
_IMPORTS = (
    "torch",
    "shared.app.drawing",
    "shared.app.session",
    "transformers.models.auto.tokenization_auto",
    "models.z_image.z_image_main",
    "transformers.models.qwen3.modeling_qwen3",
    "diffusers.models.autoencoders.autoencoder_kl",
)


@dataclass(frozen=True, kw_only=True)
class DrawJob:
    """What to draw: it travels to another process, so it holds plain values only.

    file: the transformer that takes the place of the preset's. pictures: settings of each, in the host's keys.
    args: the command line's flags. threads: on the CPU, in a process of its own; 0 leaves them to torch.
    """

    root: Path
    args: argparse.Namespace
    preset: str
    file: Path
    pictures: Sequence[Mapping[str, Any]]
    threads: int = 0


@dataclass(frozen=True)
class Drawn:
    """picture: (H, W, 3) uint8. latents: (16, h, w) float32, before decoding. seconds: denoising and decoding."""

    picture: NDArray
    latents: NDArray
    seconds: float


@dataclass(frozen=True)
class Spent:
    """What it took in all, told last. MiB; None where the system does not say."""

    load_seconds: float
    peak_rss_mb: float | None
    peak_vram_mb: float


def draw(job: DrawJob, ctx: AppContext | None = None) -> Iterator[Drawn | Spent]:
    """Draw each picture of the job, then say what it took.

    ctx: made from the job if it is not given. Raises UserError for a file that cannot be used, RunError for numbers
    that are not finite.
    """
    import torch

    from shared.app.context import AppContext
    from shared.app.loading import ModelHolder
    from shared.app.memory import peak_rss_mb, peak_vram_mb, reset_peak_vram
    from shared.app.one_picture import to_image
    from shared.app.plan import find_machine, make_plan, requested_device
    from shared.app.settings import GenerationSettings

    ctx = ctx or AppContext.create(job.args, job.root)
    # No user settings: a comparison must mean the same on every machine.
    preset = replace(ctx.presets.get(job.preset), urls=(str(job.file),), configs={})
    machine = find_machine(preset, requested_device(ctx))
    holder = ModelHolder(ctx)
    load_seconds = 0.0
    reset_peak_vram()
    try:
        for asked in job.pictures:
            settings = GenerationSettings.build(preset, {}, asked)
            plan = make_plan(ctx, preset, settings, machine)
            if plan.missing:
                raise UserError(
                    f"{job.preset}: {plan.missing[0].url} is not on this machine.",
                    f"Draw one picture with it first: wgp.py generate PROMPT --preset {job.preset}.",
                )
            began = time.perf_counter()
            # With the order at hand the prompt is encoded now; where it is remembered, no text encoder is loaded.
            model = holder.ensure(plan, lambda _: None, [settings.host_kwargs()])
            load_seconds += time.perf_counter() - began
            processor = model.processor
            if model.prompts is not None:
                model.prompts.flush()
            last: list[torch.Tensor] = []

            def keep(step: int, latents: torch.Tensor | None = None, *_: Any, last: Any = last) -> None:
                if latents is not None:
                    last[:] = [latents]

            began = time.perf_counter()
            pixels = processor.generate(**settings.host_kwargs(), callback=keep)
            seconds = time.perf_counter() - began
            import numpy as np

            yield Drawn(np.asarray(to_image(pixels)), last[0].float().cpu().numpy().squeeze(1), seconds)
        yield Spent(load_seconds, peak_rss_mb(), peak_vram_mb())
    finally:
        holder.release()


def draw_elsewhere(job: DrawJob) -> Iterator[Drawn | Spent]:
    """As `draw`, in a process of its own that ends with the last picture. RunError when it dies."""
    # Forking this process would take its memory and threads along.
    if sys.platform == "linux":
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_IMPORTS))
    else:
        context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            try:
                message = ours.recv()
            except EOFError:
                process.join()
                raise RunError(
                    f"{job.file}: the process that drew with it ended with exit code {process.exitcode}.",
                    "Its last words are above; without any, the system may have ended it for want of memory.",
                ) from None
            if isinstance(message, UserError):
                raise message
            yield message
            if isinstance(message, Spent):
                return
    finally:
        process.terminate()
        process.join()


def _send(connection: Connection, job: DrawJob) -> None:
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        try:
            for message in draw(job):
                connection.send(message)
        except UserError as error:
            connection.send(error)
