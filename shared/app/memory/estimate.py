"""The estimate before the run: weights, and the working memory of each stage.

weights  = sum over the files of tensor bytes; 16 and 32 bit numbers count at the size of the compute type, but
           those of blocks in a large file at 16 bits on a CPU that computes in float32, and those of a VAE beside
           whose decoder a CPU has a copy in bfloat16 (decoding.py): they stay mapped
LoRAs    = the same over their files
scratch  = the largest packed (or mapped 16-bit) matrix unpacked: one at a time is, for kernels that multiply
           unpacked numbers
text     = prompt tokens x per token of the text encoder's block
           per token = (3 x width + 4 x hidden) x compute bytes: the stream, its normalised copy and a result
           beside the feed-forward's gate, value, activation and product
denoise  = the larger of 8 x width x tokens (attention: stream, normalised copy, q, k and v as multiplied and as
           attended, result) and 7 x width x tokens + 3 x hidden x the tokens of one part (feed-forward),
           x compute bytes; tokens are those of picture and prompt, twice as many with guidance (both passes in
           one batch); a picture token covers 16 x 16 pixels
decode   = see decoding.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.app.memory.decoding import decode_bytes, decode_ways, saved_bytes
from shared.app.memory.published import PublishedModule
from shared.app.memory.sizes import (
    MIB,
    STAGES,
    UNKNOWN_CHANNELS,
    ModuleSizes,
    last_stage_channels,
    loaded_bytes,
    module_sizes,
    open_part,
)
from shared.app.memory.workload import PROMPT_TOKENS, Workload
from shared.quant.checkpoint import Checkpoint

FROM_HEADERS, FROM_PUBLISHED = "file headers", "published sizes"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """The terms of the formula above for one run, MiB, before anything is placed.

    sizes: by module: transformer (with its control branch), text_encoder, vae. decode_tiled_mb: of the decode in tiles
    of that many latent cells, for those that are worth a try, from large to small; decode_ways: the same in words.
    decodes_beside: by a decoder that comes to the GPU, while what was there stays; saved_mb: less for the VAE where
    that decoder has come for good. tokens: of picture and prompt in one pass. published: the modules whose sizes are
    published ones, not read from files.
    """

    sizes: Mapping[str, ModuleSizes]
    loras_mb: float
    text_mb: float
    denoise_mb: float
    decode_mb: float
    tile: int | None  # latent cells that were asked for, 0 in one piece; None leaves it to the plan
    decode_tiled_mb: Mapping[int, float]
    tokens: int
    decode_ways: Mapping[int, str]
    decodes_beside: bool = False
    saved_mb: float = 0.0
    published: tuple[str, ...] = ()

    @property
    def weights_mb(self) -> dict[str, float]:
        return {name: size.nbytes / MIB for name, size in self.sizes.items()}

    @property
    def working_mb(self) -> dict[str, float]:
        """By stage."""
        return {"text": self.text_mb, "denoise": self.denoise_mb, "decode": self.decode_mb}

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": FROM_PUBLISHED if self.published else FROM_HEADERS,
            "from_published_sizes": list(self.published),
            "weights_mb": {name: round(size, 1) for name, size in self.weights_mb.items()},
            "loras_mb": round(self.loras_mb, 1),
            "text_mb": round(self.text_mb, 1),
            "denoise_mb": round(self.denoise_mb, 1),
            "decode_mb": round(self.decode_mb, 1),
        }


def estimate_memory(
    *,
    transformer: Sequence[Path],
    text_encoder: Path | None,
    vae: Path | None,
    work: Workload,
    loras: Sequence[Path] = (),
    published: Mapping[str, PublishedModule] | None = None,
) -> MemoryEstimate:
    """Weights and working memory from the headers of the files that will be loaded.

    transformer: the main file and its module files. published: modules by name that are not here, in the place of
    their files, which are not looked at. Raises CheckpointError when a header cannot be read.
    """
    absent = published or {}
    sizes = {
        name: module.sizes(work.vae_bytes) if name == "vae" else module.sizes(work.compute_bytes, on_cpu=work.on_cpu)
        for name, module in absent.items()
    }
    channels = absent["vae"].shapes.channels if "vae" in absent else UNKNOWN_CHANNELS
    compute_bytes = work.compute_bytes
    if "transformer" not in sizes:
        parts = [open_part(path, "transformer") for path in transformer]
        sizes["transformer"] = module_sizes(parts, compute_bytes, on_cpu=work.on_cpu)
    if "text_encoder" not in sizes and text_encoder is not None:
        part = open_part(text_encoder, "text_encoder")
        sizes["text_encoder"] = module_sizes([part], compute_bytes, is_joined=False, on_cpu=work.on_cpu)
    if "vae" not in sizes and vae is not None:
        part = open_part(vae, "vae")
        channels = last_stage_channels(part)
        sizes["vae"] = ModuleSizes(nbytes=sum(loaded_bytes(info, work.vae_bytes) for info in part.tensors.values()))
        vae_stored = part.nbytes
    else:
        vae_stored = absent["vae"].nbytes if "vae" in absent else 0
    drawn, read, decoder = sizes["transformer"], sizes["text_encoder"], sizes["vae"]
    if work.on_cpu and work.decode_bytes is not None:
        sizes["vae"] = ModuleSizes(nbytes=vae_stored, mapped=vae_stored)
    ways = decode_ways(work)
    lora_tensors = [info for path in loras for info in Checkpoint.open(path).tensors.values()]
    return MemoryEstimate(
        sizes={name: sizes[name] for name in STAGES.values()},
        loras_mb=sum(loaded_bytes(info, compute_bytes) for info in lora_tensors) / MIB,
        text_mb=(PROMPT_TOKENS * read.per_token * compute_bytes + read.scratch) / MIB,
        denoise_mb=(_drawing_numbers(drawn, work) * compute_bytes + drawn.scratch) / MIB,
        decode_mb=decode_bytes(work, work.tile_cells or 0, decoder, channels) / MIB,
        tile=work.tile_cells,
        decode_tiled_mb={tile: decode_bytes(work, tile, decoder, channels) / MIB for tile in ways},
        decode_ways=ways,
        saved_mb=saved_bytes(work, decoder) / MIB,
        decodes_beside=work.decodes_beside,
        tokens=work.tokens,
        published=tuple(name for name in STAGES.values() if name in absent),
    )


def _drawing_numbers(drawn: ModuleSizes, work: Workload) -> int:
    """Numbers that live at once while the transformer works."""
    attention = 8 * drawn.width * work.tokens
    return max(attention, 7 * drawn.width * work.tokens + 3 * drawn.hidden * work.tokens_at_once)
