"""Drawing by reference pictures: ZImagePipeline for the network of Omni and Edit files, see omni.py.

Follows diffusers 0.42.1 pipelines/z_image/pipeline_z_image_omni.py. Without references it draws from the prompt alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.z_image.omni import OmniTransformer, Reference, Sequences
from models.z_image.pipeline import ZImagePipeline
from models.z_image.prediction import Prompts
from models.z_image.text_encoder import MAX_TOKENS
from shared.quant.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from PIL import Image

    from models.z_image.request import GenerateRequest

SIZE_MULTIPLE = 16  # pixels that latents and patches take together
MIN_SIDE = 64  # pixels
MAX_ASPECT = 8
MAX_PIXELS = 1024 * 1024  # of a reference; a larger one is shown with as many as the drawing has
_PROCESSOR = "preprocessor_config.json"


def prompt_pieces(prompt: str, references: int) -> list[str]:
    """The chat template around the prompt, cut where the pictures have their places; each piece is encoded alone."""
    begin, end = "<|im_start|>user\n", f"{prompt}<|im_end|>\n<|im_start|>assistant\n"
    if not references:
        return [begin + end]
    between = ["<|vision_end|><|vision_start|>"] * (references - 1)
    return [f"{begin}<|vision_start|>", *between, f"<|vision_end|>{end}<|vision_start|>", "<|vision_end|><|im_end|>"]


@dataclass(frozen=True, slots=True)
class Siglip:
    """SigLIP 2 with what prepares pictures for it; on the CPU, in float32."""

    model: Any
    processor: Any

    def see(self, picture: Image.Image) -> Tensor:
        """(rows, columns, width) features of a picture, float32."""
        given = self.processor(images=[picture], return_tensors="pt")
        rows, columns = (int(side) for side in given["spatial_shapes"][0])
        with torch.no_grad():
            hidden: Tensor = self.model(**given).last_hidden_state
        return hidden[0, : rows * columns].unflatten(0, (rows, columns))


def load_siglip(*folders: Path) -> Siglip:
    """SigLIP 2 from the first of the folders that holds one: config.json and model.safetensors as transformers saves
    them, and preprocessor_config.json there or in siglip_processor beside it.

    Raises UserError when there is none, CheckpointError for one that cannot be used.
    """
    from safetensors import SafetensorError
    from transformers import Siglip2VisionModel
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    folder = next((folder for folder in folders if (folder / "model.safetensors").is_file()), None)
    if folder is None:
        raise UserError(
            f"Reference pictures need SigLIP 2's weights; there are none in {', '.join(map(str, folders))}.",
            "They come with the Omni or Edit model: config.json and model.safetensors of its folder siglip.",
        )
    settings = [place for place in (folder, folder.parent / "siglip_processor") if (place / _PROCESSOR).is_file()]
    try:
        model, report = Siglip2VisionModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        read = Siglip2ImageProcessorPil.from_pretrained
        processor = read(settings[0], local_files_only=True) if settings else Siglip2ImageProcessorPil()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a SigLIP 2 encoder ({str(error)[:200]}).", "Get it anew.") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing (first: {missing[0]}).", "Get it anew.")
    return Siglip(model.eval().requires_grad_(False), processor)


class OmniPipeline(ZImagePipeline):
    """ZImagePipeline whose requests may have references. siglip: called when first one has."""

    transformer: OmniTransformer

    def __init__(self, transformer: OmniTransformer, *rest: Any, siglip: Callable[[], Siglip], **named: Any) -> None:
        super().__init__(transformer, *rest, **named)
        self._load_siglip = siglip
        self._siglip: Siglip | None = None
        self._looked_at: tuple[GenerateRequest, list[Reference]] | None = None

    def _encode_text(self, prompt: str, request: GenerateRequest) -> Tensor:
        return torch.cat(self._pieces(prompt, request))

    def _pieces(self, prompt: str, request: GenerateRequest) -> list[Tensor]:
        count = len(request.references)
        pieces = self.text_encoder.encode(
            prompt_pieces(prompt, count), self.device, long_prompt=request.long_prompt, tell=self._note,
            template="{prompt}",
        )  # fmt: skip
        tokens = sum(map(len, pieces)) + 2 * count  # each picture takes two places
        if tokens > MAX_TOKENS:
            raise UserError(f"Prompt and pictures take {tokens} places; there are {MAX_TOKENS}.", "Shorten the prompt.")
        return pieces

    def _prompts(self, request: GenerateRequest, positive: Tensor, negative: Tensor | None) -> Prompts:
        asked = {
            "a control picture": request.control is not None,
            "NAG": request.nag.active,
            "diversity": request.diversity.active,
        }
        if wrong := [what for what, is_asked in asked.items() if is_asked]:
            raise UserError(f"Omni and Edit models do not go with {', '.join(wrong)}.", "Leave it out.")
        references = self._references(request)

        def refine(prompt: str) -> Sequences:
            with self.safeguard.computing():
                return self.transformer.encode_references(
                    self._pieces(prompt, request), references, exact=request.precision == "exact"
                )

        return Prompts(
            positive=refine(request.prompt), negative=None if negative is None else refine(request.negative_prompt)
        )

    def _references(self, request: GenerateRequest) -> list[Reference]:
        """What the network is shown of the request's pictures, worked out once."""
        if self._looked_at is None or self._looked_at[0] is not request:
            area = request.width * request.height
            shown = [shown_as(picture, area) for picture in request.references]
            if shown and self._siglip is None:
                self._siglip = self._load_siglip()
            self._looked_at = request, [self._look_at(picture) for picture in shown]
        return self._looked_at[1]

    def _look_at(self, picture: Image.Image) -> Reference:
        assert self._siglip is not None
        width, height = (side // SIZE_MULTIPLE * SIZE_MULTIPLE for side in picture.size)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        latents = self.encode_pictures(to_pixels(picture.crop((left, top, left + width, top + height))))
        return Reference(latents[0], self._siglip.see(picture).to(self.device))


def shown_as(picture: Image.Image, area: int) -> Image.Image:
    """A reference in RGB; of more than MAX_PIXELS, scaled to `area` pixels.

    Raises UserError for one that is too small or too long.
    """
    from PIL import Image

    width, height = picture.size
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"A reference picture of {width}x{height} pixels cannot be used.",
            f"Each side must have {MIN_SIDE} at least, and one at most {MAX_ASPECT} times as many as the other.",
        )
    picture = picture.convert("RGB")
    if width * height <= MAX_PIXELS:
        return picture
    scale = math.sqrt(area / (width * height))
    return picture.resize((int(width * scale), int(height * scale)), Image.Resampling.LANCZOS)


def to_pixels(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) float32 in [-1, 1]."""
    import numpy as np

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def siglip_folders(transformer: Path) -> Sequence[Path]:
    """Where a transformer's SigLIP is looked for: beside its file, and beside its folder, as diffusers has it."""
    return [transformer.parent / "siglip", transformer.parent.parent / "siglip"]
