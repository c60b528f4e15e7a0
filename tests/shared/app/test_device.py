"""Device, number type and attention: what is chosen, and that the reason says why."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util

import pytest
import torch

from shared.app import device as device_module
from shared.app.device import DeviceInfo, attention_candidates, choose_attention, choose_dtype, detect
from shared.quant.errors import UserError
from tests.support.fake_cuda import fake_cuda

CPU = DeviceInfo("cpu", "a CPU", None, 16 << 30, "")
ADA = DeviceInfo("cuda", "an RTX 4090", 89, 24 << 30, "")
TURING = DeviceInfo("cuda", "an RTX 2080", 75, 8 << 30, "")
MAC = DeviceInfo("mps", "Apple GPU", None, 16 << 30, "")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_cpu_is_taken_and_the_reason_names_the_torch_build() -> None:
    found = detect()

    assert found.kind == "cpu"
    assert found.capability is None
    assert found.total_memory is not None and found.total_memory > 1 << 30
    assert torch.__version__ in found.reason


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("wanted", ["cuda", "mps"])
def test_insisting_on_an_absent_gpu_is_the_users_mistake(wanted: str) -> None:
    with pytest.raises(UserError, match="No usable"):
        detect(wanted)


def test_a_gpu_is_found_with_name_memory_and_capability() -> None:
    with fake_cuda(total_memory=24 << 30, capability=(8, 9)):
        found = detect()

    assert (found.kind, found.capability, found.total_memory) == ("cuda", 89, 24 << 30)
    assert "24.0 GiB" in found.reason and "8.9" in found.reason


def test_the_cpu_can_be_asked_for_beside_a_gpu() -> None:
    with fake_cuda():
        found = detect("CPU")

    assert (found.kind, found.reason) == ("cpu", "asked for")


def test_a_gpu_that_this_torch_has_no_code_for_is_passed_over_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with fake_cuda(capability=(6, 1)):
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "compute_120"])
        found = detect()
        with pytest.raises(UserError, match=r"holds no code for Pretended GPU \(compute capability 6\.1\)"):
            detect("cuda")

    assert found.kind == "cpu"
    assert "6.1" in found.reason


@pytest.mark.parametrize(
    ("capability", "architectures", "serves"),
    [
        (89, ["sm_80", "sm_90"], True),  # machine code runs on later minor versions
        (86, ["sm_89"], False),
        (90, ["sm_90a", "sm_100f"], True),
        (120, ["compute_90"], True),  # portable code is translated for later GPUs
        (61, ["sm_75", "compute_75"], False),
        (94, ["gfx942"], True),  # AMD: names are not comparable
    ],
)
def test_a_torch_build_serves_gpus_of_its_major_version(
    capability: int, architectures: list[str], serves: bool
) -> None:
    assert device_module._binary_serves(capability, architectures) is serves


def test_a_gpu_number_points_to_the_environment_variable() -> None:
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1"):
        detect("cuda:1")


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(UserError, match='"auto", "cuda", "mps" or "cpu"'):
        detect("tpu")


def test_bfloat16_is_computed_where_the_gpu_multiplies_it_natively() -> None:
    assert choose_dtype(ADA)[0] is torch.bfloat16


def test_older_gpus_compute_in_float16_and_the_reason_names_the_capability() -> None:
    dtype, reason = choose_dtype(TURING)

    assert dtype is torch.float16
    assert "7.5" in reason


@pytest.mark.parametrize(("new_enough", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_apple_gpus_compute_in_bfloat16_from_macos_14_on(
    monkeypatch: pytest.MonkeyPatch, new_enough: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: new_enough)

    assert choose_dtype(MAC)[0] is dtype


@pytest.mark.parametrize(
    ("features", "dtype", "named"),
    [
        ({"avx2": True, "avx512_bf16": True}, torch.bfloat16, "AVX512-BF16"),
        ({"amx_bf16": True}, torch.bfloat16, "AMX"),
        ({"bf16": True}, torch.bfloat16, "Arm BF16"),
        ({"avx2": True, "avx512_bf16": False}, torch.float32, "no bfloat16"),
        ({}, torch.float32, "no bfloat16"),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], dtype: torch.dtype, named: str
) -> None:
    monkeypatch.setattr(device_module, "_cpu_features", lambda: features)

    chosen, reason = choose_dtype(CPU)

    assert chosen is dtype
    assert named in reason


@pytest.mark.parametrize("requested", ["", "auto", "sdpa", "SDPA"])
def test_torchs_own_attention_is_always_there(requested: str) -> None:
    assert choose_attention(requested, None, CPU)[0] == "sdpa"


def test_a_presets_rule_wins_over_the_request_and_the_reason_says_so() -> None:
    mode, reason = choose_attention("sage2", "sdpa", ADA)

    assert mode == "sdpa"
    assert "instead of sage2" in reason


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Attention packages that count as installed, with their versions; none at first."""
    installed: dict[str, str] = {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed[name])
    return installed


@pytest.mark.usefixtures("packages")
def test_a_rule_for_an_attention_that_cannot_be_used_is_passed_over_by_name() -> None:
    mode, reason = choose_attention("sdpa", "sage2", ADA)

    assert mode == "sdpa"
    assert "the preset's sage2 cannot be used: the package sageattention is not installed" in reason


@pytest.mark.usefixtures("packages")
def test_an_attention_whose_package_is_missing_names_the_package() -> None:
    with pytest.raises(UserError, match="package sageattention is not installed"):
        choose_attention("sage2", None, ADA)


def test_on_a_gpu_all_that_round_no_more_than_torch_race(packages: dict[str, str]) -> None:
    packages |= {"flash_attn": "2.8", "flash_attn_interface": "3.0", "sageattention": "2.2"}
    hopper = dataclasses.replace(ADA, capability=90)

    assert attention_candidates(ADA) == ("sdpa", "cudnn", "flash")
    assert attention_candidates(hopper) == ("sdpa", "cudnn", "flash", "flash3")
    mode, reason = choose_attention("auto", None, ADA)
    assert (mode, reason) == ("auto", "the fastest of sdpa, cudnn, flash when the model is loaded")


def test_what_spoils_a_models_pictures_is_refused_to_rule_and_request(packages: dict[str, str]) -> None:
    packages["sageattention"] = "2.2"

    assert choose_attention("sage2", None, ADA)[0] == "sage2"
    with pytest.raises(UserError, match="it spoils this model's pictures"):
        choose_attention("sage2", None, ADA, ["sage", "sage2"])
    assert choose_attention("sdpa", "sage2", ADA, ["sage", "sage2"])[0] == "sdpa"


def test_an_attention_that_has_no_code_for_the_card_says_for_which(packages: dict[str, str]) -> None:
    packages["flash_attn_interface"] = "3.0"

    with pytest.raises(UserError, match=r"needs compute capability 9\.0, this GPU has 8\.9"):
        choose_attention("flash3", None, ADA)


def test_sage_of_the_other_generation_is_told_apart(packages: dict[str, str]) -> None:
    packages["sageattention"] = "1.0.6"

    assert choose_attention("sage", None, ADA)[0] == "sage"
    with pytest.raises(UserError, match=r"sageattention 1\.0\.6 is installed, which is sage"):
        choose_attention("sage2", None, ADA)


def test_gpu_attention_on_a_cpu_says_what_it_needs() -> None:
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and the device is cpu"):
        choose_attention("xformers", None, CPU)


def test_an_unknown_attention_names_the_closest_known_one() -> None:
    with pytest.raises(UserError, match="Did you mean 'flash'"):
        choose_attention("flush", None, CPU)
