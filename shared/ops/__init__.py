"""The element-wise work between matrix products: four operations, each in as few passes as its device allows.

    rms_norm_modulate   rms_norm(x) * weight * scale                         before attention and feed-forward
    gate_residual       x + gate * rms_norm(y) * weight                      after them
    qk_norm_rope        normalise and rotate queries and keys, lay out q, k, v as attention reads them
    swiglu              silu(first half) * second half

eager.py is what they mean, in torch, for every device and for gradients. A faster version for one kind of device is one
more module with the same four functions; `implementation()` is the only place that chooses. There are two: fused.py in
Triton for NVIDIA GPUs, compiled.py in numba for CPUs.

`scale` and `gate` are factors ready to be used (1 + adaLN's scale, tanh of its gate): they do not change while pixels
flow, so whoever holds the schedule works them out once.

exact: round where the reference implementation (diffusers 0.42.1) rounds, so that bfloat16 results are the same bits.
Without it an operation computes in float32 inside or folds factors together, and rounds once or twice instead of five
times. In float32 both agree to rounding.

Shape legend:  B batch   S tokens   D model width   H heads   E head width   F feed-forward width
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared.ops import compiled_ready, eager, triton_ready
from shared.ops.rounding import Kind, Rounded, Sums, round_rows


class Operations(Protocol):
    """A module with the four operations; what each does is said at the functions of the same names below."""

    def rms_norm_modulate(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = False
    ) -> Tensor: ...

    def gate_residual(
        self, x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, *, exact: bool = False
    ) -> Tensor: ...

    def qk_norm_rope(
        self, qkv: Tensor, qk_weight: Tensor, rope: Tensor, n_heads: int, eps: float, *, exact: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def swiglu(self, w13: Tensor) -> Tensor: ...


def implementation(x: Tensor) -> Operations:
    """The module whose functions serve tensors like x now, where no gradient is asked for: eager's anywhere else."""
    if torch.is_grad_enabled():
        return eager
    if x.is_cuda:
        return _on_gpu(x.device)
    return _on_cpu() if x.is_cpu else eager


@cache
def _on_gpu(device: torch.device) -> Operations:
    if triton_ready.why_not(device) is not None:
        return eager
    from shared.ops import fused

    return fused


@cache
def _on_cpu() -> Operations:
    if compiled_ready.why_not() is not None:
        return eager
    from shared.ops import compiled

    return compiled


def _serving(x: Tensor, factor: Tensor | None) -> Operations:
    """The same for a factor; one for each token, (1, S, D), as Omni's clean and noisy ones have, is eager's alone."""
    return eager if factor is not None and factor.shape[1] > 1 else implementation(x)


def rms_norm_modulate(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = False) -> Tensor:
    """rms_norm(x) * weight * scale over the last axis: (B, S, D), x's type.

    x: (B, S, D). weight: (D,). scale: (B or 1, 1, D) or None for 1.
    """
    return _serving(x, scale).rms_norm_modulate(x, weight, scale, eps, exact=exact)


def gate_residual(
    x: Tensor, y: Tensor | Sums, gate: Tensor | None, weight: Tensor, eps: float, *, exact: bool = False
) -> Tensor:
    """x + gate * rms_norm(y) * weight: (B, S, D), x's type; x itself is left as it is.

    x: (B, S, D) the residual stream. y: (B, S, D) what is added. gate: (B or 1, 1, D) or None for 1. weight: (D,).
    """
    serving: Any = _serving(x, gate)
    return serving.gate_residual(x, _as_read(y, serving), gate, weight, eps, exact=exact)  # type: ignore[no-any-return]


