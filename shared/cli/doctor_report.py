"""The doctor's report for people: facts in two columns, what is wrong at the end, with what to do."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from shared.quant.kernels import REFERENCE

if TYPE_CHECKING:
    from shared.app.advice import Advice
    from shared.app.doctor import AttentionFacts, Report
    from shared.app.kernel_report import KernelChoice

Row = tuple[str, str]

_LABEL_WIDTH = 20


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report, on stdout unless told otherwise."""
    (console or Console(highlight=False)).print(report_lines(report))


def report_lines(report: Report) -> RenderableType:
    """The report as one thing that rich prints. Words of the report are never taken for markup."""
    parts: list[RenderableType] = [
        *_section("Machine", _machine(report)),
        *_section("Kernels", _kernels(report.kernels)),
        *_section("Attention", _attention(report.attention)),
        *_section("Libraries", _libraries(report)),
        *_section("Which preset", _advice(report.advice)),
    ]
    if report.self_test is not None:
        test = report.self_test
        result = "passed" if test.passed else "failed"
        parts += _section("Self-test", [(result, f"{test.seconds:.1f} s: {test.words}")])
    parts += _problems(report)
    return Group(*parts)


def _section(title: str, rows: Iterable[Row]) -> list[RenderableType]:
    table = Table.grid(padding=(0, 1))
    table.add_column(min_width=_LABEL_WIDTH, no_wrap=True)
    table.add_column(overflow="fold")
    for label, words in rows:
        table.add_row(Text(f"  {label}"), Text(words))
    return [Text(title, style="bold"), table, Text()] if table.row_count else []


def _machine(report: Report) -> list[Row]:
    system, torch, device = report.system, report.torch, report.device
    disk = "free space unknown" if system.disk_free is None else f"{_gb(system.disk_free)} free"
    rows = [
        ("Python", system.python),
        ("system", system.os),
        ("RAM", "unknown" if system.ram is None else f"{system.ram / 2**30:.1f} GiB"),
        ("checkpoints", f"{system.checkpoints} ({disk})"),
        ("torch", "cannot be used" if torch is None else f"{torch.version} ({torch.build} build)"),
    ]
    if torch is not None and torch.driver:
        rows.append(("NVIDIA driver", torch.driver))
    if device is not None:
        rows += [
            ("device", f"{device.kind}, {device.name} ({device.reason})"),
            ("number type", f"{device.dtype} ({device.dtype_reason})"),
            ("between products", device.between),
        ]
    return rows


def _kernels(kernels: Iterable[KernelChoice]) -> list[Row]:
    """One row per kernel and what it serves; behind it why, where that needs a reason, and the refusals."""
    rows = []
    for chosen, group in groupby(sorted(kernels, key=_kernel_words), key=_kernel_words):
        members = list(group)
        rows.append((chosen, ", ".join(kernel.label for kernel in members)))
        if members[0].compute not in ("", REFERENCE):
            rows.append(("", f"because: {members[0].reason}"))
        refusals = dict.fromkeys(f"not {r.kernel}: {r.reason}" for kernel in members for r in kernel.refused)
        rows += [("", words) for words in refusals]
    return rows


def _attention(found: Iterable[AttentionFacts]) -> list[Row]:
    """Neighbours with the same reason share a row."""
    rows = []
    for words, group in groupby(found, key=lambda a: a.reason if a.usable else f"no: {a.reason}"):
        rows.append((", ".join(a.name for a in group), words))
    return rows


def _kernel_words(kernel: KernelChoice) -> str:
    return f"{kernel.kernel or 'none'} ({kernel.compute or '-'})"


def _libraries(report: Report) -> list[Row]:
    installed = ", ".join(f"{library.name} {library.version}" for library in report.libraries if library.version)
    rows = [("installed", installed)] if installed else []
    absent = [library for library in report.libraries if not library.version]
    rows += [(lib.name, f"{'MISSING' if lib.needed else 'not installed'} ({lib.purpose})") for lib in absent]
    nunchaku = report.nunchaku
    words = "an unrelated package, not the engine: see the warning" if nunchaku.state == "impostor" else nunchaku.words
    return [*rows, ("nunchaku", f"{nunchaku.version}: {words}" if nunchaku.version else words)]


def _advice(advice: Advice | None) -> list[Row]:
    if advice is None:
        return []
    download = f"; {_gb(advice.to_download)} to download" if advice.to_download else ""
    rows = [(f"use {advice.preset}", f"{advice.reason}{download}")]
    rows += [("", f"! {caveat}") for caveat in advice.caveats]
    possible = [verdict.preset for verdict in advice.others if not verdict.refusal]
    if possible:
        rows.append(("possible, best first", ", ".join(possible)))
    against: dict[str, list[str]] = {}
    for verdict in advice.others:
        if verdict.refusal:
            against.setdefault(verdict.refusal, []).append(verdict.preset)
    return [*rows, *(("not here", f"{', '.join(presets)}: {reason}") for reason, presets in against.items())]


def _problems(report: Report) -> list[RenderableType]:
    if not report.problems:
        return [Text("Nothing is wrong.", style="green")]
    lines: list[RenderableType] = []
    for problem in report.problems:
        label, style = ("BROKEN", "bold red") if problem.broken else ("Warning", "yellow")
        lines.append(Text.assemble((f"{label}: ", style), problem.what))
        lines.append(Text(f"  {problem.to_do}"))
    if report.usable:
        lines.append(Text("The program can be used.", style="green"))
    return lines


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
