"""Copied into a Wan2GP checkout, models/z_image with shared/ops, quant and samplers runs there, and needs no more.

The host is a stand-in (tests/support/dropin_host.py), in a folder that holds nothing else of this program.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1]
DEMO = PROGRAM / "models" / "z_image" / "demo"
COPIED = ("models/z_image", "shared/ops", "shared/quant", "shared/samplers")

# The host's own modules that ours may import: names and arguments of Wan2GP, the least that works.
HOST_MODULES = {
    "shared/utils/files_locator.py": """
def locate_file(file_name, create_path_if_none=False, error_if_none=True, extra_paths=None):
    if error_if_none:
        raise Exception(f"{file_name} was not found")
    return None

def locate_folder(folder_name, error_if_none=True):
    if error_if_none:
        raise Exception(f"{folder_name} was not found")
    return None
""",
    "shared/utils/hf.py": """
def build_hf_url(repo_id, *parts):
    return "https://huggingface.co/" + repo_id + "/resolve/main/" + "/".join(part for part in parts if part)
""",
    "shared/RGB_factors.py": """
def get_rgb_factors(model_family, model_type=None, sub_family=None):
    return ([[0.0, 0.1, 0.2]] * 16, [0.0, 0.0, 0.0]) if model_family == "flux" else (None, None)
""",
    # Exists in the host only, spelt like this: tells a LoRA's strength at each step.
    "shared/utils/loras_mutipliers.py": """
schedules = []

def update_loras_slists(transformer, slists, steps, *args, **kwargs):
    schedules.append([slists, steps])
""",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three copied packages and the host's modules. No __init__.py above them, as in Wan2GP."""
    folder = tmp_path_factory.mktemp("wan2gp")
    for package in COPIED:
        shutil.copytree(PROGRAM / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    for name, source in HOST_MODULES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source, encoding="utf-8")
    return folder


def run_host(host: Path, *arguments: str) -> dict[str, Any]:
    script = PROGRAM / "tests" / "support" / "dropin_host.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=host, env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def started(host: Path) -> dict[str, Any]:
    return run_host(host)


@pytest.fixture(scope="module")
def drawn(host: Path) -> dict[str, Any]:
    if not (DEMO / "transformer.safetensors").is_file():
        pytest.skip("the demo weights are not in this checkout")
    return run_host(host, str(DEMO))


def test_a_host_starts_up_without_importing_anything_heavy(started: dict[str, Any]) -> None:
    assert started["family"] == "z_image"
    assert started["infos"] == {"z_image": [1120, "Z-Image"]}
    assert started["heavy"] == []


def test_every_architecture_answers_the_whole_contract(started: dict[str, Any]) -> None:
    assert "z_image" in started["types"]
    for answers in started["by_type"].values():
        assert {"image_outputs", "guidance_max_phases", "text_encoder_URLs"} <= set(answers["definition"])
        assert answers["settings"]["image_mode"] == 1
        assert answers["settings"]["prompt"] == "kept"
        assert answers["lora_dir"] == "mine"
        assert answers["preview"] == [16, 3, 3]
        assert answers["files"]


def test_nothing_but_the_copied_packages_and_the_hosts_modules_is_imported(host: Path, drawn: dict[str, Any]) -> None:
    allowed = tuple(str(host / part) for part in (*COPIED, *HOST_MODULES))

    strangers = {name: path for name, path in drawn["origins"].items() if not path.startswith(allowed)}

    assert strangers == {}
    assert "models.z_image.transformer" in drawn["origins"]


def test_the_host_gets_a_pipeline_object_and_its_modules(drawn: dict[str, Any]) -> None:
    result = drawn["drawn"]

    assert result["modules"] == {"transformer": True, "text_encoder": True, "vae": True}
    assert result["denoiser"]
    assert result["extra_loras"] == [[], []]


def test_a_batch_is_drawn_as_the_host_wants_it(drawn: dict[str, Any]) -> None:
    result = drawn["drawn"]

    assert result["shape"] == [3, 2, 64, 64]
    assert -1 <= result["range"][0] < result["range"][1] <= 1
    assert result["spread"] > 0.05  # no flat picture


def test_progress_is_reported_as_the_host_wants_it(drawn: dict[str, Any]) -> None:
    calls = drawn["drawn"]["calls"]

    assert calls == [[-1, None, 2], [0, [16, 1, 8, 8], None], [1, [16, 1, 8, 8], None]]


def test_an_interrupted_generation_returns_nothing(drawn: dict[str, Any]) -> None:
    assert drawn["drawn"]["interrupted"]


def test_the_hosts_loras_learn_each_step(drawn: dict[str, Any]) -> None:
    pytest.importorskip("mmgp")

    assert drawn["drawn"]["lora_steps"][0] == [{"phase1": [1.0]}, 2]
    assert drawn["drawn"]["lora_step"] in (0, 1)
