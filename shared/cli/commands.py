"""The subcommands: each takes the parsed flags, says what it has to say, and returns the exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli.parser import overrides_of
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.events import Event, GenerationResult, ImageDone
    from shared.app.plan import GenerationPlan, PlannedFile
    from shared.app.presets import Preset

DONE, BROKEN, INTERRUPTED = 0, 1, 130

_TEXT_WIDTH = 100


def generate(ctx: AppContext, args: argparse.Namespace) -> int:
    """Draw pictures: progress on stderr, paths (or with --json one object in the last line) on stdout."""
    from shared.app.context import DEFAULT_PRESET
    from shared.app.output import resolve_output
    from shared.app.prompts import WILDCARD_FOLDER, pictures
    from shared.app.settings import GenerationSettings

    preset = ctx.presets.get(args.preset or DEFAULT_PRESET)
    settings = GenerationSettings.build(preset, ctx.saved_settings(preset), overrides_of(args))
    for note in (*preset.notes, *settings.notes):
        print(note, file=sys.stderr)
    if args.control_preview:
        from shared.cli.edit import save_control_preview

        print(save_control_preview(ctx, preset, settings, args.control_preview))
        return DONE
    count = len(pictures(settings, ctx.root / WILDCARD_FOLDER))
    if args.dry_run:
        place = resolve_output(args.output, ctx.output_folder, count)
        plan = ctx.session.plan(preset, settings)
        output = str(place.folder / place.template) if place.template else str(place.folder)
        _print_json(plan.as_dict() | {"output": output}) if args.json else print(plan_text(plan, output, count))
        return DONE

    from shared.app.events import ImageDone
    from shared.cli.progress import ProgressLine

    images: list[ImageDone] = []
    try:
        # Libraries print to stdout as they please; stdout belongs to the result.
        with contextlib.redirect_stdout(sys.stderr), ProgressLine(quiet=args.verbose == 0) as show:

            def on_event(event: Event) -> None:
                if isinstance(event, ImageDone):
                    images.append(event)
                show(event)

            result = ctx.session.generate(preset, settings, on_event=on_event, output=args.output)
    except KeyboardInterrupt:
        _print_pictures(images, preset, args, cancelled=True)
        print(f"Interrupted; {len(images)} of {count} pictures were finished and kept.", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        if not args.json:
            _print_pictures(images, preset, args)
        raise
    if args.json:
        _print_json(result.as_dict())
    else:
        _print_pictures(images, preset, args)
        if args.verbose:
            print(result_text(result), file=sys.stderr)
    return DONE


def presets(ctx: AppContext, args: argparse.Namespace) -> int:
    """List the presets that are shown, by family; with --add, make some first, and list only these."""
    if args.add:
        return _add_presets(ctx, args)
    if args.like:
        raise UserError("--like is whose settings the presets of --add take.", "Add --add FILE.")
    groups = ctx.presets.grouped()
    if args.json:
        _print_json([preset_dict(ctx, preset) for _, group in groups for preset in group], indent=2)
        return DONE
    for label, group in groups:
        print(label)
        width = max(len(preset.id) for preset in group)
        for preset in group:
            missing = missing_files(ctx, preset)
            mark = f"  ({missing_words(missing[0])})" if missing else ""
            print(f"  {preset.id:<{width}}  {preset.name}{mark}")
            if preset.description:
                indent = " " * (width + 4)
                print(textwrap.fill(preset.description, _TEXT_WIDTH, initial_indent=indent, subsequent_indent=indent))
    return DONE


def _add_presets(ctx: AppContext, args: argparse.Namespace) -> int:
    """Make a preset of each file; returns the exit code, 1 when none came of it."""
    from shared.app.adding import add_presets

    added = add_presets(ctx, [Path(name).expanduser() for name in args.add], args.like)
    if args.json:
        _print_json([{**asdict(found), "file": str(found.file)} for found in added], indent=2)
    for found in () if args.json else added:
        print(found.file)
        print(f"  {found.summary.removeprefix(f'{found.file}: ')}; {found.words}")
        if found.preset:
            print(f"  draw with it: wgp.py generate PROMPT --preset {found.preset}")
    return DONE if any(found.preset for found in added) else BROKEN


def doctor(ctx: AppContext, args: argparse.Namespace) -> int:
    """Say what this machine has and can do; exit code 1 when something is broken. With --tune, measure kernels."""
    if args.tune:
        from shared.cli.tune import tune

        return tune(args)
    from shared.app.doctor import examine
    from shared.cli.doctor_report import print_report

    with contextlib.redirect_stdout(sys.stderr):  # libraries print to stdout as they please
        if args.verbose:
            print("Looking at this machine ...", file=sys.stderr)  # importing torch takes seconds
        report = examine(ctx, self_test=not args.no_self_test)
    if args.json:
        _print_json(report.as_dict(), indent=2)
    else:
        print_report(report)
    return DONE if report.usable else BROKEN


def preset_dict(ctx: AppContext, preset: Preset) -> dict[str, Any]:
    """What `presets --json` tells about one preset."""
    return {
        "id": preset.id,
        "name": preset.name,
        "family": preset.family,
        "architecture": preset.architecture,
        "description": preset.description,
        "urls": list(preset.urls),
        "installed": not missing_files(ctx, preset),
    }


def missing_files(ctx: AppContext, preset: Preset) -> list[PlannedFile]:
    """The files the preset needs that are not on this machine."""
    from shared.app.plan import find_files, wanted_files

    return [file for file in find_files(ctx, wanted_files(ctx, preset)) if file.path is None]


def missing_words(file: PlannedFile) -> str:
    """What is to be done about a file that is not here."""
    return "to download" if file.is_remote else "missing"


def plan_text(plan: GenerationPlan, output: str, count: int) -> str:
    """The plan for `count` pictures, for people."""
    from shared.cli.progress import file_size

    settings = plan.settings
    resolution = f"{settings.width}x{settings.height}"
    lines = [
        f"{plan.preset.id}: {count} picture(s) of {resolution}, {settings.num_inference_steps} steps, "
        f"seed {settings.seed}, to {output}",
        "",
        "Files",
    ]
    for file in plan.files:
        size = file.bytes if file.path else file.published
        where = str(file.path) if file.path else f"{missing_words(file)}: {file.url}"
        lines.append(f"  {file.role:<13} {where}" + (f" ({file_size(size)})" if size is not None else ""))
        lines += [f"  {'':<13} ({file.note})"] if file.note else []
    lines += ["", f"To download: {plan.download.words}"] if plan.download else []
    device = plan.machine.device
    choices = {
        "device": f"{device.kind}, {device.name} ({device.reason})",
        "number type": f"{plan.machine.dtype.value} ({plan.machine.dtype.reason})",
        "attention": f"{plan.attention.value} ({plan.attention.reason})",
        "compute": f"{plan.compute.value} ({plan.compute.reason})",
        "offload": f"{plan.offload.value} ({plan.offload.reason})",
    }
    lines += ["", "Machine", *(f"  {name:<13} {words}" for name, words in choices.items()), ""]
    lines += memory_lines(plan)
    return "\n".join(lines)


def memory_lines(plan: GenerationPlan) -> list[str]:
    """What the pictures will take and where, stage by stage."""
    placed = plan.placement
    if placed is None:
        return ["Memory: known when all weights are on this machine, or when the preset says what they weigh"]
    vram = f", {placed.vram_mb:,.0f} MiB on the GPU" if placed.vram_mb else ""
    stages = ", ".join(f"{stage} {peak:,.0f}" for stage, peak in placed.peaks_mb.items())
    where = "on the GPU" if placed.vram_mb else "of RAM"
    by = " from the published sizes (exact once the files are here)" if plan.memory and plan.memory.published else ""
    return [
        f"Memory, estimated{by}: {placed.ram_mb:,.0f} MiB of RAM{vram}",
        f"  by stage    MiB {where}: {stages}",
        f"  {'machine':<11} {plan.fit_words}",
        *(f"  {'plan' if i == 0 else '':<11} {sentence}" for i, sentence in enumerate(placed.sentences)),
    ]


def result_text(result: GenerationResult) -> str:
    """Seconds and memory for people, in one line, and one for each note and each LoRA that did not match in full."""
    from shared.app.loras import match_words
    from shared.cli.progress import duration

    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in result.seconds.items())
    vram = f", {result.peak_vram_mb:,.0f} MiB on the GPU" if result.peak_vram_mb else ""
    rss = f"; peak {result.peak_rss_mb:,.0f} MiB of RAM{vram}" if result.peak_rss_mb else ""
    partly = [match_words(match) for match in result.loras if match["unmatched"]]
    return "\n".join([*result.notes, f"{stages}{rss}", *partly])


def _print_pictures(
    images: Sequence[ImageDone], preset: Preset, args: argparse.Namespace, *, cancelled: bool = False
) -> None:
    if args.json:
        kept = [{"path": str(image.path), "seed": image.seed} for image in images]
        _print_json({"images": kept, "preset": preset.id, "cancelled": cancelled})
    for image in () if args.json else images:
        print(image.path)


def _print_json(value: Any, indent: int | None = None) -> None:
    print(json.dumps(value, indent=indent), flush=True)  # ASCII: any console and any reader takes it
