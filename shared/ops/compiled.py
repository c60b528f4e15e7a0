"""The four operations on a CPU, one pass over the activations each: what compiled_kernels.py's loops are called with.

What they take in eager.py's place: tensors that lie row after row in float32 or bfloat16, or sums of int8 products as
they come from the multiplication; factors that are folded into float32 weights. Anything else goes to eager.py, and so
does whatever keeps the reference's rounding. They may hand on codes for the next int8 product.

Where torch computes with several threads, so do these, for rows enough to be worth it: compiled code holds no lock.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor

from shared.ops import compiled_kernels as kernels
from shared.ops import eager
from shared.ops.rounding import Kind, Rounded, Sums
from shared.ops.rounding import round_rows as eager_round_rows

_KINDS = {torch.float32: kernels.FLOAT32, torch.bfloat16: kernels.BFLOAT16}
_EACH = 2**16  # numbers that a thread is to have at least: in less time than these take, none is woken

_EPS = 1e-5
_LARGEST_ERROR = 0.02  # rounding to bfloat16 once more or less makes 0.3 %, to neighbouring int8 codes 0.5 %


@overload
def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = ..., rounding: None = ...,
    dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = ..., rounding: Kind | None,
    dtype: torch.dtype | None = ...,
) -> Tensor | Rounded: ...  # fmt: skip
def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = False,
    rounding: Kind | None = None, dtype: torch.dtype | None = None,
) -> Tensor | Rounded:  # fmt: skip
    """See shared.ops. rounding: give the result in 8 bits instead. dtype: of the result, None for x's."""
    dtype = dtype or x.dtype
    if exact or scale is not None or not _serves(x, weight, rounding, dtype):
        normed = eager.rms_norm_modulate(x, weight, scale, eps, exact=exact, dtype=dtype)
        return normed if rounding is None else eager_round_rows(normed, rounding)
    columns = x.shape[-1]
    out, out_kind, scales = _result(x.shape, dtype, rounding)
    over_rows(
        kernels.norm, x.numel() // columns, columns, x.data_ptr(), _KINDS[x.dtype], weight.data_ptr(),
        out.data_ptr(), out_kind, scales.data_ptr(), eps,
    )  # fmt: skip
    return out if rounding is None else Rounded(out, scales, dtype)


def gate_residual(
    x: Tensor, y: Tensor | Sums, gate: Tensor | None, weight: Tensor, eps: float, *, exact: bool = False
) -> Tensor:
    """See shared.ops."""
    if exact or gate is not None or not (_serves(x, weight, None, x.dtype) and _is_read(y)):
        return eager.gate_residual(x, _numbers(y), gate, weight, eps, exact=exact)
    columns = x.shape[-1]
    kept = torch.empty_like(x)
    over_rows(
        kernels.gate_residual_norm, x.numel() // columns, columns, x.data_ptr(), _KINDS[x.dtype], *_source(y),
        weight.data_ptr(), kept.data_ptr(), 0, 0, 0, 0, eps,
    )  # fmt: skip
    return kept


def gate_residual_norm(
    x: Tensor, y: Tensor | Sums, gate: Tensor | None, weight: Tensor, next_weight: Tensor, next_scale: Tensor | None,
    eps: float, *, exact: bool = False, rounding: Kind | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | Rounded]:  # fmt: skip
    """gate_residual(x, y, gate, weight), and rms_norm_modulate(of it, next_weight, next_scale), in one pass."""
    dtype = dtype or x.dtype
    factors = gate is not None or next_scale is not None
    if exact or factors or not (
        _serves(x, weight, rounding, dtype) and _serves(x, next_weight, rounding, dtype) and _is_read(y)
    ):  # fmt: skip
        stream = gate_residual(x, y, gate, weight, eps, exact=exact)
        return stream, rms_norm_modulate(
            stream, next_weight, next_scale, eps, exact=exact, rounding=rounding, dtype=dtype
        )
    columns = x.shape[-1]
    kept = torch.empty_like(x)
    out, out_kind, scales = _result(x.shape, dtype, rounding)
    over_rows(
        kernels.gate_residual_norm, x.numel() // columns, columns, x.data_ptr(), _KINDS[x.dtype], *_source(y),
        weight.data_ptr(), kept.data_ptr(), next_weight.data_ptr(), out.data_ptr(), out_kind, scales.data_ptr(), eps,
    )  # fmt: skip
    return kept, out if rounding is None else Rounded(out, scales, dtype)


