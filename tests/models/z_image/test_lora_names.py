"""Names in LoRA files are taken apart rightly, and files for other models are recognised by theirs."""

from __future__ import annotations

import pytest

from models.z_image import lora_names
from models.z_image.keys import Slot
from models.z_image.lora_names import Key

Q = "layers.0.attention.to_q"
FLAT_Q = "layers_0_attention_to_q"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"transformer.{Q}.lora_A.weight", Key(Q, "down", False)),
        (f"transformer.{Q}.lora_B.weight", Key(Q, "up", False)),
        (f"diffusion_model.{Q}.lora_down.weight", Key(Q, "down", False)),
        (f"base_model.model.{Q}.lora_A.default.weight", Key(Q, "down", False)),
        (f"base_model.model.{Q}.lora_B.style_2.weight", Key(Q, "up", False)),
        (f"base_model.model.{Q}.lora_B.bias", Key(Q, "up_bias", False)),
        (f"{Q}.lora_linear_layer.up.weight", Key(Q, "up", False)),
        ("layers.0.attention.to.q.lora.down.weight", Key("layers.0.attention.to.q", "down", False)),
        (f"lora_unet_{FLAT_Q}.lora_up.weight", Key(FLAT_Q, "up", False)),
        (f"lora_unet_{FLAT_Q}.alpha", Key(FLAT_Q, "alpha", False)),
        (f"lycoris_{FLAT_Q}.lokr_w1", Key(FLAT_Q, "lokr_w1", False)),
        (f"lycoris_{FLAT_Q}.lokr_w2_b", Key(FLAT_Q, "lokr_w2_b", False)),
        (f"lycoris_{FLAT_Q}.hada_w2_a", Key(FLAT_Q, "hada_w2_a", False)),
        (f"lora_unet_{FLAT_Q}.dora_scale", Key(FLAT_Q, "magnitude", False)),
        (f"base_model.model.{Q}.lora_magnitude_vector.default.weight", Key(Q, "magnitude", False)),
        (f"base_model.model.{Q}.lora_magnitude_vector", Key(Q, "magnitude", False)),
        (f"diffusion_model.{Q}.diff", Key(Q, "diff", False)),
        (f"diffusion_model.{Q}.diff_b", Key(Q, "diff_b", False)),
        ("lycoris_layers_0_attention_norm1.w_norm", Key("layers_0_attention_norm1", "diff", False)),
        (
            "lora_te_model_layers_3_self_attn_q_proj.lora_down.weight",
            Key("layers_3_self_attn_q_proj", "down", True),
        ),
        (
            "text_encoder.model.layers.3.mlp.up_proj.lora_A.weight",
            Key("layers.3.mlp.up_proj", "down", True),
        ),
        (
            "text_encoders.qwen3_4b.transformer.model.layers.3.mlp.up_proj.lora_A.weight",
            Key("layers.3.mlp.up_proj", "down", True),
        ),
        (f"transformer.{Q}.weight", None),
        (f"base_model.model.{Q}.lora_A.bias", None),
    ],
)
def test_a_name_says_module_part_and_network(name: str, expected: Key | None) -> None:
    assert lora_names.parse(name) == expected


@pytest.mark.parametrize(
    ("spelling", "slot"),
    [
        ("layers.0.attention.to_k", Slot("layers.0.attention.qkv", (1,), 3)),
        ("layers.0.attention.to.k", Slot("layers.0.attention.qkv", (1,), 3)),
        ("layers_0_attention_to_k", Slot("layers.0.attention.qkv", (1,), 3)),
        ("layers.0.attention.to_qkv", Slot("layers.0.attention.qkv", (0, 1, 2), 3)),
        ("layers_0_attention_out", Slot("layers.0.attention.out", (0,), 1)),
        ("layers.0.attention.to_out", Slot("layers.0.attention.out", (0,), 1)),
        ("layers_0_attention_to_out_0", Slot("layers.0.attention.out", (0,), 1)),
        ("layers_0_feed_forward_w3", Slot("layers.0.feed_forward.w13", (1,), 2)),
        ("layers.0.feed_forward.net.0.proj", Slot("layers.0.feed_forward.w13", (1, 0), 2)),
        ("layers_0_adaLN_modulation_0", Slot("layers.0.adaLN_modulation.0", (0,), 1)),
        ("all_x_embedder_2-1", Slot("x_embedder", (0,), 1)),
        ("layers.1.attention.to_k", None),
    ],
)
def test_a_module_finds_its_rows(spelling: str, slot: Slot | None) -> None:
    ours = [f"layers.0.{m}" for m in ("attention.qkv", "attention.out", "feed_forward.w13", "feed_forward.w2")]

    known = lora_names.places([*ours, "layers.0.adaLN_modulation.0", "x_embedder"])

    assert lora_names.find_place(spelling, known) == slot


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight", "FLUX.1"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "FLUX.1"),
        ("diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight", "HunyuanVideo"),
        ("transformer.single_transformer_blocks.3.attn.to_qkv_mlp_proj.lora_A.weight", "FLUX.2"),
        ("transformer.transformer_blocks.3.attn.add_k_proj.lora_A.weight", "Qwen-Image"),
        ("transformer_blocks.3.img_mlp.net.0.proj.lora_A.weight", "Qwen-Image"),
        ("diffusion_model.blocks.3.cross_attn.k.lora_A.weight", "Wan"),
        ("diffusion_model.blocks.3.ffn.0.lora_down.weight", "Wan"),
        ("lora_unet_input_blocks_7_1_transformer_blocks_4_attn1_to_k.lora_down.weight", "Stable Diffusion XL"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "Stable Diffusion XL"),
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.lora_down.weight",
            "Stable Diffusion 1.5, 2 or XL",
        ),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.attn2.to_k.lora_A.weight", "LTX-Video or PixArt"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "a language model"),
        ("diffusion_model.layers.0.attention.to_q.lora_A.weight", None),
        ("something.else.lora_A.weight", None),
    ],
)
def test_a_file_for_another_model_is_recognised(name: str, model: str | None) -> None:
    assert lora_names.origin([name]) == model


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"lycoris_{FLAT_Q}.oft_blocks", "OFT"),
        (f"base_model.model.{Q}.oft_R.weight", "OFT"),
        (f"lycoris_{FLAT_Q}.a1.weight", "GLoRA"),
        (f"base_model.model.{Q}.ia3_l", "IA3"),
        (f"base_model.model.{Q}.vera_lambda_b", "VeRA"),
        (f"lycoris_{FLAT_Q}.lokr_t2", "a convolution's Tucker form"),
    ],
)
def test_kinds_that_are_not_offered_are_named(name: str, kind: str) -> None:
    assert lora_names.not_offered(["transformer.x.lora_A.weight", name]) == (name, kind)
