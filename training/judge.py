"""Judge the exported demo on held-out captions: 8 network calls, no guidance, the files and the code that
users run.

For every picture size, half the captions mention everything and half leave things out; two of three show
one shape. Scenes and sentence frames come from the held-out side of the split (scenes.is_held_out,
captions.write_caption(held_out=True)). The checker reads the decoded picture and knows nothing of the
model. Writes a JSON report, one contact sheet per size, and prints a table.

    python -m training.judge --count 240 --output work/judge
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.z_image.autoencoder import decode, load_vae
from models.z_image.loader import load_transformer
from models.z_image.text_encoder import TextEncoder, load_text_encoder, load_tokenizer
from training.captions import Caption, write_caption
from training.checker import Verdict, judge_picture
from training.sampling import sample_pictures
from training.scenes import sample_scene
from training.train_flow import write_sheet
from training.train_vae import PICTURE_SIZES

ATTRIBUTES = ("ground", "colour", "place", "kind", "size", "count", "everything")
_BATCH = 8
_SHEET_PICTURES = 32


def held_out_captions(count: int, seed: int) -> list[Caption]:
    """Captions of scenes, in wordings, that training never saw."""
    rng = np.random.default_rng(seed)
    captions = []
    for i in range(count):
        scene = sample_scene(rng, held_out=True, num_shapes=2 if i % 3 == 2 else 1)
        captions.append(write_caption(scene, rng, held_out=True, complete=i % 2 == 0))
    return captions


def shares(captions: Sequence[Caption], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Share of pictures that keep each promise, among those whose caption made it, for all and by number of shapes."""

    def promised(caption: Caption, attribute: str) -> bool:
        if attribute in ("count", "everything"):
            return True
        if attribute == "ground":
            return caption.ground is not None
        return any(getattr(promise, attribute) is not None for promise in caption.shapes)

    report: dict[str, Any] = {}
    for name, counts in (("all", (1, 2)), ("one shape", (1,)), ("two shapes", (2,))):
        pairs = [(c, v) for c, v in zip(captions, verdicts, strict=True) if len(c.shapes) in counts]
        row: dict[str, Any] = {"captions": len(pairs)}
        for attribute in ATTRIBUTES:
            kept = [getattr(v, attribute) for c, v in pairs if promised(c, attribute)]
            row[attribute] = round(float(np.mean(kept)), 4) if kept else None
        report[name] = row
    return report


def judge(
    folder: Path, output: Path, sizes: Sequence[tuple[int, int]], count: int, seed: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Generate, read and compare; writes report.json, failures and contact sheets into `output`."""
    transformer = load_transformer(folder / "transformer.safetensors", dtype)
    encoder = TextEncoder(
        load_text_encoder(folder / "text_encoder" / "model.safetensors", dtype),
        load_tokenizer(folder / "text_encoder"),
    )
    vae = load_vae(folder / "vae" / "diffusion_pytorch_model.safetensors", torch.float32)
    device = torch.device("cpu")

    def encode_text(prompts: Sequence[str]) -> list[Tensor]:
        return encoder.encode(prompts, device)

    output.mkdir(parents=True, exist_ok=True)
    captions = held_out_captions(count, seed)
    report: dict[str, Any] = {"steps": 8, "shift": 3.0, "guidance": 0, "dtype": str(dtype).split(".")[1], "seed": seed}
    for width, height in sizes:
        started = time.monotonic()
        pictures: list[np.ndarray] = []
        for start in range(0, count, _BATCH):
            prompts = [c.text for c in captions[start : start + _BATCH]]
            pictures += sample_pictures(
                transformer,
                encode_text,
                lambda latents: decode(vae, latents),
                prompts,
                width=width,
                height=height,
                first_seed=seed + start,
            )
        verdicts = [judge_picture(p, c) for p, c in zip(pictures, captions, strict=True)]
        failures = [
            {"index": i, "caption": c.text, "wrong": [a for a in ATTRIBUTES[:-1] if not getattr(v, a)]}
            for i, (c, v) in enumerate(zip(captions, verdicts, strict=True))
            if not v.everything
        ]
        name = f"{width}x{height}"
        report[name] = shares(captions, verdicts) | {"failures": failures}
        write_sheet(output / f"sheet_{name}.png", pictures[:_SHEET_PICTURES], captions[:_SHEET_PICTURES])
        if failures:
            wrong = [pictures[f["index"]] for f in failures][:_SHEET_PICTURES]
            texts = [captions[f["index"]] for f in failures][:_SHEET_PICTURES]
            write_sheet(output / f"failures_{name}.png", wrong, texts, columns=min(8, len(wrong)))
        seconds = time.monotonic() - started
        print(f"{name}: {seconds / count:.2f} s a picture", flush=True)
        for row in ("all", "one shape", "two shapes"):
            values = " ".join(f"{a} {100 * report[name][row][a]:.1f}" for a in ATTRIBUTES)
            print(f"  {row} ({report[name][row]['captions']}): {values}", flush=True)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("models/z_image/demo"))
    parser.add_argument("--output", type=Path, default=Path("work/judge"))
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--sizes", nargs="*", default=[f"{w}x{h}" for w, h in PICTURE_SIZES], help="WxH")
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    sizes = []
    for size in arguments.sizes:
        width, height = size.split("x")
        sizes.append((int(width), int(height)))
    judge(arguments.demo, arguments.output, sizes, arguments.count, arguments.seed, getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
