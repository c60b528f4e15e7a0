"""SVDQuant of a weight: find the codes, scales and low-rank branch of packings/svdq.py that come nearest to it.

    smoothed weight S = W * smooth;  S ~ Q * scales + up @ down * smooth

Taking the branch first (the largest singular directions of S) and rounding what is left is not the best pair: rounding
leaves an error that has large directions of its own. So both are found in turns, the branch for S less the rounded
part, then the rounded part for S less the branch, and the best pair is kept. Everything is rounded to the stored types
before the other half is fitted to it, so that their rounding errors are made up for.

With inputs of the layer at hand (inputs.py) the smoothing is searched for, and the rounding may look at how inputs go
together (rounding.py). Weighing the branch by the size of the smoothed inputs was tried and did not help.

Paper: Li et al. 2024, arXiv 2411.05007; the turns as in LoftQ, Li et al. 2023, arXiv 2310.08659.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shared.quant import e2m1
from shared.quant.inputs import Inputs
from shared.quant.packings.svdq import Kind, Svdq
from shared.quant.rounding import round_with_feedback

_STORED = torch.bfloat16
_LARGEST_INT4 = 7  # -8 is left out: the range is even on both sides
_LARGEST_E4M3 = 448.0
# Columns beyond the rank that the search for singular directions carries along, and its rounds when it starts afresh.
_OVERSAMPLING = 16
_FIRST_ROUNDS = 4
# What a smoothing is tried on: so many rows of the weight, and rows of inputs.
_SEARCHED_ROWS = 2048
_SEARCHED_INPUTS = 256
_POWERS = (0.25, 0.5, 0.75, 1.0)
# Sizes of inputs count as at least this part of the largest.
_LEAST_SIZE = 1e-4
_TINY = 1e-12  # for a layer whose inputs are all zero
_ROWS_AT_ONCE = 1024  # rounded together: the intermediate results of a whole matrix would take gigabytes


def fit(
    weight: Tensor,
    *,
    kind: Kind,
    rank: int,
    group: int,
    smooth: Tensor | None,
    iterations: int,
    parts: int,
    inputs: Inputs | None = None,
    learned_rounding: bool = False,
) -> dict[str, Tensor]:
    """The tensors of packings/svdq.py for `weight` (N, K), floats in bfloat16.

    smooth: (K,) positive, by which activations will be divided; None: found by search where there are inputs, else
    none. iterations: turns after the first pair. parts: matrices stacked in `weight`, N / parts rows each; in fp4 each
    has its own scale beside those of the groups. learned_rounding: see rounding.py; needs inputs.
    Needs two float32 copies of `weight` and a little more, two more for learned rounding.
    """
    columns = weight.shape[1]
    if smooth is None and inputs is not None:
        smooth = find_smoothing(weight, inputs, kind=kind, rank=rank, group=group)
    smooth = torch.ones(columns, device=weight.device) if smooth is None else smooth
    smooth = smooth.to(weight.device, _STORED)
    smoothed = weight.float() * smooth.float()
    rest = smoothed.clone()
    basis = None
    best: dict[str, Tensor] = {}
    smallest = float("inf")
    for _ in range(iterations + 1):
        up, down, basis = largest_directions(rest, rank, basis)
        up, down = up.to(_STORED), (down / smooth.float()).to(_STORED)
        torch.addmm(smoothed, up.float(), down.float() * smooth.float(), alpha=-1, out=rest)
        row_scale = _row_scale(rest, kind, parts)
        codes, scales, error = _round_to(rest, smoothed, row_scale, kind, group)
        if error < smallest:
            smallest = error
            best = {"codes": codes, "scales": scales, "row_scale": row_scale, "smooth": smooth, "down": down, "up": up}
    if learned_rounding and inputs is not None:
        del rest
        best["codes"] = _learned_codes(smoothed, best, kind, inputs)
    return best


def find_smoothing(weight: Tensor, inputs: Inputs, *, kind: Kind, rank: int, group: int) -> Tensor:
    """The smoothing (K,) whose outputs are nearest to those of `weight` (N, K), among powers of the inputs' size.

    Judged by the sum of two squared errors: of the rounded weight alone, as computed where there are no 4-bit tensor
    cores, and with the activations rounded to 4 bits as well, as there. Both gain from smoothing, the second more.
    """
    step = -(-len(weight) // _SEARCHED_ROWS)
    part = weight[::step].float()
    rows = inputs.fitting.to(weight.device)[:_SEARCHED_INPUTS]
    errors = []
    for smooth in (candidates := list(_smoothings(inputs))):
        tensors = fit(part, kind=kind, rank=rank, group=group, smooth=smooth, iterations=0, parts=1)
        errors.append(_output_errors(part, tensors, rows, kind, group))
    return candidates[errors.index(min(errors))]


def _smoothings(inputs: Inputs) -> Iterator[Tensor]:
    """None at all first: of equal errors the first one counts."""
    yield torch.ones_like(inputs.rms)
    for size in (inputs.rms, inputs.peak):
        for power in _POWERS:
            # Columns that saw next to nothing would ask for a smoothing of zero.
            smooth = size.clamp(min=max(float(size.max()) * _LEAST_SIZE, _TINY)).pow(power)
            yield smooth / smooth.log().mean().exp()


def _output_errors(weight: Tensor, tensors: dict[str, Tensor], rows: Tensor, kind: Kind, group: int) -> float:
    """Squared errors of the outputs of rows (n, K), with the rows as they are and rounded to 4 bits, summed."""
    rest = Svdq(kind).residual(tensors, torch.float32)
    smooth, down, up = (tensors[name].float() for name in ("smooth", "down", "up"))
    smoothed_rows = rows / smooth
    wanted = rows @ weight.t() - rows @ down.t() @ up.t()
    grouped = smoothed_rows.unflatten(1, (-1, group))
    ones = torch.ones(len(rows), 1, device=rows.device)
    values = _round_int4(grouped)[2] if kind == "int4" else _round_fp4(grouped, ones)[2]
    alone = (smoothed_rows @ rest.t() - wanted).square().sum()
    return float(alone + (values.flatten(1) @ rest.t() - wanted).square().sum())


def _learned_codes(smoothed: Tensor, tensors: dict[str, Tensor], kind: Kind, inputs: Inputs) -> Tensor:
    """Codes (N, K/2) of the smoothed weight less the branch, for the scales there are, rounded with feedback."""
    smooth = tensors["smooth"].float()
    rest = torch.addmm(smoothed, tensors["up"].float(), tensors["down"].float() * smooth, alpha=-1)
    steps = tensors["scales"].float() * tensors["row_scale"]
    group = rest.shape[1] // steps.shape[1]

    def nearest(numbers: Tensor, columns: Tensor) -> Tensor:
        step = steps[:, columns // group]
        return _numbers(_codes(numbers, step, kind), kind) * step

    rounded = round_with_feedback(rest, inputs.fitting.to(rest.device) / smooth, nearest)
    codes = [
        _codes(rows, some.repeat_interleave(group, dim=1), kind)
        for rows, some in zip(rounded.split(_ROWS_AT_ONCE), steps.split(_ROWS_AT_ONCE), strict=True)
    ]
    flat = torch.cat(codes)
    return flat[:, 0::2] | flat[:, 1::2] << 4


def _codes(numbers: Tensor, steps: Tensor, kind: Kind) -> Tensor:
    """The nearest codes (uint8, 0 to 15) to numbers in units of `steps`; a step of 0 has zeros only."""
    scaled = torch.where(steps == 0, 0, numbers / steps)
    if kind == "fp4":
        return e2m1.encode(scaled)
    return scaled.round().clamp(-_LARGEST_INT4, _LARGEST_INT4).to(torch.int8).view(torch.uint8) & 15


def _numbers(codes: Tensor, kind: Kind) -> Tensor:
    """What codes (0 to 15) stand for, float32."""
    if kind == "fp4":
        return torch.tensor(e2m1.VALUES, device=codes.device)[codes.int()]
    return torch.where(codes > 7, codes.int() - 16, codes.int()).float()


def largest_directions(matrix: Tensor, rank: int, basis: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
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
