"""From given pictures to drawings and back: what each pass shows the model, and how the result is put together.

    image to image   fit the picture to the size, draw from it
    inpainting       cut the mask's surroundings out, draw them at the chosen resolution, scale them back, fade them in
    outpainting      the same, on a canvas with margins, which are the mask
    second pass      enlarge the drawing, draw from that
    tiles            enlarge the picture, draw it tile by tile, blend the tiles where they overlap

Outside a mask (grown and feathered) the given picture's pixels come back unchanged, every bit of them.
Mistakes in the pictures are told by `open_edit`, before a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.edit_settings import EditSettings
from shared.app.metadata import write_file
from shared.app.pictures import extend_border, fit_picture, open_mask, open_picture, sha256_of
from shared.app.settings import DEFAULT_BLOCK, GenerationSettings
from shared.preprocess import RAW, Preprocessor
from shared.quant.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Levels = np.ndarray[Any, np.dtype[Any]]

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, as Pillow has them

CONTEXT = 0.25  # what is shown around a mask, as a share of its longer side
MIN_CONTEXT = 32  # pixels
MAX_ZOOM = 2  # a small mask's surroundings are enlarged at most so much; beyond, the network sees too little around
REFERENCES = "image_refs"
INPUTS = "inputs"  # folder below the pictures' own, for copies of what was given
TILE_OVERLAP = 64  # pixels by which neighbouring tiles overlap at least


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass:
    """One drawing the model is asked for. start, control: RGB at its size; mask: "L", 0 or 255, at its size.
    references: RGB of any size.

    strength: share of the steps, for `start`. window: shares of the steps in which control counts.
    seed: added to the picture's seed, so that tiles differ.
    """

    width: int
    height: int
    start: Image.Image | None = None
    mask: Image.Image | None = None
    control: Image.Image | None = None
    references: tuple[Image.Image, ...] = ()
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def host_kwargs(self) -> dict[str, Any]:
        """As keywords of a pipeline object's `generate` (contract C1d): tensors in [-1, 1], the mask in {0, 1}."""
        keywords: dict[str, Any] = {
            "width": self.width,
            "height": self.height,
            "denoising_strength": self.strength,
        }
        if self.start is not None:
            keywords["image_start"] = _to_tensor(self.start)
        if self.mask is not None:
            keywords["input_masks"] = (_to_tensor(self.mask) > 0).float()
        if self.control is not None:
            keywords["input_frames"] = _to_tensor(self.control)[:, None]
        if self.references:
            keywords["input_ref_images"] = list(self.references)
        if self.window != (0, 1):
            keywords["control_start"], keywords["control_end"] = self.window
        return keywords


