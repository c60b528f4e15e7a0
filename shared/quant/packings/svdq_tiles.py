"""SVDQuant in the tiles that files and nunchaku's engine have: the numbers of svdq.py, where they lie in a file.

    qweight (N, K/2) int8   wscales (N, G)   proj_up (N, R)   smooth_factor (K,)   proj_down (K, R)
    row_scale (N, 1) float32, in order; may be absent: ones

Shapes are nominal, as svdq_tiling.py explains; but a tile's 128 rows lie together in every tensor that has rows, so
rows are cut where tiles end, as views. Rows that come from several places stay there: the tensors of a second piece
are called qweight_1, wscales_1, proj_up_1, and so on. Two more ways to lie come of this one:

    a CPU's     codes and scales in tiles, everything else in order, under svdq.py's names
    nunchaku's  one piece; FP4's row scales as wcscales (N,), in tiles and of 16 bits
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import torch
from torch import Tensor

from shared.quant import svdq_tiling as tiling

CODES, SCALES = "qweight", "wscales"
_BY_ROW = (CODES, SCALES, "proj_up")
SHARED = ("smooth_factor", "proj_down")
_BRANCH = ("smooth", "down", "up")

Tensors = Mapping[str, Tensor]


def are_tiles(tensors: Tensors) -> bool:
    """Whether codes and scales lie in tiles, of whichever of the three ways."""
    return CODES in tensors


def branch_is_tiled(tensors: Tensors) -> bool:
    return "proj_down" in tensors


def are_as_in_a_file(tensors: Tensors) -> bool:
    """Whether they lie in the first way, in one piece or several."""
    return branch_is_tiled(tensors) and "wcscales" not in tensors


def are_the_engine_s(tensors: Tensors) -> bool:
    """Whether nunchaku's engine reads them as they lie."""
    return branch_is_tiled(tensors) and not are_scattered(tensors) and "row_scale" not in tensors


def are_scattered(tensors: Tensors) -> bool:
    """Whether rows lie in several places."""
    return f"{CODES}_1" in tensors


def are_whole(start: int, stop: int) -> bool:
    """Whether rows [start, stop) begin and end with tiles."""
    return start % tiling.ROWS == stop % tiling.ROWS == 0


def pieces(tensors: Tensors, name: str) -> list[Tensor]:
    """The tensors that hold the rows of `name`, from the first on."""
    return [tensors[name], *_others(tensors, name)]


def _others(tensors: Tensors, name: str) -> Iterator[Tensor]:
    for i in count(1):
        if (further := f"{name}_{i}") not in tensors:
            return
        yield tensors[further]


def take_rows(tensors: Tensors, start: int, stop: int) -> dict[str, Tensor]:
    """Rows [start, stop), which are whole tiles of tensors as in a file, as views."""
    found: list[dict[str, Tensor]] = []
    first = 0
    for parts in zip(*(pieces(tensors, name) for name in _BY_ROW), strict=True):
        height = len(parts[0])
        begin, end = max(start - first, 0), min(stop - first, height)
        if begin < end:
            found.append({name: part[begin:end] for name, part in zip(_BY_ROW, parts, strict=True)})
        first += height
    kept = {name: tensors[name] for name in SHARED} | _numbered(found)
    return kept | {"row_scale": tensors["row_scale"][start:stop]} if "row_scale" in tensors else kept


def join_rows(parts: Sequence[Tensors]) -> dict[str, Tensor]:
    """All rows, where they are. The parts lie as in a file, and have the same smoothing and `down`."""
    found = [
        dict(zip(_BY_ROW, of_piece, strict=True))
        for tensors in parts
        for of_piece in zip(*(pieces(tensors, name) for name in _BY_ROW), strict=True)
    ]
    joined = {name: parts[0][name] for name in SHARED} | _numbered(found)
    if any("row_scale" in tensors for tensors in parts):
        joined["row_scale"] = torch.cat([row_scale(tensors) for tensors in parts])
    return joined


def row_scale(tensors: Tensors) -> Tensor:
    """(N, 1) float32, in order."""
    if "row_scale" in tensors:
        return tensors["row_scale"]
    rows = sum(len(piece) for piece in pieces(tensors, CODES))
    if "wcscales" in tensors:
        return tiling.unpack_scales(tensors["wcscales"], rows, 1).float()
    return torch.ones(rows, 1, device=tensors[CODES].device)


def in_order(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of svdq.py."""
    if not are_tiles(tensors):
        return dict(tensors)
    return {
        "codes": tiling.codes_in_order(pieces(tensors, CODES)),
        "scales": tiling.scales_in_order(pieces(tensors, SCALES)),
        **_branch(tensors),
    }


def with_branch_in_order(tensors: Tensors) -> dict[str, Tensor]:
    """A CPU's way: codes and scales stay in tiles where they are."""
    if not branch_is_tiled(tensors):
        return dict(tensors)
    stay = {name: tensor for name, tensor in tensors.items() if name.startswith((CODES, SCALES))}
    return stay | _branch(tensors)


def _branch(tensors: Tensors) -> dict[str, Tensor]:
    """What is in order in both other ways."""
    kept = {"row_scale": row_scale(tensors)}
    if not branch_is_tiled(tensors):
        return kept | {name: tensors[name] for name in _BRANCH}
    smooth, down = tensors["smooth_factor"], tensors["proj_down"]
    return kept | {
        "smooth": tiling.unpack_scales(smooth, len(smooth), 1).flatten(),
        "down": tiling.down_in_order(down),
        "up": tiling.up_in_order(pieces(tensors, "proj_up")),
    }


def for_the_engine(tensors: Tensors, *, has_row_scales: bool) -> dict[str, Tensor]:
    """nunchaku's way. Row scales are rounded to the type of the smoothing, as a file has them."""
    if not branch_is_tiled(tensors):
        tensors = _tiled(in_order(tensors))
    result = {name: tensors[name] for name in SHARED}
    for name in _BY_ROW:
        of = pieces(tensors, name)
        result[name] = of[0] if len(of) == 1 else torch.cat(of)
    if "wcscales" in tensors:
        result["wcscales"] = tensors["wcscales"]
    elif has_row_scales:
        result["wcscales"] = tiling.SCALES.to_file(row_scale(tensors).to(result["smooth_factor"].dtype))
    return result


def _tiled(natural: Tensors) -> dict[str, Tensor]:
    rows, columns = natural["codes"].shape[0], natural["codes"].shape[1] * 2
    scales, down, up = (natural[name] for name in ("scales", "down", "up"))
    return {
        CODES: tiling.WORDS.to_file(natural["codes"].contiguous().view(torch.int32)).view(torch.int8).view(rows, -1),
        SCALES: tiling.pack_scales(scales).view(rows, -1),
        "proj_up": tiling.UP.to_file(up).view(rows, -1),
        "smooth_factor": tiling.SCALES.to_file(natural["smooth"][:, None]),
        "proj_down": tiling.DOWN.to_file(down).view(columns, -1),
        "row_scale": natural["row_scale"],
    }


def _numbered(found: Sequence[Tensors]) -> dict[str, Tensor]:
    """Tensors of pieces by the names that all of them have together."""
    return {
        name if i == 0 else f"{name}_{i}": tensor for i, piece in enumerate(found) for name, tensor in piece.items()
    }
