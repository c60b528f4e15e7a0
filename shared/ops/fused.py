"""The four operations by Triton: the same functions as eager.py, each one pass over the memory, and three more.

    gate_residual_norm   gate_residual and the next rms_norm_modulate in one: the stream is not read again
    round_rows           tokens in 8 bits (rounding.py)
    rounding=...         rms_norm_modulate, gate_residual_norm, swiglu hand the next linear its 8 bits at once

For inference: results have no gradient. Activations of 16 or 32 bits; launch sizes come from tuning.py.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from shared.ops import eager, tuning
from shared.ops import triton_kernels as kernels
from shared.ops.rounding import CODES, Kind, Rounded
from shared.ops.rounding import round_rows as eager_round_rows
from shared.ops.triton_ready import capability, interpreted

_EPS = 1e-5
_LARGEST_ERROR = 0.02  # rounding to bfloat16 once more or less makes 0.3 %, to neighbouring int8 codes 0.5 %

_ROUND: dict[Kind | None, int] = {None: 0, "int8": 1, "fp8": 3 if interpreted() else 2}  # as in triton_kernels.py


@overload
def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = ..., rounding: None = ...,
    dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = ..., rounding: Kind,
    dtype: torch.dtype | None = ...,
) -> Rounded: ...  # fmt: skip
def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = False, rounding: Kind | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | Rounded:  # fmt: skip
    """See shared.ops. rounding: give the result in 8 bits instead, rounded from what it would have been.

    dtype: of the result on a CPU, where streams may be wider; here it is x's.
    """
    flat = _rows(x)
    tokens, columns = flat.shape
    out, codes_scale = _result(x, rounding)
    per_item, scale_stride = _per_item(scale, x)
    kernels.rms_norm_modulate[(tokens,)](
        flat, weight, weight if scale is None else scale, out, codes_scale,
        per_item, columns, eps, flat.stride(0), scale_stride,
        HAS_SCALE=scale is not None, EXACT=exact, ROUND=_ROUND[rounding], **_row_launch(x, columns),
    )  # fmt: skip
    return out if rounding is None else Rounded(out, codes_scale, x.dtype)


def gate_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, *, exact: bool = False
) -> Tensor:
    """See shared.ops."""
    stream, added = _rows(x), _rows(y)
    tokens, columns = stream.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    per_item, gate_stride = _per_item(gate, x)
    kernels.gate_residual[(tokens,)](
        stream, added, weight if gate is None else gate, weight, out,
        per_item, columns, eps, stream.stride(0), added.stride(0), gate_stride,
        HAS_GATE=gate is not None, EXACT=exact, **_row_launch(x, columns),
    )  # fmt: skip
    return out


def gate_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, next_weight: Tensor, next_scale: Tensor | None,
    eps: float, *, exact: bool = False, rounding: Kind | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | Rounded]:  # fmt: skip
    """gate_residual(x, y, gate, weight), and rms_norm_modulate(of it, next_weight, next_scale), as if one by one."""
    stream, added = _rows(x), _rows(y)
    tokens, columns = stream.shape
    kept = torch.empty_like(x, memory_format=torch.contiguous_format)
    out, codes_scale = _result(x, rounding)
    per_item, gate_stride = _per_item(gate, x)
    _, scale_stride = _per_item(next_scale, x)
    kernels.gate_residual_norm[(tokens,)](
        stream, added, weight if gate is None else gate, weight, next_weight,
        next_weight if next_scale is None else next_scale, kept, out, codes_scale,
        per_item, columns, eps, stream.stride(0), added.stride(0), gate_stride, scale_stride,
        HAS_GATE=gate is not None, HAS_SCALE=next_scale is not None, EXACT=exact, ROUND=_ROUND[rounding],
        **_row_launch(x, columns),
    )  # fmt: skip
    return kept, out if rounding is None else Rounded(out, codes_scale, x.dtype)


def qk_norm_rope(
    qkv: Tensor, qk_weight: Tensor, rope: Tensor, n_heads: int, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See shared.ops. Written over qkv, of which all three are views: nothing is copied."""
    batch, length, _ = qkv.shape
    width = qk_weight.shape[1]
    if width & (width - 1) or width < 16:  # a head is one row of a power of two
        return eager.qk_norm_rope(qkv, qk_weight, rope, n_heads, eps, exact=exact)
    qkv, angles = qkv.contiguous(), rope.contiguous()
    heads = _power_of_two(n_heads)
    kernels.qk_norm_rope[(batch * length, 2)](
        qkv, qk_weight[0], qk_weight[1], angles,
        length, n_heads, eps, 0 if len(angles) == 1 else angles.stride(0), angles.stride(1),
        EXACT=exact, HEADS=heads, HEAD_WIDTH=width,
        **tuning.launch("row", capability(qkv.device), heads * width),
    )  # fmt: skip
    q, k, v = qkv.view(batch, length, 3, n_heads, width).unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@overload
