"""SVDQuant of a weight: find the codes, scales and low-rank branch of packings/svdq.py that come nearest to it.

    smoothed weight S = W * smooth;  S ~ Q * scales + up @ down * smooth

Taking the branch first (the largest singular directions of S) and rounding what is left is not the best pair: rounding
leaves an error that has large directions of its own. So both are found in turns, the branch for S less the rounded
part, then the rounded part for S less the branch, and the best pair is kept. Everything is rounded to the stored types
before the other half is fitted to it, so that their rounding errors are made up for.

Paper: Li et al. 2024, arXiv 2411.05007; the turns as in LoftQ, Li et al. 2023, arXiv 2310.08659.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.quant import e2m1
from shared.quant.packings.svdq import Kind

_STORED = torch.bfloat16
_LARGEST_INT4 = 7  # -8 is left out: the range is even on both sides
_LARGEST_E4M3 = 448.0
# Columns beyond the rank that the search for singular directions carries along, and its rounds when it starts afresh.
_OVERSAMPLING = 16
_FIRST_ROUNDS = 4
_ROWS_AT_ONCE = 1024  # rounded together: the intermediate results of a whole matrix would take gigabytes


def fit(
    weight: Tensor, *, kind: Kind, rank: int, group: int, smooth: Tensor | None, iterations: int, parts: int
) -> dict[str, Tensor]:
    """The tensors of packings/svdq.py for `weight` (N, K), floats in bfloat16.

    smooth: (K,) positive, by which activations will be divided; None for none. iterations: turns after the first pair.
    parts: matrices stacked in `weight`, N / parts rows each; in fp4 each has its own scale beside those of the groups.
    Needs two float32 copies of `weight` and a little more.
    """
    columns = weight.shape[1]
    smooth = torch.ones(columns, device=weight.device) if smooth is None else smooth
    smooth = smooth.to(weight.device, _STORED)
    smoothed = weight.float() * smooth.float()
    rest = smoothed.clone()
    basis = None
    best: dict[str, Tensor] = {}
    smallest = float("inf")
    for _ in range(iterations + 1):
        up, down, basis = _largest_directions(rest, rank, basis)
        up, down = up.to(_STORED), (down / smooth.float()).to(_STORED)
        torch.addmm(smoothed, up.float(), down.float() * smooth.float(), alpha=-1, out=rest)
        row_scale = _row_scale(rest, kind, parts)
        codes, scales, error = _round_to(rest, smoothed, row_scale, kind, group)
        if error < smallest:
            smallest = error
            best = {"codes": codes, "scales": scales, "row_scale": row_scale, "smooth": smooth, "down": down, "up": up}
    return best


def _largest_directions(matrix: Tensor, rank: int, basis: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """up (N, R) and down (R, K) whose product is nearest to `matrix` (N, K), and the basis found, to go on from.

    By subspace iteration (Halko et al. 2011, arXiv 0909.4061), since a whole SVD of 20480 x 3840 takes minutes. Ranks
    that the matrix does not have are zeros.
    """
    rounds = 1
    if basis is None:
        rounds = _FIRST_ROUNDS
        width = min(rank + _OVERSAMPLING, *matrix.shape)
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    for _ in range(rounds):
        range_ = torch.linalg.qr(matrix @ basis).Q
        basis = torch.linalg.qr(matrix.t() @ range_).Q
    left, sizes, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    kept = min(rank, len(sizes))
    up = torch.zeros(matrix.shape[0], rank, device=matrix.device)
    down = torch.zeros(rank, matrix.shape[1], device=matrix.device)
    up[:, :kept] = left[:, :kept] * sizes[:kept]
    down[:kept] = right[:kept] @ basis.t()
    return up, down, basis


def _row_scale(rest: Tensor, kind: Kind, parts: int) -> Tensor:
    """(N, 1) float32: fp4 spends the range of its group scales on each part's largest number; ones for int4."""
    if kind == "int4":
        return torch.ones(len(rest), 1, device=rest.device)
    low, high = rest.view(parts, -1).aminmax(dim=1)
    whole = (torch.maximum(-low, high) / (e2m1.MAX * _LARGEST_E4M3)).to(_STORED).float()
    whole[whole == 0] = 1  # a matrix of zeros
    return whole.repeat_interleave(len(rest) // parts)[:, None]


def _round_to(
    rest: Tensor, smoothed: Tensor, row_scale: Tensor, kind: Kind, group: int
) -> tuple[Tensor, Tensor, float]:
    """Codes (N, K/2) and scales (N, G) of `rest`, and the norm of what they miss.

    `rest` is overwritten with `smoothed` less the rounded numbers: what the next branch is to hold.
    """
    codes, scales, squares = [], [], 0.0
    blocks = (t.split(_ROWS_AT_ONCE) for t in (rest, smoothed, row_scale))
    for block, smoothed_block, row_scale_block in zip(*blocks, strict=True):
        grouped = block.unflatten(1, (-1, group))
        if kind == "int4":
            block_codes, block_scales, values = _round_int4(grouped)
        else:
            block_codes, block_scales, values = _round_fp4(grouped, row_scale_block)
        squares += float((grouped - values).square().sum())
        torch.sub(smoothed_block, values.flatten(1), out=block)
        flat = block_codes.flatten(1)
        codes.append(flat[:, 0::2] | flat[:, 1::2] << 4)
        scales.append(block_scales)
    return torch.cat(codes), torch.cat(scales), squares**0.5


def _round_int4(grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, G, group) float32 -> codes uint8, scales (N, G), and the numbers that these stand for."""
    scales = (grouped.abs().amax(dim=2) / _LARGEST_INT4).to(_STORED)
    scales[scales == 0] = 1  # a group of zeros
    steps = scales.float()[..., None]
    numbers = (grouped / steps).round_().clamp_(-_LARGEST_INT4, _LARGEST_INT4)
    return numbers.to(torch.int8).view(torch.uint8) & 15, scales, numbers * steps


def _round_fp4(grouped: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As _round_int4(); a group far below the largest gets the scale 0 and with it zeros."""
    largest = grouped.abs().amax(dim=2)
    scales = (largest / e2m1.MAX / row_scale).clamp_(max=_LARGEST_E4M3).to(torch.float8_e4m3fn)
    steps = (scales.float() * row_scale)[..., None]
    codes = e2m1.encode(torch.where(steps == 0, 0, grouped / steps))
    table = torch.tensor(e2m1.VALUES, device=grouped.device)
    return codes, scales, table[codes.int()] * steps
