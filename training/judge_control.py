"""Judge the demo's control branch on outlines that its training never drew, with the files and the code of users.

edges: canny edges of a held-out outline (outlines.py: arrow, cross, hexagon ...) drawn in other colours than the
caption asks, which speaks of colours only. overlap: intersection over union of what was drawn in the asked colours
with the outline; without the edges, for comparison, too. colours: share of pictures whose ground and only shape have
the asked colours, read by checker.py.

hole: a part of a captioned scene is cut out and drawn anew. right: share of the pixels in the hole that are shape
where shape was, ground where ground was; and the same when only the known pixels are kept and no branch is asked.

    python -m training.judge_control --count 40
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.z_image.autoencoder import load_vae
from models.z_image.editing import ControlPicture, PictureStart
from models.z_image.loader import load_transformer
from models.z_image.pipeline import ZImagePipeline
from models.z_image.request import GenerateRequest
from models.z_image.text_encoder import TextEncoder, load_text_encoder, load_tokenizer
from training.captions import write_caption
from training.checker import read_picture
from training.outlines import Drawing, drawing_of, paint, sample_drawing
from training.resume import DEMO
from training.scenes import COLOURS, sample_scene
from training.train_control import CONFIG, CONTROL_FILE, edges_of, sample_hole, word_colours
from training.train_vae import to_pixels

LEAST_OVERLAP = 0.8
_SEED = 30_000
_SHEET_COLUMNS = 8


def shape_of(picture: NDArray[np.uint8], drawing: Drawing) -> NDArray[np.bool_]:
    """(height, width): where the picture is nearer to the shape's palette colour than to the ground's.

    Nearer along the line between the two, so that light and shadow do not count, nor does a colour beside both.
    """
    ground, colour = (np.array(COLOURS[name], np.float32) for name in (drawing.ground, drawing.shapes[0].colour))
    way = colour - ground
    return (picture.astype(np.float32) - ground) @ way > 0.5 * float(way @ way)


def overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Intersection over union, 0 for two empty ones."""
    return float((first & second).sum() / max(1, (first | second).sum()))


def has_colours(picture: NDArray[np.uint8], drawing: Drawing) -> bool:
    """Whether the checker reads the asked ground, and one shape, of the asked colour."""
    reading = read_picture(picture)
    return reading.ground == drawing.ground and [s.colour for s in reading.shapes] == [drawing.shapes[0].colour]


def load_pipeline(demo: Path, control: Path) -> ZImagePipeline:
    """The demo with the branch, float32 on the CPU."""
    transformer = load_transformer([demo / "transformer.safetensors", control], torch.float32)
    encoder = TextEncoder(
        load_text_encoder(demo / "text_encoder" / "model.safetensors", torch.float32),
        load_tokenizer(demo / "text_encoder"),
    )
    vae = load_vae(demo / "vae" / "diffusion_pytorch_model.safetensors", torch.float32)
    return ZImagePipeline(transformer, encoder, vae, torch.device("cpu"))


def draw(pipeline: ZImagePipeline, **request: Any) -> NDArray[np.uint8]:
    """One picture (height, width, 3) in 8 steps without guidance."""
    pixels = pipeline(GenerateRequest(steps=8, **request))
    assert pixels is not None  # nobody interrupts
    return _to_bytes(pixels[0])


