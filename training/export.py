"""Write the trained demo as files that the program (and diffusers and transformers) load:
models/z_image/demo.

    transformer.safetensors                    bf16, diffusers' tensor names, its config in the header
    text_encoder/model.safetensors, config.json and the tokenizer
    vae/diffusion_pytorch_model.safetensors, config.json
    MANIFEST.json                              size, SHA-256 and parameters of every file, and how it was trained

The text encoder's last layer, which no pipeline runs, is small random numbers.

    python -m training.export --flow work/flow.pt --vae work/vae.pt
"""

from __future__ import annotations

import argparse
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from models.z_image.loader import to_diffusers
from training.checkpoints import load_checkpoint
from training.train_flow import TEXT_ENCODER_LAYERS, TRANSFORMER_CONFIG, TextToLatents, build_text_encoder
from training.train_vae import LATENT_CHANNELS, AutoencoderInTraining

MOST_BYTES = 32 * 1024 * 1024
_LOG_VARIANCE = -6.0  # of the posterior: a deviation of 0.05, for those who sample it


def export_transformer(model: TextToLatents, path: Path) -> int:
    """Write bf16 under diffusers' names; returns the number of parameters."""
    tensors = {name: t.to(torch.bfloat16) for name, t in to_diffusers(model.transformer.state_dict()).items()}
    metadata = {"format": "pt", "config": json.dumps(TRANSFORMER_CONFIG.as_diffusers())}
    save_file(tensors, path, metadata=metadata)
    return sum(t.numel() for t in tensors.values())


def export_text_encoder(model: TextToLatents, tokenizer_folder: Path, folder: Path) -> int:
    """Write model.safetensors (keys `model.*`), config.json and the tokenizer; returns the number of parameters."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    whole = build_text_encoder(len(tokenizer), layers=TEXT_ENCODER_LAYERS)
    state = {name: tensor * 0.1 if tensor.ndim > 1 else tensor for name, tensor in whole.state_dict().items()}
    state["norm.weight"] = torch.ones(whole.config.hidden_size)
    state.update(model.text_encoder.state_dict())
    tensors = {f"model.{name}": t.to(torch.bfloat16).contiguous() for name, t in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = whole.config.to_dict()
    config.update(architectures=["Qwen3ForCausalLM"], tie_word_embeddings=True, dtype="bfloat16")
    config.update(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return sum(t.numel() for t in tensors.values())


@torch.no_grad()
def export_vae(model: AutoencoderInTraining, folder: Path) -> int:
    """Write float32 weights and config.json; returns the number of parameters.

    The half of the encoder's output that says how sure it is was never trained: it gets one small constant.
    """
    tensors = {name: t.clone().contiguous() for name, t in model.vae.state_dict().items()}
    tensors["encoder.conv_out.weight"][LATENT_CHANNELS:] = 0
    tensors["encoder.conv_out.bias"][LATENT_CHANNELS:] = _LOG_VARIANCE
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    model.vae.save_config(folder)
    return sum(t.numel() for t in tensors.values())


def write_manifest(folder: Path, parameters: dict[str, int], training: dict[str, Any]) -> None:
    """List every file with its size and SHA-256. Raises ValueError when all together exceed MOST_BYTES."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "MANIFEST.json")
    listed = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        listed[name] = {"bytes": path.stat().st_size, "sha256": digest}
        if name in parameters:
            listed[name]["parameters"] = parameters[name]
    total = sum(entry["bytes"] for entry in listed.values())
    if total > MOST_BYTES:
        raise ValueError(f"{folder}: {total} bytes, more than the {MOST_BYTES} that the repository allows")
    manifest = {"files": listed, "bytes": total, "training": training}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flow", type=Path, default=Path("work/flow.pt"))
    parser.add_argument("--vae", type=Path, default=Path("work/vae.pt"))
    parser.add_argument("--tokenizer", type=Path, default=Path("work/text_encoder"))
    parser.add_argument("--output", type=Path, default=Path("models/z_image/demo"))
    parser.add_argument("--untrained", action="store_true", help="random weights where no checkpoint exists yet")
    arguments = parser.parse_args()
    for name in ("", "text_encoder", "vae"):
        (arguments.output / name).mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, local_files_only=True)
    torch.manual_seed(0)
    model, steps = TextToLatents(len(tokenizer)), 0
    if arguments.flow.exists() or not arguments.untrained:
        saved = load_checkpoint(arguments.flow)
        model.load_state_dict(saved["averaged"])
        steps = saved["step"]
    autoencoder, vae_steps = AutoencoderInTraining(), 0
    if arguments.vae.exists() or not arguments.untrained:
        saved = load_checkpoint(arguments.vae)
        autoencoder.load_state_dict(saved["model"])
        vae_steps = saved["step"]

    parameters = {
        "transformer.safetensors": export_transformer(model, arguments.output / "transformer.safetensors"),
        "text_encoder/model.safetensors": export_text_encoder(
            model, arguments.tokenizer, arguments.output / "text_encoder"
        ),
        "vae/diffusion_pytorch_model.safetensors": export_vae(autoencoder, arguments.output / "vae"),
    }
    training = {
        "flow_steps": steps,
        "vae_steps": vae_steps,
        "commands": "training/README.md",
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_manifest(arguments.output, parameters, training)
    print((arguments.output / "MANIFEST.json").read_text())


if __name__ == "__main__":
    main()
