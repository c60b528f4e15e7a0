"""The given pictures, read and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.app.editing.edit import REFERENCES, Edit
from shared.app.pictures import open_mask, open_picture
from shared.app.setting_checks import block_of
from shared.app.settings import GenerationSettings
from shared.preprocess import Preprocessor
from shared.quant.errors import UserError


def open_edit(settings: GenerationSettings, model_def: Mapping[str, Any], folder: Path) -> Edit:
    """Read and check what the settings draw from; without pictures, an Edit that draws once.

    folder: where pictures are looked for that are not there as given (see `keep_sources`).

    Raises UserError naming the file for one that is missing, broken, too large or of the wrong shape, for a mask that
    marks nothing, and for control or reference pictures that the model does not look at.
    """
    edit = settings.edit
    has_control = "guide_preprocessing" in model_def
    _check_model(settings, model_def, has_control=has_control)
    paths = {key: getattr(edit, key) for key in ("image_start", "image_mask", "image_guide")}
    sources = {key: _find(path, folder) for key, path in paths.items() if path}
    references = {f"{REFERENCES} {i}": _find(path, folder) for i, path in enumerate(edit.image_refs, start=1)}
    picture = mask = guide = None
    if "image_start" in sources:
        picture = open_picture(sources["image_start"], "the picture")
    if picture is not None and "image_mask" in sources:
        mask = open_mask(sources["image_mask"], picture.image.size)
    if "image_guide" in sources:
        guide = open_picture(sources["image_guide"], "the control picture")
    given = [
        open_picture(path, f"reference picture {key.removeprefix(REFERENCES).strip()}")
        for key, path in references.items()
    ]
    notes = [note for one in (picture, mask, guide, *given) if one is not None for note in one.notes]
    if picture is not None and not edit.is_inpainting and settings.denoising_strength == 1:
        if edit.tile_scale > 1 and not has_control:
            raise UserError(
                "With denoising_strength 1 every tile would be drawn from nothing.", "Take a smaller one, such as 0.4."
            )
        if edit.tile_scale == 1:
            notes.append("denoising_strength is 1, so nothing of the picture will show")
    return Edit(
        settings=settings,
        block=block_of(model_def),
        has_control=has_control,
        picture=None if picture is None else picture.image,
        mask=None if mask is None else mask.image,
        guide=None if guide is None else guide.image,
        references=tuple(one.image for one in given),
        notes=tuple(notes),
        sources=sources | references,
        preprocessor=Preprocessor(edit.control_preprocessor),
    )


def _check_model(settings: GenerationSettings, model_def: Mapping[str, Any], *, has_control: bool) -> None:
    """Raise UserError for pictures that the model does not look at."""
    if settings.edit.image_refs and "image_ref_choices" not in model_def:
        raise UserError(
            "This preset's model does not look at reference pictures.",
            'Omni and Edit models do; a preset for such a file has the architecture "z_image_omni".',
        )
    if settings.edit.image_guide and not has_control:
        raise UserError(
            "This preset has no ControlNet, so the control picture cannot steer it.",
            "Choose a preset with one, such as z_image_control2_1, or leave the control picture out.",
        )


def _find(path: str, folder: Path) -> Path:
    """A picture as given, else below `folder`; a path to nothing is told by whoever opens it."""
    given = Path(path).expanduser()
    return given if given.is_file() or not (folder / path).is_file() else folder / path
