"""Start the program, or its tests, on a fresh machine: makes .venv, installs what is pinned, then hands over.

    python run.py [arguments of wgp.py]      the page; or a command, such as: generate "a red circle"
    python run.py test [arguments of pytest]
    python run.py setup                      only the set-up, with what the tests need

Only the standard library is used: this runs before anything is installed. A finished set-up leaves a stamp in
.venv, so that the next start costs a fraction of a second; without a valid stamp everything is looked through
and repaired. TORCH_INDEX_URL names another package index for torch (another CUDA version, ROCm, XPU).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent
VENV = PROGRAM / ".venv"
RUNTIME = ("requirements.txt",)
WITH_TESTS = ("requirements.txt", "requirements-dev.txt")

SUPPORTED = ((3, 12), (3, 13), (3, 11))  # the pinned packages have wheels for these; the first found is taken
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
CUDA_DRIVER = 580  # the first NVIDIA driver that runs CUDA 13, which the pinned torch is built with
REACH_SECONDS = 3.0
MOST_WORKERS = 8  # of pytest; each holds up to 2 GB


class SetupError(Exception):
    """Why the set-up cannot go on and what to do about it, for a person."""


def main(arguments: Sequence[str]) -> int:
    """Set up what is missing, then become wgp.py or pytest. Returns an exit code where that is not possible."""
    command = arguments[0] if arguments and arguments[0] in ("test", "setup") else "start"
    try:
        if sys.version_info[:2] not in SUPPORTED:
            return subprocess.call([*other_python(), str(PROGRAM / "run.py"), *arguments])
        set_up(RUNTIME if command == "start" else WITH_TESTS)
    except SetupError as error:
        print(f"\nThe set-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the next start goes on from here.", file=sys.stderr)
        return 130
    if command == "setup":
        return 0
    if command == "test":
        os.chdir(PROGRAM)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # else every worker's torch takes all cores
        return hand_over([str(venv_python()), "-m", "pytest", *in_parallel(), *arguments[1:]])
    return hand_over([str(venv_python()), str(PROGRAM / "wgp.py"), *arguments])


def in_parallel() -> list[str]:
    """Arguments that spread the tests, file by file, over the cores; `-n 0` behind them turns that off."""
    return ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "loadfile"]


def set_up(requirements: Sequence[str]) -> None:
    """Make .venv hold what the files pin: new, completed, repaired, or (most often) as it is."""
    if is_finished(requirements):
        return
    started = time.monotonic()
    say("Setting up; this is done once and takes a few minutes, mostly for downloads.")
    prepare_venv()
    remove_cut_short_packages()
    install_torch()
    say(f"Installing the packages of {requirements[-1]} ...")
    pip_install(*(argument for name in requirements for argument in ("-r", str(PROGRAM / name))))
    mark_finished(requirements)
    say(f"Set-up finished after {time.monotonic() - started:.0f} s.")


def hand_over(command: list[str]) -> int:
    """Become another program; on Windows, where a process cannot be replaced, run it and wait for it."""
    sys.stdout.flush()
    if os.name != "nt":
        os.execv(command[0], command)
    child = subprocess.Popen(command)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            pass  # Ctrl-C reaches the child as well: it saves what it has and ends by itself


# ---------------------------------------------------------------------------------------------- Python


def other_python() -> list[str]:
    """The command of a Python on this machine that the program supports. Raises SetupError if there is none."""
    for major, minor in SUPPORTED:
        if os.name == "nt":
            command = ["py", f"-{major}.{minor}"]
        else:
            command = [f"python{major}.{minor}"]
        if shutil.which(command[0]) and version_of(command) == (major, minor):
            say(f"Python {platform.python_version()} is not supported; going on with {' '.join(command)}.")
            return command
    names = ", ".join(f"{major}.{minor}" for major, minor in sorted(SUPPORTED))
    raise SetupError(
        f"this is Python {platform.python_version()}, and the program needs {names}.\n"
        "Install one of them (https://www.python.org/downloads/, or your system's packages) and start again."
    )


def version_of(command: Sequence[str]) -> tuple[int, int] | None:
    """The (major, minor) version of a Python; None if it does not start."""
    asked = [*command, "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
        major, minor = answer.stdout.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


# ---------------------------------------------------------------------------------------------- .venv


def venv_python() -> Path:
    return VENV / "Scripts" / "python.exe" if os.name == "nt" else VENV / "bin" / "python"


def site_packages() -> Path:
    if os.name == "nt":
        return VENV / "Lib" / "site-packages"
    return next(VENV.glob("lib/python3.*/site-packages"), VENV / "lib")


def prepare_venv() -> None:
    """Make .venv, or make it anew when it is unusable (half made, or its Python was removed or replaced)."""
    if VENV.exists():
        problem = venv_problem()
        if problem is None:
            return
        say(f"{VENV} is unusable ({problem}): making it again.")
        shutil.rmtree(VENV)
    say(f"Making {VENV} with Python {platform.python_version()} ...")
    if subprocess.call([sys.executable, "-m", "venv", str(VENV)]) != 0:
        raise SetupError(
            f"{VENV} could not be made; the lines above say why.\n"
            "On Debian and Ubuntu the package python3-venv is needed: sudo apt install python3-venv"
        )


def venv_problem() -> str | None:
    """Why the existing .venv cannot be used; None if it can."""
    version = version_of([str(venv_python())])
    if version is None:
        return "its Python does not start"
    if version not in SUPPORTED:
        return f"it is for Python {version[0]}.{version[1]}"
    if os.name != "nt" and site_packages().parent.name != f"python{version[0]}.{version[1]}":
        return "its Python was replaced by another version"
    if subprocess.run([str(venv_python()), "-m", "pip", "--version"], capture_output=True).returncode != 0:
        return "its pip does not work"
    return None


def remove_cut_short_packages() -> None:
    """Forget packages whose installation was killed half-way, so that pip installs them again.

    pip writes INSTALLER into a package's .dist-info last; without it, pip would take the package for installed.
    """
    for info in site_packages().glob("*.dist-info"):
        if not (info / "INSTALLER").is_file():
            say(f"{info.name.removesuffix('.dist-info')} was installed only in part: it is installed again.")
            shutil.rmtree(info)
    for leftover in site_packages().glob("~*"):  # pip's name for what it is about to remove
        if leftover.is_dir():
            shutil.rmtree(leftover)


def is_finished(requirements: Sequence[str]) -> bool:
    stamp = VENV / "set-up-finished.txt"
    return stamp.is_file() and fingerprint(requirements) in stamp.read_text(encoding="utf-8").split()


def mark_finished(requirements: Sequence[str]) -> None:
    """Leave the stamp. What the tests need includes what the program needs, so both are then finished."""
    finished = {fingerprint(requirements), fingerprint(RUNTIME)}
    (VENV / "set-up-finished.txt").write_text("\n".join(sorted(finished)) + "\n", encoding="utf-8")


def fingerprint(requirements: Sequence[str]) -> str:
    """Changes with the required packages, and with the Python behind .venv (removed or replaced by an update)."""
    digest = hashlib.sha256(os.path.realpath(venv_python()).encode())
    digest.update(b"present" if venv_python().exists() else b"gone")
    for name in requirements:
        digest.update((PROGRAM / name).read_bytes())
    return digest.hexdigest()


def pip_install(*arguments: str) -> None:
    if not try_pip_install(*arguments):
        raise SetupError(
            "pip could not install everything; its last lines above say why. Without a network, or with a full\n"
            "disk, put that right and start again: what is installed already is kept."
        )


def try_pip_install(*arguments: str) -> bool:
    pip = [str(venv_python()), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    environment = {**os.environ, "PIP_USER": "0"}  # a user's general wish for --user does not fit a venv
    return subprocess.call([*pip, "install", *arguments], env=environment) == 0


# ---------------------------------------------------------------------------------------------- torch


@dataclass(frozen=True)
class TorchBuild:
    """Which torch: from a package index of its own, or (None) from where pip finds everything else; and why."""

    index: str | None
    reason: str


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU: its name and the first number of its driver's version (None if unknown)."""

    name: str
    driver: int | None


