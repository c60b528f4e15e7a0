"""Draw many training scenes once and keep their latents, so that training the flow never waits for a pencil.

`--stage draw` writes pictures and scenes, `--stage encode` turns the pictures into normalised latents with
the frozen encoder of `train_vae`. Captions are not stored: a scene is worded anew each time it is used.

    python -m training.latents --stage draw
    python -m training.latents --stage encode --vae work/vae.pt
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.checkpoints import load_checkpoint
from training.scenes import Scene, Shape, draw_scene, sample_scene
from training.train_vae import AutoencoderInTraining, to_pixels

# (width, height) -> how many scenes. The small sizes come first in training: a step there costs a third.
POOLS: dict[tuple[int, int], int] = {
    (128, 128): 8000,
    (192, 128): 2500,
    (128, 192): 2500,
    (256, 256): 4000,
    (384, 256): 2000,
    (256, 384): 2000,
}
_ENCODE_BATCH = 16


@dataclass(frozen=True)
class LatentPool:
    """Scenes of one picture size and their latents: (count, 16, height / 8, width / 8) float16, mean 0, deviation 1."""

    scenes: list[Scene]
    latents: NDArray[np.float16]


def load_pool(folder: Path, width: int, height: int) -> LatentPool:
    """Open one size's pool; the latents are read into memory. Raises FileNotFoundError when it was not made."""
    name = f"{width}x{height}"
    listed = json.loads((folder / f"scenes_{name}.json").read_text())
    scenes = [Scene(s["ground"], tuple(Shape(**shape) for shape in s["shapes"])) for s in listed]
    latents = np.load(folder / f"latents_{name}.npy")
    return LatentPool(scenes[: len(latents)], latents)


def draw_pool_to_disk(folder: Path, width: int, height: int, count: int, seed: int) -> None:
    """Write pictures_WxH.npy (count, H, W, 3) uint8 and scenes_WxH.json."""
    rng = np.random.default_rng((seed, width, height))
    name = f"{width}x{height}"
    shape = (count, height, width, 3)
    pictures = np.lib.format.open_memmap(folder / f"pictures_{name}.npy", "w+", np.uint8, shape)
    scenes = []
    for i in range(count):
        scene = sample_scene(rng, held_out=False)
        pictures[i] = draw_scene(scene, width, height, rng)
        scenes.append(asdict(scene))
    pictures.flush()
    (folder / f"scenes_{name}.json").write_text(json.dumps(scenes))


@torch.no_grad()
def encode_pool(model: AutoencoderInTraining, folder: Path, width: int, height: int) -> None:
    """Write latents_WxH.npy from pictures_WxH.npy."""
    name = f"{width}x{height}"
    pictures = np.load(folder / f"pictures_{name}.npy", mmap_mode="r")[: POOLS[width, height]]
    latents = np.empty((len(pictures), 16, height // 8, width // 8), np.float16)
    for start in range(0, len(pictures), _ENCODE_BATCH):
        batch = to_pixels(list(pictures[start : start + _ENCODE_BATCH]))
        with torch.autocast("cpu", torch.bfloat16):
            latents[start : start + _ENCODE_BATCH] = model.encode(batch).numpy()
    np.save(folder / f"latents_{name}.npy", latents)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("draw", "encode"), required=True)
    parser.add_argument("--folder", type=Path, default=Path("work/pools"))
    parser.add_argument("--vae", type=Path, default=Path("work/vae.pt"))
    parser.add_argument("--sizes", nargs="*", help="WxH; all when left out")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = [tuple(map(int, size.split("x"))) for size in arguments.sizes or []]
    pools = {size: count for size, count in POOLS.items() if not wanted or size in wanted}
    if arguments.stage == "encode":
        model = AutoencoderInTraining().to(memory_format=torch.channels_last)
        model.load_state_dict(load_checkpoint(arguments.vae)["model"])
        model.eval()
    for (width, height), count in pools.items():
        if arguments.stage == "draw":
            draw_pool_to_disk(arguments.folder, width, height, count, arguments.seed)
        else:
            encode_pool(model, arguments.folder, width, height)
        print(f"{arguments.stage}: {count} scenes of {width}x{height}", flush=True)


if __name__ == "__main__":
    main()
