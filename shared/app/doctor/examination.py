"""The examination: every room's findings in one report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shared.app.doctor.device_facts import look_at_device
from shared.app.doctor.nunchaku import nunchaku_facts
from shared.app.doctor.problems import find_problems
from shared.app.doctor.report import Report
from shared.app.doctor.self_test import draw_self_test
from shared.app.doctor.software import list_libraries, look_at_system, look_at_torch

if TYPE_CHECKING:
    from shared.app.context import AppContext


def examine(ctx: AppContext, *, self_test: bool = False) -> Report:
    """Look at this machine. self_test: draw a picture as well.

    Raises UserError for a device, an attention or a kind of compute that was asked for and is unknown or absent;
    everything else that is wrong is in the report.
    """
    libraries = tuple(list_libraries())
    torch_facts, torch_problem = look_at_torch()
    nunchaku = nunchaku_facts(torch_facts)
    system = look_at_system(ctx.files.roots[0])
    report = Report(system=system, torch=torch_facts, device=None, libraries=libraries, nunchaku=nunchaku)
    if torch_facts is not None:
        report = look_at_device(ctx, report)
    if self_test and torch_facts is not None:
        report = replace(report, self_test=draw_self_test(ctx))
    found = [torch_problem] if torch_problem else []
    return replace(report, problems=(*found, *find_problems(ctx, report)))