def judge_edges(
    pipeline: ZImagePipeline, count: int, size: tuple[int, int], weight: float
) -> tuple[dict[str, float], list[list[NDArray[np.uint8]]]]:
    """The figures, and for the sheet (edges, picture) of every drawing."""
    width, height = size
    rng = np.random.default_rng(_SEED)
    overlaps, without, colours, shown = [], [], [], []
    for i in range(count):
        drawing = sample_drawing(rng, width, height, held_out=True)
        edges = edges_of(drawing, width, height, rng)
        prompt = word_colours(drawing.ground, drawing.shapes[0].colour, rng, held_out=True)
        control = ControlPicture(channels=CONFIG.in_channels, picture=to_pixels([edges])[0], weight=weight)
        asked: dict[str, Any] = {"prompt": prompt, "width": width, "height": height, "seeds": (_SEED + i,)}
        picture = draw(pipeline, **asked, control=control)
        outline = drawing.shapes[0].mask(width, height) > 0.5
        overlaps.append(overlap(shape_of(picture, drawing), outline))
        colours.append(has_colours(picture, drawing))
        if i % 4 == 0:
            without.append(overlap(shape_of(draw(pipeline, **asked), drawing), outline))
        shown.append([edges, picture])
    figures = {
        "pictures": float(count),
        "overlap": float(np.mean(overlaps)),
        f"overlap of {LEAST_OVERLAP:g} or more": float(np.mean([o >= LEAST_OVERLAP for o in overlaps])),
        "colours": float(np.mean(colours)),
        "overlap without edges": float(np.mean(without)),
    }
    return figures, shown


def judge_holes(
    pipeline: ZImagePipeline, count: int, size: tuple[int, int], weight: float
) -> tuple[dict[str, float], list[list[NDArray[np.uint8]]]]:
    """The figures, and for the sheet (picture with the hole, picture) of every scene."""
    width, height = size
    rng = np.random.default_rng(_SEED + 1)
    right: list[float] = []
    plainly: list[float] = []
    shown = []
    for i in range(count):
        scene = sample_scene(rng, held_out=True, num_shapes=1)
        drawing = drawing_of(scene, width, height)
        truth = drawing.shapes[0].mask(width, height) > 0.5
        whole, hole = to_pixels([paint(drawing, width, height)])[0], sample_hole(rng, width, height)
        inside = hole[0].numpy() > 0.5
        caption = write_caption(scene, rng, held_out=True, complete=True)
        asked: dict[str, Any] = {"prompt": caption.text, "width": width, "height": height, "seeds": (_SEED + i,)}
        control = ControlPicture(channels=CONFIG.in_channels, weight=weight, repaint=whole, mask=hole)
        pictures = [
            draw(pipeline, **asked, start=PictureStart(picture=whole, mask=hole, free=True), control=control),
            draw(pipeline, **asked, start=PictureStart(picture=whole, mask=hole)),
        ]
        for picture, shares in zip(pictures, (right, plainly), strict=True):
            shares.append(float((shape_of(picture, drawing) == truth)[inside].mean()))
        shown.append([_to_bytes(whole * (1 - hole)), pictures[0]])
    figures = {
        "pictures": float(count),
        "right": float(np.mean(right)),
        "right without branch": float(np.mean(plainly)),
    }
    return figures, shown


def judge(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Both tables, printed and as report.json, and a sheet each."""
    width, height = map(int, arguments.size.split("x"))
    pipeline = load_pipeline(arguments.demo, arguments.control)
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = {}
    for name, task, count in (("edges", judge_edges, arguments.count), ("hole", judge_holes, arguments.count // 2)):
        report[name], shown = task(pipeline, count, (width, height), arguments.weight)
        words = ", ".join(f"{key} {value:.3g}" for key, value in report[name].items())
        print(f"{name}, {arguments.size}: {words}", flush=True)
        starts = range(0, len(shown) - _SHEET_COLUMNS + 1, _SHEET_COLUMNS)
        rows = [np.hstack(row) for i in starts for row in zip(*shown[i : i + _SHEET_COLUMNS], strict=True)]
        if rows:
            cv2.imwrite(str(arguments.output / f"{name}.png"), np.vstack(rows)[..., ::-1])
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _to_bytes(pixels: Tensor) -> NDArray[np.uint8]:
    return ((pixels.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=DEMO)
    parser.add_argument("--control", type=Path, default=CONTROL_FILE)
    parser.add_argument("--output", type=Path, default=Path("work/judge_control"))
    parser.add_argument("--count", type=int, default=40, help="pictures with edges; half as many with a hole")
    parser.add_argument("--size", default="256x256", help="WxH")
    parser.add_argument("--weight", type=float, default=1.0, help="of the control branch")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    judge(arguments)


if __name__ == "__main__":
    main()
