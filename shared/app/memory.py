"""What a generation needs and what it used: a memory estimate before the run, peak figures after it.

All figures are in MiB (2**20 bytes). The estimate reads file headers only and needs no torch:

    weights  = sum over the files of tensor bytes; 16 and 32 bit numbers count at the size of the compute type
    denoise  = tokens x widest x compute bytes x 3, twice that with guidance (both passes in one batch)
               tokens = (width / 16) x (height / 16) + 512, the longest usual prompt
               widest = most rows of any matrix of the transformer; 3 = input, product and output of one layer
    decode   = pixels x channels x VAE bytes x 3; in tiles 2 x picture + 3 x tile
               channels = those that enter the decoder's last stage; 3 = input, normalised input, output of one layer
    working  = max(denoise, decode): they never live at the same time
    RAM      = base + weights (+ working on the CPU)
    VRAM     = weights resident at once + working
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.quant.checkpoint import Checkpoint

MIB = 2**20

_BASE_MB = 500.0  # Python, torch, transformers and diffusers imported, nothing loaded; Linux x86-64, CPU build
_PROMPT_TOKENS = 512  # longest prompt the text encoder takes
_PATCH_PIXELS = 16  # one image token covers 16 x 16 pixels: VAE factor 8, patch size 2
_CELL_PIXELS = 8
_UNKNOWN_CHANNELS = 256  # the published Z-Image (Flux) VAE's
_LIVE_TENSORS = 3  # input, normalised input, output
_STORED_TENSORS = 2  # a tiled decode keeps whole activations between layers
_PLAIN_DTYPES = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
}  # converted to the compute dtype at load; packed formats keep their size


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """The terms of the formula above for one run, MiB. ram_mb and vram_mb follow from where the weights are placed."""

    weights_mb: Mapping[str, float]  # by module: transformer, text_encoder, vae
    denoise_mb: float
    decode_mb: float
    ram_mb: float = 0.0
    vram_mb: float = 0.0  # 0 on the CPU

    def placed(self, *, on_cpu: bool, resident_mb: float | None) -> MemoryEstimate:
        """The same with RAM and VRAM. resident_mb: most weights on the GPU at once; None = all of them."""
        weights = sum(self.weights_mb.values())
        working = max(self.denoise_mb, self.decode_mb)
        resident = weights if resident_mb is None else min(weights, resident_mb)
        ram = _BASE_MB + weights + (working if on_cpu else 0.0)
        return replace(self, ram_mb=ram, vram_mb=0.0 if on_cpu else resident + working)

    def as_dict(self) -> dict[str, Any]:
        return {
            "weights_mb": {name: round(size, 1) for name, size in self.weights_mb.items()},
            "denoise_mb": round(self.denoise_mb, 1),
            "decode_mb": round(self.decode_mb, 1),
            "ram_mb": round(self.ram_mb, 1),
            "vram_mb": round(self.vram_mb, 1),
        }


def estimate_memory(
    *,
    transformer: Sequence[Path],
    text_encoder: Path,
    vae: Path,
    width: int,
    height: int,
    tile_cells: int | None,
    compute_bytes: int,
    vae_bytes: int,
    guided: bool,
) -> MemoryEstimate:
    """Weights and working sets from the headers of the files that will be loaded; not placed yet.

    transformer: the main file and its module files. width, height: pixels. tile_cells: latent cells, 0 is untiled.
    compute_bytes, vae_bytes: bytes per number of the two dtypes. guided: two passes in one batch.
    Raises CheckpointError when a header cannot be read.
    """
    files = [Checkpoint.open(path) for path in transformer]
    vae_file = Checkpoint.open(vae)
    weights = {
        "transformer": sum(_loaded_bytes(file, compute_bytes) for file in files) / MIB,
        "text_encoder": _loaded_bytes(Checkpoint.open(text_encoder), compute_bytes) / MIB,
        "vae": _loaded_bytes(vae_file, vae_bytes) / MIB,
    }
    widest = max((info.shape[0] for file in files for info in file.tensors.values() if len(info.shape) == 2), default=0)
    tokens = (width // _PATCH_PIXELS) * (height // _PATCH_PIXELS) + _PROMPT_TOKENS
    denoise = tokens * widest * compute_bytes * _LIVE_TENSORS * (2 if guided else 1)
    pixels, tile = width * height, (tile_cells or 0) * _CELL_PIXELS
    if tile:
        live_pixels = _STORED_TENSORS * pixels + _LIVE_TENSORS * min(width, tile) * min(height, tile)
    else:
        live_pixels = _LIVE_TENSORS * pixels
    decode = live_pixels * _last_stage_channels(vae_file) * vae_bytes
    return MemoryEstimate(weights_mb=weights, denoise_mb=denoise / MIB, decode_mb=decode / MIB)


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


def _loaded_bytes(file: Checkpoint, compute_bytes: int) -> float:
    return sum(
        info.nbytes * compute_bytes / _PLAIN_DTYPES[info.dtype] if info.dtype in _PLAIN_DTYPES else info.nbytes
        for info in file.tensors.values()
    )


def _last_stage_channels(vae: Checkpoint) -> int:
    """Channels that enter the decoder's full-resolution stage, read off the convolution shapes.

    The convolution with 3 outputs (RGB) takes C0 channels; the widest convolution that gives C0 opens the last stage.
    """
    convolutions = [info.shape for info in vae.tensors.values() if len(info.shape) == 4]
    rgb_inputs = {shape[1] for shape in convolutions if shape[0] == 3}
    entering = {shape[1] for shape in convolutions if shape[0] in rgb_inputs}
    return max(rgb_inputs | entering, default=_UNKNOWN_CHANNELS)
