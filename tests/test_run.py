"""run.py's decisions: which Python, which torch, what is finished and what has to be repaired."""

from __future__ import annotations

import ast
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import run

NVIDIA = run.Gpu("NVIDIA GeForce RTX 4090", 580)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program folder with requirements and a .venv that looks whole; nothing is installed."""
    monkeypatch.setattr(run, "PROGRAM", tmp_path)
    monkeypatch.setattr(run, "VENV", tmp_path / ".venv")
    (tmp_path / "requirements.txt").write_text("# pins\ntorch==2.13.0\nnumpy==2.4.6\n")
    (tmp_path / "requirements-dev.txt").write_text("-r requirements.txt\npytest==9.2.0\n")
    run.venv_python().parent.mkdir(parents=True)
    run.venv_python().write_text("")
    packages().mkdir(parents=True)
    return tmp_path


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Records what pip would install; a call succeeds unless its arguments name an index called "broken"."""
    calls: list[tuple[str, ...]] = []

    def install(*arguments: str) -> bool:
        calls.append(arguments)
        return "broken" not in arguments

    monkeypatch.setattr(run, "try_pip_install", install)
    return calls


def packages() -> Path:
    return run.VENV / ("Lib/site-packages" if os.name == "nt" else "lib/python3.12/site-packages")


def choose(system: str, gpu: run.Gpu | None, *, reachable: bool = True, machine: str = "x86_64") -> run.TorchBuild:
    return run.choose_torch(system=system, machine=machine, gpu=gpu, is_reachable=lambda _: reachable)


# ---------------------------------------------------------------------------------------------- any Python


def test_only_the_standard_library_is_imported() -> None:
    tree = ast.parse((Path(run.__file__)).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }

    assert imported <= sys.stdlib_module_names


def test_an_old_python_can_read_the_file_and_so_say_that_it_is_too_old() -> None:
    ast.parse(Path(run.__file__).read_text(encoding="utf-8"), feature_version=(3, 7))


def test_an_unsupported_python_hands_over_to_a_supported_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    monkeypatch.setattr(run.shutil, "which", lambda name: name)
    monkeypatch.setattr(run, "version_of", lambda command: (3, 13) if "3.13" in command[-1] else None)
    monkeypatch.setattr(run.subprocess, "call", lambda command: called.append(command) or 7)

    assert run.main(["generate", "a circle"]) == 7

    assert "3.13" in " ".join(called[0][:-3])
    assert called[0][-3:] == [str(run.PROGRAM / "run.py"), "generate", "a circle"]
    assert "is not supported" in capsys.readouterr().out


def test_without_any_supported_python_the_message_names_those_that_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setattr(run.shutil, "which", lambda _: None)

    assert run.main([]) == 1

    assert "needs 3.11, 3.12, 3.13" in capsys.readouterr().err


def test_a_python_that_does_not_start_has_no_version() -> None:
    assert run.version_of([sys.executable]) == sys.version_info[:2]
    assert run.version_of(["no-such-python"]) is None


# ---------------------------------------------------------------------------------------------- which torch


@pytest.mark.parametrize(
    ("system", "gpu", "reachable", "index"),
    [
        ("Linux", NVIDIA, True, None),
        ("Linux", None, True, run.CPU_INDEX),
        ("Linux", None, False, None),
        ("Windows", NVIDIA, True, run.CUDA_INDEX),
        ("Windows", NVIDIA, False, None),
        ("Windows", None, True, None),
    ],
)
def test_the_torch_build_fits_the_machine(system: str, gpu: run.Gpu | None, reachable: bool, index: str | None) -> None:
    assert choose(system, gpu, reachable=reachable).index == index


def test_a_mac_takes_the_usual_build_and_an_intel_mac_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("Darwin", None, machine="arm64").index is None

    with pytest.raises(run.SetupError, match="Intel"):
        choose("Darwin", None, machine="x86_64")


def test_an_unreachable_index_is_named_in_the_reason() -> None:
    assert f"{run.CPU_INDEX} cannot be reached" in choose("Linux", None, reachable=False).reason


def test_an_index_from_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_INDEX_URL", "https://example.org/rocm")

    assert choose("Linux", NVIDIA).index == "https://example.org/rocm"


