"""Every naming, prefix, number type and layout of a file gives the same network; everything else is named."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

from models.z_image import loader
from models.z_image.loader import load_transformer, to_diffusers
from shared.quant import mapping
from shared.quant.errors import CheckpointError, LayerMismatchError, UnknownFormatError
from shared.quant.kernels.resolve import resolve
from shared.quant.linear import JoinedLinear, PackedLinear
from tests.support.tiny_model import TINY

State = dict[str, torch.Tensor]


def official(state: State) -> State:
    """The state dict as the official repository and ComfyUI name it: qkv fused, short names."""
    result: State = {}
    for name, tensor in state.items():
        name = name.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        name = name.replace("to_out.0", "out").replace("norm_q", "q_norm").replace("norm_k", "k_norm")
        if re.search(r"to_[kv]\.weight", name):
            continue
        if name.endswith("to_q.weight"):
            base = name.removesuffix("to_q.weight")
            result[base + "qkv.weight"] = torch.cat([state[f"{base}to_{c}.weight"] for c in "qkv"])
        else:
            result[name] = tensor
    return result


def nunchaku_plain(state: State) -> State:
    """Refiners as nunchaku leaves them: attention as in diffusers, feed-forward fused with w3's rows first."""
    result = dict(state)
    for name in state:
        if "refiner" in name and name.endswith("feed_forward.w1.weight"):
            base = name.removesuffix("w1.weight")
            result[base + "net.0.proj.weight"] = torch.cat([result.pop(base + "w3.weight"), result.pop(name)])
            result[base + "net.2.weight"] = result.pop(base + "w2.weight")
    return result


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.fixture
def state(reference_transformer: ZImageTransformer2DModel) -> State:
    return {name: tensor.contiguous() for name, tensor in reference_transformer.state_dict().items()}


