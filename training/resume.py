"""Turn the shipped demo back into training checkpoints, so that its training goes on from a fresh clone.

The optimizer's state is not shipped; a short warm-up replaces it.

    python -m training.latents
    python -m training.resume
    python -m training.train_flow --start-from work/start.pt --steps N
    python -m training.train_vae --start-from work/start_vae.pt --steps N
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from models.z_image.autoencoder import load_vae
from models.z_image.loader import load_transformer
from models.z_image.text_encoder import load_text_encoder
from training.checkpoints import save_checkpoint
from training.train_flow import TextToLatents
from training.train_vae import AutoencoderInTraining

DEMO = Path("models/z_image/demo")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def restore_autoencoder(folder: Path) -> AutoencoderInTraining:
    """The demo's VAE as train_vae holds it."""
    model = AutoencoderInTraining()
    model.vae.load_state_dict(load_vae(folder / "vae", torch.float32).state_dict())
    return model.eval()


def restore_flow(folder: Path) -> TextToLatents:
    """The demo's text encoder and transformer as the one module that train_flow optimises, float32."""
    encoder = load_text_encoder(folder / "text_encoder" / "model.safetensors", torch.float32)
    model = TextToLatents(encoder.config.vocab_size)
    model.text_encoder.load_state_dict(encoder.state_dict())
    model.transformer.load_state_dict(load_transformer(folder / "transformer.safetensors", torch.float32).state_dict())
    return model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=DEMO)
    parser.add_argument("--work", type=Path, default=Path("work"))
    arguments = parser.parse_args()
    tokenizer = arguments.work / "text_encoder"
    tokenizer.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        shutil.copy(arguments.demo / "text_encoder" / name, tokenizer / name)
    save_checkpoint(arguments.work / "start_vae.pt", {"model": restore_autoencoder(arguments.demo).state_dict()})
    save_checkpoint(arguments.work / "start.pt", {"model": restore_flow(arguments.demo).state_dict()})
    print(f"{arguments.work}/start.pt and start_vae.pt hold the demo's weights; training goes on with --start-from.")


if __name__ == "__main__":
    main()
