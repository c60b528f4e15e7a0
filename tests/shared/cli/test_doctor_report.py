"""`doctor` on the command line: a report to read or one JSON object, and the exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from shared.app.advice import Advice, Verdict
from shared.app.context import AppContext
from shared.app.doctor import NunchakuFacts, Problem, Report, SystemFacts, examine
from shared.app.kernel_report import PROBES, KernelChoice, Refusal
from shared.cli import commands
from shared.cli.doctor_report import print_report
from shared.cli.parser import build_parser, parse_arguments
from tests.support.doctors import doctors_context
from tests.support.fake_family import FakeHandler, fake_families

PROGRAM = Path(__file__).parents[3]


@pytest.fixture
def handler() -> FakeHandler:
    return FakeHandler()


@pytest.fixture
def ctx(tmp_path: Path, handler: FakeHandler, monkeypatch: pytest.MonkeyPatch) -> AppContext:
    return doctors_context(tmp_path, handler, monkeypatch)


def run(ctx: AppContext, *arguments: str) -> int:
    args = parse_arguments(build_parser(fake_families(FakeHandler()), "lora_root"), ("doctor", *arguments))
    args.gpu = "cpu"
    ctx.args = args
    return commands.doctor(ctx, args)


def text(report: Report, width: int = 100) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width))
    return stream.getvalue()


def verdict(preset: str, refusal: str) -> Verdict:
    return Verdict(
        preset=preset, name="", format="", refusal=refusal, reason="fits", caveats=(), weights=1, to_download=0,
        passes=8, expands=False, streamed=False, bits=16,
    )  # fmt: skip


def kernel(label: str, name: str, compute: str, *refused: Refusal) -> KernelChoice:
    return KernelChoice(
        label=label, packing="", kernel=name, compute=compute, refused=refused, waiting=(), error=0.0, problem=""
    )


BARE = Report(
    system=SystemFacts(python="3.11.7", os="Linux", ram=None, checkpoints="ckpts", disk_free=None),
    torch=None,
    device=None,
    nunchaku=NunchakuFacts("absent", "", "not installed"),
)


def test_the_report_is_printed_and_a_usable_machine_ends_with_0(
    ctx: AppContext, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ctx) == 0

    out = capsys.readouterr().out
    for part in ("Machine", "Kernels", "int8", "Attention", "use z_image_demo", "Self-test", "passed"):
        assert part in out
    assert "Nothing is wrong." in out


def test_json_is_all_of_stdout(ctx: AppContext, handler: FakeHandler, capsys: pytest.CaptureFixture[str]) -> None:
    handler.prepare = lambda processor: sys.stdout.write("a library is chatty\n")

    code = run(ctx, "--json")

    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert code == 0 and told["usable"] and told["self_test"]["passed"]
    assert "chatty" in captured.err


def test_without_a_self_test_no_model_is_loaded(
    ctx: AppContext, handler: FakeHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    run(ctx, "--no-self-test", "--json")

    assert handler.loads == [] and json.loads(capsys.readouterr().out)["self_test"] is None


def test_something_broken_ends_with_1_and_says_what_to_do(
    ctx: AppContext, handler: FakeHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    handler.prepare = lambda processor: setattr(processor, "spoil", "picture")

    assert run(ctx) == 1

    out = capsys.readouterr().out
    assert "BROKEN: The self-test failed" in out and "failed" in out and "can be used" not in out


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_without_a_self_test_the_program_answers_in_seven_seconds() -> None:
    import resource

    def spent() -> float:  # of computing: the wall clock also measures what else runs on the machine
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    command = [sys.executable, str(PROGRAM / "wgp.py"), "doctor", "--no-self-test", "--json"]
    subprocess.run(command, capture_output=True, timeout=120, check=False)  # compiles kernels, once on a machine
    before = spent()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["usable"] else 1) and "Traceback" not in done.stderr
    assert {kernel["label"] for kernel in told["kernels"]} == {probe.label for probe in PROBES}
    assert spent() - before <= 7


def test_words_in_brackets_are_no_markup() -> None:
    report = Report(
        system=BARE.system, torch=None, device=None, nunchaku=BARE.nunchaku,
        problems=(Problem("The shape is [red] and [/odd].", "Do [bold]this."),),
    )  # fmt: skip

    assert "[red] and [/odd]" in text(report) and "[bold]this" in text(report)


def test_a_bare_machine_has_a_report_too() -> None:
    out = text(BARE)

    assert "cannot be used" in out and "Kernels" not in out


def test_kernels_are_grouped_and_refusals_told_once() -> None:
    refusal = Refusal("native-fp4", "needs 10.0")
    kernels = (kernel("NVFP4", "dequantize", "bf16", refusal), kernel("MXFP8", "dequantize", "bf16", refusal))
    report = Report(system=BARE.system, torch=None, device=None, nunchaku=BARE.nunchaku, kernels=kernels)

    out = text(report)

    assert "NVFP4, MXFP8" in out and out.count("not native-fp4: needs 10.0") == 1


def test_the_advice_groups_what_is_possible_and_what_is_refused() -> None:
    others = (verdict("a", ""), verdict("b", ""), verdict("c", "too large"), verdict("d", "too large"))
    advice = Advice(preset="best", reason="it fits", caveats=("slow",), to_download=10**9, others=others)
    report = Report(system=BARE.system, torch=None, device=None, nunchaku=BARE.nunchaku, advice=advice)

    out = text(report)

    for part in ("use best", "1.0 GB to download", "! slow", "a, b", "c, d: too large"):
        assert part in out


def test_the_words_fit_a_narrow_terminal(ctx: AppContext) -> None:
    assert max(map(len, text(examine(ctx), width=60).splitlines())) <= 60
