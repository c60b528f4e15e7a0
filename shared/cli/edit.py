"""The flags of `generate` that draw from pictures, and --control-preview."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.edit_settings import parse_control
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.context import AppContext
    from shared.app.presets import Preset
    from shared.app.settings import GenerationSettings

IMAGE_TO_IMAGE_STRENGTH = 0.6  # when --image comes without a strength; at the usual 1 nothing of the picture shows


def add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `generate`."""
    group = parser.add_argument_group("drawing from pictures (docs/editing.md, docs/control.md)")
    group.add_argument("--image", metavar="IMAGE", help="picture to change; with --mask or --outpaint the rest is kept")
    group.add_argument(
        "--denoising-strength",
        metavar="F",
        type=float,
        help=f"how much of --image is drawn anew, 0 to 1 (default: {IMAGE_TO_IMAGE_STRENGTH}, in a mask 1)",
    )
    group.add_argument("--mask", metavar="IMAGE", help="mask over --image: white is repainted, black stays as it is")
    group.add_argument("--outpaint", metavar="SIDE=PIXELS,...", help="draw around --image, such as left=128,bottom=64")
    group.add_argument(
        "--control",
        metavar="IMAGE[:PREPROCESSOR]",
        type=_control,
        help="control picture, for presets with a ControlNet; as it is, or turned into canny, scribble, lineart, gray, "
        "blur or tile, or by a model that is downloaded first (59 to 351 MB) into depth, pose or hed",
    )
    group.add_argument(
        "--reference", metavar="IMAGE", action="append", help="picture to go by, for Omni and Edit models; repeatable"
    )
    group.add_argument("--control-weight", metavar="F", type=float, help="how strongly the control picture steers")
    group.add_argument(
        "--control-preview",
        metavar="PATH",
        help="only write what the ControlNet would be shown to this file (.png, .jpg, .webp)",
    )


def edit_overrides(args: argparse.Namespace, others: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that these flags give, under the host's key names. others: those given otherwise."""
    overrides = {
        "image_start": args.image,
        "image_mask": args.mask,
        "outpaint": args.outpaint,
        "denoising_strength": args.denoising_strength,
        "control_net_weight": args.control_weight,
        "image_refs": args.reference,
    }
    if args.control:
        overrides["image_guide"], overrides["control_preprocessor"] = args.control
    given = {key: value for key, value in overrides.items() if value is not None}
    everything = {**others, **given}
    keeps_parts = any(everything.get(key) for key in ("image_mask", "outpaint"))
    if args.image and not keeps_parts and "denoising_strength" not in everything:
        given["denoising_strength"] = IMAGE_TO_IMAGE_STRENGTH
    return given


def save_control_preview(ctx: AppContext, preset: Preset, settings: GenerationSettings, path: str) -> Path:
    """Write what the ControlNet would be shown. Raises UserError when that is nothing, or for another file ending."""
    from shared.app.annotators import fetch, missing_megabytes
    from shared.app.editing import open_edit
    from shared.app.metadata import FORMATS, write_file

    target = Path(path).expanduser()
    if target.suffix.lower() not in FORMATS:
        raise UserError(f"--control-preview {path}: pictures are saved as {', '.join(FORMATS)}.")
    edit = open_edit(settings, preset.model_def, ctx.output_folder)
    for note in edit.notes:
        print(note, file=sys.stderr)
    if megabytes := missing_megabytes(ctx.files, settings.edit):
        print(f"Downloading {megabytes:.0f} MB for {settings.edit.control_preprocessor} pictures", file=sys.stderr)
    preview = edit.with_preprocessor(fetch(ctx.files, settings.edit)).control_preview()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, lambda file: preview.save(file, format=FORMATS[target.suffix.lower()]))
    return target


def _control(text: str) -> tuple[str, str]:
    try:
        return parse_control(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
