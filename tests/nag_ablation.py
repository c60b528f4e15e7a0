"""What NAG does to the demo's pictures, by an independent judge: a negative prompt names the colour that was drawn.

The prompts leave the shape's colour open, so each seed chooses one. Every picture whose one shape has a readable hue is
drawn again with that hue's name for a negative prompt and everything else as it was. Black and white are left out: to
stay away from black on white is to draw nothing.

    python -m tests.nag_ablation --scale 2 --seeds 16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from models.z_image.z_image_handler import family_handler
from models.z_image.z_image_main import model_factory
from training.checker import Reading, read_picture

# prompt -> the ground and the kind of shape that it asks for
PROMPTS = {
    "a circle on a white background": ("white", "circle"),
    "a large square on a white background": ("white", "square"),
    "a circle in the middle of a black background": ("black", "circle"),
}
HUES = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")


@dataclass(frozen=True)
class Pair:
    """A prompt and a seed, what it shows by itself and what it shows with `hue` in the negative prompt."""

    prompt: str
    seed: int
    hue: str
    plain: Reading
    guided: Reading

    @property
    def still_there(self) -> bool:
        return any(shape.colour == self.hue for shape in self.guided.shapes)


def load_demo() -> model_factory:
    demo, _ = family_handler.load_model(
        model_filename="models/z_image/demo/transformer.safetensors",
        base_model_type="z_image",
        dtype=torch.float32,
        VAE_dtype=torch.float32,
    )
    return demo


def ablate(demo: model_factory, drawings: Iterable[tuple[str, int]], **nag: float) -> list[Pair]:
    """A pair for each (prompt, seed) whose picture shows one shape of a readable hue. nag: NAG_scale and the like."""
    pairs = []
    for prompt, seed in drawings:
        plain = _look(demo, input_prompt=prompt, seed=seed)
        hue = plain.shapes[0].colour if len(plain.shapes) == 1 else None
        if hue in HUES:
            guided = _look(demo, input_prompt=prompt, seed=seed, n_prompt=hue, **nag)
            pairs.append(Pair(prompt, seed, hue, plain, guided))
    return pairs


def keeps(reading: Reading, prompt: str) -> dict[str, bool]:
    """Which parts of the prompt a picture keeps: its ground, its one shape, and that shape's kind."""
    ground, kind = PROMPTS[prompt]
    one = len(reading.shapes) == 1
    return {"ground": reading.ground == ground, "one shape": one, "kind": one and reading.shapes[0].kind == kind}


def _look(demo: model_factory, **settings: Any) -> Reading:
    pictures = demo.generate(width=256, height=256, sampling_steps=8, **settings)
    assert pictures is not None
    return read_picture(((pictures[:, 0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=2.0, help="NAG_scale")
    parser.add_argument("--seeds", type=int, default=16, help="of each prompt")
    arguments = parser.parse_args()
    drawings = [(prompt, seed) for prompt in PROMPTS for seed in range(arguments.seeds)]
    pairs = ablate(load_demo(), drawings, NAG_scale=arguments.scale)
    still = sum(pair.still_there for pair in pairs)
    sys.stdout.write(f"{len(pairs)} pictures; the named colour is still there in {still}\n")
    for what in ("ground", "one shape", "kind"):
        before, after = (
            sum(keeps(reading, pair.prompt)[what] for pair, reading in zip(pairs, readings, strict=True))
            for readings in ([pair.plain for pair in pairs], [pair.guided for pair in pairs])
        )
        sys.stdout.write(f"{what}: right in {before} without, in {after} with\n")


if __name__ == "__main__":
    main()
