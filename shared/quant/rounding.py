"""Rounding that looks at the inputs: what one column of a weight misses is made up for by the columns after it.

Rounding W to W + E costs ||E X||^2 at the outputs, and inputs X that go together let errors cancel: where two columns
always see the same numbers, one rounded up and one rounded down cost nothing. So columns are rounded one by one, and
after each the best change of all others, still free, is added to them. In one sweep that is, for the inverse U^T U
of X X^T with U upper triangular,

    e_k = (w_k - rounded(w_k)) / U[k, k]          w_j -= e_k * U[k, j]   for the columns j after k

Columns with the largest inputs go first: those after them can still make up for them.
Paper: Frantar et al. 2022 (GPTQ), arXiv 2210.17323; it follows from LeCun et al. 1990 (Optimal Brain Damage).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A few hundred rows say little about how thousands of columns go together: what they say of pairs counts only so much,
# or the columns are fitted to the sample.
_TRUST_IN_PAIRS = 0.8
# Of the mean square: keeps columns that never saw anything from being free of cost.
_DAMPING = 0.05
_COLUMNS_AT_ONCE = 128  # their errors reach the columns beyond in one product


def round_with_feedback(weight: Tensor, rows: Tensor, nearest: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Numbers for `weight` (N, K) float32, each of which its format has, whose products with `rows` (n, K) are close.

    nearest(numbers (N, c), columns (c,)) -> the closest that the format has in these columns. Needs two copies of the
    weight and two matrices (K, K), float32. Returns (N, K).
    """
    order = rows.square().sum(dim=0).argsort(descending=True)
    rows = rows[:, order]
    matrix = (rows.t() @ rows).div_(len(rows))
    squares = matrix.diagonal().clone()
    matrix *= _TRUST_IN_PAIRS
    matrix.diagonal().copy_(squares + _DAMPING * squares.mean() + torch.finfo(torch.float32).tiny)
    # One name for all that it becomes: a matrix of 10240 columns takes 0.4 GB each time.
    matrix = torch.linalg.cholesky(matrix)
    matrix = torch.cholesky_inverse(matrix)
    factor = torch.linalg.cholesky(matrix, upper=True)
    del matrix
    left = weight[:, order]
    rounded = torch.empty_like(weight)
    for start in range(0, len(order), _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, len(order))
        missed = torch.empty(len(weight), stop - start, device=weight.device)
        for k in range(start, stop):
            found = nearest(left[:, k : k + 1], order[k : k + 1])
            rounded[:, order[k]] = found[:, 0]
            missed[:, k - start] = (left[:, k] - found[:, 0]) / factor[k, k]
            left[:, k + 1 : stop] -= missed[:, k - start, None] * factor[k, k + 1 : stop]
        left[:, stop:].addmm_(missed, factor[start:stop, stop:], alpha=-1)
    return rounded
