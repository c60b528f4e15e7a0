"""A Z-Image in nunchaku's SVDQuant files, INT4 and FP4, refiners packed or not: loaded, drawn from, LoRA on top."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

from models.z_image import loader
from models.z_image.loader import load_transformer
from shared.quant.checkpoint import Checkpoint
from shared.quant.errors import CheckpointError, LayerMismatchError
from shared.quant.formats import layers_of, svdq
from shared.quant.kernels.resolve import resolve
from shared.quant.kernels.svdq import in_order
from shared.quant.linear import JoinedLinear, PackedLinear
from shared.quant.mapping import is_mapped
from shared.quant.packings.svdq import Kind
from tests.models.z_image import test_stacked_on_gpu as on_gpu
from tests.support.fake_cuda import fake_cuda
from tests.support.packed_model import assert_same_network, forward
from tests.support.tiny_model import TINY, relative_error

State = dict[str, torch.Tensor]

# nunchaku's linears of a block, and whose rows they stack, in that order: w3 before w1.
STACKS = {
    "attention.to_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.to_out.0": ("attention.to_out.0",),
    "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),
    "feed_forward.net.2": ("feed_forward.w2",),
}


def nunchaku_files(state: State, folder: Path, kind: Kind, rank: int, skip_refiners: bool) -> tuple[Path, Path]:
    """A nunchaku file of the model, and a plain diffusers file of the weights that the packed ones stand for."""
    packed, plain = dict(state), dict(state)
    for block in sorted({m[0] for n in state if (m := re.match(r"(layers|\w+_refiner)\.\d+", n))}):
        skipped = skip_refiners and "refiner" in block
        for theirs, stacked in STACKS.items():
            if skipped and "attention" in theirs:
                continue
            weight = torch.cat([packed.pop(f"{block}.{name}.weight") for name in stacked])
            if skipped:  # not packed, but stacked and renamed all the same
                packed[f"{block}.{theirs}.weight"] = weight
                continue
            parts = len(stacked) if theirs == "attention.to_qkv" else 1
            tensors = svdq.quantize(weight, kind=kind, rank=rank, iterations=0, parts=parts)
            packed |= {f"{block}.{theirs}.{suffix}": tensor for suffix, tensor in tensors.items()}

    path = folder / f"svdq-{kind}_r{rank}.safetensors"
    metadata = svdq.header(TINY.as_diffusers(), kind=kind, rank=rank, skip_refiners=skip_refiners)
    save_file(packed, path, metadata=metadata)
    checkpoint = Checkpoint.open(path)
    for module, layer in layers_of(checkpoint, checkpoint.tensors).items():
        if svdq.claims(layer):
            block, theirs = re.fullmatch(r"(\w+\.\d+)\.(.+)", module).groups()
            weight = svdq.read(layer).dequantize(torch.float32)
            for name, rows in zip(STACKS[theirs], weight.chunk(len(STACKS[theirs])), strict=True):
                plain[f"{block}.{name}.weight"] = rows.contiguous()
    save_file(plain, folder / "plain.safetensors")
    return path, folder / "plain.safetensors"


@pytest.fixture(scope="module")
def state(reference_transformer: ZImageTransformer2DModel) -> State:
    return {name: tensor.contiguous() for name, tensor in reference_transformer.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "rank", "skip_refiners"),
    [("int4", 32, False), ("int4", 128, True), ("fp4", 128, False), ("fp4", 32, True)],
)
def test_a_nunchaku_file_is_the_network_of_its_dequantized_weights(
    tmp_path: Path, state: State, kind: Kind, rank: int, skip_refiners: bool
) -> None:
    path, plain_path = nunchaku_files(state, tmp_path, kind, rank, skip_refiners)

    model = load_transformer(path, torch.float32)

    assert model.config == TINY
    packed = {name for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    blocks = 2 if skip_refiners else 4
    assert len(packed) == 4 * blocks and any("refiner" in name for name in packed) != skip_refiners
    assert not any(isinstance(m, JoinedLinear) for m in model.modules()), "w3 and w1 change places in one matrix"
    plain = load_transformer(plain_path, torch.float32)
    assert_same_network(model, plain, tmp_path)


def test_a_higher_rank_and_fp4_come_nearer_to_the_original(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "original.safetensors")
    original = forward(load_transformer(tmp_path / "original.safetensors", torch.float32))

    errors = {}
    for kind, rank in (("int4", 16), ("int4", 128), ("fp4", 16)):
        path, _ = nunchaku_files(state, tmp_path, kind, rank, skip_refiners=True)
        errors[kind, rank] = relative_error(forward(load_transformer(path, torch.float32)), original)

    assert errors["int4", 128] < 0.8 * errors["int4", 16]
    assert errors["fp4", 16] < errors["int4", 16] < 0.2


def test_it_computes_in_bfloat16(tmp_path: Path, state: State) -> None:
    path, plain_path = nunchaku_files(state, tmp_path, "fp4", 32, skip_refiners=False)

    ours = forward(load_transformer(path, torch.bfloat16))

    plain = forward(load_transformer(plain_path, torch.float32))
    plain_bfloat16 = forward(load_transformer(plain_path, torch.bfloat16))
    assert relative_error(ours, plain) < 1.5 * relative_error(plain_bfloat16, plain)


@pytest.mark.parametrize("kind", ["int4", "fp4"])
def test_a_cpu_opens_it_without_reading_a_weight_and_computes_the_same(
    tmp_path: Path, state: State, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = nunchaku_files(state, tmp_path, kind, 32, skip_refiners=False)
    natural = load_transformer(path, torch.bfloat16)
    for layer in packed_layers(natural):
        layer._keep(in_order(layer.packed))
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)  # as a file of the real size is loaded

    model = load_transformer(path, torch.bfloat16, keep_mapped=True)
    resolve([model], torch.device("cpu"))

    buffers = [pair for layer in packed_layers(model) for pair in layer.named_buffers()]
    assert {name for name, tensor in buffers if not is_mapped(tensor)} <= {"row_scale"}
    resolve([natural], torch.device("cpu"))
    assert torch.equal(forward(model), forward(natural))


@pytest.mark.parametrize(("kind", "offloader"), [("int4", "direct"), ("fp4", "streamed")])
def test_a_gpu_gets_the_rows_of_w1_and_w3_in_line_and_draws_the_same(
    tmp_path: Path, state: State, kind: Kind, offloader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)
    monkeypatch.setenv("ZIMAGE_TRITON", "0")  # not pretended
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    path, _ = nunchaku_files(half, tmp_path, kind, 32, skip_refiners=False)
    with fake_cuda():
        joined, apart = (on_gpu.load(path, "bf16", keep_apart=keep_apart) for keep_apart in (False, True))
        assert on_gpu.stacked(apart) and not on_gpu.stacked(joined)
        expected, got = (on_gpu.drawn(model, on_gpu.OFFLOADERS[offloader]()) for model in (joined, apart))

    assert torch.equal(got, expected)


def packed_layers(model: torch.nn.Module) -> list[PackedLinear]:
    return [m for m in model.modules() if isinstance(m, PackedLinear)]


def test_a_damaged_layer_is_named_before_anything_is_drawn(tmp_path: Path, state: State) -> None:
    path, _ = nunchaku_files(state, tmp_path, "int4", 32, skip_refiners=True)
    checkpoint = Checkpoint.open(path)
    tensors = checkpoint.load()
    ours = "layers.1.feed_forward.net.2"

    save_file(tensors | {f"{ours}.proj_up": tensors[f"{ours}.proj_up"][:, :16].contiguous()}, tmp_path / "rank")
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.net\.2: proj_up is \[384, 16\]"):
        load_transformer(tmp_path / "rank", torch.float32)

    save_file(tensors | {f"{ours}.qweight": tensors[f"{ours}.qweight"][:256].contiguous()}, tmp_path / "rows")
    with pytest.raises(LayerMismatchError, match=r"net\.2\.weight is \[256, 1024\], expected \[384, 1024\]"):
        load_transformer(tmp_path / "rows", torch.float32)

    del tensors[f"{ours}.wscales"]
    save_file(tensors, tmp_path / "scales")
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.net\.2: .* no wscales"):
        load_transformer(tmp_path / "scales", torch.float32)
