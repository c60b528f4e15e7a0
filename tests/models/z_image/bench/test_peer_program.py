"""diffusers' whole program as a peer: from a preset's files to the picture that ours draws, with any offloading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.z_image.bench import peer_program
from models.z_image.bench.peer_program import PLACES, main
from models.z_image.text_encoder import TEMPLATE

DEMO = Path(peer_program.__file__).parents[1] / "demo"
FILES = {
    "transformer": DEMO / "transformer.safetensors",
    "text-encoder": DEMO / "text_encoder" / "model.safetensors",
    "vae": DEMO / "vae" / "diffusion_pytorch_model.safetensors",
}


def arguments(place: str, picture: Path) -> list[str]:
    files = [word for role, path in FILES.items() for word in (f"--{role}", str(path))]
    return [place, "--resolution", "64x64", "--steps", "2", "--prompt", "a red circle on a blue ground",
            "--device", "cpu", "--picture", str(picture), *files]  # fmt: skip


# accelerate's sequential offload cannot take a CPU for its GPU.
@pytest.mark.parametrize("place", [place for place in PLACES if place != "sequential offload"])
def test_a_picture_is_drawn_from_our_files(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    main(arguments(place, tmp_path / "peer.png"))

    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(told["seconds"]) == {"load", "text", "denoise", "decode"}
    assert all(seconds > 0 for seconds in told["seconds"].values())
    assert told["forwards"] == 2
    assert "peak_vram_mb" not in told, "nothing was on a GPU"
    with Image.open(tmp_path / "peer.png") as picture:
        red, _, blue = picture.convert("RGB").resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
    assert blue > red, "the ground is blue"


def test_a_tokenizer_without_a_chat_template_asks_as_ours_does(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for file in FILES["text-encoder"].parent.iterdir():
        if file.name != "chat_template.jinja":
            shutil.copyfile(file, tmp_path / file.name)

    encoder = tmp_path / FILES["text-encoder"].name
    pipeline = peer_program.load_pipeline(FILES["transformer"], encoder, FILES["vae"])()

    asked = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a fox"}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert asked == TEMPLATE.format(prompt="a fox")


def test_sequential_offload_leaves_no_weights_where_they_were(recwarn: pytest.WarningsRecorder) -> None:
    pipeline = peer_program.load_pipeline(*FILES.values())()

    PLACES["sequential offload"](pipeline, torch.device("cpu"))

    assert all(p.is_meta for p in pipeline.transformer.parameters()), "they come for a layer's turn"


def test_packed_files_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = torch.nn.Sequential(object.__new__(peer_program.PackedLinear))
    monkeypatch.setattr(peer_program, "load_transformer", lambda *args, **options: packed)

    with pytest.raises(ValueError, match="read no packed weights"):
        peer_program.load_pipeline(*FILES.values())
