"""`wgp.py doctor --tune`: find the fastest launch options of this GPU's kernels, once, and keep them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shared.quant.errors import RunError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared.quant.kernels.tune import Found


def tune(args: argparse.Namespace) -> int:
    """Measure, telling each entry on stderr, and write. Raises UserError where no kernel can run."""
    import torch

    from shared.ops import triton_ready, tuning
    from shared.quant.kernels.tune import BUDGET_SECONDS, as_entries, entries_for, search, seconds_on

    device = torch.device("cuda")
    reason = triton_ready.why_not(device) if torch.cuda.is_available() else "there is no NVIDIA GPU that torch can use"
    if reason is not None:
        raise UserError(f"Nothing can be tuned: {reason}.", "Only Triton's kernels on NVIDIA GPUs are.")
    name, capability = torch.cuda.get_device_name(device), triton_ready.capability(device)
    if args.verbose:
        print(f"Measuring kernels on {name}, {BUDGET_SECONDS:.0f} s at most ...", file=sys.stderr)
    found = []
    with torch.inference_mode():
        for one in search(entries_for(device, capability), seconds_on(device)):
            found.append(one)
            if args.verbose:
                print(f"  {one.words}", file=sys.stderr)
    if not found:
        raise RunError("No kernel could be measured: none ran here.", "Close other programs that use the GPU.")
    origin = f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    try:
        tuning.write(as_entries(found, tuning.of_architecture(capability, tuning.known())), capability, origin)
    except OSError as error:
        raise RunError(f"{tuning.MACHINE_FILE} cannot be written: {error}.", "Make that folder writable.") from error
    report = _report(found, origin)
    print(json.dumps(report) if args.json else _words(report))
    return 0


def _report(found: Sequence[Found], origin: str) -> dict[str, Any]:
    from shared.ops import tuning

    return {
        "measured_with": origin,
        "file": str(tuning.MACHINE_FILE),
        "entries": [asdict(one) for one in found],
        "changed": sum(one.before is None or one.seconds < one.before for one in found),
    }


def _words(report: dict[str, Any]) -> str:
    count = len(report["entries"])
    return f"{count} measured, {report['changed']} faster than before. Used from now on: {report['file']}"
