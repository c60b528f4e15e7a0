"""What `quantize` did: the report beside the new file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.app.metadata import write_file

if TYPE_CHECKING:
    from shared.quant.convert import LayerReport

WORST = 10


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Why a layer got its format: what was measured of it, and the error that each format tried would have had."""

    layer: str
    format: str
    kurtosis: float
    peak: float
    errors: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What was written. layers: every matrix, in the file's order. preset: its id, "" when none was made.

    error_lora: the error-correction LoRA's file, None without one. chosen: what the recipe left open, and why.
    expected_bytes: the size that the choice was made for, None without one. output: what to open; an index where there
    are several files.
    """

    output: Path
    report: Path
    bytes: int
    seconds: float
    peak_rss_mb: float | None
    layers: Sequence[LayerReport]
    notes: Sequence[str]
    preset: str
    error_lora: Path | None = None
    chosen: Sequence[Chosen] = ()
    expected_bytes: int | None = None

    @property
    def quantized(self) -> list[LayerReport]:
        """The matrices that were not left plain, the least exact first: by their outputs where these were looked at.

        Smoothing and learned rounding let go of numbers that meet small inputs, so that a weight may be far off.
        """
        from shared.quant.targets import PLAIN

        packed = [r for r in self.layers if r.format not in PLAIN]
        return sorted(packed, key=lambda r: -(r.relative_error if r.output_error is None else r.output_error))

    def as_dict(self) -> dict[str, Any]:
        quantized = self.quantized
        return {
            "output": str(self.output),
            "bytes": self.bytes,
            "layers": dict(Counter(r.format for r in self.layers)),
            "seconds": round(self.seconds, 1),
            "peak_rss_mb": None if self.peak_rss_mb is None else round(self.peak_rss_mb),
            "worst": [asdict(r) for r in quantized[:WORST]],
            "mean_relative_error": _mean(r.relative_error for r in quantized) or 0.0,
            "mean_output_error": _mean(r.output_error for r in quantized),
            "mean_corrected_error": _mean(r.corrected_error for r in quantized),
            "mean_corrected_output_error": _mean(r.corrected_output_error for r in quantized),
            "expected_bytes": self.expected_bytes,
            "error_lora": None if self.error_lora is None else str(self.error_lora),
            "report": str(self.report),
            "preset": self.preset,
            "notes": list(self.notes),
        }


def _mean(errors: Iterable[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if known else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file that is there whole or not at all."""
    text = json.dumps(value, indent=4, ensure_ascii=False) + "\n"
    write_file(path, lambda file: file.write(text.encode("utf-8")))