def qk_norm_rope(
    qkv: Tensor | Sums, qk_weight: Tensor, rope: Tensor, n_heads: int, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See shared.ops. The results are parts of one new tensor; short ones in float32 as eager's, and token by token, as
    attention's result is to lie, which follows them."""
    weight_is_read = qk_weight.dtype == torch.float32 and qk_weight.is_contiguous()
    if exact or not (weight_is_read and _is_read(qkv) and rope.is_complex() and _lies_row_by_row(rope)):
        return eager.qk_norm_rope(_numbers(qkv), qk_weight, rope, n_heads, eps, exact=exact)
    batch, tokens, _ = qkv.shape
    width = qk_weight.shape[1]
    assert rope.shape[1] == tokens  # loops would read past its end
    assert len(rope) in (1, batch)
    is_short = tokens < eager.SHORT
    dtype = torch.float32 if is_short else qkv.dtype
    out = torch.empty(3, batch, *((tokens, n_heads) if is_short else (n_heads, tokens)), width, dtype=dtype)
    over_rows(
        kernels.qk_norm_rope, batch * tokens, n_heads, width, tokens, batch, *_source(qkv), qk_weight.data_ptr(),
        rope.data_ptr(), len(rope), out.data_ptr(), _KINDS[dtype], is_short, eps, numbers=qkv.shape[-1],
    )  # fmt: skip
    q, k, v = (out.transpose(2, 3) if is_short else out).unbind()
    return q, k, v


@overload
def swiglu(w13: Tensor | Sums, *, rounding: None = ...) -> Tensor: ...
@overload
def swiglu(w13: Tensor | Sums, *, rounding: Kind | None) -> Tensor | Rounded: ...
def swiglu(w13: Tensor | Sums, *, rounding: Kind | None = None) -> Tensor | Rounded:
    """See shared.ops. rounding: as in rms_norm_modulate."""
    if rounding == "fp8" or not _is_read(w13):
        opened = eager.swiglu(_numbers(w13))
        return opened if rounding is None else eager_round_rows(opened, rounding)
    columns = w13.shape[-1] // 2
    shape = torch.Size((*w13.shape[:-1], columns))
    out, out_kind, scales = _result(shape, w13.dtype, rounding)
    over_rows(
        kernels.swiglu, shape.numel() // columns, columns, *_source(w13), out.data_ptr(), out_kind, scales.data_ptr(),
        numbers=2 * columns,
    )  # fmt: skip
    return out if rounding is None else Rounded(out, scales, w13.dtype)


def round_rows(x: Tensor, factor: Tensor | None = None) -> Rounded:
    """The tokens of x (..., K), times factor (K,) float32 where there is one, as int8 codes."""
    if not (_is_read(x) and (factor is None or (factor.dtype == torch.float32 and factor.is_contiguous()))):
        return eager_round_rows(x if factor is None else x * factor, "int8")
    columns = x.shape[-1]
    codes, kind, scales = _result(x.shape, x.dtype, "int8")
    over_rows(
        kernels.convert, x.numel() // columns, columns, x.data_ptr(), _KINDS[x.dtype], 0,
        0 if factor is None else factor.data_ptr(), codes.data_ptr(), kind, scales.data_ptr(),
    )  # fmt: skip
    return Rounded(codes, scales, x.dtype)


def scaled(sums: Sums) -> Tensor:
    """The numbers (..., N) that sums stand for."""
    if not (_is_read(sums) and sums.dtype in _KINDS):
        return sums.restore()
    tokens, columns = sums.sums.shape
    out, kind, scales = _result(sums.shape, sums.dtype, None)
    over_rows(kernels.convert, tokens, columns, *_source(sums), out.data_ptr(), kind, scales.data_ptr())
    return out


def wrong_operations() -> list[str]:
    """The operations whose numbers differ from eager.py's on this processor, by name; none as a rule."""
    generator = torch.Generator("cpu").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    heads, width, tokens = 2, 32, 5
    columns = heads * width
    x, y, weight = numbers(1, tokens, columns), numbers(1, tokens, columns).bfloat16(), numbers(columns)
    qkv, w13, heads_weight = numbers(1, tokens, 3 * columns), numbers(1, tokens, 2 * columns), numbers(2, width)
    angles = numbers(1, tokens, 1, width // 2)
    rope = torch.polar(torch.ones_like(angles), angles)
    whole = torch.randint(-9999, 9999, (tokens, columns), generator=generator, dtype=torch.int32, device="cpu")
    sums = Sums(whole, numbers(tokens, 1), numbers(columns, 1), x.shape, torch.float32)
    with torch.no_grad():
        stream = eager.gate_residual(x, y, None, weight, _EPS)
        kept, normed = gate_residual_norm(x, y, None, weight, weight, None, _EPS)
        pairs: dict[str, tuple[Any, Tensor]] = {
            "rms_norm_modulate": (
                rms_norm_modulate(x, weight, None, _EPS), eager.rms_norm_modulate(x, weight, None, _EPS),
            ),
            "gate_residual": (kept, stream),
            "gate_residual_norm": (normed, eager.rms_norm_modulate(stream, weight, None, _EPS)),
            "qk_norm_rope": (
                qk_norm_rope(qkv, heads_weight, rope, heads, _EPS)[0],
                eager.qk_norm_rope(qkv.clone(), heads_weight, rope, heads, _EPS)[0],
            ),
            "swiglu": (swiglu(w13), eager.swiglu(w13)),
            "round_rows": (round_rows(x).restore(), x),
            "scaled": (scaled(sums), sums.restore()),
        }  # fmt: skip
        return [
            name
            for name, (got, expected) in pairs.items()
            if not float((got - expected).norm() / expected.norm()) <= _LARGEST_ERROR  # NaN too
        ]


def over_rows(kernel: Callable[..., None], rows: int, *arguments: Any, numbers: int = 0) -> None:
    """kernel(first, last, *arguments) for all rows, by as many threads as torch uses.

    numbers: in a row; 0 for the first of the arguments.
    """
    most = torch.get_num_threads()
    threads = min(most, rows * (numbers or arguments[0]) // _EACH)
    if threads < 2:
        kernel(0, rows, *arguments)
        return
    step = -(-rows // threads)
    others = [
        _pool(most - 1).submit(kernel, first, min(first + step, rows), *arguments) for first in range(step, rows, step)
    ]
    kernel(0, step, *arguments)
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


def kind_of(out: Tensor) -> int:
    """The kind that kernels write to this tensor."""
    return kernels.CODES if out.dtype == torch.int8 else _KINDS[out.dtype]


def _result(shape: torch.Size, dtype: torch.dtype, rounding: Kind | None) -> tuple[Tensor, int, Tensor]:
    """Memory for a result, its kind, and memory for its rows' scales (of numbers: something, never touched)."""
    if rounding is None:
        out = torch.empty(shape, dtype=dtype)
        return out, _KINDS[dtype], out
    codes = torch.empty(shape, dtype=torch.int8)
    return codes, kernels.CODES, torch.empty(shape.numel() // shape[-1], 1, dtype=torch.float32)


def _source(x: Tensor | Sums) -> tuple[int, int, int, int]:
    """Address, kind, addresses of the rows' factors and of the columns'."""
    if isinstance(x, Sums):
        return x.sums.data_ptr(), kernels.SUMS, x.row.data_ptr(), x.column.data_ptr()
    return x.data_ptr(), _KINDS[x.dtype], 0, 0


def _serves(x: Tensor, weight: Tensor, rounding: Kind | None, dtype: torch.dtype) -> bool:
    return (
        _is_read(x)
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and rounding != "fp8"
        and dtype in _KINDS
    )


def _is_read(x: Tensor | Sums) -> bool:
    if isinstance(x, Sums):
        return x.sums.is_contiguous() and x.row.is_contiguous() and x.column.is_contiguous()
    # A stand-in of a mode that only works out shapes has no memory.
    return type(x) is Tensor and x.dtype in _KINDS and x.is_contiguous()


def _lies_row_by_row(rope: Tensor) -> bool:
    return rope.dtype == torch.complex64 and rope.is_contiguous()


def _numbers(x: Tensor | Sums) -> Tensor:
    return x.restore() if isinstance(x, Sums) else x
