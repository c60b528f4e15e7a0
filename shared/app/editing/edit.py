"""An edit: given pictures made into drawings, and drawings into the finished picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.edit_settings import EditSettings
from shared.app.editing.drawing_pass import Draw, Pass
from shared.app.editing.inpainting import Box, box_of, canvas_of, scaled, working_size
from shared.app.editing.tiles import tile_boxes, tile_weight
from shared.app.metadata import write_file
from shared.app.pictures import extend_border, fit_picture, sha256_of
from shared.app.setting_checks import DEFAULT_BLOCK
from shared.app.settings import GenerationSettings
from shared.preprocess import RAW, Preprocessor
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

REFERENCES = "image_refs"
INPUTS = "inputs"  # folder below the pictures' own, for copies of what was given


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
            return len(tile_boxes(self._tiled_size, self.settings, self.block))
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
        larger = scaled(size, self._edit.hires_scale, self.block)
        enlarged = fit_picture(first, larger, "stretch")
        return draw(
            self._pass(larger, start=enlarged, strength=self._edit.hires_strength, control=self._control(larger))
        )

    def control_preview(self) -> Image.Image:
        """What the ControlNet will be shown. Raises UserError when it is shown nothing."""
        size = (self.settings.width, self.settings.height)
        box = None
        if self._edit.is_inpainting:
            canvas, fade = canvas_of(self._picture, self.mask, self._edit)
            box = box_of(fade, canvas.size, self.settings)
            size = working_size(box, self.settings, self.block)
        elif self._edit.tile_scale > 1:
            size = self._tiled_size
        shown = self._control(size, box)
        if shown is None:
            raise UserError("There is no control picture to preview.", "Give one with --control.")
        return shown

    def _inpaint(self, draw: Draw) -> Image.Image:
        from PIL import Image

        canvas, fade = canvas_of(self._picture, self.mask, self._edit)
        box = box_of(fade, canvas.size, self.settings)
        size = working_size(box, self.settings, self.block)
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

    def _draw_tiles(self, draw: Draw) -> Image.Image:
        import numpy as np
        from PIL import Image

        size = self._tiled_size
        large = fit_picture(self._picture, size, "stretch")
        guide = self._control(size) if self.guide is not None else None
        total = np.zeros((size[1], size[0], 3), np.float32)
        weights = np.zeros((size[1], size[0], 1), np.float32)
        for number, box in enumerate(tile_boxes(size, self.settings, self.block)):
            start = large.crop(box)
            control = guide.crop(box) if guide is not None else self._processed(start) if self.has_control else None
            tile = (box[2] - box[0], box[3] - box[1])
            asked = self._pass(
                tile, start=start, strength=self.settings.denoising_strength, control=control, seed=number
            )  # fmt: skip
            weight = tile_weight(tile)
            left, top, right, bottom = box
            total[top:bottom, left:right] += np.asarray(draw(asked), np.float32) * weight
            weights[top:bottom, left:right] += weight
        return Image.fromarray((total / weights).round().clip(0, 255).astype(np.uint8))

    @property
    def _edit(self) -> EditSettings:
        return self.settings.edit

    @property
    def _picture(self) -> Image.Image:
        assert self.picture is not None  # EditSettings sees to it
        return self.picture

    @property
    def _tiled_size(self) -> tuple[int, int]:
        return scaled(self._picture.size, self._edit.tile_scale, self.block)

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


def _copy(source: Path, target: Path) -> None:
    data = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, lambda file: file.write(data))
