"""Packed rows that stand apart in a file stay mapped until they come to lie as one matrix on the GPU: the same bits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from diffusers import ZImageTransformer2DModel
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import save_file

from models.z_image import loader
from models.z_image.loader import load_transformer
from models.z_image.transformer import ZImageTransformer
from models.z_image.z_image_main import model_factory
from shared.app.offload import PROFILES, DirectPlacement, Offloader
from shared.app.streamer import StreamOffload
from shared.quant import kernels, mapping, pieces
from shared.quant.formats import comfy_int8, fp8_plain, fp8_scaled, mxfp8, nvfp4
from shared.quant.kernels import torch_fp8, torch_int8
from shared.quant.kernels.resolve import resolve
from shared.quant.linear import PackedLinear
from shared.quant.packings.other_type import OtherType
from shared.quant.stacked_linear import StackedLinear
from tests.support.cpu_kernels import skip_where_cpus_lack
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.fake_lane import FakeLane
from tests.support.garbage import quick_collections
from tests.support.gguf_blocks import random_blocks
from tests.support.packed_model import State, linears_of, lora_file, official_names
from tests.support.tiny_model import TINY

GPU = torch.device("cuda")
MIB = 2**20
SMALL = {"scale", "tensor_scale", "nested_offset"}  # a number for a row or more
REQUEST: dict[str, Any] = {
    "input_prompt": "a red circle", "seed": 7, "width": 32, "height": 32, "sampling_steps": 1, "shift": 3.0,
}  # fmt: skip
Quantize = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]

OFFLOADERS: dict[str, Callable[[], Offloader]] = {
    "direct": lambda: DirectPlacement("cuda", FakeLane),
    "streamed": lambda: StreamOffload(budget=6 * MIB, lane=FakeLane),
    "streamed from locked RAM": lambda: StreamOffload(budget=6 * MIB, lock=1 << 30, lane=FakeLane),
}


def fp8_of_equal_scales(weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
    tensors = dict(fp8_scaled.quantize(weight * (448 * 0.01 / weight.abs().max())))
    tensors["weight_scale"] = torch.tensor(0.01)
    return tensors


def nf4(weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """By bitsandbytes, magnitudes nested."""
    codes, quant_state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return {"weight": codes} | {f"weight.{suffix}": t for suffix, t in quant_state.as_dict(packed=True).items()}


FORMATS: dict[str, tuple[Quantize, str]] = {  # what packs a matrix, and how it is computed
    "int8": (comfy_int8.quantize, "bf16"),
    "int8 ConvRot in int8": (lambda w: comfy_int8.quantize(w, rotation=None), "int8"),
    "fp8": (fp8_plain.quantize, "bf16"),
    "fp8 scaled in fp8": (fp8_scaled.quantize, "fp8"),
    "fp8 scaled alike in fp8": (fp8_of_equal_scales, "fp8"),
    "fp8 scaled by blocks": (lambda w: fp8_scaled.quantize(w, block=64), "bf16"),
    "nvfp4": (nvfp4.quantize, "bf16"),
    "mxfp8": (mxfp8.quantize, "bf16"),
    "nf4": (nf4, "bf16"),
}


@dataclass
class Counts:
    """What a model's forwards took. apart: tensors that were wanted in one piece and did not lie so."""

    products: Counter[str] = field(default_factory=Counter)
    roundings: int = 0
    as_one: int = 0
    apart: int = 0

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """release() collects garbage; without this each time looks through all of torch and transformers."""
    with quick_collections():
        yield


