"""Z-Image streamed through a pretended GPU: the pictures of weights that all stay there, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from safetensors.torch import save_file

from models.z_image.z_image_main import model_factory
from shared.app.offload import DirectPlacement, weight_bytes
from shared.app.stream_schedule import ALIGNMENT
from shared.app.streamer import StreamOffload
from shared.quant.linear import PackedLinear
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.fake_lane import FakeLane
from tests.support.garbage import quick_collections
from tests.support.packed_model import lora_file
from tests.support.tiny_model import TINY, randomise

# Two captions of different length at once, guidance, and an oblong picture decoded in two tiles.
REQUEST: dict[str, Any] = {
    "input_prompt": "a red circle on a green ground", "n_prompt": "blue", "seed": 7, "width": 64, "height": 32,
    "sampling_steps": 2, "guide_scale": 2.0, "shift": 3.0, "VAE_tile_size": 4,
}  # fmt: skip
CONTROLLED: dict[str, Any] = {
    "input_prompt": "a fox", "seed": 3, "sampling_steps": 2, "width": 32, "height": 32,
    "input_frames": torch.linspace(-1, 1, 3 * 32 * 32).view(3, 1, 32, 32), "context_scale": [0.8],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """release() collects garbage; without this each time looks through all of torch and transformers."""
    with quick_collections():
        yield


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def load(*files: Path) -> model_factory:
    return model_factory(model_filename=list(files), dtype=torch.bfloat16, VAE_dtype=torch.float32)


def modules_of(model: model_factory) -> dict[str, Any]:
    return {name: getattr(model, name) for name in ("transformer", "text_encoder", "vae")}


def resident(model: model_factory, request: dict[str, Any]) -> torch.Tensor:
    """The picture with everything on the GPU; the model is on the CPU again afterwards."""
    offloader = DirectPlacement("cuda")
    offloader.place(modules_of(model))
    model.device = offloader.device
    picture = model.generate(**request)
    offloader.release()
    assert picture is not None
    return picture


def least_budget(model: model_factory) -> int:
    """Room for two blocks of the largest kind and what belongs to none, of the transformer."""
    blocks = [*model.transformer.layers, *model.transformer.noise_refiner, *model.transformer.context_refiner]
    blocks += model.transformer.control.layers if model.transformer.control is not None else []
    largest = max(map(weight_bytes, blocks))
    rest = weight_bytes(model.transformer) - sum(map(weight_bytes, blocks))
    return rest + 2 * largest + 64 * ALIGNMENT


def streamed(model: model_factory, request: dict[str, Any], *, lock: int = 1 << 30, late: bool = True) -> torch.Tensor:
    """The picture with room for two blocks, drawn twice: the second time everything is in the rhythm."""
    lane = FakeLane(late=late)
    offloader = StreamOffload(budget=least_budget(model), lock=lock, lane=lambda: lane)
    offloader.place(modules_of(model))
    model.device = offloader.device
    first, again = model.generate(**request), model.generate(**request)
    assert first is not None and again is not None
    assert torch.equal(first, again)
    assert "blocks, the others through 2 buffers" in offloader.describe()
    assert lane.peak <= offloader.budget
    offloader.release()
    assert lane.resident() == 0
    return first


@pytest.mark.parametrize(("lock", "late"), [(0, True), (1 << 30, False)])
def test_guided_pictures_in_tiles(model_folder: Path, gpu: FakeCuda, lock: int, late: bool) -> None:
    model = load(model_folder / "transformer.safetensors")

    expected = resident(model, REQUEST)

    assert torch.equal(streamed(model, REQUEST, lock=lock, late=late), expected)


def test_a_control_branch_is_streamed_along(model_folder: Path, gpu: FakeCuda, tmp_path: Path) -> None:
    branch = ZImageControlNetModel(
        control_layers_places=[0, 1], control_refiner_layers_places=[0], control_in_dim=33,
        add_control_noise_refiner="control_noise_refiner", dim=TINY.dim, n_refiner_layers=1, n_heads=3, n_kv_heads=3,
    )  # fmt: skip
    path = tmp_path / "control.safetensors"
    save_file({n: t.contiguous() for n, t in randomise(branch, 31).state_dict().items()}, path)
    model = load(model_folder / "transformer.safetensors", path)
    uncontrolled = {name: value for name, value in CONTROLLED.items() if name not in ("input_frames", "context_scale")}

    expected = resident(model, CONTROLLED)

    assert torch.equal(streamed(model, CONTROLLED), expected)
    assert not torch.equal(resident(model, uncontrolled), expected)


def test_packed_weights_with_a_lora_whose_strength_changes(
    model_folder: Path, reference_transformer: ZImageTransformer2DModel, gpu: FakeCuda, tmp_path: Path
) -> None:
    state: dict[str, torch.Tensor] = {}
    for name, tensor in reference_transformer.state_dict().items():
        if name.startswith("layers.") and name.endswith(".weight") and tensor.ndim == 2 and "adaLN" not in name:
            scale = (tensor.abs().amax(1, keepdim=True) / 127).bfloat16()
            state[f"{name}._data"] = (tensor / scale).round().clamp(-127, 127).to(torch.int8)
            state[f"{name}._scale"] = scale
        else:
            state[name] = tensor.contiguous()
    path, lora = tmp_path / "int8.safetensors", tmp_path / "lora.safetensors"
    save_file(state, path)
    lora_file(lora)
    for name in ("text_encoder", "vae"):
        (tmp_path / name).symlink_to(model_folder / name)
    model = load(path)
    assert any(isinstance(m, PackedLinear) for m in model.transformer.layers.modules())
    without = resident(model, REQUEST)
    assert model.load_loras([lora], [[[0.7, -0.4]]])[0].matched

    expected = resident(model, REQUEST)

    assert torch.equal(streamed(model, REQUEST), expected)
    assert not torch.equal(expected, without)
