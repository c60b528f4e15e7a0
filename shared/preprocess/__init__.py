"""Preprocessors: from a picture to what a ControlNet wants to see. One file each, listed here by name.

A preprocessor is a module with `process(picture)`: (H, W, 3) uint8 RGB in, the same shape and type out, by OpenCV
alone, so that nothing is downloaded. "raw" is no file: the picture as it is, for control pictures made elsewhere
(depth maps, poses).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from shared.quant.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    Picture = np.ndarray[Any, np.dtype[np.uint8]]

RAW = "raw"

# Name -> what the control picture shows, in a person's words.
PREPROCESSORS: Mapping[str, str] = {
    RAW: "the picture as it is",
    "canny": "edges, white on black",
    "scribble": "thick outlines, white on black",
    "lineart": "fine lines, white on black",
    "gray": "the picture without its colours",
    "blur": "soft colours, no detail",
    "tile": "the picture at a quarter of its size, enlarged again",
}


def process(name: str, picture: Picture) -> Picture:
    """The control picture. Raises UserError for an unknown name, naming the closest."""
    require_known(name)
    if name == RAW:
        return picture
    result: Picture = import_module(f"{__name__}.{name}").process(picture)
    return result


def require_known(name: str) -> None:
    """Raise UserError for a name that is not in PREPROCESSORS."""
    if name in PREPROCESSORS:
        return
    closest = difflib.get_close_matches(name, PREPROCESSORS, n=1)
    hint = f'The closest is "{closest[0]}". ' if closest else ""
    raise UserError(f'There is no preprocessor "{name}".', f"{hint}Known: {', '.join(PREPROCESSORS)}.")
