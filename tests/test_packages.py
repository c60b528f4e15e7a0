"""What the program imports is what it installs: pinned, listed, and named in NOTICE."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1]
# Used where the user has installed them, never required. The index has another package named nunchaku.
OPTIONAL = {"nunchaku", "triton", "flash-attn", "flash-attn-interface", "sageattention", "xformers", "onnxruntime"}
OURS = {"models", "shared", "training", "tests", "run", "wgp"}


def requirements(name: str) -> dict[str, str]:
    """Package (normalised) -> version specification of a requirements file, without the files it includes."""
    lines = (line.partition("#")[0].strip() for line in (PROGRAM / name).read_text(encoding="utf-8").splitlines())
    found = (re.fullmatch(r"([\w.-]+)(.*)", line) for line in lines if line and not line.startswith("-r "))
    return {normalised(match[1]): match[2] for match in found if match}


def normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def imported_packages(*folders: str) -> dict[str, str]:
    """Third-party package -> the first file that imports it."""
    distributions = packages_distributions()
    found: dict[str, str] = {}
    for path in sorted(path for folder in folders for path in PROGRAM.glob(folder)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - OURS - sys.stdlib_module_names:
                for package in distributions.get(top, [top])[:1]:
                    found.setdefault(normalised(package), path.relative_to(PROGRAM).as_posix())
    return found


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned(name: str) -> None:
    assert {package for package, version in requirements(name).items() if not version.startswith("==")} == set()


def test_what_the_program_imports_is_in_its_requirements() -> None:
    imported = imported_packages("wgp.py", "shared/**/*.py", "models/**/*.py")

    allowed = requirements("requirements.txt").keys() | OPTIONAL
    assert {package: file for package, file in imported.items() if package not in allowed} == {}


def test_what_tests_and_training_import_is_in_the_requirements() -> None:
    listed = requirements("requirements.txt").keys() | requirements("requirements-dev.txt").keys() | OPTIONAL
    imported = imported_packages("tests/**/*.py", "training/**/*.py")

    assert {package: file for package, file in imported.items() if package not in listed} == {}


def test_the_statistics_package_named_nunchaku_is_never_installed() -> None:
    assert "nunchaku" not in requirements("requirements.txt") | requirements("requirements-dev.txt")


def test_notice_names_every_package_of_the_program() -> None:
    notice = (PROGRAM / "NOTICE").read_text(encoding="utf-8")

    assert [package for package in requirements("requirements.txt") if package not in normalised(notice)] == []