def test_an_old_driver_is_told_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    choose("Linux", run.Gpu("NVIDIA GeForce RTX 3060", 550))

    assert "driver 550 is too old" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "gpu"),
    [
        ("NVIDIA GeForce RTX 4090, 580.65.06\n", NVIDIA),
        ("NVIDIA H200, 590.1\nNVIDIA H200, 590.1\n", run.Gpu("NVIDIA H200", 590)),
        ("NVIDIA A100, [N/A]", run.Gpu("NVIDIA A100", None)),
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_the_gpu_is_read_from_nvidia_smi(answer: str, gpu: run.Gpu | None) -> None:
    assert run.parse_gpu(answer) == gpu


def test_a_server_that_does_not_answer_is_given_up_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def silent(*_: object, **__: object) -> None:
        released.wait(5)
        raise TimeoutError

    monkeypatch.setattr(run, "REACH_SECONDS", 0.1)
    monkeypatch.setattr(run.urllib.request, "urlopen", silent)
    started = time.monotonic()

    assert run.is_reachable(run.CPU_INDEX) is False

    assert time.monotonic() - started < 1
    released.set()


def test_a_refused_connection_is_not_reachable() -> None:
    assert run.is_reachable("http://127.0.0.1:1") is False


def test_the_pin_of_torch_is_the_one_in_requirements() -> None:
    pinned = (Path(run.__file__).parent / "requirements.txt").read_text(encoding="utf-8")

    assert run.torch_pin(pinned).split("==")[1].count(".") == 2


def test_a_torch_of_the_pinned_version_is_kept_whatever_its_build(program: Path, pip: list[tuple[str, ...]]) -> None:
    (packages() / "torch-2.13.0+cu130.dist-info").mkdir()

    run.install_torch()

    assert pip == []


def test_a_failing_torch_index_falls_back_to_pips_own_sources(
    program: Path, pip: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "choose_torch", lambda **_: run.TorchBuild("broken", "a test"))

    run.install_torch()

    assert pip == [("torch==2.13.0", "--index-url", "broken"), ("torch==2.13.0",)]


def test_without_an_index_pips_configuration_is_left_alone(
    program: Path, pip: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "choose_torch", lambda **_: run.TorchBuild(None, "a test"))

    run.install_torch()

    assert pip == [("torch==2.13.0",)]


# ---------------------------------------------------------------------------------------------- what is finished


def test_a_finished_set_up_does_nothing_again(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.mark_finished(run.RUNTIME)
    monkeypatch.setattr(run.subprocess, "call", fail)
    monkeypatch.setattr(run.subprocess, "run", fail)

    run.set_up(run.RUNTIME)


def fail(*_: object, **__: object) -> None:
    raise AssertionError("a finished set-up starts no process")


def test_what_the_tests_need_includes_what_the_program_needs(program: Path) -> None:
    run.mark_finished(run.WITH_TESTS)

    assert run.is_finished(run.WITH_TESTS) and run.is_finished(run.RUNTIME)


def test_what_the_program_needs_is_not_what_the_tests_need(program: Path) -> None:
    run.mark_finished(run.RUNTIME)

    assert not run.is_finished(run.WITH_TESTS)


@pytest.mark.parametrize("change", ["requirements", "python removed", "python replaced"])
def test_a_change_of_pins_or_python_is_noticed(program: Path, change: str) -> None:
    python = run.venv_python()
    run.mark_finished(run.RUNTIME)

    if change == "requirements":
        (program / "requirements.txt").write_text("torch==2.14.0\n")
    elif change == "python removed":
        python.unlink()
    else:
        (program / "python3.13").write_text("")
        python.unlink()
        python.symlink_to(program / "python3.13")

    assert not run.is_finished(run.RUNTIME)


def test_an_interrupted_set_up_leaves_no_stamp(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: str) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "prepare_venv", lambda: None)
    monkeypatch.setattr(run, "find_gpu", lambda: NVIDIA)
    monkeypatch.setattr(run, "try_pip_install", interrupted)

    assert run.main([]) == 130
    assert not run.is_finished(run.RUNTIME)


def test_a_failing_pip_is_an_error_in_words(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "prepare_venv", lambda: None)
    monkeypatch.setattr(run, "find_gpu", lambda: NVIDIA)
    monkeypatch.setattr(run, "try_pip_install", lambda *_: False)

    assert run.main([]) == 1
    assert "what is installed already is kept" in capsys.readouterr().err
    assert not run.is_finished(run.RUNTIME)


# ---------------------------------------------------------------------------------------------- what is repaired


def test_a_package_killed_half_way_is_forgotten_and_others_are_kept(program: Path) -> None:
    for name, files in (("whole-1.0", ("METADATA", "INSTALLER")), ("half-2.0", ("METADATA",))):
        (packages() / f"{name}.dist-info").mkdir()
        for file in files:
            (packages() / f"{name}.dist-info" / file).write_text("")
    (packages() / "~alf").mkdir()

    run.remove_cut_short_packages()

    assert [path.name for path in packages().iterdir()] == ["whole-1.0.dist-info"]


def test_a_half_made_venv_is_made_again(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr(run.subprocess, "call", lambda command: made.append(command) or 0)

    run.prepare_venv()  # its python is an empty file

    assert made == [[sys.executable, "-m", "venv", str(run.VENV)]]
    assert not run.VENV.exists()


def test_a_working_venv_is_kept(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "venv_problem", lambda: None)
    monkeypatch.setattr(run.subprocess, "call", fail)

    run.prepare_venv()

    assert run.venv_python().exists()


@pytest.mark.parametrize(
    ("version", "pip_works", "problem"),
    [
        ((3, 12), True, None),
        (None, True, "does not start"),
        ((3, 9), True, "is for Python 3.9"),
        ((3, 13), True, "replaced by another version"),
        ((3, 12), False, "pip does not work"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="the folder of packages names no version on Windows")
def test_what_makes_a_venv_unusable_is_named(
    program: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: tuple[int, int] | None,
    pip_works: bool,
    problem: str | None,
) -> None:
    answer = run.subprocess.CompletedProcess([], 0 if pip_works else 1)
    monkeypatch.setattr(run, "version_of", lambda _: version)
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: answer)

    found = run.venv_problem()

    assert found is None if problem is None else problem in str(found)


def test_a_venv_that_cannot_be_made_names_debians_package(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "venv_problem", lambda: "a test")
    monkeypatch.setattr(run.subprocess, "call", lambda _: 1)

    with pytest.raises(run.SetupError, match="python3-venv"):
        run.prepare_venv()


# ---------------------------------------------------------------------------------------------- what is started


@pytest.fixture
def started(program: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[object, list[str]]]:
    """Call main with everything set up: the requirement files it asked for, and the command it became."""

    def start(*arguments: str) -> tuple[object, list[str]]:
        asked: list[object] = []
        became: list[str] = []
        monkeypatch.chdir(program)
        monkeypatch.setattr(run, "set_up", asked.append)
        monkeypatch.setattr(run, "hand_over", lambda command: became.extend(command) or 0)
        assert run.main(list(arguments)) == 0
        return asked[0], became

    return start


def test_everything_but_test_and_setup_goes_to_wgp(started: Callable[..., tuple[object, list[str]]]) -> None:
    python, wgp = str(run.venv_python()), str(run.PROGRAM / "wgp.py")

    assert started() == (run.RUNTIME, [python, wgp])
    assert started("generate", "test", "--seed", "1") == (
        run.RUNTIME,
        [python, wgp, "generate", "test", "--seed", "1"],
    )


def test_test_starts_pytest_on_every_core_with_its_arguments(
    started: Callable[..., tuple[object, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    assert started("test", "-k", "hub") == (
        run.WITH_TESTS,
        [str(run.venv_python()), "-m", "pytest", "-n", "3", "--dist", "loadfile", "-k", "hub"],
    )


def test_setup_starts_nothing(started: Callable[..., tuple[object, list[str]]]) -> None:
    assert started("setup") == (run.WITH_TESTS, [])


@pytest.mark.skipif(os.name == "nt", reason="POSIX replaces the process")
def test_handing_over_keeps_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[object] = []

    def execv(path: str, command: list[str]) -> None:
        became.append((path, command))
        raise SystemExit  # as the real one, it does not come back

    monkeypatch.setattr(run.os, "execv", execv)

    with pytest.raises(SystemExit):
        run.hand_over(["/venv/python", "wgp.py", "a b"])

    assert became == [("/venv/python", ["/venv/python", "wgp.py", "a b"])]
