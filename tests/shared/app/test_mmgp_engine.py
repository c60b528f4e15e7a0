"""mmgp on a pretended GPU: same numbers as the plain CPU, really streamed, and gone without a trace after release."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from shared.app.offload import MIB, PROFILES, Profile, weight_bytes
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.garbage import quick_collections
from tests.support.streamed_network import Layer

pytest.importorskip("mmgp")
from shared.app.mmgp_engine import MmgpOffload, restore_safetensors

BLOCKS = 12
WIDTH = 384
BLOCK_BYTES = 2 * WIDTH * WIDTH * 2  # two bfloat16 linears

# A GPU on which the networks below (7 MiB each) get a limit of 2 MiB.
SMALL_GPU = 8 * 2**20
LIMIT = 2 * 2**20


class Network(nn.Module):
    """A stack like a transformer's, with a parameter of its own, a packed buffer, and a second entry point."""

    _offload_hooks: ClassVar[list[str]] = ["embed"]  # mmgp accepts nothing but a list

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("codes", torch.arange(WIDTH).to(torch.uint8))
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(BLOCKS))

    def embed(self, x: Tensor) -> Tensor:
        return x + self.token + self.codes.to(self.token.dtype) / 256

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        # Like the timestep embedding, `t` is needed in all its float32 digits: bfloat16 would move the result.
        x = self.embed(x) * torch.sin(t * 1000).to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Called by another method than forward, as a VAE is; kept in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 64), nn.SiLU(), nn.Linear(64, 3))

    def decode(self, x: Tensor) -> Tensor:
        return self.inner(x.float())


def build() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    modules = {"transformer": Network().bfloat16(), "text_encoder": Network().bfloat16(), "vae": Decoder()}
    return {name: module.eval().requires_grad_(False) for name, module in modules.items()}


def run(modules: dict[str, nn.Module], device: torch.device | str) -> Tensor:
    """One pass through all modules, twice, as two steps would be."""
    x = torch.linspace(-1, 1, WIDTH, dtype=torch.bfloat16).repeat(4, 1).to(device)
    t = torch.tensor([0.8571], dtype=torch.float32).to(device)
    features = modules["text_encoder"].embed(x)
    for _ in range(2):
        x = modules["transformer"](x + features, t)
    return modules["vae"].decode(x)


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda(total_memory=8 << 30) as device:
        yield device


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """mmgp collects garbage at every turn; without this each time looks through all of torch and transformers."""
    with quick_collections():
        yield


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return run(build(), "cpu")


def place(number: float, modules: dict[str, nn.Module], total_memory: int | None = None) -> MmgpOffload:
    offloader = MmgpOffload(PROFILES[number], total_memory=total_memory)
    offloader.place(modules)
    return offloader


@pytest.mark.parametrize("number", PROFILES)
def test_every_profile_computes_exactly_what_the_cpu_computes(gpu: FakeCuda, expected: Tensor, number: float) -> None:
    modules = build()
    offloader = place(number, modules)

    result = run(modules, offloader.device)

    assert result.is_cuda
    assert torch.equal(result.cpu(), expected)


def test_a_whole_model_profile_uploads_each_model_once(gpu: FakeCuda) -> None:
    modules = build()
    place(1, modules)
    before = sum(gpu.uploads)

    run(modules, "cuda")

    inputs = 4 * WIDTH * 2 + 4
    assert sum(gpu.uploads) - before == sum(weight_bytes(m) for m in modules.values()) + inputs
    assert gpu.peak >= weight_bytes(modules["transformer"])


