"""Files beside small layers: strengths, several at once, packed weights, swaps, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.z_image import lora
from models.z_image.lora_layer import Strength, Strengths, per_step
from shared.quant.errors import CheckpointError, LayerMismatchError, UnknownFormatError, UserError
from shared.quant.linear import PackedLinear
from shared.quant.packing import Packed
from shared.quant.packings.int8 import Int8

State = dict[str, Tensor]
WIDTH, HEIGHT = 8, 4  # columns of the fused layer, rows of each of its three parts
QKV = "layers.0.attention.qkv"


def network(qkv: nn.Linear | None = None) -> nn.Module:
    """A fused layer, one with a bias, a norm and a layer of the captions, under the transformer's names."""

    def block() -> nn.Module:
        module = nn.Module()
        module.attention = nn.Module()
        module.attention.qkv = nn.Linear(WIDTH, 3 * HEIGHT, bias=False)
        module.adaLN_modulation = nn.Sequential(nn.Linear(WIDTH, 6))
        module.attention_norm1 = nn.RMSNorm(WIDTH, eps=1e-5)
        return module

    model = nn.Module()
    model.layers = nn.ModuleList([block()])
    model.context_refiner = nn.ModuleList([block()])
    if qkv is not None:
        model.layers[0].attention.qkv = qkv
    return model.requires_grad_(False)


def pair(module: str, rows: int, rank: int = 2) -> State:
    return {f"{module}.lora_A.weight": torch.randn(rank, WIDTH), f"{module}.lora_B.weight": torch.randn(rows, rank)}


