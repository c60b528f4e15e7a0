"""Empty preset folders, and the program's own model families."""

from pathlib import Path

import pytest

from shared.app.families import load_families
from tests.support.preset_folders import Folders

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def families():
    return load_families(ROOT / "models")


@pytest.fixture
def folders(tmp_path, families):
    return Folders(tmp_path, families)
