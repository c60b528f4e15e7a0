"""What is exported means the same as what was trained."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from training import export
from training.export import export_vae, write_manifest
from training.train_vae import SCALING_FACTOR, SHIFT_FACTOR, AutoencoderInTraining


@torch.no_grad()
def test_exported_autoencoder_gives_the_latents_of_the_trained_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoencoderInTraining().eval()
    pixels = torch.rand(1, 3, 32, 48) * 2 - 1

    export_vae(model, tmp_path)

    plain = AutoencoderKL.from_pretrained(tmp_path, local_files_only=True).eval()
    distribution = plain.encode(pixels).latent_dist
    latents = model.encode(pixels)
    torch.testing.assert_close((distribution.mode() - SHIFT_FACTOR) * SCALING_FACTOR, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain.decode(latents / SCALING_FACTOR + SHIFT_FACTOR).sample, model.decode(latents))
    assert float(distribution.std.max()) < 0.06


def test_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")

    write_manifest(tmp_path, {"vae/config.json": 3}, {"flow_steps": 7})

    manifest = json.loads((tmp_path / "MANIFEST.json").read_text())
    entry = manifest["files"]["vae/config.json"]
    assert entry == {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest(), "parameters": 3}
    assert manifest["training"]["flow_steps"] == 7


def test_manifest_refuses_more_than_the_repository_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.bin").write_bytes(b"12345")
    monkeypatch.setattr(export, "MOST_BYTES", 4)

    with pytest.raises(ValueError, match="5 bytes, more than the 4"):
        write_manifest(tmp_path, {}, {})
