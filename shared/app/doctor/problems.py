"""What is wrong, and what to do about it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from shared.app.doctor.report import Problem, Report
from shared.app.doctor.software import INSTALL

if TYPE_CHECKING:
    from shared.app.context import AppContext

PYTHONS = ((3, 11), (3, 13))  # oldest and newest, as in pyproject.toml


def find_problems(ctx: AppContext, report: Report) -> list[Problem]:
    """What is wrong, broken things first."""
    system, device, test = report.system, report.device, report.self_test
    found = []
    oldest, newest = PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        wanted = f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
        found.append(Problem(f"Python {system.python} is not one of {wanted}.", f"Install Python {newest[0]}.12."))
    missing = [library.name for library in report.libraries if library.needed and not library.version]
    if missing:
        found.append(Problem(f"Not installed: {', '.join(missing)}.", INSTALL))
    if test is not None and not test.passed:
        found.append(Problem(f"The self-test failed: {test.words}", "--verbose 2 with `generate` shows where."))
    for kernel in report.kernels:
        if kernel.problem:
            what = f"{kernel.label} weights cannot be used: {kernel.problem}."
            found.append(Problem(what, "Take a preset in another format.", broken=False))
    if device is not None and report.torch is not None and report.torch.driver and device.kind == "cpu":
        what = f"There is an NVIDIA driver ({report.torch.driver}), but the CPU is used: {device.reason}."
        to_do = "Delete .venv and run python run.py: it installs the torch that fits the driver."
        found.append(Problem(what, to_do, broken=False))
    if report.nunchaku.state == "impostor":
        to_do = "Run: pip uninstall nunchaku. This program draws SVDQuant files without the engine."
        found.append(Problem(_sentence(report.nunchaku.words), to_do, broken=False))
    if report.advice is not None and system.disk_free is not None and report.advice.to_download > system.disk_free:
        what = f"{report.advice.preset} needs a download of {report.advice.to_download / 1e9:.1f} GB"
        what += f", and {system.disk_free / 1e9:.1f} GB are free at {system.checkpoints}."
        found.append(Problem(what, "Make room there.", broken=False))
    if report.torch is not None and report.advice is None:
        to_do = "Get the program's own files back: git checkout models defaults"
        found.append(Problem("No preset can be used.", to_do))
    found += [Problem(line, "Mend or remove that file.", broken=False) for line in ctx.presets.problems]
    return sorted(found, key=lambda problem: not problem.broken)


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."
