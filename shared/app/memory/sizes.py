"""What a module takes in memory once it is loaded, read off its files' headers: in all, by block, and mapped."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.app.stream_schedule import ALIGNMENT
from shared.quant.assemble import MAPPED_FROM
from shared.quant.checkpoint import Checkpoint, TensorInfo
from shared.quant.formats import format_of, layers_of

MIB = 2**20
STAGES: Mapping[str, str] = {"text": "text_encoder", "denoise": "transformer", "decode": "vae"}
"""Stage -> the module that works in it, in the order in which they come."""

# Roles by what stands before their names in ComfyUI's all-in-one checkpoints; what else is there is the transformer's.
_PART_PREFIXES = {
    "text_encoder": ("text_encoders.", "cond_stage_model."),
    "vae": ("vae.", "first_stage_model."),
}
UNKNOWN_CHANNELS = 256  # the published Z-Image (Flux) VAE's
_BLOCK_TENSORS = 4  # a numbered module of fewer tensors is no block, but a layer of some small stack

_PLAIN_DTYPES = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
}  # converted to the compute dtype at load; packed formats keep their size
HALF, FLOAT32 = 2, 4  # bytes of a number
# nunchaku's tiles: a CPU puts those of the low-rank branch in order and reads the others as they lie; a GPU without
# nunchaku's engine has them all put in order in RAM.
_IN_TILES = re.compile(r".*\.(?:qweight|wscales|proj_down|proj_up)")
_IN_TILES_ON_CPU = re.compile(r".*\.proj_(?:down|up)")
_BLOCK_NAME = re.compile(r"(?:.*?\.)??\w+\.\d+(?=\.)")
_TABLE_NAME = re.compile(r"(?:.*\.)?(?:embed_tokens|token_embd)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSizes:
    """One module, from its files' headers. Bytes as it is loaded.

    mapped: of them those that can stay in the file, packed or in the type that is computed in: a CPU lets go of them
    after use.
    blocks: of each repeated block, in the files' order. width, hidden: numbers per token of a block's stream and of its
    feed-forward. products: numbers that multiply each token in a pass, whatever they are packed in. scratch: bytes of
    the largest packed matrix when it is unpacked. table: bytes of the embedding table, which is unpacked once.
    """

    nbytes: int
    mapped: int = 0
    blocks: tuple[int, ...] = ()
    width: int = 0
    hidden: int = 0
    products: int = 0
    scratch: int = 0
    table: int = 0

    @property
    def trunk(self) -> int:
        """Bytes of what belongs to no block."""
        return self.nbytes - sum(self.blocks)

    @property
    def per_token(self) -> int:
        """Numbers that live at once for each token, at a block's widest moment."""
        return 3 * self.width + 4 * self.hidden


def open_part(path: Path, role: str) -> Checkpoint:
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


def module_sizes(
    files: Sequence[Checkpoint], compute_bytes: int, *, is_joined: bool = True, on_cpu: bool = False
) -> ModuleSizes:
    """Sizes of the module in these files. Of other modules in the same file (a whole checkpoint's), all count.

    on_cpu: matrices of a large 16-bit file's blocks stay mapped where float32 is computed in. is_joined: whether rows
    of packed matrices are copied, in small files, so that one product makes several (q, k and v) of them.
    """
    matrices = _matrices(files)
    tables = [matrix for matrix in matrices if _TABLE_NAME.fullmatch(matrix.module)]
    unpacked = {id(info) for matrix in tables if matrix.is_packed for info in matrix.tensors}
    total, mapped, scratch = sum(m.numbers for m in tables if m.is_packed) * compute_bytes, 0, 0
    blocks: dict[str, list[int]] = {}  # of the tensors in each numbered module
    for number, file in enumerate(files):
        is_large = file.nbytes >= MAPPED_FROM
        widens = on_cpu and compute_bytes == FLOAT32 and is_large
        in_tiles = _IN_TILES_ON_CPU if on_cpu else _IN_TILES
        for info in file.tensors.values():
            if id(info) in unpacked:
                continue
            stored, block = _PLAIN_DTYPES.get(info.dtype), _BLOCK_NAME.match(info.name)
            if widens and stored == HALF and len(info.shape) == 2 and block:
                size, stored = info.nbytes, compute_bytes
                scratch = max(scratch, info.nbytes * FLOAT32 // HALF)
            else:
                size = loaded_bytes(info, compute_bytes)
            total += size
            is_read_there = stored == compute_bytes or (stored is None and (is_large or not is_joined))
            mapped += size if is_read_there and not in_tiles.fullmatch(info.name) else 0
            if block:
                blocks.setdefault(f"{number} {block[0]}", []).append(-(-size // ALIGNMENT) * ALIGNMENT)
    blocks = {name: sizes for name, sizes in blocks.items() if len(sizes) >= _BLOCK_TENSORS}
    inside = [m.shape for m in matrices if any(m.module.startswith(f"{name.split(' ', 1)[1]}.") for name in blocks)]
    # The feed-forward's way back is the matrix that takes most numbers, however its way out is stored (w1, w3, w13).
    width, hidden = max(inside, key=lambda shape: shape[1], default=(0, 0))
    return ModuleSizes(
        nbytes=total,
        mapped=mapped,
        blocks=tuple(map(sum, blocks.values())),
        width=width,
        hidden=hidden,
        products=sum(math.prod(shape) for shape in inside if shape[1] >= width),
        scratch=max([scratch, *(m.numbers * compute_bytes for m in matrices if m.is_packed and m not in tables)]),
        table=sum(matrix.numbers for matrix in tables) * compute_bytes,
    )


def loaded_bytes(info: TensorInfo, compute_bytes: int) -> int:
    """Of one tensor: plain numbers become the type that is computed in, packed ones stay as they are."""
    plain = _PLAIN_DTYPES.get(info.dtype)
    return info.nbytes if plain is None else info.nbytes * compute_bytes // plain


@dataclass(frozen=True, slots=True)
class _Matrix:
    """What a layer multiplies by, as it is when unpacked. module: the layer's path. tensors: it is kept in."""

    module: str
    shape: tuple[int, ...]
    is_packed: bool
    tensors: tuple[TensorInfo, ...]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def _matrices(files: Sequence[Checkpoint]) -> list[_Matrix]:
    found = []
    for file in files:
        for module, layer in layers_of(file, list(file.tensors)).items():
            packed = format_of(layer)
            plain = layer.tensors["weight"].shape if "weight" in layer.tensors else ()
            shape = plain if packed is None else packed.shape(layer)
            found.append(_Matrix(module, shape, packed is not None, tuple(layer.tensors.values())))
    return [matrix for matrix in found if len(matrix.shape) == 2]


def last_stage_channels(vae: Checkpoint) -> int:
    """Channels that enter the decoder's full-resolution stage, read off the convolution shapes.

    The convolution with 3 outputs (RGB) takes C0 channels; the widest convolution that gives C0 opens the last stage.
    """
    convolutions = [info.shape for info in vae.tensors.values() if len(info.shape) == 4]
    rgb_inputs = {shape[1] for shape in convolutions if shape[0] == 3}
    entering = {shape[1] for shape in convolutions if shape[0] in rgb_inputs}
    return max(rgb_inputs | entering, default=UNKNOWN_CHANNELS)