def qk_norm_rope(
    qkv: Tensor | Sums, qk_weight: Tensor, rope: Tensor, n_heads: int, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values as attention reads them, (B, H, S, E) each (strides are the device's choice).

    Of qkv's type, or float32 where attention is faster in it. qkv itself is used up: the results may be views of it,
    written over.
    qkv: (B, S, 3 * H * E), all queries first, then keys, then values. qk_weight: (2, E), the queries' head-wise RMS
    norm's weight and the keys'. rope: (B or 1, S, 1, E / 2, 2) float32, cosine and sine of each pair's angle, on a CPU
    also as complex numbers (B or 1, S, 1, E / 2); pairs are (x[2i], x[2i + 1]).
    """
    serving: Any = implementation(qkv.sums if isinstance(qkv, Sums) else qkv)
    answer: tuple[Tensor, Tensor, Tensor] = serving.qk_norm_rope(
        _as_read(qkv, serving), qk_weight, rope, n_heads, eps, exact=exact
    )
    return answer


def swiglu(w13: Tensor) -> Tensor:
    """silu(w13[..., :F]) * w13[..., F:]: (..., 2 F) -> (..., F)."""
    return implementation(w13).swiglu(w13)


# ------------------------------------------------------------------------ straight into the linear that comes next
#
# A linear whose kernel multiplies 8 bits says which in `takes(device)` (shared.quant.linear). What stands before it
# then rounds its result in the same pass, where it would be written, read, rounded, written and read otherwise. On a
# CPU the sums of such a product may come as they are, too (reads_sums()): scaling them is then part of the next pass.


def rms_norm_modulate_into(
    linear: nn.Module, x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, *, exact: bool = False
) -> Tensor | Rounded:
    """rms_norm_modulate(x, ...) as `linear` takes it: also of its weight's type, where x is a wider stream."""
    kind, serving = _taken_by(linear, x), _serving(x, scale)
    if serving is eager:
        normed = eager.rms_norm_modulate(x, weight, scale, eps, exact=exact, dtype=_type_of(linear, x))
        return normed if kind is None else round_rows(normed, kind)
    fast: Any = serving
    answer: Tensor | Rounded = fast.rms_norm_modulate(
        x, weight, scale, eps, exact=exact, rounding=kind, dtype=_type_of(linear, x)
    )
    return answer


def gate_residual_norm_into(
    linear: nn.Module, x: Tensor, y: Tensor | Sums, gate: Tensor | None, weight: Tensor, next_weight: Tensor,
    next_scale: Tensor | None, eps: float, *, exact: bool = False,
) -> tuple[Tensor, Tensor | Rounded]:  # fmt: skip
    """(gate_residual(x, y, gate, weight), rms_norm_modulate(of that, next_weight, next_scale) as `linear` takes it)."""
    if _serving(x, gate) is eager or _serving(x, next_scale) is eager:
        stream = gate_residual(x, y, gate, weight, eps, exact=exact)
        return stream, rms_norm_modulate_into(linear, stream, next_weight, next_scale, eps, exact=exact)
    fast: Any = implementation(x)
    answer: tuple[Tensor, Tensor | Rounded] = fast.gate_residual_norm(
        x, _as_read(y, fast), gate, weight, next_weight, next_scale, eps,
        exact=exact, rounding=_taken_by(linear, x), dtype=_type_of(linear, x),
    )  # fmt: skip
    return answer


def swiglu_into(linear: nn.Module, w13: Tensor | Sums, *, exact: bool = False) -> Tensor | Rounded:
    """swiglu(w13) as `linear` takes it. exact: on a CPU; the kernels of GPUs round as the reference does anyway."""
    plain = w13.sums if isinstance(w13, Sums) else w13
    kind, serving = _taken_by(linear, plain), implementation(plain)
    if exact and plain.is_cpu:
        serving = eager
    if serving is eager:
        opened = eager.swiglu(_as_read(w13, serving))
        return opened if kind is None else round_rows(opened, kind)
    fast: Any = serving
    answer: Tensor | Rounded = fast.swiglu(_as_read(w13, fast), rounding=kind)
    return answer


def reads_sums(x: Tensor | Rounded) -> bool:
    """Whether the operations behind a product of x take its sums before they are scaled."""
    plain = x.codes if isinstance(x, Rounded) else x
    return plain.is_cpu and implementation(plain) is not eager


def _as_read(x: Tensor | Sums, serving: Operations) -> Any:
    """x as the module reads it."""
    return x.restore() if isinstance(x, Sums) and serving is eager else x


def _taken_by(linear: nn.Module, x: Tensor) -> Kind | None:
    if type(linear) is nn.Linear:  # modules are slow to say what they lack
        return None
    takes: Callable[[torch.device], Kind | None] | None = getattr(linear, "takes", None)
    return None if takes is None else takes(x.device)


def _type_of(linear: nn.Module, x: Tensor) -> torch.dtype:
    weight = linear._parameters.get("weight")
    dtype: torch.dtype = getattr(linear, "weight", x).dtype if weight is None else weight.dtype
    return dtype


__all__ = [
    "Rounded", "Sums", "gate_residual", "gate_residual_norm_into", "implementation", "qk_norm_rope", "reads_sums",
    "rms_norm_modulate", "rms_norm_modulate_into", "round_rows", "swiglu", "swiglu_into",
]  # fmt: skip
