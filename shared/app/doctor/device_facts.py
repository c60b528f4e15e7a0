"""What follows from the device: number type, kernels, attention, and which preset to use."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shared.app.advice import advise
from shared.app.device import ATTENTION_PACKAGES, DeviceInfo, choose_attention, choose_dtype, detect
from shared.app.doctor.report import AttentionFacts, DeviceFacts, Report
from shared.app.kernel_report import kernel_choices
from shared.app.plan import choose_compute, requested_device
from shared.quant.errors import UserError

if TYPE_CHECKING:
    import torch

    from shared.app.context import AppContext


def look_at_device(ctx: AppContext, report: Report) -> Report:
    """The report with everything that depends on the device."""
    import torch

    device = detect(requested_device(ctx))
    dtype, dtype_reason = choose_dtype(device)
    dtype_name = str(dtype).removeprefix("torch.")
    kernels = tuple(kernel_choices(torch.device(device.kind), dtype, compute=choose_compute(ctx).value))
    # SVDQuant's INT4 and FP4 are one packing: a card that multiplies one of them does not take the other's files.
    expanding = {k.packing for k in kernels if k.expands} - {k.packing for k in kernels if k.kernel and not k.expands}
    return replace(
        report,
        device=DeviceFacts(
            kind=device.kind,
            name=device.name,
            capability="" if device.capability is None else f"{device.capability // 10}.{device.capability % 10}",
            memory=device.total_memory,
            reason=device.reason,
            dtype=dtype_name,
            dtype_reason=dtype_reason,
            between=_between(torch.device(device.kind)),
        ),
        kernels=kernels,
        attention=tuple(_attention(name, device) for name in ("auto", *ATTENTION_PACKAGES)),
        advice=advise(ctx, device, dtype_name, report.system.ram, expanding),
    )


def _between(device: torch.device) -> str:
    from shared.ops import compiled_ready, triton_ready

    fast, reason = (
        ("compiled by numba", compiled_ready.why_not())
        if device.type == "cpu"
        else ("fused by Triton", triton_ready.why_not(device))
    )
    return fast if reason is None else f"torch's own operations ({reason})"


def _attention(name: str, device: DeviceInfo) -> AttentionFacts:
    try:
        mode, reason = choose_attention(name, None, device)
    except UserError as error:
        return AttentionFacts(name, False, error.message.partition(": ")[2].rstrip(".") or error.message)
    return AttentionFacts(name, True, f"{mode}: {reason}" if name == "auto" else "usable")