DIALECTS = {
    "diffusers": lambda s: s,
    "official": official,
    "official in a full checkpoint": lambda s: (
        prefixed(official(s), "model.diffusion_model.")
        | {
            "vae.decoder.conv_in.weight": torch.zeros(1),
            "text_encoders.qwen3_4b.transformer.model.norm.weight": torch.zeros(1),
        }
    ),
    "diffusers names behind a prefix": lambda s: prefixed(s, "model.diffusion_model."),
    "short prefix": lambda s: prefixed(official(s), "diffusion_model."),
    "nunchaku's plain layers": nunchaku_plain,
    "Lumina's leftover": lambda s: official(s) | {"norm_final.weight": torch.zeros(384)},
    "one-dimensional pad tokens": lambda s: s | {n: s[n].flatten() for n in ("x_pad_token", "cap_pad_token")},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_naming_gives_the_same_weights(tmp_path: Path, state: State, dialect: str) -> None:
    save_file(DIALECTS[dialect](state), tmp_path / "m.safetensors")

    model = load_transformer(tmp_path / "m.safetensors", torch.float32)

    assert model.config == TINY
    back = to_diffusers(model.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_every_plain_number_type_is_read_into_the_asked_one(tmp_path: Path, state: State, stored: torch.dtype) -> None:
    save_file({n: t.to(stored) for n, t in state.items()}, tmp_path / "m.safetensors")

    model = load_transformer(tmp_path / "m.safetensors", torch.bfloat16)

    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = state["layers.0.feed_forward.w2.weight"].to(stored).to(torch.bfloat16)
    assert torch.equal(model.layers[0].feed_forward.w2.weight, expected)


def test_shards_and_diffusers_folders_load(tmp_path: Path, reference_transformer: ZImageTransformer2DModel) -> None:
    reference_transformer.save_pretrained(tmp_path / "transformer", max_shard_size="15MB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1

    model = load_transformer(tmp_path / "transformer", torch.float32)

    assert torch.equal(
        model.final_layer.linear.weight,
        reference_transformer.state_dict()["all_final_layer.2-1.linear.weight"],
    )


def test_weights_of_the_right_type_and_layout_are_not_copied(tmp_path: Path, state: State) -> None:
    save_file(official(state), tmp_path / "m.safetensors")

    model = load_transformer(tmp_path / "m.safetensors", torch.float32)

    copied = [name for name, p in model.named_parameters() if not mapping.is_mapped(p)]
    assert {name.rsplit(".", 2)[1] for name in copied} == {"w13"}, "only w1 and w3 are two tensors in such a file"


@pytest.mark.parametrize("dialect", ["diffusers", "official", "nunchaku's plain layers"])
def test_a_large_file_for_the_cpu_is_not_copied_at_all_and_draws_the_same(
    tmp_path: Path, state: State, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(DIALECTS[dialect](state), tmp_path / "m.safetensors")
    latents, captions = torch.randn(1, 16, 8, 8), [torch.randn(5, TINY.cap_feat_dim)]
    joined = load_transformer(tmp_path / "m.safetensors", torch.float32, keep_mapped=True)
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)

    apart = load_transformer(tmp_path / "m.safetensors", torch.float32, keep_mapped=True)

    assert not any(isinstance(m, JoinedLinear) for m in joined.modules()), "a small file is copied all the same"
    assert all(mapping.is_mapped(p) for p in apart.parameters())
    with torch.no_grad():
        drawn = [m(latents, torch.tensor([0.3]), captions) for m in (joined, apart)]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dialect", ["diffusers", "official", "nunchaku's plain layers"])
def test_a_large_16_bit_file_stays_as_it_is_where_float32_is_computed_in(
    tmp_path: Path, state: State, dialect: str, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = {name: tensor.to(stored) for name, tensor in DIALECTS[dialect](state).items()}
    save_file(halves, tmp_path / "m.safetensors")
    latents, captions = torch.randn(1, 16, 8, 8), [torch.randn(5, TINY.cap_feat_dim)]
    copied = load_transformer(tmp_path / "m.safetensors", torch.float32, keep_mapped=True)
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)

    kept = load_transformer(tmp_path / "m.safetensors", torch.float32, keep_mapped=True)

    resolved = resolve([kept], torch.device("cpu"))
    linears = [m for m in kept.modules() if isinstance(m, PackedLinear)]
    assert [(r.packing, r.kernel, r.compute) for r in resolved] == [("16-bit", "widened", "bf16")]
    assert all(mapping.is_mapped(m.packed.tensors["numbers"]) for m in linears)
    assert all(m.packed.tensors["numbers"].dtype == stored for m in linears)
    assert not any(type(m) is torch.nn.Linear for m in kept.modules())
    with torch.no_grad():
        drawn = [m(latents, torch.tensor([0.3]), captions) for m in (copied, kept)]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("dialect", ["diffusers", "official", "nunchaku's plain layers"])
def test_numbers_of_another_type_lie_in_a_large_file_until_they_are_used(
    tmp_path: Path, state: State, dialect: str, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({n: t.to(stored) for n, t in DIALECTS[dialect](state).items()}, tmp_path / "m.safetensors")
    latents, captions = torch.randn(1, 16, 8, 8), [torch.randn(5, TINY.cap_feat_dim, dtype=torch.bfloat16)]
    copied = load_transformer(tmp_path / "m.safetensors", torch.bfloat16)
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)

    kept = load_transformer(tmp_path / "m.safetensors", torch.bfloat16, keep_mapped=True)

    assert [(r.packing, r.kernel) for r in resolve([kept], torch.device("cpu"))] == [("other-type", "cast")]
    linears = [m for m in kept.modules() if isinstance(m, PackedLinear)]
    assert all(mapping.is_mapped(t) and t.dtype == stored for m in linears for t in m.packed.tensors.values())
    assert not any(isinstance(m, JoinedLinear) for m in kept.modules())
    with torch.no_grad():
        drawn = [m(latents, torch.tensor([0.3]), captions) for m in (copied, kept)]
    assert torch.equal(drawn[0], drawn[1])
    used = kept.layers[0].feed_forward.w13.packed.tensors
    assert [(tensor.dtype, mapping.is_mapped(tensor)) for tensor in used.values()] == [(torch.bfloat16, False)]


def test_numbers_of_another_type_are_cast_before_a_gpu_gets_them(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(state, tmp_path / "m.safetensors")
    copied = load_transformer(tmp_path / "m.safetensors", torch.bfloat16)
    monkeypatch.setattr(loader, "MAPPED_FROM", 0)
    kept = load_transformer(tmp_path / "m.safetensors", torch.bfloat16, keep_apart=True)

    resolve([kept], torch.device("cuda"), "int8")  # which is asked of packed numbers, and these are not

    for name, module in kept.named_modules():
        if isinstance(module, PackedLinear):
            (numbers,) = module.packed.tensors.values()
            assert torch.equal(numbers, copied.get_submodule(name).weight)


@pytest.mark.parametrize("packed", [False, True], ids=["text", "base64, as mmgp"])
def test_header_config_says_what_shapes_do_not(tmp_path: Path, state: State, packed: bool) -> None:
    text = json.dumps(TINY.as_diffusers() | {"axes_dims": [64, 32, 32], "rope_theta": 10000.0})
    metadata = {"config_base64": base64.b64encode(text.encode()).decode()} if packed else {"config": text}
    save_file(state, tmp_path / "m.safetensors", metadata=metadata)

    model = load_transformer(tmp_path / "m.safetensors", torch.float32)

    assert (model.config.axes_dims, model.config.rope_theta) == ((64, 32, 32), 10000.0)


@pytest.mark.parametrize(
    "metadata", [{"config": "{"}, {"config": "3"}, {"config": '{"axes_dims": [1, 2]}'}, {"config_base64": "%"}]
)
def test_unusable_header_configs_are_named(tmp_path: Path, state: State, metadata: dict[str, str]) -> None:
    save_file(state, tmp_path / "odd.safetensors", metadata=metadata)

    with pytest.raises(CheckpointError, match=r"odd\.safetensors: the config in its header is not usable"):
        load_transformer(tmp_path / "odd.safetensors", torch.float32)


def test_missing_extra_and_misshapen_tensors_are_listed_with_the_file(tmp_path: Path, state: State) -> None:
    del state["layers.1.attention.to_k.weight"]
    state |= {f"stranger.{i}": torch.zeros(1) for i in range(7)}
    state["layers.0.ffn_norm1.weight"] = torch.zeros(5)
    save_file(state, tmp_path / "odd.safetensors")

    with pytest.raises(LayerMismatchError) as error:
        load_transformer(tmp_path / "odd.safetensors", torch.float32)

    text = str(error.value)
    assert "odd.safetensors" in text
    assert "1 missing (layers.1.attention.to_k.weight)" in text
    assert "7 unexpected (stranger.0, stranger.1, stranger.2, stranger.3, stranger.4, ...)" in text
    assert "layers.0.ffn_norm1.weight is [5], expected [384]" in text


def test_rows_given_twice_are_refused(tmp_path: Path, state: State) -> None:
    state["layers.0.attention.qkv.weight"] = torch.zeros(3 * 384, 384)
    save_file(state, tmp_path / "m.safetensors")

    with pytest.raises(LayerMismatchError, match=r"1 given twice \(layers\.0\.attention\.qkv"):
        load_transformer(tmp_path / "m.safetensors", torch.float32)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("control_layers.0.after_proj.weight", "ControlNet without its embedder"),
        ("siglip_embedder.1.weight", "Omni or Edit"),
    ],
)
def test_relatives_are_named(tmp_path: Path, state: State, name: str, says: str) -> None:
    save_file(state | {name: torch.zeros(4, 4)}, tmp_path / "m.safetensors")

    with pytest.raises(LayerMismatchError, match=says):
        load_transformer(tmp_path / "m.safetensors", torch.float32)


def test_packed_numbers_are_named_and_not_misread(tmp_path: Path, state: State) -> None:
    name = "layers.0.feed_forward.w1.weight"
    save_file(state | {name: torch.zeros(7, dtype=torch.int8)}, tmp_path / "m.safetensors")

    with pytest.raises(UnknownFormatError, match=r"layers\.0\.feed_forward\.w1 is packed in a way.*I8"):
        load_transformer(tmp_path / "m.safetensors", torch.float32)


def test_a_foreign_model_is_told_apart(tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, tmp_path / "flux.safetensors")

    with pytest.raises(LayerMismatchError, match=r"no Z-Image transformer.*double_blocks"):
        load_transformer(tmp_path / "flux.safetensors", torch.float32)


def test_a_truncated_file_is_named(tmp_path: Path, state: State) -> None:
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1000])

    with pytest.raises(CheckpointError, match="truncated"):
        load_transformer(path, torch.float32)
