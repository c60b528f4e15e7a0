"""The shipped demo, turned back into training checkpoints, is the same model."""

from __future__ import annotations

import torch

from models.z_image import autoencoder
from models.z_image.text_encoder import load_text_encoder, load_tokenizer
from training.resume import DEMO, restore_autoencoder, restore_flow
from training.train_flow import encode_prompt


@torch.no_grad()
def test_the_autoencoder_gives_the_same_latents_and_pictures() -> None:
    restored, shipped = restore_autoencoder(DEMO), autoencoder.load_vae(DEMO / "vae", torch.float32)
    picture = torch.rand(1, 3, 64, 64) * 2 - 1

    latents = restored.encode(picture)

    torch.testing.assert_close(latents, autoencoder.encode(shipped, picture), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        restored.decode(latents).clamp(-1, 1), autoencoder.decode(shipped, latents), rtol=0, atol=1e-4
    )


@torch.no_grad()
def test_the_flow_model_reads_prompts_as_the_shipped_encoder_does() -> None:
    restored = restore_flow(DEMO).eval()
    encoder = load_text_encoder(DEMO / "text_encoder" / "model.safetensors", torch.float32)
    ids = encode_prompt("a red circle", load_tokenizer(DEMO / "text_encoder"))

    features = restored.encode_text([ids])[0]

    torch.testing.assert_close(features, encoder(input_ids=torch.tensor([ids])).last_hidden_state[0])
    assert restored(torch.randn(1, 16, 8, 8), torch.tensor([0.5]), [ids]).shape == (1, 16, 8, 8)