Draw = Callable[[Pass], "Image.Image"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edit:
    """The given pictures, read and checked. notes: what had to be decided about them, in words.

    sources: settings key -> the file it was read from, "image_refs 1" and so on for references.
    preprocessor: makes what a ControlNet is shown; one with a model of its own must be given by `with_preprocessor`.
    """

    settings: GenerationSettings
    block: int = DEFAULT_BLOCK  # pixels; sides of drawings are multiples of it
    has_control: bool = False
    picture: Image.Image | None = None
    mask: Image.Image | None = None
    guide: Image.Image | None = None
    references: tuple[Image.Image, ...] = ()
    notes: tuple[str, ...] = ()
    sources: Mapping[str, Path] = field(default_factory=dict)
    preprocessor: Preprocessor = field(default_factory=lambda: Preprocessor(RAW))

    def with_preprocessor(self, preprocessor: Preprocessor) -> Edit:
        """The same with a preprocessor whose files are at hand."""
        return replace(self, preprocessor=preprocessor)

    @property
    def hashes(self) -> dict[str, str]:
        """Settings key -> SHA-256 of the file."""
        return {key: sha256_of(path) for key, path in self.sources.items()}

    def keep_sources(self, folder: Path) -> dict[str, Any]:
        """Copy the given files into `folder`/inputs, each once, named by its content; settings key -> the copy's name
        below `folder`, a list of names for image_refs. A record with these draws the picture again, and does not tell
        where its maker keeps files.

        Raises RunError when the disk refuses.
        """
        names: dict[str, Any] = {}
        for key, path in self.sources.items():
            name = f"{INPUTS}/{sha256_of(path)[:16]}{path.suffix.lower()}"
            if not (folder / name).is_file():
                _copy(path, folder / name)
            if key.startswith(REFERENCES):
                names.setdefault(REFERENCES, []).append(name)
            else:
                names[key] = name
        return names

    @property
    def prompt_kwargs(self) -> dict[str, Any]:
        """Those keywords of `generate` that have a part in how the prompt is encoded."""
        return {"input_ref_images": list(self.references)} if self.references else {}

    @property
    def passes(self) -> int:
        """How many drawings one picture takes."""
        if self._edit.tile_scale > 1:
            return len(self._tile_boxes(self._scaled(self._picture.size, self._edit.tile_scale)))
        return 2 if self._edit.hires_scale > 1 else 1

    def draw(self, draw: Draw) -> Image.Image:
        """The finished picture, from as many drawings as `passes` says."""
        if self._edit.is_inpainting:
            return self._inpaint(draw)
        if self._edit.tile_scale > 1:
            return self._draw_tiles(draw)
        size = (self.settings.width, self.settings.height)
        start = None if self.picture is None else fit_picture(self.picture, size, self._edit.image_fit)
        strength = 1.0 if start is None else self.settings.denoising_strength
        first = draw(self._pass(size, start=start, strength=strength, control=self._control(size)))
        if self._edit.hires_scale == 1:
            return first
        larger = self._scaled(size, self._edit.hires_scale)
        enlarged = fit_picture(first, larger, "stretch")
        return draw(
            self._pass(larger, start=enlarged, strength=self._edit.hires_strength, control=self._control(larger))
        )

    def control_preview(self) -> Image.Image:
        """What the ControlNet will be shown. Raises UserError when it is shown nothing."""
        size = (self.settings.width, self.settings.height)
        box = None
        if self._edit.is_inpainting:
            canvas, fade = self._canvas()
            box = self._box(fade, canvas.size)
            size = self._working_size(box)
        elif self._edit.tile_scale > 1:
            size = self._scaled(self._picture.size, self._edit.tile_scale)
        shown = self._control(size, box)
        if shown is None:
            raise UserError("There is no control picture to preview.", "Give one with --control.")
        return shown

    # ---- inpainting and outpainting

    def _inpaint(self, draw: Draw) -> Image.Image:
        from PIL import Image

        canvas, fade = self._canvas()
        box = self._box(fade, canvas.size)
        size = self._working_size(box)
        whole = Image.fromarray(fade)
        fade_there = whole.crop(box)
        repaint = fade_there.point(lambda level: 255 if level else 0).resize(size, Image.Resampling.BOX)
        drawn = draw(
            self._pass(
                size,
                start=fit_picture(canvas.crop(box), size, "stretch"),
                mask=repaint.point(lambda level: 255 if level else 0),
                strength=self.settings.denoising_strength,
                control=self._control(size, box),
            )
        )
        drawn = fit_picture(drawn, (box[2] - box[0], box[3] - box[1]), "stretch")
        canvas.paste(drawn, box[:2], fade_there)
        return canvas

    def _canvas(self) -> tuple[Image.Image, Levels]:
        """The picture with its margins, and (H, W) uint8 how much of the drawing shows at each pixel."""
        import cv2
        import numpy as np

        left, top, right, bottom = margins = self._edit.margins
        canvas = extend_border(self._picture, *margins)
        inner = np.zeros((self._picture.height, self._picture.width), np.uint8)
        if self.mask is not None:
            inner = np.asarray(self.mask)
        grow = self._edit.mask_expand
        if grow < 0:
            # With a rim of zeros, so that a mask does not hold on to the picture's border.
            depth = cv2.distanceTransform(np.pad(inner, 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
            inner = np.where(depth > -grow, 255, 0)
        solid = np.pad(inner, ((top, bottom), (left, right)), constant_values=255) > 0
        if not solid.any():
            raise UserError(f'"mask_expand" {grow} leaves nothing of the mask.', "Take a number nearer to 0.")
        if grow > 0 or self._edit.mask_feather:
            away = cv2.distanceTransform((~solid).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        else:
            away = np.where(solid, 0.0, np.inf)
        beyond = away - max(grow, 0)
        fade = np.clip(1 - beyond / (self._edit.mask_feather + 1), 0, 1)  # 1 inside, 0 from feather + 1 pixels on
        return canvas, np.ceil(fade * 255).astype(np.uint8)

    def _box(self, fade: Levels, canvas: tuple[int, int]) -> Box:
        """What is cut out and drawn: the mask with some context, of the drawing's shape as far as the canvas allows."""
        import numpy as np

        width, height = canvas
        if self._edit.inpaint_area == "whole":
            return (0, 0, width, height)
        rows, columns = np.flatnonzero(fade.any(axis=1)), np.flatnonzero(fade.any(axis=0))
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        around = max(round(CONTEXT * max(right - left, bottom - top)), MIN_CONTEXT)
        wanted_width = max(right - left + 2 * around, self.settings.width // MAX_ZOOM)
        wanted_height = max(bottom - top + 2 * around, self.settings.height // MAX_ZOOM)
        shape = self.settings.width / self.settings.height
        wanted_width = max(wanted_width, round(wanted_height * shape))
        wanted_height = max(wanted_height, round(wanted_width / shape))
        left, right = _span((left + right) / 2, wanted_width, width)
        top, bottom = _span((top + bottom) / 2, wanted_height, height)
        return (left, top, right, bottom)

    def _working_size(self, box: Box) -> tuple[int, int]:
        """The box's shape with as many pixels as the chosen resolution has."""
        width, height = box[2] - box[0], box[3] - box[1]
        if (width, height) == (self.settings.width, self.settings.height):
            return width, height
        scale = math.sqrt(self.settings.width * self.settings.height / (width * height))
        return self._scaled((width, height), scale)

    # ---- tiles

    def _draw_tiles(self, draw: Draw) -> Image.Image:
        import numpy as np
        from PIL import Image

        size = self._scaled(self._picture.size, self._edit.tile_scale)
        large = fit_picture(self._picture, size, "stretch")
        guide = self._control(size) if self.guide is not None else None
        total = np.zeros((size[1], size[0], 3), np.float32)
        weights = np.zeros((size[1], size[0], 1), np.float32)
        for number, box in enumerate(self._tile_boxes(size)):
            start = large.crop(box)
            control = guide.crop(box) if guide is not None else self._processed(start) if self.has_control else None
            tile = (box[2] - box[0], box[3] - box[1])
            asked = self._pass(
                tile, start=start, strength=self.settings.denoising_strength, control=control, seed=number
            )  # fmt: skip
            weight = _tile_weight(tile)
            left, top, right, bottom = box
            total[top:bottom, left:right] += np.asarray(draw(asked), np.float32) * weight
            weights[top:bottom, left:right] += weight
        return Image.fromarray((total / weights).round().clip(0, 255).astype(np.uint8))

    def _tile_boxes(self, size: tuple[int, int]) -> list[Box]:
        """Tiles of the chosen resolution that cover the size, evenly spread, row by row."""
        columns = _tile_spans(size[0], min(self.settings.width, size[0]), self.block)
        rows = _tile_spans(size[1], min(self.settings.height, size[1]), self.block)
        return [(left, top, right, bottom) for top, bottom in rows for left, right in columns]

    # ---- parts of the above

    @property
    def _edit(self) -> EditSettings:
        return self.settings.edit

    @property
    def _picture(self) -> Image.Image:
        assert self.picture is not None  # EditSettings sees to it
        return self.picture

    def _pass(self, size: tuple[int, int], **parts: Any) -> Pass:
        window = (self._edit.control_start, self._edit.control_end)
        return Pass(width=size[0], height=size[1], window=window, references=self.references, **parts)

    def _control(self, size: tuple[int, int], box: Box | None = None) -> Image.Image | None:
        """The control picture at `size`; of one that lies over the given picture, the part in the box."""
        if self.guide is None:
            return None
        guide = self.guide
        if box is not None and guide.size == self._picture.size:
            guide = extend_border(guide, *self._edit.margins).crop(box)
            return self._processed(fit_picture(guide, size, "stretch"))
        return self._processed(fit_picture(guide, size, self._edit.image_fit))

    def _processed(self, image: Image.Image) -> Image.Image:
        import numpy as np
        from PIL import Image

        if self.preprocessor.name == RAW:
            return image
        return Image.fromarray(self.preprocessor(np.asarray(image)))

    def _scaled(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        width, height = (max(round(side * scale / self.block), 1) * self.block for side in size)
        return width, height


def open_edit(settings: GenerationSettings, model_def: Mapping[str, Any], folder: Path) -> Edit:
    """Read and check what the settings draw from; without pictures, an Edit that draws once.

    folder: where pictures are looked for that are not there as given (see `keep_sources`).

    Raises UserError naming the file for one that is missing, broken, too large or of the wrong shape, for a mask that
    marks nothing, and for control or reference pictures that the model does not look at.
    """
    edit = settings.edit
    has_control = "guide_preprocessing" in model_def
    if edit.image_refs and "image_ref_choices" not in model_def:
        raise UserError(
            "This preset's model does not look at reference pictures.",
            'Omni and Edit models do; a preset for such a file has the architecture "z_image_omni".',
        )
    if edit.image_guide and not has_control:
        raise UserError(
            "This preset has no ControlNet, so the control picture cannot steer it.",
            "Choose a preset with one, such as z_image_control2_1, or leave the control picture out.",
        )
    paths = {key: getattr(edit, key) for key in ("image_start", "image_mask", "image_guide")}
    sources = {key: _find(path, folder) for key, path in paths.items() if path}
    sources |= {f"{REFERENCES} {i}": _find(path, folder) for i, path in enumerate(edit.image_refs, start=1)}
    notes: list[str] = []
    picture = mask = guide = None
    if "image_start" in sources:
        given = open_picture(sources["image_start"], "the picture")
        picture = given.image
        notes += given.notes
        if "image_mask" in sources:
            given = open_mask(sources["image_mask"], picture.size)
            mask = given.image
            notes += given.notes
    if "image_guide" in sources:
        given = open_picture(sources["image_guide"], "the control picture")
        guide = given.image
        notes += given.notes
    given_references = [
        open_picture(path, f"reference picture {key.removeprefix(REFERENCES).strip()}")
        for key, path in sources.items()
        if key.startswith(REFERENCES)
    ]
    notes += [note for given in given_references for note in given.notes]
    if picture is not None and not edit.is_inpainting and settings.denoising_strength == 1:
        if edit.tile_scale > 1 and not has_control:
            raise UserError(
                "With denoising_strength 1 every tile would be drawn from nothing.", "Take a smaller one, such as 0.4."
            )
        if edit.tile_scale == 1:
            notes.append("denoising_strength is 1, so nothing of the picture will show")
    return Edit(
        settings=settings,
        block=int(model_def.get("vae_block_size", DEFAULT_BLOCK)),
        has_control=has_control,
        picture=picture,
        mask=mask,
        guide=guide,
        references=tuple(given.image for given in given_references),
        notes=tuple(notes),
        sources=sources,
        preprocessor=Preprocessor(edit.control_preprocessor),
    )


def _copy(source: Path, target: Path) -> None:
    data = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, lambda file: file.write(data))


def _find(path: str, folder: Path) -> Path:
    """A picture as given, else below `folder`; a path to nothing is told by whoever opens it."""
    given = Path(path).expanduser()
    return given if given.is_file() or not (folder / path).is_file() else folder / path


def _span(middle: float, wanted: int, available: int) -> tuple[int, int]:
    """[start, end) of `wanted` pixels around the middle, moved and if need be cut to lie in [0, available)."""
    length = min(wanted, available)
    start = min(max(round(middle - length / 2), 0), available - length)
    return start, start + length


def _tile_spans(length: int, tile: int, block: int) -> list[tuple[int, int]]:
    """[start, end) of equal tiles over `length` pixels, TILE_OVERLAP or more overlapping; starts are even numbers of
    blocks, so that latent cells coincide."""
    overlap = min(TILE_OVERLAP, tile // 2)
    count = 1 if tile >= length else math.ceil((length - overlap) / (tile - overlap))
    starts = [round(i * (length - tile) / max(count - 1, 1) / block) * block for i in range(count)]
    return [(start, start + tile) for start in starts]


def _tile_weight(size: tuple[int, int]) -> Levels:
    """(H, W, 1) float32: how much a tile counts at each pixel, rising from its border over TILE_OVERLAP pixels."""
    import numpy as np

    ramps = []
    for side in size:
        from_border = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1
        ramps.append(np.minimum(from_border / TILE_OVERLAP, 1).astype(np.float32))
    return (ramps[1][:, None] * ramps[0][None, :])[:, :, None]


def _to_tensor(image: Image.Image) -> Any:
    """(channels, H, W) float32 in [-1, 1]; levels of 8 bits come back exactly."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(image))
    pixels = pixels[:, :, None] if pixels.dim() == 2 else pixels
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
