"""Preprocessors: from a picture to what a ControlNet wants to see. One file each, listed here by name.

A preprocessor turns (H, W, 3) uint8 RGB into the same shape and type. Its module has one of

    process(picture)      by OpenCV alone, nothing is downloaded
    load(*files)          a model; returns what does the same with it. FILES says which files, in order

"raw" is no module: the picture as it is, for control pictures made elsewhere. Models run on the CPU: they are small,
and the GPU is full of the one that draws.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
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
    "depth": "near is bright, far is dark",
    "pose": "people as coloured stick figures with faces and hands",
    "hed": "soft edges, white on black",
}


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file that a preprocessor's model needs. url: on the Hub. megabytes: 10^6 bytes. sha256: "" if not known."""

    url: str
    megabytes: float
    sha256: str = ""


_DEPTH = "https://huggingface.co/depth-anything/Depth-Anything-V2-Small-hf/resolve/main"
_POSE = "https://huggingface.co/yzd-v/DWPose/resolve/main"
# A conversion of the original, ControlNetHED.pth, which is a pickle: those can run any program while they are read.
_HED = "https://huggingface.co/axodoxian/controlnet_onnx/resolve/main/annotators"

# The files of each preprocessor with a model, in the order that its load() takes them.
FILES: Mapping[str, tuple[ModelFile, ...]] = {
    "depth": (
        ModelFile(f"{_DEPTH}/config.json", 0.001),
        ModelFile(
            f"{_DEPTH}/model.safetensors", 99.2, "3152477ce0d8d6978d76b995120de97cb5b928701fd0f817769f59e249a16b70"
        ),
    ),
    "pose": (
        ModelFile(f"{_POSE}/yolox_l.onnx", 216.7, "7860ae79de6c89a3c1eb72ae9a2756c0ccfbe04b7791bb5880afabd97855a411"),
        ModelFile(
            f"{_POSE}/dw-ll_ucoco_384.onnx", 134.4, "724f4ff2439ed61afb86fb8a1951ec39c6220682803b4a8bd4f598cd913b1843"
        ),
    ),
    "hed": (ModelFile(f"{_HED}/hed.onnx", 58.9),),
}


@dataclass(slots=True, eq=False)
class Preprocessor:
    """A preprocessor by its name, ready to be called; its model, if it has one, is loaded at the first call.

    files: those of FILES[name], in that order, on this machine.
    """

    name: str
    files: tuple[Path, ...] = ()
    _process: Callable[[Picture], Picture] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        require_known(self.name)

    def __call__(self, picture: Picture) -> Picture:
        """The control picture. Raises UserError when the model's files or its package are missing, CheckpointError for
        a file that cannot be used."""
        if self.name == RAW:
            return picture
        if self._process is None:
            self._process = self._load()
        return self._process(picture)

    def _load(self) -> Callable[[Picture], Picture]:
        module = import_module(f"{__name__}.{self.name}")
        wanted = FILES.get(self.name, ())
        if len(self.files) != len(wanted):
            missing = ", ".join(file.url for file in wanted[len(self.files) :])
            raise UserError(f'"{self.name}" needs files that are not on this machine: {missing}.', "Download them.")
        process: Callable[[Picture], Picture] = module.load(*self.files) if wanted else module.process
        return process


def process(name: str, picture: Picture, files: tuple[Path, ...] = ()) -> Picture:
    """The control picture of one picture; see Preprocessor, which keeps the model for several."""
    return Preprocessor(name, files)(picture)


def require_known(name: str) -> None:
    """Raise UserError for a name that is not in PREPROCESSORS."""
    if name in PREPROCESSORS:
        return
    closest = difflib.get_close_matches(name, PREPROCESSORS, n=1)
    hint = f'The closest is "{closest[0]}". ' if closest else ""
    raise UserError(f'There is no preprocessor "{name}".', f"{hint}Known: {', '.join(PREPROCESSORS)}.")