def swiglu(w13: Tensor, *, rounding: None = ...) -> Tensor: ...
@overload
def swiglu(w13: Tensor, *, rounding: Kind) -> Rounded: ...
def swiglu(w13: Tensor, *, rounding: Kind | None = None) -> Tensor | Rounded:
    """See shared.ops. rounding: as in rms_norm_modulate."""
    w13 = w13.contiguous()
    columns = w13.shape[-1] // 2
    tokens = w13.numel() // (2 * columns)
    shape = (*w13.shape[:-1], columns)
    if rounding is None:
        out = torch.empty(shape, dtype=w13.dtype, device=w13.device)
        launch = tuning.launch("stretch", capability(w13.device), columns)
        width = launch.pop("WIDTH")
        grid = (tokens, -(-columns // width))
        kernels.swiglu[grid](w13, out, columns, WIDTH=width, **launch)
        return out
    codes = torch.empty(shape, dtype=CODES[rounding], device=w13.device)
    codes_scale = torch.empty(tokens, 1, dtype=torch.float32, device=w13.device)
    kernels.swiglu_rounded[(tokens,)](
        w13, codes, codes_scale, columns, ROUND=_ROUND[rounding], **_row_launch(w13, columns)
    )
    return Rounded(codes, codes_scale, w13.dtype)


def round_rows(x: Tensor, kind: Kind, smooth: Tensor | None = None) -> Rounded:
    """The tokens of x (..., K), divided by smooth (K,) where there is one, in 8 bits."""
    flat = _rows(x)
    tokens, columns = flat.shape
    codes, codes_scale = _result(x, kind)
    kernels.round_rows[(tokens,)](
        flat, flat if smooth is None else smooth, codes, codes_scale, columns, flat.stride(0),
        HAS_SMOOTH=smooth is not None, ROUND=_ROUND[kind], **_row_launch(x, columns),
    )  # fmt: skip
    return Rounded(codes, codes_scale, x.dtype)


def wrong_operations(device: torch.device) -> list[str]:
    """The operations whose numbers differ from eager.py's on `device`, by name; none as a rule.

    Of the published network's sizes, so that what is compiled here is what the first picture needs.
    """
    heads, width, hidden = 30, 128, 10240
    generator = torch.Generator("cpu").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        # "cpu" said aloud: an offloader may have made the GPU torch's default.
        return torch.randn(*shape, generator=generator, device="cpu").to(device, torch.bfloat16)

    x, y, qkv, w13 = (numbers(1, 8, columns) for columns in (heads * width,) * 2 + (3 * heads * width, 2 * hidden))
    weight, factor, heads_weight = numbers(heads * width), numbers(1, 1, heads * width), numbers(2, width)
    angles = numbers(1, 8, 1, width // 2).float()
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
    rounded = eager_round_rows(x, "int8")
    pairs = {
        "rms_norm_modulate": (rms_norm_modulate(x, weight, None, _EPS), eager.rms_norm_modulate(x, weight, None, _EPS)),
        "gate_residual": (gate_residual(x, y, factor, weight, _EPS), eager.gate_residual(x, y, factor, weight, _EPS)),
        "swiglu": (swiglu(w13), eager.swiglu(w13)),
        "round_rows": (round_rows(x, "int8").restore(), rounded.restore()),
        "qk_norm_rope": (
            qk_norm_rope(qkv.clone(), heads_weight, rope, heads, _EPS)[0],
            eager.qk_norm_rope(qkv.clone(), heads_weight, rope, heads, _EPS)[0],
        ),
    }
    return [
        name
        for name, (got, expected) in pairs.items()
        if not float((got.float() - expected.float()).norm() / expected.float().norm()) <= _LARGEST_ERROR  # NaN too
    ]


def _rows(x: Tensor) -> Tensor:
    """x (..., K) as tokens (T, K), without a copy where its memory allows."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _result(x: Tensor, rounding: Kind | None) -> tuple[Tensor, Tensor]:
    """Memory for a result in x's shape, and for the scales of its tokens."""
    if rounding is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return out, out  # a kernel that does not round never touches its last pointer
    codes = torch.empty(x.shape, dtype=CODES[rounding], device=x.device)
    return codes, torch.empty(x.numel() // x.shape[-1], 1, dtype=torch.float32, device=x.device)


def _per_item(factors: Tensor | None, x: Tensor) -> tuple[int, int]:
    """Tokens of one item of x (B, S, D), and the distance between the rows of `factors` (B or 1, 1, D): 0 for one."""
    tokens = x.numel() // x.shape[-1]
    per_item = tokens // len(x) if x.dim() == 3 else tokens
    single = factors is None or factors.numel() == factors.shape[-1]
    return per_item, 0 if single or factors is None else factors.stride(0)


def _row_launch(x: Tensor, columns: int) -> dict[str, Any]:
    width = _power_of_two(columns)
    return {"WIDTH": width, **tuning.launch("row", capability(x.device), width)}


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