def product(state: State, module: str) -> Tensor:
    return state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(state: State, name: str = "l") -> Path:
        save_file(state, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return save


def change(model: nn.Module, module: str) -> Tensor:
    """What the files add to a linear's weight: the unit vectors sent through it."""
    linear = model.get_submodule(module)
    bias = 0 if linear.bias is None else linear.bias
    weight = linear.dequantize() if isinstance(linear, PackedLinear) else linear.weight
    return (linear(torch.eye(WIDTH)) - bias).T - weight


# ---------------------------------------------------------------------------------------- strengths


@pytest.mark.parametrize(
    ("strength", "steps", "expected"),
    [
        (0.5, 3, [0.5, 0.5, 0.5]),
        (((1, 0.5, 0),), 8, [1, 1, 1, 0.5, 0.5, 0.5, 0, 0]),
        (((1, 2, 3, 4),), 2, [1, 3]),
        (((1,), (0,)), 4, [1, 1, 0, 0]),
        (((1,), (0,)), 5, [1, 1, 1, 0, 0]),
        (((0,), (1,), (2,)), 4, [0, 0, 1, 2]),
        (((0.9, 0.8), (1.2, 1.1, 1)), 8, [0.9, 0.9, 0.8, 0.8, 1.2, 1.2, 1.1, 1]),
        (((1,), (0,)), 1, [1]),
    ],
)
def test_a_strength_is_spread_over_phases_and_steps(strength: Strength, steps: int, expected: list[float]) -> None:
    assert per_step(strength, steps) == expected


def test_a_step_tells_whether_its_strengths_are_new() -> None:
    strengths = Strengths([0.5, ((1, 0),)])
    strengths.begin(4)

    assert [strengths.set_step(step) for step in (1, 2, 3, 4)] == [False, True, False, False]
    assert strengths.now == (0.5, 0.0)


def test_strengths_follow_the_steps_and_zero_is_no_change_at_all(saved: Callable[..., Path]) -> None:
    model, state = network(), pair("layers.0.attention.to_k", HEIGHT)
    plain = model.layers[0].attention.qkv(torch.eye(WIDTH))
    loras = lora.LoraSet(model)
    loras.apply([saved(state)], [((1, 0.25), (0,))])
    loras.begin(4)

    for step, strength in enumerate((1, 0.25, 0, 0)):
        loras.set_step(step)
        rows = change(model, QKV)[HEIGHT : 2 * HEIGHT]
        torch.testing.assert_close(rows, strength * product(state, "layers.0.attention.to_k"), rtol=0, atol=1e-5)
    assert torch.equal(model.layers[0].attention.qkv(torch.eye(WIDTH)), plain)


def test_captions_are_refined_again_only_when_their_layers_get_another_strength(saved: Callable[..., Path]) -> None:
    elsewhere = saved(pair("layers.0.attention.qkv", 3 * HEIGHT), "layers")
    refiner = saved(pair("context_refiner.0.attention.qkv", 3 * HEIGHT), "refiner")

    for files, expected in (([elsewhere], [False, False]), ([elsewhere, refiner], [True, False])):
        loras = lora.LoraSet(network())
        loras.apply(files, [((1, 0),)] * len(files))
        loras.begin(3)
        loras.set_step(1)
        assert [loras.set_step(2), loras.set_step(3)] == expected


# ---------------------------------------------------------------------------------------- several


def test_files_on_the_same_and_on_other_rows_add_up(saved: Callable[..., Path]) -> None:
    model, expected = network(), torch.zeros(3 * HEIGHT, WIDTH)
    files, strengths = [], [0.5, -1.0, 2.0]
    for i, (name, rows) in enumerate((("to_q", slice(0, 4)), ("qkv", slice(0, 12)), ("to_q", slice(0, 4)))):
        module = f"layers.0.attention.{name}"
        state = pair(module, rows.stop - rows.start, rank=2 + i)
        files.append(saved(state, str(i)))
        expected[rows] += strengths[i] * product(state, module)

    lora.LoraSet(model).apply(files, strengths)

    torch.testing.assert_close(change(model, QKV), expected, rtol=0, atol=1e-5)


def test_all_low_rank_files_of_a_layer_share_one_product_down(saved: Callable[..., Path]) -> None:
    model = network()
    files = [saved(pair(QKV, 3 * HEIGHT), str(i)) for i in range(3)]
    lora.LoraSet(model).apply(files, [1.0] * 3)
    change(model, QKV)

    (hook,) = model.layers[0].attention.qkv._forward_hooks.values()
    ready = hook._ready[1]
    assert ready.down.shape == (6, WIDTH)
    assert [tuple(up.matrix_RO.shape) for up in ready.ups] == [(6, 3 * HEIGHT)]


def test_a_trainer_that_writes_qkv_and_its_parts_is_read_once(saved: Callable[..., Path]) -> None:
    model, expected = network(), []
    state = pair("layers.0.attention.qkv", 3 * HEIGHT)
    for name in ("to_q", "to_k", "to_v"):
        module = f"layers.0.attention.{name}"
        state |= pair(module, HEIGHT)
        expected.append(product(state, module))

    (match,) = lora.LoraSet(model).apply([saved(state)], [1.0])

    torch.testing.assert_close(change(model, QKV), torch.cat(expected), rtol=0, atol=1e-5)
    assert (match.matched, match.total) == (8, 8)


# ---------------------------------------------------------------------------------------- swaps


def test_another_strength_reads_nothing_again(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = network(), pair(QKV, 3 * HEIGHT)
    loras, path = lora.LoraSet(model), saved(state)
    loras.apply([path], [1.0])
    hooks = list(model.layers[0].attention.qkv._forward_hooks.values())
    monkeypatch.setattr(lora, "read", lambda path: pytest.fail(f"{path} was read again"))

    loras.apply([path], [0.25])

    torch.testing.assert_close(change(model, QKV), 0.25 * product(state, QKV), rtol=0, atol=1e-5)
    assert list(model.layers[0].attention.qkv._forward_hooks.values()) == hooks


def test_a_file_that_was_replaced_is_read_again(saved: Callable[..., Path]) -> None:
    model = network()
    loras = lora.LoraSet(model)
    loras.apply([saved(pair(QKV, 3 * HEIGHT))], [1.0])

    state = pair(QKV, 3 * HEIGHT, rank=3)
    loras.apply([saved(state)], [1.0])

    torch.testing.assert_close(change(model, QKV), product(state, QKV), rtol=0, atol=1e-5)


def test_a_file_that_cannot_be_used_leaves_the_others_as_they_were(saved: Callable[..., Path]) -> None:
    model, state = network(), pair(QKV, 3 * HEIGHT)
    loras = lora.LoraSet(model)
    good, bad = saved(state), saved(pair("transformer_blocks.0.attn.to_q", 4), "bad")
    loras.apply([good], [1.0])

    with pytest.raises(UserError):
        loras.apply([good, bad], [1.0, 1.0])

    torch.testing.assert_close(change(model, QKV), product(state, QKV), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------- other kinds


def test_biases_and_norms_are_changed_too(saved: Callable[..., Path]) -> None:
    model = network()
    state = {
        "diffusion_model.layers.0.adaLN_modulation.0.diff_b": torch.randn(6),
        "lycoris_layers_0_attention_norm1.w_norm": torch.randn(WIDTH),
    }
    linear, norm, x = model.layers[0].adaLN_modulation[0], model.layers[0].attention_norm1, torch.randn(3, WIDTH)
    before, unscaled = linear(x), norm(x) / norm.weight

    lora.LoraSet(model).apply([saved(state)], [0.5])

    torch.testing.assert_close(linear(x), before + 0.5 * next(iter(state.values())))
    difference = state["lycoris_layers_0_attention_norm1.w_norm"]
    torch.testing.assert_close(norm(x), unscaled * (norm.weight + 0.5 * difference))


def test_the_text_encoders_part_goes_to_the_text_encoder(saved: Callable[..., Path]) -> None:
    encoder = nn.Module()
    encoder.layers = nn.ModuleList([nn.Module()])
    encoder.layers[0].self_attn = nn.Module()
    encoder.layers[0].self_attn.q_proj = nn.Linear(WIDTH, 5, bias=False)
    state = pair("text_encoder.model.layers.0.self_attn.q_proj", 5)
    loras = lora.LoraSet(network(), encoder.requires_grad_(False))

    (match,) = loras.apply([saved(state)], [2.0])

    expected = 2 * product(state, "text_encoder.model.layers.0.self_attn.q_proj")
    torch.testing.assert_close(change(encoder, "layers.0.self_attn.q_proj"), expected, rtol=0, atol=1e-5)
    assert (match.matched, match.unmatched) == (2, ())
    assert loras.touches_encoder
    loras.apply([], [])
    assert not loras.touches_encoder
    assert not encoder.layers[0].self_attn.q_proj._forward_hooks


DORA = {
    "rows": torch.rand(3 * HEIGHT, 1) + 0.5,
    "columns": torch.rand(1, WIDTH) + 0.5,
}


@pytest.mark.parametrize("way", DORA)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora_on_a_packed_layer_is_dora_on_the_weight_it_stands_for(
    saved: Callable[..., Path], int8_linear: PackedLinear, way: str, strength: float
) -> None:
    weight = int8_linear.dequantize()
    state = pair(QKV, 3 * HEIGHT) | {f"{QKV}.dora_scale": DORA[way]}
    changed = weight + product(state, QKV)
    norm = changed.norm(dim=1 if way == "rows" else 0, keepdim=True)
    packed = {name: tensor.clone() for name, tensor in int8_linear.packed.tensors.items()}
    model = network(int8_linear)

    lora.LoraSet(model).apply([saved(state)], [strength])

    expected = strength * (DORA[way] * changed / norm - weight)
    torch.testing.assert_close(change(model, QKV), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, packed[name]) for name, tensor in int8_linear.packed.tensors.items())


@pytest.fixture
def int8_linear() -> PackedLinear:
    codes = torch.randint(-100, 100, (3 * HEIGHT, WIDTH), dtype=torch.int8)
    packed = Packed(Int8(), (3 * HEIGHT, WIDTH), {"codes": codes, "scale": torch.rand(3 * HEIGHT, 1)})
    return PackedLinear(packed, None, torch.float32, compute="bf16")


# ---------------------------------------------------------------------------------------- as differences


KINDS: dict[str, State] = {
    "LoRA with alpha": pair(QKV, 3 * HEIGHT) | {f"{QKV}.alpha": torch.tensor(1.0)},
    "q and v": pair("layers.0.attention.to_q", HEIGHT) | pair("layers.0.attention.to_v", HEIGHT),
    "LoKr": {
        "lycoris_layers_0_attention_to_k.lokr_w1": torch.randn(2, 4),
        "lycoris_layers_0_attention_to_k.lokr_w2": torch.randn(2, 2),
    },
    "LoHa": {f"{QKV}.hada_w{i}_{c}": torch.randn(*s) for i in (1, 2) for c, s in (("a", (12, 3)), ("b", (3, WIDTH)))},
    "LoHa of rank 1": {
        f"{QKV}.hada_w{i}_{c}": torch.randn(*s) for i in (1, 2) for c, s in (("a", (12, 1)), ("b", (1, WIDTH)))
    },
    "DoRA": pair("layers.0.attention.to_v", HEIGHT)
    | {"layers.0.attention.to_v.lora_magnitude_vector": torch.rand(HEIGHT)},
    "full": {f"{QKV}.diff": torch.randn(3 * HEIGHT, WIDTH)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_differences_for_merging_are_what_the_layer_adds(saved: Callable[..., Path], kind: str) -> None:
    model, path = network(), saved(KINDS[kind])
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    lora.LoraSet(model).apply([path], [0.7])

    found = dict(lora.deltas(lora.read(path), 0.7, shapes, model.get_parameter))

    assert list(found) == [f"{QKV}.weight"]
    torch.testing.assert_close(found[f"{QKV}.weight"], change(model, QKV), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_host_is_given_has_the_same_effect(saved: Callable[..., Path], kind: str) -> None:
    model = network()
    lora.LoraSet(model).apply([saved(KINDS[kind])], [1.0])
    expected = change(model, QKV)

    given = lora.fuse(model, KINDS[kind])

    name = f"diffusion_model.{QKV}"
    if f"{name}.diff" in given:
        made = given[f"{name}.diff"]
    else:
        made = given[f"{name}.lora_B.weight"] @ given[f"{name}.lora_A.weight"]
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    assert all(key.startswith(name) for key in given)


def test_differences_reach_biases_and_norms(saved: Callable[..., Path]) -> None:
    model = network()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    bias, norm = torch.randn(6), torch.randn(WIDTH)
    state = {"layers.0.adaLN_modulation.0.diff_b": bias, "layers.0.attention_norm1.diff": norm}

    found = dict(lora.deltas(lora.read(saved(state)), 2.0, shapes, model.get_parameter))

    torch.testing.assert_close(found["layers.0.adaLN_modulation.0.bias"], 2 * bias)
    torch.testing.assert_close(found["layers.0.attention_norm1.weight"], 2 * norm)


def test_a_file_for_another_model_is_refused_before_any_difference(saved: Callable[..., Path]) -> None:
    file = lora.read(saved(pair("transformer.single_transformer_blocks.0.attn.to_q", 4)))

    with pytest.raises(UserError, match=r"0 of its 2 keys .* It looks like a LoRA for FLUX\.1\."):
        lora.match(file, {f"{QKV}.weight": (12, 8)})


# ---------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("state", "error", "complaint"),
    [
        ({f"{QKV}.lora_A.weight": torch.full((2, 8), torch.nan)}, CheckpointError, "lora_A.weight holds NaN"),
        ({f"{QKV}.lora_A.weight": torch.ones(2, 8)}, LayerMismatchError, "attention.qkv lacks up"),
        (
            {f"{QKV}.lora_A.weight": torch.ones(2, 8), f"{QKV}.lora_B.weight": torch.ones(12, 3)},
            LayerMismatchError,
            r"down \[2, 8\] and up \[12, 3\]: their ranks differ",
        ),
        (pair("layers.0.attention.to_q", 12), LayerMismatchError, "takes 8 numbers and gives 4 here; .* gives 12"),
        ({f"{QKV}.lokr_w1": torch.ones(2, 2)}, LayerMismatchError, "attention.qkv lacks lokr_w2"),
        ({f"{QKV}.oft_blocks": torch.ones(2, 2, 2)}, UnknownFormatError, "oft_blocks belongs to OFT"),
        ({f"{QKV}.alpha": torch.ones(1)}, LayerMismatchError, "nothing but an alpha"),
        (
            pair(QKV, 12) | {f"{QKV}.dora_scale": torch.ones(7)},
            LayerMismatchError,
            r"DoRA magnitude has shape \[7\]",
        ),
        ({"layers.0.attention_norm1.diff": torch.ones(5)}, LayerMismatchError, "is a norm of 8 numbers"),
        ({f"{QKV}.diff_b": torch.ones(5)}, LayerMismatchError, "gives 12 numbers here; the file's bias has 5"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(
    saved: Callable[..., Path], state: State, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint) as caught:
        lora.LoraSet(network()).apply([saved(state)], [1.0])
    assert "l.safetensors" in str(caught.value)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "l.safetensors")

    with pytest.raises(CheckpointError, match="pickle"):
        lora.read(tmp_path / "l.safetensors")