def install_torch() -> None:
    """Install torch before everything else, from the build that fits the machine; any build satisfies the pin."""
    pin = torch_pin((PROGRAM / "requirements.txt").read_text(encoding="utf-8"))
    installed = next(site_packages().glob(f"torch-{pin.partition('==')[2]}*.dist-info"), None)
    if installed is not None:
        say(f"PyTorch is installed: {installed.name.removesuffix('.dist-info')}.")
        return
    build = choose_torch(
        system=platform.system(), machine=platform.machine(), gpu=find_gpu(), is_reachable=is_reachable
    )
    say(f"Installing PyTorch: {build.reason} ...")
    if build.index is None:
        pip_install(pin)
    elif not try_pip_install(pin, "--index-url", build.index):
        say(f"PyTorch could not be installed from {build.index}; trying pip's own sources.")
        pip_install(pin)


def choose_torch(*, system: str, machine: str, gpu: Gpu | None, is_reachable: Callable[[str], bool]) -> TorchBuild:
    """The torch build for a machine. system and machine are platform's words ("Linux", "x86_64")."""
    named = os.environ.get("TORCH_INDEX_URL")
    if named:
        return TorchBuild(named, "from TORCH_INDEX_URL")
    if system == "Darwin":
        if machine == "x86_64":
            raise SetupError("this Mac has an Intel processor, and PyTorch has no builds for those since 2.3.")
        return TorchBuild(None, "the build for Apple processors")
    if gpu is None:
        # Windows' usual build has no CUDA; Linux' usual build brings several GB of it.
        wanted = TorchBuild(None if system == "Windows" else CPU_INDEX, "the CPU build, as there is no NVIDIA GPU")
    else:
        wanted = TorchBuild(CUDA_INDEX if system == "Windows" else None, f"the CUDA build, for {gpu.name}")
        if gpu.driver is not None and gpu.driver < CUDA_DRIVER:
            say(
                f"NVIDIA driver {gpu.driver} is too old for this PyTorch (CUDA 13 needs {CUDA_DRIVER}): pictures "
                "are drawn on the CPU until the driver is updated."
            )
    if wanted.index is None or is_reachable(wanted.index):
        return wanted
    return TorchBuild(None, f"the build that pip finds, as {wanted.index} cannot be reached")


def torch_pin(requirements: str) -> str:
    """The line "torch==..." of a requirements file."""
    return next(line for line in requirements.splitlines() if line.startswith("torch=="))


def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU, or None."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
        return parse_gpu(answer.stdout)
    except (OSError, subprocess.SubprocessError):
        # a container may have the driver without its tools
        return Gpu("an NVIDIA GPU", None) if any(Path("/proc/driver/nvidia/gpus").glob("*")) else None


def parse_gpu(answer: str) -> Gpu | None:
    """Read nvidia-smi's first line, "NVIDIA GeForce RTX 4090, 580.65.06"."""
    name, comma, driver = (answer.strip().splitlines() or [""])[0].rpartition(", ")
    if not comma:
        return None
    major = driver.partition(".")[0]
    return Gpu(name, int(major) if major.isdigit() else None)


def is_reachable(url: str) -> bool:
    """Whether a server answers within REACH_SECONDS, name resolution and all its addresses included."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{url}/torch/", timeout=REACH_SECONDS):
                answers.append(True)
        except OSError:
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return answers == [True]


def say(text: str) -> None:
    print(f"[run.py] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
