"""A tiny Z-Image of random weights, as its reference implementations build and save it."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from tests.support.tiny_model import TINY, randomise

# The template as Jinja: what diffusers' pipeline renders through the tokenizer.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def reference_transformer() -> ZImageTransformer2DModel:
    config = {k: v for k, v in TINY.as_diffusers().items() if not k.startswith("_")}
    return randomise(ZImageTransformer2DModel(**config), 1)


@pytest.fixture(scope="session")
def reference_encoder() -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    return randomise(Qwen3Model(config), 2)


@pytest.fixture(scope="session")
def reference_vae() -> AutoencoderKL:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 32), layers_per_block=1, latent_channels=16, norm_num_groups=4,
        scaling_factor=0.4, shift_factor=0.2, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with Qwen's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    reference_transformer: ZImageTransformer2DModel,
    reference_encoder: Qwen3Model,
    reference_vae: AutoencoderKL,
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """The three parts on disk, written by diffusers, transformers and safetensors, laid out like the demo."""
    folder = tmp_path_factory.mktemp("tiny_z_image")
    save_file(reference_transformer.state_dict(), folder / "transformer.safetensors")
    reference_encoder.save_pretrained(folder / "text_encoder")
    state = {f"model.{name}": tensor for name, tensor in reference_encoder.state_dict().items()}
    save_file(state, folder / "text_encoder" / "model.safetensors")
    tokenizer.save_pretrained(folder / "text_encoder")
    reference_vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="session")
def reference_pipeline(
    reference_transformer: ZImageTransformer2DModel,
    reference_encoder: Qwen3Model,
    reference_vae: AutoencoderKL,
    tokenizer: PreTrainedTokenizerFast,
) -> ZImagePipeline:
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False),
        vae=reference_vae, text_encoder=reference_encoder, tokenizer=tokenizer, transformer=reference_transformer,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
