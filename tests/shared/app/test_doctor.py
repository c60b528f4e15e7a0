"""The doctor tells facts and problems, never imports the impostor, and draws a picture to be sure."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shared.app.advice import advise
from shared.app.context import AppContext
from shared.app.device import DeviceInfo
from shared.app.doctor import Report, TorchFacts, examine, software
from shared.app.doctor.nunchaku import nunchaku_facts
from shared.app.doctor.self_test import SELF_TEST_SEED, draw_self_test
from shared.app.kernel_report import KernelChoice
from shared.ops import triton_ready
from shared.quant.errors import UserError
from tests.support.doctors import doctors_context
from tests.support.fake_family import FakeHandler, FakeProcessor

CUDA = TorchFacts(version="2.13.0+cu130", build="CUDA 13.0", driver="580.65")


@pytest.fixture
def handler() -> FakeHandler:
    return FakeHandler()


@pytest.fixture
def ctx(tmp_path: Path, handler: FakeHandler, monkeypatch: pytest.MonkeyPatch) -> AppContext:
    return doctors_context(tmp_path, handler, monkeypatch)


def words(report: Report) -> list[str]:
    return [problem.what for problem in report.problems]


def test_a_machine_without_faults_is_usable_and_the_report_is_json(ctx: AppContext) -> None:
    report = examine(ctx)

    told = json.loads(json.dumps(report.as_dict()))
    assert report.usable and told["usable"] is True and words(report) == []
    assert told["system"]["ram"] > 0 and told["system"]["disk_free"] > 0
    assert told["device"]["kind"] == "cpu" and told["torch"]["version"]
    assert told["kernels"][0]["packing"] == "int8" and told["kernels"][0]["reason"]
    assert told["advice"]["preset"] == "z_image_demo"
    assert told["self_test"] is None


def test_a_packing_that_some_kernel_multiplies_as_it_is_is_not_called_slow(
    ctx: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choice(label: str, packing: str, compute: str) -> KernelChoice:
        return KernelChoice(
            label=label, packing=packing, kernel="k", compute=compute, refused=(), waiting=(), error=0.0, problem=""
        )

    choices = [
        choice("SVDQuant INT4", "svdq", "native"),
        choice("SVDQuant FP4", "svdq", "bf16"),
        choice("NVFP4", "nvfp4", "bf16"),
    ]
    monkeypatch.setattr("shared.app.doctor.device_facts.kernel_choices", lambda *_, **__: choices)
    told: list[object] = []
    monkeypatch.setattr("shared.app.doctor.device_facts.advise", lambda *arguments: told.append(arguments[-1]))

    examine(ctx)

    assert told == [{"nvfp4"}]


def test_attention_names_what_cannot_be_used_and_why(ctx: AppContext) -> None:
    found = {attention.name: attention for attention in examine(ctx).attention}

    assert found["sdpa"].usable and found["auto"].usable
    assert not found["sage2"].usable and "NVIDIA GPU" in found["sage2"].reason


def test_the_self_test_draws_a_small_picture_and_keeps_nothing(ctx: AppContext, handler: FakeHandler) -> None:
    report = examine(ctx, self_test=True)

    test = report.self_test
    assert test is not None and test.passed and report.usable
    assert "256x256" in test.words and test.seconds > 0
    assert handler.processors[0].calls[0]["seed"] == SELF_TEST_SEED
    assert not ctx.output_folder.exists()


@pytest.mark.parametrize("spoil", ["latents", "picture"])
def test_numbers_that_are_not_finite_fail_the_self_test(ctx: AppContext, handler: FakeHandler, spoil: str) -> None:
    handler.prepare = lambda processor: setattr(processor, "spoil", spoil)

    report = examine(ctx, self_test=True)

    assert not report.usable and report.problems[0].broken
    assert "NaN" in words(report)[0] or "finite" in words(report)[0]


def test_a_picture_of_one_colour_fails_the_self_test(
    ctx: AppContext, handler: FakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.ones(shape))

    test = draw_self_test(ctx)

    assert not test.passed and "one colour" in test.words


def test_whatever_fails_while_drawing_becomes_a_line(ctx: AppContext, handler: FakeHandler) -> None:
    def crash(processor: FakeProcessor) -> None:
        raise ZeroDivisionError("a fault in a library")

    handler.prepare = crash

    report = examine(ctx, self_test=True)

    assert not report.usable and "ZeroDivisionError: a fault in a library" in words(report)[0]


def test_missing_demo_weights_fail_the_self_test_with_their_name(ctx: AppContext) -> None:
    (ctx.root / "weights/z_image_demo/vae.safetensors").unlink()

    report = examine(ctx, self_test=True)

    assert not report.usable and any("vae.safetensors" in line for line in words(report))


def test_a_torch_that_does_not_load_is_the_finding(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now raises ImportError
    monkeypatch.setattr("shared.app.doctor.software.importlib.util.find_spec", lambda name: SimpleNamespace())

    report = examine(ctx, self_test=True)

    assert not report.usable and "torch does not load" in words(report)[0]
    assert report.device is None and report.kernels == () and report.self_test is None


def test_a_missing_torch_is_named_with_what_to_run(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.app.doctor.software.importlib.util.find_spec", lambda name: None)

    report = examine(ctx)

    assert words(report) == ["torch is not installed."] and "run.py" in report.problems[0].to_do


def test_a_needed_library_that_is_missing_is_broken_and_an_optional_one_is_not(
    ctx: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shared.app.doctor.software.LIBRARIES", {"no-such-a": (True, "text"), "no-such-b": (False, "more")}
    )

    report = examine(ctx)

    assert words(report) == ["Not installed: no-such-a."] and not report.usable


def test_a_gpu_that_torch_does_not_use_is_a_warning(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.app.doctor.software._driver", lambda: "580.65")

    report = examine(ctx)

    assert report.usable and "580.65" in words(report)[0]


def test_a_driver_program_that_does_not_answer_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **options: float) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", options["timeout"])

    monkeypatch.setattr("shared.app.doctor.software.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("shared.app.doctor.software.subprocess.run", hang)

    assert software._driver() == ""


def test_a_download_larger_than_the_disk_is_a_warning(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "shared.app.doctor.device_facts.advise", lambda *args: replace(advise(*args), to_download=10**18)
    )

    report = examine(ctx)

    assert report.usable and "download" in words(report)[0]


def test_a_users_broken_preset_is_a_warning(ctx: AppContext) -> None:
    folder = ctx.root / "finetunes"
    folder.mkdir()
    (folder / "mine.json").write_text("{")
    ctx.refresh_presets()

    report = examine(ctx)

    assert report.usable and "mine.json" in words(report)[0]


def test_a_device_that_is_not_there_is_the_users_mistake(ctx: AppContext) -> None:
    ctx.args.gpu = "quantum"

    with pytest.raises(UserError, match="quantum"):
        examine(ctx)


def test_a_card_is_told_with_its_capability(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    card = DeviceInfo("cuda", "Card", 120, 16 * 2**30, "a test's card")
    monkeypatch.setattr("shared.app.doctor.device_facts.detect", lambda prefer: card)
    monkeypatch.setattr("shared.app.doctor.device_facts.kernel_choices", lambda *_, **__: [])
    monkeypatch.setattr(triton_ready, "why_not", lambda _device: "the package triton is not installed")

    device = examine(ctx).device

    assert device is not None and (device.capability, device.dtype) == ("12.0", "bfloat16")
    assert device.between == "torch's own operations (the package triton is not installed)"


def test_a_cpu_is_told_with_what_computes_between_products(ctx: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.app.doctor.device_facts.kernel_choices", lambda *_, **__: [])
    monkeypatch.setattr(
        "shared.app.doctor.device_facts.detect", lambda prefer: DeviceInfo("cpu", "Processor", None, None, "a test's")
    )

    device = examine(ctx).device

    assert device is not None and device.between == "compiled by numba"


# ---------------------------------------------------------------------------------------------- nunchaku


def package(folder: Path, *files: str) -> list[str]:
    """A package `nunchaku` that must not be imported."""
    (folder / "nunchaku").mkdir()
    for file in ("__init__.py", *files):
        path = folder / "nunchaku" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise AssertionError('imported')\n")
    return [str(folder)]


def test_the_statistics_package_is_an_impostor_and_is_not_imported(tmp_path: Path) -> None:
    found = nunchaku_facts(CUDA, package(tmp_path, "models.py"))

    assert found.state == "impostor" and "unrelated statistics package" in found.words
    assert "nunchaku" not in sys.modules


def test_the_engine_is_known_by_its_compiled_module(tmp_path: Path) -> None:
    assert nunchaku_facts(CUDA, package(tmp_path, "_C.py", "ops/__init__.py")).state == "engine"


def test_a_folder_that_merely_has_the_name_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "nunchaku").mkdir()

    assert nunchaku_facts(CUDA, [str(tmp_path)]).state == "absent"


def test_the_wheel_is_described_for_this_python_torch_and_cuda(tmp_path: Path) -> None:
    told = nunchaku_facts(CUDA, package(tmp_path)).words

    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert "nunchaku-tech" in told and f"nunchaku-<version>+cu13.0torch2.13-{tag}-{tag}-" in told


def test_a_cpu_build_is_offered_no_wheel(tmp_path: Path) -> None:
    cpu = TorchFacts(version="2.13.0+cpu", build="CPU", driver="")

    assert "<version>" not in nunchaku_facts(cpu, package(tmp_path)).words


def test_an_impostor_is_a_warning_with_what_to_do(
    ctx: AppContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = package(tmp_path)
    monkeypatch.setattr(
        "shared.app.doctor.examination.nunchaku_facts", lambda torch_facts: nunchaku_facts(torch_facts, folder)
    )

    report = examine(ctx)

    assert report.usable and "statistics" in words(report)[0]
    assert "pip uninstall nunchaku" in report.problems[0].to_do
