"""What a generation needs and what it used: a memory estimate before the run, peak figures after it.

All figures are in MiB (2**20 bytes). The estimate reads file headers only and needs no torch:

    weights  = sum over the files of tensor bytes; 16 and 32 bit numbers count at the size of the compute type, but
               those of blocks in a large file at 16 bits on a CPU that computes in float32: they stay mapped
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
    decode   = pixels x channels x VAE bytes x live; in tiles 2 x picture + live x tile
               channels = those that enter the decoder's last stage
               live = 3 on a GPU: input, normalised input, output of one layer; 4.6 on a CPU, measured, whose
               convolutions copy their input and output into an order of their own; 3.5 in bfloat16, of which the last
               norm, in float32, takes the most. On a CPU the picture itself counts, too

    RAM of a stage on the CPU  = base + all weights used up to then + LoRAs + the stage's working memory; a text
                                 encoder's that are mapped from the file are let go of before drawing
    VRAM of a stage on a GPU   = its model's weights as they are placed + LoRAs + the stage's working memory

Of a module whose files are not here yet, the published sizes of its files and its family's shapes stand in for headers:
blocks of equal size, tensors outside them plain. Tested to be within a tenth for bf16 and int8 files.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.app.stream_schedule import ALIGNMENT
from shared.quant.assemble import MAPPED_FROM
from shared.quant.checkpoint import Checkpoint, TensorInfo
from shared.quant.formats import Layer, format_of, layers_of

MIB = 2**20

STAGES: Mapping[str, str] = {"text": "text_encoder", "denoise": "transformer", "decode": "vae"}
"""Stage -> the module that works in it, in the order in which they come."""

# Python, torch, diffusers, transformers and numba in use, nothing loaded; measured on Linux x86-64, CPU build.
BASE_MB = 644.0
# Roles by what stands before their names in ComfyUI's all-in-one checkpoints; what else is there is the transformer's.
_PART_PREFIXES = {
    "text_encoder": ("text_encoders.", "cond_stage_model."),
    "vae": ("vae.", "first_stage_model."),
}
_PROMPT_TOKENS = 512  # longest prompt the text encoder takes
# Tokens that go through the transformer's feed-forward at once where it need not be all: models/z_image/token_rows.py.
FEED_FORWARD_TOKENS_ON_CPU, FEED_FORWARD_TOKENS_ON_GPU = 576, 2304
_PATCH_PIXELS = 16  # one image token covers 16 x 16 pixels: VAE factor 8, patch size 2
_CELL_PIXELS = 8
_UNKNOWN_CHANNELS = 256  # the published Z-Image (Flux) VAE's
_LIVE_ON_GPU, _LIVE_ON_CPU, _LIVE_ON_CPU_IN_BF16 = 3.0, 4.6, 3.5
_PICTURE_BYTES = 80  # per pixel on a CPU: the picture in float32, a few times over, and as 8 bits
_DECODER_SHARE = 0.6  # of a VAE's weights
_STORED_TENSORS = 2  # a tiled decode keeps whole activations between layers
_BLOCK_TENSORS = 4  # a numbered module of fewer tensors is no block, but a layer of some small stack
# glibc's malloc.h: M_MMAP_THRESHOLD, from which a piece is taken from the system; M_TRIM_THRESHOLD, from which free
# memory at the heap's end is given back. Lower ones cost time: the system clears every page that it hands out.
_HEAP_LIMITS = {-3: 4 * MIB, -1: 16 * MIB}
_PLAIN_DTYPES = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
}  # converted to the compute dtype at load; packed formats keep their size
# Bytes for each number, from which on a file is plain, and from which on its packed numbers have 8 bits.
_PACKED_BELOW, _PACKED_IN_BYTES = 1.9, 0.98
FROM_HEADERS, FROM_PUBLISHED = "file headers", "published sizes"
_HALF, _FLOAT32 = 2, 4  # bytes of a number
_BLOCK_NAME = re.compile(r"(?:.*?\.)??\w+\.\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSizes:
    """One module, from its files' headers. Bytes as it is loaded.

    mapped: of them those that can stay in the file, packed or in the type that is computed in: a CPU lets go of them
    after use.
    blocks: of each repeated block, in the files' order. width, hidden: numbers per token of a block's stream and of its
    feed-forward. products: numbers that multiply each token in a pass, whatever they are packed in. scratch: bytes of
    the largest packed matrix when it is unpacked.
    """

    nbytes: int
    mapped: int = 0
    blocks: tuple[int, ...] = ()
    width: int = 0
    hidden: int = 0
    products: int = 0
    scratch: int = 0

    @property
    def trunk(self) -> int:
        """Bytes of what belongs to no block."""
        return self.nbytes - sum(self.blocks)

    @property
    def per_token(self) -> int:
        """Numbers that live at once for each token, at a block's widest moment."""
        return 3 * self.width + 4 * self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleShapes:
    """What a family knows of one of its published modules without a file, in numbers (weights), not bytes.

    numbers: in all. outside: of them in no block. unpacked: those that packed files keep in 16 bits. blocks: how many;
    width, hidden, products: as in ModuleSizes. largest: of the matrices in a block. channels: those that enter a VAE
    decoder's last stage.
    """

    numbers: int
    outside: int = 0
    unpacked: int = 0
    blocks: int = 0
    width: int = 0
    hidden: int = 0
    products: int = 0
    largest: int = 0
    channels: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModule:
    """A module that is not (all) here: bytes of its files, the main one first, and the family's shapes of that one.

    further: bytes of module files (ControlNet), taken for 16 bit numbers in blocks like the main file's. packs_table:
    whether a packed file packs what lies outside blocks too. is_joined: as in _module().
    """

    shapes: ModuleShapes
    nbytes: int
    further: tuple[int, ...] = ()
    packs_table: bool = False
    is_joined: bool = True

    def sizes(self, compute_bytes: int, *, on_cpu: bool = False) -> ModuleSizes:
        """Its sizes as it is loaded to compute in numbers of so many bytes. on_cpu: as in _module()."""
        shapes = self.shapes
        stored = self.nbytes / shapes.numbers
        widens = on_cpu and compute_bytes == _FLOAT32 and self.nbytes >= MAPPED_FROM and shapes.blocks > 0
        if widens and round(stored) == _HALF:
            outside, scratch = shapes.outside * compute_bytes, shapes.largest * compute_bytes
            mapped = (shapes.numbers - shapes.outside) * _HALF
            total = mapped + outside
        elif stored > _PACKED_BELOW:
            total = shapes.numbers * compute_bytes
            mapped = total if round(stored) == compute_bytes else 0
            outside, scratch = shapes.outside * compute_bytes, 0
        else:
            kept = 0 if self.packs_table else shapes.unpacked
            if stored > _PACKED_IN_BYTES:  # what is more than a byte for each number is the second byte of plain ones
                kept = min(kept, max(0, self.nbytes - shapes.numbers))
            widened = min(kept, shapes.outside) if widens else kept
            total = self.nbytes + widened * (compute_bytes - 2)
            mapped = (kept * 2 if compute_bytes == 2 else (kept - widened) * 2) + (
                0 if self.is_joined else self.nbytes - kept * 2
            )
            outside = round(shapes.outside * stored) if self.packs_table else min(shapes.outside, kept) * compute_bytes
            scratch = max(shapes.largest, shapes.outside if self.packs_table else 0) * compute_bytes
        blocks = ((total - outside) // shapes.blocks,) * shapes.blocks if shapes.blocks else ()
        products = shapes.products
        if shapes.blocks:
            plain_block = (shapes.numbers - shapes.outside) * compute_bytes // shapes.blocks
            for size in (nbytes * compute_bytes // 2 for nbytes in self.further):
                count = size // plain_block
                total += size
                mapped += size if compute_bytes == 2 else 0
                blocks += (plain_block,) * count
                products += count * shapes.products // shapes.blocks
        return ModuleSizes(
            nbytes=total,
            mapped=mapped,
            blocks=blocks,
            width=shapes.width,
            hidden=shapes.hidden,
            products=products,
            scratch=scratch,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """The terms of the formula above for one run, MiB, before anything is placed.

    sizes: by module: transformer (with its control branch), text_encoder, vae. decode_tiled_mb: of the decode in tiles
    of that many latent cells, for those that are worth a try. tokens: of picture and prompt in one pass. published:
    the modules whose sizes are published ones, not read from files.
    """

    sizes: Mapping[str, ModuleSizes]
    loras_mb: float
    text_mb: float
    denoise_mb: float
    decode_mb: float
    tile: int | None  # latent cells that were asked for, 0 in one piece; None leaves it to the plan
    decode_tiled_mb: Mapping[int, float]
    tokens: int
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
    width: int,
    height: int,
    tile_cells: int | None,
    compute_bytes: int,
    vae_bytes: int,
    guided: bool,
    loras: Sequence[Path] = (),
    on_cpu: bool = True,
    decode_bytes: int | None = None,
    is_exact: bool = False,
    published: Mapping[str, PublishedModule] | None = None,
) -> MemoryEstimate:
    """Weights and working sets from the headers of the files that will be loaded.

    transformer: the main file and its module files. published: modules by name that are not here, in the place of
    their files, which are not looked at. width, height: pixels. tile_cells: latent cells, 0 is untiled, and
    so is None, which leaves it to the plan.
    compute_bytes, vae_bytes: bytes per number of the two dtypes. decode_bytes: of the activations that a picture is
    decoded in, with a second decoder of that type, where they are not the VAE's own. guided: two passes in one batch.
    is_exact: all tokens go through the feed-forward at once, as in the reference.
    Raises CheckpointError when a header cannot be read.
    """
    absent = published or {}
    sizes = {
        name: module.sizes(vae_bytes) if name == "vae" else module.sizes(compute_bytes, on_cpu=on_cpu)
        for name, module in absent.items()
    }
    channels = absent["vae"].shapes.channels if "vae" in absent else _UNKNOWN_CHANNELS
    if "transformer" not in sizes:
        sizes["transformer"] = _module(
            [_open_part(path, "transformer") for path in transformer], compute_bytes, on_cpu=on_cpu
        )
    if "text_encoder" not in sizes and text_encoder is not None:
        sizes["text_encoder"] = _module(
            [_open_part(text_encoder, "text_encoder")], compute_bytes, is_joined=False, on_cpu=on_cpu
        )
    if "vae" not in sizes and vae is not None:
        vae_file = _open_part(vae, "vae")
        channels = _last_stage_channels(vae_file)
        sizes["vae"] = ModuleSizes(nbytes=sum(_loaded_bytes(info, vae_bytes) for info in vae_file.tensors.values()))
    sizes = {name: sizes[name] for name in STAGES.values()}
    tokens = ((width // _PATCH_PIXELS) * (height // _PATCH_PIXELS) + _PROMPT_TOKENS) * (2 if guided else 1)
    at_once = FEED_FORWARD_TOKENS_ON_CPU if on_cpu else FEED_FORWARD_TOKENS_ON_GPU
    at_once = tokens if is_exact else min(tokens, at_once)
    drawn = sizes["transformer"]
    read = sizes["text_encoder"]
    pixels = width * height
    per_pixel = channels * (decode_bytes or vae_bytes)
    beside = sizes["vae"].nbytes * _DECODER_SHARE * decode_bytes / vae_bytes if decode_bytes else 0.0
    on_any_cpu = _LIVE_ON_CPU if decode_bytes is None else _LIVE_ON_CPU_IN_BF16
    live = on_any_cpu if on_cpu else _LIVE_ON_GPU
    beside += pixels * _PICTURE_BYTES if on_cpu else 0

    def decode(tile: int) -> float:
        side = tile * _CELL_PIXELS
        if not tile or max(width, height) <= side:
            return (live * pixels * per_pixel + beside) / MIB
        stored = _STORED_TENSORS * pixels if on_cpu else 0  # with a GPU, whole activations are kept in RAM
        return ((stored + live * min(width, side) * min(height, side)) * per_pixel + beside) / MIB

    return MemoryEstimate(
        sizes=sizes,
        loras_mb=sum(_loaded_bytes(i, compute_bytes) for p in loras for i in Checkpoint.open(p).tensors.values()) / MIB,
        text_mb=(_PROMPT_TOKENS * read.per_token * compute_bytes + read.scratch) / MIB,
        denoise_mb=(_drawing_numbers(drawn, tokens, at_once) * compute_bytes + drawn.scratch) / MIB,
        decode_mb=decode(tile_cells or 0),
        tile=tile_cells,
        decode_tiled_mb={tile: decode(tile) for tile in TILES},
        tokens=tokens,
        published=tuple(name for name in sizes if name in absent),
    )


TILES = (64, 32, 16)
"""Sides of decoding tiles in latent cells, from large to small, that are tried where one piece is too much."""


def peak_rss_mb() -> float | None:
    """Most physical memory this process has held so far, MiB; None where the system does not tell."""
    if sys.platform == "win32":
        try:
            import psutil
        except ImportError:
            return None
        return float(psutil.Process().memory_info().peak_wset) / MIB
    if sys.platform == "linux":
        # Not getrusage: on Linux its maximum survives exec, so a child reports the peak of the process that started it.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024  # KiB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB  # bytes on macOS


def free_vram_bytes() -> int | None:
    """Bytes that this process can have on the first GPU, what its tensors hold now among them; None if not known."""
    torch = _torch_with_cuda()
    if torch is None:
        return None
    return int(torch.cuda.mem_get_info(0)[0]) + int(torch.cuda.memory_reserved(0))


def free_ram_bytes() -> int | None:
    """Bytes of RAM that can be had without swapping, this process's own among them; None if the system does not say."""
    listing = Path("/proc/meminfo")
    if not listing.is_file():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", listing.read_text(encoding="ascii", errors="replace"))
    own = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii", errors="replace"))
    return None if found is None else (int(found[1]) + (int(own[1]) if own else 0)) * 1024


def give_freed_memory_back() -> None:
    """From now on, let large pieces of RAM go back to the system when they are freed; does nothing without glibc.

    glibc takes large pieces from the system one by one, until one is freed: then it takes pieces of that size, up to
    32 MiB, out of its heap, which keeps whatever lies below a piece in use. A decode in tiles so held 340 MiB of RAM
    for tensors of 160. A fixed limit ends that. To be called early: what the heap has grown to is used again first.
    """
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is not None:
        for option, size in _HEAP_LIMITS.items():
            mallopt(option, size)


def reset_peak_vram() -> None:
    """Start a new peak measurement on every GPU."""
    torch = _torch_with_cuda()
    if torch is not None:
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def peak_vram_mb() -> float:
    """Most GPU memory held by tensors since the last reset, MiB, of the fullest GPU; 0 without CUDA."""
    torch = _torch_with_cuda()
    if torch is None:
        return 0.0
    peaks = [int(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count())]
    return max(peaks) / MIB


def _torch_with_cuda() -> Any | None:
    torch = sys.modules.get("torch")  # not imported: then nothing is on a GPU either
    return torch if torch is not None and torch.cuda.is_available() else None


def _open_part(path: Path, role: str) -> Checkpoint:
    """The tensors of one role: an all-in-one checkpoint holds those of three, each behind a prefix."""
    checkpoint = Checkpoint.open(path)
    roles = {
        name: next((role for role, prefixes in _PART_PREFIXES.items() if name.startswith(prefixes)), "transformer")
        for name in checkpoint.tensors
    }
    if len(set(roles.values())) < 2:
        return checkpoint
    own = {name: info for name, info in checkpoint.tensors.items() if roles[name] == role}
    return replace(checkpoint, tensors=own)


def _module(
    files: Sequence[Checkpoint], compute_bytes: int, *, is_joined: bool = True, on_cpu: bool = False
) -> ModuleSizes:
    """Sizes of the module in these files. Of other modules in the same file (a whole checkpoint's), all count.

    on_cpu: matrices of a large 16-bit file's blocks stay mapped where float32 is computed in. is_joined: whether rows
    of packed matrices may be copied, so that one product makes several (q, k and v) of them.
    """
    blocks: dict[str, int] = {}
    counts: dict[str, int] = {}
    matrices: list[tuple[str, tuple[int, ...]]] = []
    total = mapped = scratch = 0
    for number, file in enumerate(files):
        widens = on_cpu and compute_bytes == _FLOAT32 and file.nbytes >= MAPPED_FROM
        for info in file.tensors.values():
            stored = _PLAIN_DTYPES.get(info.dtype)
            if widens and stored == _HALF and len(info.shape) == 2 and _BLOCK_NAME.match(info.name):
                size, stored = info.nbytes, compute_bytes
                scratch = max(scratch, info.nbytes * _FLOAT32 // _HALF)
            else:
                size = _loaded_bytes(info, compute_bytes)
            total += size
            mapped += size if stored == compute_bytes or (stored is None and not is_joined) else 0
            if found := _BLOCK_NAME.match(info.name):
                name = f"{number} {found[0]}"
                blocks[name] = blocks.get(name, 0) + -(-size // ALIGNMENT) * ALIGNMENT
                counts[name] = counts.get(name, 0) + 1
        for module, layer in layers_of(file, list(file.tensors)).items():
            shape, packed = _matrix(layer)
            if len(shape) == 2:
                matrices.append((module, shape))
                if packed:
                    scratch = max(scratch, math.prod(shape) * compute_bytes)
    real = {name for name, count in counts.items() if count >= _BLOCK_TENSORS}
    inside = [
        shape for module, shape in matrices if any(module.startswith(name.split(" ", 1)[1] + ".") for name in real)
    ]
    # The feed-forward's way back is the matrix that takes most numbers, however its way out is stored (w1, w3, w13).
    width, hidden = max(inside, key=lambda shape: shape[1], default=(0, 0))
    return ModuleSizes(
        nbytes=total,
        mapped=mapped,
        blocks=tuple(size for name, size in blocks.items() if name in real),
        width=width,
        hidden=hidden,
        products=sum(math.prod(shape) for shape in inside if shape[1] >= width),
        scratch=scratch,
    )


def _drawing_numbers(drawn: ModuleSizes, tokens: int, at_once: int) -> int:
    """Numbers that live at once while the transformer works, at_once of its tokens in the feed-forward."""
    return max(8 * drawn.width * tokens, 7 * drawn.width * tokens + 3 * drawn.hidden * at_once)


def _matrix(layer: Layer) -> tuple[tuple[int, ...], bool]:
    """The shape a layer's weight stands for, () without one, and whether it is packed."""
    packed = format_of(layer)
    if packed is not None:
        return packed.shape(layer), True
    return (layer.tensors["weight"].shape, False) if "weight" in layer.tensors else ((), False)


def _loaded_bytes(info: TensorInfo, compute_bytes: int) -> int:
    plain = _PLAIN_DTYPES.get(info.dtype)
    return info.nbytes if plain is None else info.nbytes * compute_bytes // plain


def _last_stage_channels(vae: Checkpoint) -> int:
    """Channels that enter the decoder's full-resolution stage, read off the convolution shapes.

    The convolution with 3 outputs (RGB) takes C0 channels; the widest convolution that gives C0 opens the last stage.
    """
    convolutions = [info.shape for info in vae.tensors.values() if len(info.shape) == 4]
    rgb_inputs = {shape[1] for shape in convolutions if shape[0] == 3}
    entering = {shape[1] for shape in convolutions if shape[0] in rgb_inputs}
    return max(rgb_inputs | entering, default=_UNKNOWN_CHANNELS)
