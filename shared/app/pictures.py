"""Pictures that people give: opened whatever camera, scanner or program they come from, and fitted to a size.

What is put right: orientation by EXIF, palettes, grey, CMYK, 16 bits per channel, transparency (onto white). Of an
animation the first frame is taken. What is refused, before its pixels are read: more than MAX_PIXELS.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.quant.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 80_000_000  # about 240 MB as RGB; cameras have 50 million
_SAME_SHAPE = 0.01  # masks and pictures whose aspect ratios differ by less are taken to be of the same shape

FITS: Mapping[str, str] = {
    "crop": "fill the size and cut off what hangs over",
    "pad": "show the whole picture and continue its border",
    "stretch": "distort to the size",
}


@dataclass(frozen=True, slots=True)
class GivenPicture:
    """A picture as RGB, upright, and what had to be decided about it, in words."""

    image: Image.Image
    notes: tuple[str, ...] = ()


def open_picture(path: str | Path, what: str) -> GivenPicture:
    """Read a picture file as 8-bit RGB. what: the picture's part, for messages ("the control picture").

    Raises UserError for a file that is missing, no picture, broken, or larger than MAX_PIXELS.
    """
    image, notes = _load(path, what)
    return GivenPicture(_as_rgb(image), notes)


def open_mask(path: str | Path, size: tuple[int, int], what: str = "the mask") -> GivenPicture:
    """Read a mask as "L", 0 or 255 only, at `size` (width, height). White, or in a picture with transparency what is
    opaque, is 255.

    A mask of another size and the same shape is enlarged or reduced. Raises UserError for another shape, and for a
    mask with nothing white in it.
    """
    from PIL import Image

    image, loaded_notes = _load(path, what)
    notes = list(loaded_notes)
    if image.size != size:
        (width, height), (wanted_width, wanted_height) = image.size, size
        if abs(width * wanted_height / (height * wanted_width) - 1) > _SAME_SHAPE:
            raise UserError(
                f"{path}: {what} is {width}x{height}, the picture {wanted_width}x{wanted_height}: of another shape.",
                "Make both of the same size; white is repainted.",
            )
        notes.append(f"{what} is {width}x{height} and is resized to the picture's {wanted_width}x{wanted_height}")
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    alpha = image.convert("RGBA").getchannel("A") if has_alpha else None
    if alpha is not None and alpha.getextrema() == (255, 255):
        alpha = None  # an alpha channel that says nothing
    level = alpha if alpha is not None else _as_rgb(image).convert("L")
    mask = level.resize(size, Image.Resampling.BILINEAR).point(lambda value: 255 if value >= 128 else 0)
    darkest, brightest = mask.getextrema()
    if brightest == 0:
        raise UserError(f"{path}: {what} is all black: there is nothing to repaint.", "White marks what is repainted.")
    if darkest == 255:
        notes.append(f"{what} is all white: the whole picture is repainted")
    return GivenPicture(mask, tuple(notes))


def fit_picture(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """The picture at `size` (width, height), by one of FITS. An aspect ratio that is right already is only scaled."""
    from PIL import Image, ImageOps

    if image.size == size:
        return image
    resample = Image.Resampling.LANCZOS
    if fit == "crop":
        return ImageOps.fit(image, size, resample)
    if fit == "pad":
        whole = ImageOps.contain(image, size, resample)
        left, top = (size[0] - whole.width) // 2, (size[1] - whole.height) // 2
        return extend_border(whole, left, top, size[0] - whole.width - left, size[1] - whole.height - top)
    return image.resize(size, resample)


def extend_border(image: Image.Image, left: int, top: int, right: int, bottom: int) -> Image.Image:
    """The picture with margins of so many pixels, in which its border pixels go on."""
    import numpy as np
    from PIL import Image

    pixels = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    return Image.fromarray(pixels)


def sha256_of(path: str | Path) -> str:
    """Hexadecimal hash of a file's bytes, to know a picture again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(path: str | Path, what: str) -> tuple[Image.Image, tuple[str, ...]]:
    """The first frame, upright, in the file's own mode."""
    from PIL import Image, ImageOps

    notes: list[str] = []
    if not Path(path).is_file():
        raise UserError(f"{path}: {what} is not there.", "Check the path.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
            with Image.open(path) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    raise UserError(
                        f"{path}: {what} has {width}x{height} pixels, {width * height / 1e6:.0f} million; "
                        f"at most {MAX_PIXELS // 10**6} million are read.",
                        "Reduce it first.",
                    )
                if getattr(opened, "n_frames", 1) > 1:
                    notes.append(f"{what} is an animation of {opened.n_frames} frames; the first is used")  # type: ignore[attr-defined]
                opened.load()
                image = ImageOps.exif_transpose(opened)
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {what} has far too many pixels ({error}).", "Reduce it first.") from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reports a broken file as any of the three
        raise UserError(f"{path}: {what} is not a readable picture ({error}).", "Save it again as PNG.") from error
    return image, tuple(notes)


def _as_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Any:
    """Grey of 16 or 32 bits as uint8 levels; Pillow's own conversion would cut everything above 255 to white."""
    import numpy as np

    levels = np.nan_to_num(np.asarray(image, dtype=np.float64))
    highest = levels.max(initial=0.0)
    if image.mode == "F" and highest <= 1:
        scale = 255.0
    else:
        scale = 255 / 65535 if image.mode.startswith("I;16") or highest > 255 else 1.0
    return (levels * scale).round().clip(0, 255).astype(np.uint8)
