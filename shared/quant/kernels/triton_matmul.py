"""Products of 8-bit matrices by Triton, with everything that follows them done before the result is written.

    out = (a codes^T) * a_scale * scale  +  left right^T  +  bias

T tokens, N rows, K columns, R rank. a (T, K) and codes (N, K) are both int8, summed exactly in 32 bits, or both E4M3,
summed in float32. left (T, R) and right (N, R) are the low-rank branch of SVDQuant, in the activations' type.

A program makes a tile of BLOCK_M x BLOCK_N results. Tiles are numbered down GROUP_M rows of them before the next
column is begun, so that programs that run together share what they read in the L2 cache. scaled_matmul() below launches
it; tile sizes come from shared/ops/tuning.json.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from shared.ops import tuning
from shared.ops.rounding import Rounded
from shared.ops.triton_ready import capability, interpreted

_RANK_BLOCK = 32  # columns of the low-rank branch that are multiplied at once; ranks are multiples of 16


@triton.jit
def _scaled_matmul(
    a, codes, a_scale, scale, left, right, bias, out,
    tokens, rows, columns, rank, left_stride, right_stride,
    WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BRANCH: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """WHOLE: the codes are integers. EVEN: columns is a multiple of BLOCK_K. a, codes and out have no gaps.

    WIDEN: multiply the branch in float32, for the interpreter, which cannot multiply bfloat16.
    """
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(rows, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    tall = tl.minimum(tiles_m - first, GROUP_M)
    tile_m = first + program % (GROUP_M * tiles_n) % tall
    tile_n = program % (GROUP_M * tiles_n) // tall

    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    # Beyond the edge the last token and row are read again, which needs no mask in the loop; nobody writes them.
    a_at = a + tl.minimum(m, tokens - 1)[:, None] * columns + k[None, :]
    b_at = codes + tl.minimum(n, rows - 1)[None, :] * columns + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if WHOLE else tl.float32)
    for done in range(0, columns, BLOCK_K):
        if EVEN:
            a_tile, b_tile = tl.load(a_at), tl.load(b_at)
        else:
            inside = k < columns - done
            a_tile = tl.load(a_at, mask=inside[None, :], other=0.0)
            b_tile = tl.load(b_at, mask=inside[:, None], other=0.0)
        total = tl.dot(a_tile, b_tile, total, out_dtype=tl.int32 if WHOLE else tl.float32)
        a_at += BLOCK_K
        b_at += BLOCK_K

    there_m, there_n = m < tokens, n < rows
    result = total.to(tl.float32) * tl.load(a_scale + m, mask=there_m, other=0.0)[:, None]
    result = result * tl.load(scale + n, mask=there_n, other=0.0)[None, :]
    if HAS_BRANCH:
        r = tl.arange(0, BLOCK_R)
        for done in range(0, rank, BLOCK_R):
            inside = r < rank - done
            l_tile = tl.load(
                left + m[:, None] * left_stride + done + r[None, :], mask=there_m[:, None] & inside[None, :], other=0.0
            )
            r_tile = tl.load(
                right + n[None, :] * right_stride + done + r[:, None], mask=there_n[None, :] & inside[:, None],
                other=0.0,
            )  # fmt: skip
            if WIDEN:
                l_tile, r_tile = l_tile.to(tl.float32), r_tile.to(tl.float32)
            result = tl.dot(l_tile, r_tile, result)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=there_n, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * rows + n[None, :], result.to(out.dtype.element_ty), mask=there_m[:, None] & there_n)


def scaled_matmul(
    a: Rounded,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    branch: tuple[Tensor, Tensor] | None = None,
    *,
    launch: tuning.Launch | None = None,
) -> Tensor:
    """The product above: (..., N) in a.dtype.

    codes: (N, K) int8 or float8_e4m3fn as a's are. scale: (N, 1) float32. bias: (N,). branch: left (T, R), right (N, R)
    in a.dtype. launch: other options than the table's.
    """
    rows, columns = codes.shape
    tokens = len(a.scale)
    out = torch.empty(*a.codes.shape[:-1], rows, dtype=a.dtype, device=codes.device)
    launch = launch or tuning.launch(f"{a.kind} matmul", capability(codes.device), tokens)
    left, right = (out, out) if branch is None else (part if part.stride(1) == 1 else part.contiguous()
                                                     for part in branch)  # fmt: skip
    grid = (-(-tokens // launch["BLOCK_M"]) * -(-rows // launch["BLOCK_N"]),)
    _scaled_matmul[grid](
        a.codes, codes, a.scale, scale, left, right, out if bias is None else bias, out,
        tokens, rows, columns, 0 if branch is None else right.shape[1], left.stride(0), right.stride(0),
        WHOLE=a.kind == "int8", HAS_BIAS=bias is not None, HAS_BRANCH=branch is not None,
        EVEN=columns % launch["BLOCK_K"] == 0, WIDEN=interpreted(), BLOCK_R=_RANK_BLOCK, **launch,
    )  # fmt: skip
    return out