def test_a_limited_model_is_streamed_block_by_block(gpu: FakeCuda, expected: Tensor) -> None:
    modules = build()
    offloader = place(3, modules, total_memory=SMALL_GPU)

    result = run(modules, "cuda")

    assert offloader.budgets == {"transformer": LIMIT // MIB, "text_encoder": LIMIT // MIB, "vae": 0}
    assert torch.equal(result.cpu(), expected)
    # Two passes through 12 blocks that cannot all stay: some come twice, none stays out of the count.
    assert gpu.uploads.count(BLOCK_BYTES // 2) > 2 * BLOCKS
    assert gpu.peak <= LIMIT + BLOCK_BYTES < weight_bytes(modules["transformer"])


@pytest.mark.parametrize(("prefetch", "at_once", "ahead"), [(True, 2, 1), (False, 1, 0)])
def test_each_block_travels_once_per_pass(gpu: FakeCuda, prefetch: bool, at_once: int, ahead: int) -> None:
    modules = {"transformer": build()["transformer"]}
    profile = Profile(number=5, sentence="", resident={"*": 1}, pinned="none", prefetch=prefetch)
    MmgpOffload(profile).place(modules)

    for _ in range(2):
        modules["transformer"](torch.ones(1, WIDTH).bfloat16().cuda(), torch.ones(1).cuda())

    # The last block of a pass is followed by the first of the next.
    assert gpu.uploads.count(BLOCK_BYTES // 2) == 2 * (2 * BLOCKS + ahead)
    assert at_once * BLOCK_BYTES < gpu.peak < (at_once + 0.1) * BLOCK_BYTES


def test_float32_weights_stay_float32(gpu: FakeCuda) -> None:
    modules = build()

    place(4, modules)

    assert {p.dtype for p in modules["vae"].parameters()} == {torch.float32}


def test_weights_of_several_types_in_one_model_keep_them(gpu: FakeCuda) -> None:
    modules = build()
    modules["transformer"].layers[3].float()

    place(4, modules)

    assert modules["transformer"].layers[3].up.weight.dtype == torch.float32
    assert modules["transformer"].layers[4].up.weight.dtype == torch.bfloat16


def test_torchs_default_device_is_the_cpu_afterwards(gpu: FakeCuda) -> None:
    place(4, build())

    assert gpu.default_device == torch.device("cpu")
    assert torch.zeros(1).device == torch.device("cpu")


@pytest.mark.parametrize(("number", "pinned"), [(1, True), (4, True), (5, False)])
def test_weights_are_pinned_where_the_profile_says_so(gpu: FakeCuda, number: float, pinned: bool) -> None:
    modules = build()

    place(number, modules)

    assert modules["transformer"].token.is_pinned() is pinned
    assert modules["vae"].inner[0].weight.is_pinned() is (number == 1)


def test_a_model_that_is_not_contiguous_is_placed_unpinned(gpu: FakeCuda) -> None:
    modules: dict[str, nn.Module] = {"vae": nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)}

    place(1, modules)

    assert modules["vae"].weight.is_contiguous(memory_format=torch.channels_last)
    assert not modules["vae"].weight.is_pinned()


def test_what_mmgp_prints_goes_to_the_log(
    gpu: FakeCuda, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="shared.app.mmgp_engine"):
        place(4, build())

    assert capsys.readouterr().out == ""
    assert any("transformer" in record.getMessage() for record in caplog.records)


def test_after_release_the_gpu_is_empty_and_the_modules_are_as_before(gpu: FakeCuda, expected: Tensor) -> None:
    modules = build()
    before = {m: set(vars(m)) for top in modules.values() for m in top.modules()}
    offloader = place(2, modules, total_memory=SMALL_GPU)
    run(modules, "cuda")

    offloader.release()

    assert gpu.resident() == 0
    assert {m: set(vars(m)) for m in before} == before
    assert torch.equal(run(modules, "cpu"), expected)


def test_released_modules_can_be_placed_again(gpu: FakeCuda, expected: Tensor) -> None:
    modules = build()
    place(2, modules).release()

    place(5, modules, total_memory=SMALL_GPU)

    assert torch.equal(run(modules, "cuda").cpu(), expected)


def test_attributes_that_others_set_while_placed_survive_release(gpu: FakeCuda) -> None:
    modules = build()
    offloader = place(4, modules)
    modules["transformer"].layers[0].up.adapter = "mine"

    offloader.release()

    assert modules["transformer"].layers[0].up.adapter == "mine"


def test_placing_twice_is_refused(gpu: FakeCuda) -> None:
    offloader = place(4, build())

    with pytest.raises(RuntimeError, match="release"):
        offloader.place(build())


def test_a_failure_while_placing_leaves_modules_and_default_device_alone(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = build()
    before = {m: set(vars(m)) for top in modules.values() for m in top.modules()}

    def out_of_memory() -> None:
        raise MemoryError("pretended")

    monkeypatch.setattr(torch.cuda, "empty_cache", out_of_memory)  # the last thing that placing does
    with pytest.raises(MemoryError, match="pretended"):
        place(4, modules)

    assert {m: set(vars(m)) for m in before} == before
    assert gpu.default_device == torch.device("cpu")


def test_slots_for_mmgps_own_loras_are_made_only_when_wanted(gpu: FakeCuda, expected: Tensor) -> None:
    modules = build()
    # mmgp 3.8.2 makes no slots in a model with both parameters of its own and further entry points.
    modules["transformer"]._offload_hooks = []
    offloader = MmgpOffload(PROFILES[4], loras=["transformer"])
    offloader.place(modules)

    assert hasattr(modules["transformer"], "_loras_model_data")
    assert not hasattr(modules["text_encoder"], "_loras_model_data")
    assert torch.equal(run(modules, "cuda").cpu(), expected)

    offloader.release()

    assert torch.equal(run(modules, "cpu"), expected)


# -- a real GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("number", PROFILES)
def test_a_real_gpu_agrees_with_the_cpu_and_gets_its_memory_back(expected: Tensor, number: float) -> None:
    before = torch.cuda.memory_allocated()
    modules = build()
    # Pretend it to be small, so that profiles which keep whole models stream here too.
    offloader = place(number, modules, total_memory=SMALL_GPU)

    result = run(modules, "cuda").cpu()
    offloader.release()

    # bfloat16 products are summed in another order on a GPU: 1/256 per rounding, a few of them in a row.
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)
    assert torch.cuda.memory_allocated() - before < MIB


# -- the safetensors functions that mmgp replaces -----------------------------------------------------------------


def test_no_loaded_module_is_left_with_mmgps_safetensors_reader() -> None:
    assert restore_safetensors() == []


def test_models_load_from_safetensors_files_after_the_engine_was_imported(tmp_path: Path) -> None:
    # In a process of its own, which imports transformers for the first time through mmgp.
    code = """
import sys
import shared.app.mmgp_engine
import safetensors
from transformers import Qwen3Config, Qwen3Model
assert safetensors.safe_open.__module__ != "mmgp.safetensors2"
config = Qwen3Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=1, num_key_value_heads=1, head_dim=8)
model = Qwen3Model(config)
model.save_pretrained(sys.argv[1])
again = Qwen3Model.from_pretrained(sys.argv[1])
assert again.norm.weight.equal(model.norm.weight)
print("loaded")
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )

    assert result.stdout.strip().endswith("loaded"), result.stderr
