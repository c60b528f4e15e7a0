"""The settings that draw from pictures: a start picture, a mask, a control picture, margins, further passes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from shared.app.pictures import FITS
from shared.preprocess import FILES, PREPROCESSORS, RAW, require_known
from shared.quant.errors import UserError

SIDES = ("left", "top", "right", "bottom")
AREAS: Mapping[str, str] = {
    "masked": "the mask's surroundings, at full size",
    "whole": "the whole picture",
}
MAX_MARGIN = 4096  # pixels

# Wan2GP's letters for what a control picture is turned into; V means there is one, A that there is a mask, I that there
# are references.
_LETTERS = {"canny": "E", "scribble": "S", "gray": "C", "pose": "P", "depth": "D"}

# key -> (lowest, highest) allowed value
_RANGES: Mapping[str, tuple[float, float]] = {
    "control_start": (0, 1),
    "control_end": (0, 1),
    "mask_expand": (-1024, 1024),
    "mask_feather": (0, 1024),
    "hires_scale": (1, 4),
    "hires_strength": (0, 1),
    "tile_scale": (1, 8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSettings:
    """What to draw from. Field names are settings keys, Wan2GP's where it has one; "" is no picture.

    image_start: picture to change. image_mask: white is repainted. image_guide: picture for the ControlNet.
    image_refs: pictures to go by, for Omni and Edit models.
    control_preprocessor: what image_guide is turned into. control_start, control_end: shares of the steps in which it
    counts. mask_expand: pixels by which the mask grows, below 0 shrinks. mask_feather: pixels over which its edge fades
    out, beyond that. inpaint_area: one of AREAS, what the model is shown. image_fit: one of FITS, for pictures of
    another shape than the drawing.
    outpaint: margins to draw around the picture, "left=128,bottom=64".
    hires_scale, hires_strength: a second pass over the enlarged drawing. tile_scale: enlarge image_start that much,
    drawing it tile by tile.
    """

    image_start: str = ""
    image_mask: str = ""
    image_guide: str = ""
    image_refs: tuple[str, ...] = ()
    control_preprocessor: str = RAW
    control_start: float = 0.0
    control_end: float = 1.0
    mask_expand: int = 0
    mask_feather: int = 8
    inpaint_area: str = "masked"
    image_fit: str = "crop"
    outpaint: str = ""
    hires_scale: float = 1.0
    hires_strength: float = 0.5
    tile_scale: float = 1.0

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> EditSettings:
        """From settings values of the right kinds (schema/). Raises UserError for what does not fit together."""
        chosen = {field.name: values[field.name] for field in fields(cls) if values.get(field.name) is not None}
        if "control_preprocessor" not in chosen:
            chosen["control_preprocessor"] = _from_letters(str(values.get("video_prompt_type") or ""))
        chosen = {key: int(value) if key.startswith("mask_") else value for key, value in chosen.items()}
        chosen["image_refs"] = tuple(chosen.get("image_refs", ()))
        edit = cls(**chosen)
        edit._check()
        return edit

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Pixels to draw on the left, top, right and bottom of the picture."""
        return parse_margins(self.outpaint)

    @property
    def is_inpainting(self) -> bool:
        """Whether a part of the picture is kept."""
        return bool(self.image_mask) or any(self.margins)

    def as_record(self) -> dict[str, Any]:
        """What redraws the picture, and Wan2GP's letters for what was given; {} where nothing is asked."""
        if self == EditSettings():
            return {}
        record = {key: value for key, value in asdict(self).items() if value not in ("", ())}
        letters = ""
        if self.image_guide or self.image_mask:
            letters = _LETTERS.get(self.control_preprocessor, "") if self.image_guide else ""
            letters += "VA" if self.image_mask else "V"
        if self.image_refs:
            letters += "I"
        return record | ({"video_prompt_type": letters} if letters else {})

    def _check(self) -> None:
        for key, (lowest, highest) in _RANGES.items():
            value = getattr(self, key)
            if not lowest <= value <= highest:
                raise UserError(f'"{key}" must be from {lowest} to {highest}, got {value}.')
        if self.control_start >= self.control_end:
            raise UserError(
                f'"control_start" {self.control_start:g} is not before "control_end" {self.control_end:g}.',
                "Both are shares of the steps: 0 and 1 are all of them.",
            )
        require_known(self.control_preprocessor)
        _require_one_of("image_fit", self.image_fit, FITS)
        _require_one_of("inpaint_area", self.inpaint_area, AREAS)
        needs_picture = {
            "image_mask": bool(self.image_mask),
            "outpaint": any(self.margins),
            "tile_scale": self.tile_scale > 1,
        }
        for key, is_set in needs_picture.items():
            if is_set and not self.image_start:
                raise UserError(f'"{key}" needs a picture to work on.', 'Give one with --image or "image_start".')
        if self.tile_scale > 1 and (self.is_inpainting or self.hires_scale > 1):
            raise UserError('"tile_scale" does not go with a mask, "outpaint" or "hires_scale".', "Do one at a time.")
        if self.hires_scale > 1 and self.is_inpainting:
            raise UserError('"hires_scale" does not go with a mask or "outpaint".', "Do one at a time.")


def parse_margins(text: str) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels from "left=128,bottom=64"; "all=64" is every side. Raises UserError."""
    margins = dict.fromkeys(SIDES, 0)
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = re.fullmatch(r"(\w+)\s*=\s*(\d{1,5})", part)
        if match is None:
            raise UserError(f'"outpaint": "{part}" is not of the form SIDE=PIXELS.', "Example: left=128,bottom=64.")
        side, pixels = match[1].lower(), int(match[2])
        if side != "all" and side not in SIDES:
            _require_one_of("outpaint", side, (*SIDES, "all"))
        if pixels > MAX_MARGIN:
            raise UserError(f'"outpaint": {pixels} pixels are too many.', f"At most {MAX_MARGIN} on a side.")
        margins |= dict.fromkeys(SIDES if side == "all" else (side,), pixels)
    left, top, right, bottom = margins.values()
    return left, top, right, bottom


def parse_control(text: str) -> tuple[str, str]:
    """(file, preprocessor) from IMAGE or IMAGE:PREPROCESSOR as typed ("C:\\a.png" has none). Raises UserError for an
    unknown preprocessor."""
    file, colon, name = text.rpartition(":")
    if not colon or len(file) < 2 or re.search(r"[\\/.]", name):
        return text, RAW
    require_known(name)
    return file, name


def preprocessor_choices() -> list[tuple[str, str]]:
    """(what it shows and what is downloaded for it, name) of every preprocessor, for a list to choose from."""
    sizes = {name: f", {sum(file.megabytes for file in files):.0f} MB" for name, files in FILES.items()}
    return [(f"{words.capitalize()} ({name}{sizes.get(name, '')})", name) for name, words in PREPROCESSORS.items()]


def _from_letters(letters: str) -> str:
    """The preprocessor that Wan2GP's video_prompt_type names; raw for those this program has not."""
    return next((name for name, letter in _LETTERS.items() if letter in letters), RAW)


def _require_one_of(key: str, value: str, known: Mapping[str, str] | tuple[str, ...]) -> None:
    if value in known:
        return
    closest = difflib.get_close_matches(value, known, n=1)
    hint = f'The closest is "{closest[0]}".' if closest else ""
    raise UserError(f'"{key}" must be one of {", ".join(known)}, got "{value}".', hint)
