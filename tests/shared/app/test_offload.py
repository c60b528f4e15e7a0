"""Placing whole models, choosing an offloader by size, and the budgets handed to mmgp."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared.app.device import DeviceInfo
from shared.app.memory_plan import MemoryPlan
from shared.app.offload import (
    ALIGNMENT,
    MIB,
    PROFILES,
    DirectPlacement,
    align_integer_weights,
    automatic_profile,
    budgets_mib,
    find_profile,
    make_offloader,
    weight_bytes,
)
from shared.app.streamer import StreamOffload
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import UserError
from shared.quant.formats import format_of, layers_of
from shared.quant.linear import PackedLinear
from shared.quant.packing import Packed
from shared.quant.targets import targets
from tests.support.fake_cuda import fake_cuda

GIB = 2**30
CPU = DeviceInfo("cpu", "a CPU", None, 16 * GIB, "")

# The published 6B model in bfloat16: 6.2, 4.0 and 0.08 billion numbers.
BF16 = {"transformer": int(12.3e9), "text_encoder": int(7.9e9), "vae": int(0.17e9)}
INT4 = {"transformer": int(4.5e9), "text_encoder": int(7.9e9), "vae": int(0.17e9)}


def planned(engine: str, **changes: Any) -> MemoryPlan:
    known = {"reason": "", "peaks_mb": {}, "ram_mb": 0.0, "vram_mb": 0.0, "sentences": (), "step_seconds": {}}
    return MemoryPlan(engine=engine, **known | {"gpu_bytes": 8 * GIB} | changes)  # type: ignore[arg-type]


def gpu(gibibytes: float) -> DeviceInfo:
    return DeviceInfo("cuda", "a GPU", 89, int(gibibytes * GIB), "")


# -- placing ------------------------------------------------------------------------------------------------------


def test_on_a_cpu_modules_stay_where_they_are_and_are_ready_to_run() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    weight = module[0].weight
    placement = DirectPlacement("cpu")

    placement.place({"transformer": module})

    assert module[0].weight is weight
    assert not module.training
    assert not weight.requires_grad
    assert placement.device == torch.device("cpu")
    assert "in RAM" in placement.describe()


def test_everything_is_resident_on_a_gpu_and_nothing_after_release() -> None:
    modules = {"transformer": nn.Linear(64, 64), "vae": nn.Conv2d(3, 8, 3)}
    with fake_cuda() as device:
        x = torch.randn(2, 64, device="cuda")
        placement = DirectPlacement("cuda")
        placement.place(modules)
        result = modules["transformer"](x)
        resident = device.resident()
        placement.release()
        left = device.resident()
        kept = modules["transformer"].weight.device

    assert result.shape == (2, 64)
    assert resident == sum(weight_bytes(m) for m in modules.values())
    assert left == 0
    assert kept == torch.device("cpu")


def test_a_model_nobody_uses_any_more_is_dropped_without_travelling_back() -> None:
    with fake_cuda() as device:
        module = nn.Linear(64, 64)
        placement = DirectPlacement("cuda")
        placement.place({"transformer": module})
        del module
        gc.collect()

        assert device.resident() == 0


def test_placing_twice_is_refused() -> None:
    placement = DirectPlacement("cpu")
    placement.place({})

    with pytest.raises(RuntimeError, match="release"):
        placement.place({})


def test_an_offloader_can_place_again_after_release() -> None:
    placement = DirectPlacement("cpu")
    placement.place({"vae": nn.Linear(2, 2)})
    placement.release()

    placement.place({"vae": nn.Linear(2, 2)})


# -- aligned integers ---------------------------------------------------------------------------------------------


def unaligned(values: torch.Tensor) -> torch.Tensor:
    """The same numbers at an address that is not a multiple of 16."""
    memory = torch.empty(values.nbytes + ALIGNMENT, dtype=torch.int8).numpy()
    start = (3 - memory.ctypes.data) % ALIGNMENT
    view = torch.frombuffer(memory, dtype=values.dtype, offset=start, count=values.numel()).view(values.shape)
    view.copy_(values)
    assert view.data_ptr() % ALIGNMENT == 3
    return view


def test_unaligned_integer_buffers_and_parameters_are_copied_to_aligned_ones() -> None:
    module = nn.Module()
    values = torch.arange(-60, 60, dtype=torch.int8).view(12, 10)
    module.register_buffer("qweight", unaligned(values))
    module.codes = nn.Parameter(unaligned(values).view(torch.uint8), requires_grad=False)
    module.register_buffer("scale", torch.ones(12))
    parent = nn.Sequential(module)

    copied = align_integer_weights(parent)

    assert copied == 2
    assert module.qweight.data_ptr() % ALIGNMENT == module.codes.data_ptr() % ALIGNMENT == 0
    assert torch.equal(module.qweight, values)
    assert torch.equal(module.codes.view(torch.int8), values)
    assert align_integer_weights(parent) == 0


def test_int8_weights_of_optimum_quanto_are_aligned_inside_their_wrapper() -> None:
    quanto = pytest.importorskip("optimum.quanto")
    module = nn.Sequential(nn.Linear(32, 16, bias=False))
    quanto.quantize(module, weights=quanto.qint8)
    quanto.freeze(module)
    x = torch.randn(3, 32)
    expected = module(x)
    module[0].weight._data = unaligned(module[0].weight._data)

    DirectPlacement("cpu").place({"transformer": module})

    assert module[0].weight._data.data_ptr() % ALIGNMENT == 0
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["int8", "fp8", "mxfp8", "nvfp4", "svdq_int4"])
def test_our_own_packed_weights_compute_where_they_lie_and_are_not_copied(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "layer.safetensors"
    tensors = targets()[kind].quantize(torch.randn(128, 256), 1, 32)
    save_file({f"blocks.0.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}, path)
    read = layers_of(checkpoint := Checkpoint.open(path), checkpoint.tensors)["blocks.0"]
    found = format_of(read)
    assert found is not None
    packed = found.read(read)
    x = torch.randn(40, 256).bfloat16()
    expected = PackedLinear(packed, None, torch.bfloat16)(x)
    moved = {name: unaligned(tensor) for name, tensor in packed.tensors.items()}
    layer = PackedLinear(Packed(packed.packing, packed.shape, moved), None, torch.bfloat16)

    DirectPlacement("cpu").place({"transformer": layer})

    assert {name: t.data_ptr() for name, t in layer.packed.tensors.items()} == {
        n: t.data_ptr() for n, t in moved.items()
    }
    assert torch.equal(layer(x), expected)


def test_packed_weights_are_counted_at_their_packed_size() -> None:
    module = nn.Module()
    module.register_buffer("qweight", torch.zeros(8, 4, dtype=torch.uint8))
    module.bias = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))

    assert weight_bytes(module) == 32 + 16


# -- choosing -----------------------------------------------------------------------------------------------------


def test_the_profiles_are_wan2gps_each_with_a_sentence() -> None:
    assert list(PROFILES) == [1, 2, 3, 3.5, 4, 4.5, 5]
    assert all(profile.number == number and profile.sentence.endswith(".") for number, profile in PROFILES.items())


@pytest.mark.parametrize("automatic", [None, 0, -1])
def test_no_profile_leaves_the_choice_to_the_program(automatic: float | None) -> None:
    assert find_profile(automatic) is None


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no profile 6\. Choose from 1, 2, 3, 3\.5, 4, 4\.5, 5"):
        find_profile(6)


def test_without_an_nvidia_gpu_everything_is_placed_directly() -> None:
    assert isinstance(make_offloader(CPU, planned("direct"), 4), DirectPlacement)
    assert isinstance(make_offloader(CPU, None), DirectPlacement)


def test_a_plan_with_room_for_everything_puts_it_on_the_gpu() -> None:
    offloader = make_offloader(gpu(32), planned("direct"))

    assert isinstance(offloader, DirectPlacement)
    assert offloader.device.type == "cuda"


def test_a_plan_to_stream_is_followed_with_its_budget() -> None:
    offloader = make_offloader(gpu(8), planned("stream", budget=3 * GIB))

    assert isinstance(offloader, StreamOffload)
    assert offloader.budget == 3 * GIB


def test_a_cap_holds_for_torch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)

    make_offloader(gpu(16), planned("stream", budget=GIB, cap=4 * GIB))
    make_offloader(gpu(16), planned("stream", budget=GIB))

    assert shares == [0.25]


@pytest.mark.parametrize(
    ("memory", "ram", "weights", "number"),
    [
        (24, 64, BF16, None),
        (16, 64, BF16, 1),
        (16, 32, BF16, 3),
        (16, 16, BF16, 3.5),
        (12, 64, BF16, 2),
        (12, 32, BF16, 4),
        (8, 16, BF16, 5),
        (12, 32, INT4, 1),  # a smaller transformer makes room: every model fits by itself
        (0.25, 16, {"transformer": 2**20}, 2),  # no room to compute in: streamed rather than refused
    ],
)
def test_the_profile_follows_from_the_sizes(
    memory: float, ram: int, weights: dict[str, int], number: float | None
) -> None:
    profile, reason = automatic_profile(int(memory * GIB), ram * GIB, weights)

    assert (profile.number if profile else None) == number
    assert "GiB on the GPU" in reason


def test_unknown_sizes_take_profile_4() -> None:
    profile, _ = automatic_profile(24 * GIB, 64 * GIB, None)

    assert profile is PROFILES[4]


def test_without_mmgp_weights_are_streamed_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "shared.app.mmgp_engine", raising=False)
    monkeypatch.setitem(sys.modules, "mmgp", None)  # makes `import mmgp` raise ImportError

    with caplog.at_level(logging.WARNING):
        offloader = make_offloader(gpu(24), planned("mmgp", profile=PROFILES[4], budget=GIB))

    assert isinstance(offloader, StreamOffload)
    assert "mmgp does not load here" in caplog.text


@pytest.mark.parametrize("plan", [planned("mmgp", profile=PROFILES[3.5]), None])
def test_a_profile_asked_for_on_a_gpu_uses_mmgp(plan: MemoryPlan | None) -> None:
    pytest.importorskip("mmgp")

    offloader = make_offloader(gpu(24), plan, 3.5)

    assert offloader.name == "mmgp"
    assert offloader.device.type == "cuda"
    assert PROFILES[3.5].sentence in offloader.describe()


# -- budgets ------------------------------------------------------------------------------------------------------


def test_streaming_profiles_keep_wan2gps_figures() -> None:
    assert budgets_mib(PROFILES[4], BF16, 12 * GIB) == {"transformer": 100, "text_encoder": 100, "vae": 3000}
    assert budgets_mib(PROFILES[5], BF16, 12 * GIB)["vae"] == 1000


def test_whole_models_have_no_limit_where_they_fit() -> None:
    assert budgets_mib(PROFILES[1], BF16, 24 * GIB) == {"transformer": 0, "text_encoder": 0, "vae": 0}


def test_a_whole_model_that_leaves_no_room_to_compute_gets_a_limit() -> None:
    budgets = budgets_mib(PROFILES[3], BF16, 12 * GIB)

    # 12 GiB less 3 GiB for activations; the text encoder's 7.4 GiB fit
    assert budgets == {"transformer": 9 * GIB // MIB, "text_encoder": 0, "vae": 0}


def test_no_limit_is_above_mmgps_own_share_of_the_memory() -> None:
    budgets = budgets_mib(PROFILES[1], {"transformer": 100 * GIB}, 48 * GIB)

    assert budgets["transformer"] == int(0.8 * 48 * GIB / MIB)


# -- cost ---------------------------------------------------------------------------------------------------------


def test_the_profile_table_is_read_without_importing_torch() -> None:
    code = "import sys; from shared.app.offload import PROFILES; print(len(PROFILES), 'torch' in sys.modules)"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.split() == ["7", "False"]
