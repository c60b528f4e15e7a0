"""Caption features against transformers' whole Qwen3 and diffusers' way of prompting it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file, save_file
from transformers import Qwen3Model

from models.z_image.text_encoder import TEMPLATE, TextEncoder, load_text_encoder, load_tokenizer
from shared.quant.errors import LayerMismatchError, UserError

CPU = torch.device("cpu")


@pytest.fixture
def encoder(model_folder: Path) -> TextEncoder:
    folder = model_folder / "text_encoder"
    return TextEncoder(load_text_encoder(folder / "model.safetensors", torch.float32), load_tokenizer(folder))


@pytest.mark.parametrize("prompt", ["a red fox", "", "Füchse 狐 🦊", "long " * 90])
def test_features_agree_with_diffusers(encoder: TextEncoder, reference_pipeline: ZImagePipeline, prompt: str) -> None:
    expected, _ = reference_pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)

    ours = encoder.encode([prompt], CPU)[0]

    torch.testing.assert_close(ours, expected[0], rtol=1e-4, atol=1e-5)


def test_the_template_is_the_chat_template_rendered(encoder: TextEncoder) -> None:
    rendered = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )

    assert TEMPLATE.format(prompt="hi") == rendered


def test_the_last_layer_and_final_norm_are_not_loaded(encoder: TextEncoder, reference_encoder: Qwen3Model) -> None:
    assert len(encoder.model.layers) == len(reference_encoder.layers) - 1
    assert not any(name.startswith("norm.") for name, _ in encoder.model.named_parameters())


def test_a_prompt_is_encoded_once(encoder: TextEncoder) -> None:
    first = encoder.encode(["fox", "", "fox"], CPU)
    encoder.encode(["fox"], CPU)

    assert encoder.encoded == 2
    assert torch.equal(first[0], first[2])


def test_names_behind_any_prefix_load(model_folder: Path, tmp_path: Path) -> None:
    state = load_file(model_folder / "text_encoder" / "model.safetensors")
    comfy = {f"text_encoders.qwen3_4b.transformer.{name}": tensor for name, tensor in state.items()}
    save_file(comfy | {"text_encoders.qwen3_4b.logit_scale": torch.ones(())}, tmp_path / "te.safetensors")

    model = load_text_encoder(tmp_path / "te.safetensors", torch.float32)

    assert torch.equal(model.embed_tokens.weight, state["model.embed_tokens.weight"])


def test_a_prompt_that_has_no_positions_is_refused_not_cut(encoder: TextEncoder) -> None:
    with pytest.raises(UserError, match="at most 1504"):
        encoder.encode(["x" * 2000], CPU)


def test_a_missing_tensor_is_named(model_folder: Path, tmp_path: Path) -> None:
    state = load_file(model_folder / "text_encoder" / "model.safetensors")
    del state["model.layers.0.mlp.down_proj.weight"]
    save_file(state, tmp_path / "te.safetensors")

    with pytest.raises(LayerMismatchError, match=r"1 missing \(layers\.0\.mlp\.down_proj\.weight\)"):
        load_text_encoder(tmp_path / "te.safetensors", torch.float32)


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No tokenizer in"):
        load_tokenizer(tmp_path)


def test_a_long_prompt_is_kept_cut_or_refused_as_asked_and_a_cut_is_told(encoder: TextEncoder) -> None:
    prompt = "x" * 600  # a token per byte in this tokenizer
    told: list[str] = []

    kept = encoder.encode([prompt], CPU, tell=told.append)[0]
    assert len(kept) > 600
    assert told == []

    cut = encoder.encode([prompt], CPU, long_prompt="cut", tell=told.append)[0]
    torch.testing.assert_close(cut, kept[:512])
    assert len(told) == 1
    assert "was cut to 512" in told[0]

    with pytest.raises(UserError, match=r"at most 512 are taken.*long_prompt=cut"):
        encoder.encode([prompt], CPU, long_prompt="refuse")


def test_a_cut_prompt_may_be_of_any_length_and_a_short_one_is_not_told_of(encoder: TextEncoder) -> None:
    told: list[str] = []

    features = encoder.encode(["x" * 5000, "fox"], CPU, long_prompt="cut", tell=told.append)

    assert [len(features[0]), len(features[1]) < 512, len(told)] == [512, True, 1]