@pytest.fixture(autouse=True)
def _large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)  # as a file of the real size is loaded
    monkeypatch.setenv("ZIMAGE_TRITON", "0")  # not pretended


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    found = Counts()
    run, as_one = kernels.run, pieces.as_one

    def counted_run(kernel: kernels.Kernel, layer: PackedLinear, x: Any) -> torch.Tensor:
        found.products[f"{kernel.name} {layer.out_features} x {layer.in_features}"] += 1
        return run(kernel, layer, x)

    def counted_rounding(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            found.roundings += 1
            return real(*given)

        return counted

    def looked(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        tensor = as_one(tensors)
        if len(tensors) > 1:
            found.as_one += tensor is not None
            found.apart += tensor is None
        return tensor

    monkeypatch.setattr(kernels, "run", counted_run)
    monkeypatch.setattr(torch_int8, "round_tokens", counted_rounding(torch_int8.round_tokens))
    monkeypatch.setattr(torch_fp8, "round_rows", counted_rounding(torch_fp8.round_rows))
    monkeypatch.setattr(pieces, "as_one", looked)
    return found


@pytest.fixture(scope="module")
def state(reference_transformer: ZImageTransformer2DModel) -> State:
    return {name: tensor.bfloat16().contiguous() for name, tensor in reference_transformer.state_dict().items()}


def write(state: State, path: Path, quantize: Quantize) -> Path:
    """The linears of all blocks packed."""
    tensors = dict(state)
    for module in linears_of(state):
        if module.startswith(("layers.", "noise_refiner.", "context_refiner.")) and "adaLN" not in module:
            packed = quantize(tensors.pop(f"{module}.weight"))
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file(tensors, path)
    return path


def write_gguf(state: State, path: Path) -> Path:
    writer = GGUFWriter(path, "lumina2")
    for i, (name, tensor) in enumerate(official_names(state).items()):
        fits = name.startswith("layers.") and tensor.ndim == 2
        kind = "F32" if not fits else "Q4_K" if tensor.shape[1] % 256 == 0 else "Q8_0"
        data = random_blocks(kind, *tensor.shape, seed=i, scale=2e-4) if fits else tensor.float().numpy()
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path, compute: str, *, keep_apart: bool) -> ZImageTransformer:
    """As the program does it: opened, and kernels chosen, before anything goes to the GPU."""
    model = load_transformer(path, torch.bfloat16, keep_apart=keep_apart)
    resolve([model], GPU, compute, trial=lambda *_: (None, "as asked"))
    return model


def forward(model: ZImageTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 8, 12, generator=generator).bfloat16()
    captions = [torch.randn(12, TINY.cap_feat_dim, generator=generator).bfloat16().cuda()]
    with torch.inference_mode():
        return model(latents.cuda(), torch.tensor([0.3]).cuda(), captions).cpu()


def drawn(model: ZImageTransformer, offloader: Offloader) -> torch.Tensor:
    """Of streamed blocks the second of two forwards, when they are in their rhythm."""
    offloader.place({"transformer": model})
    result = forward(model)
    if offloader.name == "stream":
        first, result = result, forward(model)
        assert torch.equal(first, result)
    offloader.release()
    return result


def stacked(model: torch.nn.Module) -> list[StackedLinear]:
    return [m for m in model.modules() if isinstance(m, StackedLinear)]


def buffers_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of packed layers under the packings' names for them."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and not isinstance(layer.packing, OtherType):
            yield from ((re.sub(r"_\d+$", "", name), tensor) for name, tensor in layer.named_buffers())


def largest(layer: PackedLinear) -> torch.Tensor:
    return max(layer.buffers(), key=lambda tensor: tensor.nbytes)


STREAMED = [(name, offloader) for name in ("fp8 scaled in fp8", "nvfp4") for offloader in list(OFFLOADERS)[1:]]


@pytest.mark.parametrize(("name", "offloader"), [(name, "direct") for name in (*FORMATS, "gguf")] + STREAMED)
def test_packed_rows_laid_side_by_side_are_one_product_and_the_joined_rows_to_the_bit(
    tmp_path: Path, state: State, gpu: FakeCuda, counts: Counts, name: str, offloader: str
) -> None:
    quantize, compute = FORMATS.get(name, (None, "bf16"))
    if compute == "fp8":
        skip_where_cpus_lack("torch-fp8")
    path = write_gguf(state, tmp_path / "m.gguf") if quantize is None else write(state, tmp_path / "m", quantize)
    joined, model = (load(path, compute, keep_apart=keep_apart) for keep_apart in (False, True))
    packed = [m for m in joined.modules() if isinstance(m, PackedLinear) and not isinstance(m.packing, OtherType)]
    copied = [m for m in packed if not mapping.is_mapped(largest(m))]
    assert not stacked(joined) and len(stacked(model)) == len(copied) > 0
    assert {name for name, tensor in buffers_of(model) if not mapping.is_mapped(tensor)} <= SMALL

    counts.clear()
    expected = drawn(joined, OFFLOADERS[offloader]())
    wanted = copy(counts)
    counts.clear()
    got = drawn(model, OFFLOADERS[offloader]())

    assert torch.equal(got, expected)
    assert counts.products == wanted.products and counts.roundings == wanted.roundings
    assert counts.as_one and not counts.apart


def test_a_lora_reaches_them_as_it_does_joined_ones(
    model_folder: Path, state: State, gpu: FakeCuda, counts: Counts, tmp_path: Path
) -> None:
    path, lora = write(state, tmp_path / "transformer.safetensors", comfy_int8.quantize), tmp_path / "lora.safetensors"
    lora_file(lora)
    for name in ("text_encoder", "vae"):
        (tmp_path / name).symlink_to(model_folder / name)
    pictures = []
    for keep_apart in (False, True):
        model = model_factory(model_filename=path, dtype=torch.bfloat16, keep_apart=keep_apart)
        resolve([model.transformer], GPU, "int8", trial=lambda *_: (None, "as asked"))
        assert bool(stacked(model.transformer)) == keep_apart
        model.load_loras([lora], [0.7])
        offloader = DirectPlacement("cuda", FakeLane)
        offloader.place({name: getattr(model, name) for name in ("transformer", "text_encoder", "vae")})
        model.device, counts.apart = offloader.device, 0
        pictures.append(model.generate(**REQUEST))
        model.load_loras([], [])
        pictures.append(model.generate(**REQUEST))
        assert not counts.apart
        offloader.release()

    joined, joined_without, apart, apart_without = pictures
    assert torch.equal(joined, apart) and torch.equal(joined_without, apart_without)
    assert not torch.equal(joined, joined_without)


def test_an_offloader_that_lays_nothing_in_line_gets_the_same_bits(
    tmp_path: Path, state: State, gpu: FakeCuda, counts: Counts
) -> None:
    pytest.importorskip("mmgp")
    from shared.app.mmgp_engine import MmgpOffload

    skip_where_cpus_lack("torch-fp8")
    path = write(state, tmp_path / "m", fp8_scaled.quantize)
    expected = drawn(load(path, "fp8", keep_apart=True), OFFLOADERS["direct"]())
    counts.clear()

    got = drawn(load(path, "fp8", keep_apart=True), MmgpOffload(PROFILES[4], total_memory=16 * MIB))

    assert torch.equal(got, expected)
    assert counts.apart
