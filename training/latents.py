"""Draw many training scenes once and keep their latents, so that training the flow never waits for a pencil.

Latents are the patch code of the drawings (`patch_code.py`), which the autoencoder learns separately. Captions are not
stored: a scene is worded anew each time it is used.

    python -m training.latents
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.patch_code import PatchCode, load_patch_code
from training.scenes import Scene, Shape, draw_scene, sample_scene

# (width, height) -> how many scenes. The small sizes come first in training: a step there costs a third.
POOLS: dict[tuple[int, int], int] = {
    (128, 128): 8000,
    (192, 128): 2500,
    (128, 192): 2500,
    (256, 256): 4000,
    (384, 256): 2000,
    (256, 384): 2000,
}
_BATCH = 16


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


def write_pool(code: PatchCode, folder: Path, width: int, height: int, count: int, seed: int) -> None:
    """Write latents_WxH.npy (count, 16, H / 8, W / 8) float16 and scenes_WxH.json."""
    rng = np.random.default_rng((seed, width, height))
    latents = np.empty((count, 16, height // 8, width // 8), np.float16)
    scenes = []
    for start in range(0, count, _BATCH):
        batch = [sample_scene(rng, held_out=False) for _ in range(min(_BATCH, count - start))]
        pictures = np.stack([draw_scene(scene, width, height) for scene in batch])
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents[start : start + len(batch)] = code.encode(pixels).numpy()
        scenes += [asdict(scene) for scene in batch]
    np.save(folder / f"latents_{width}x{height}.npy", latents)
    (folder / f"scenes_{width}x{height}.json").write_text(json.dumps(scenes))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("work/pools"))
    parser.add_argument("--sizes", nargs="*", help="WxH; all when left out")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = [tuple(map(int, size.split("x"))) for size in arguments.sizes or []]
    code = load_patch_code()
    for size, count in POOLS.items():
        if not wanted or size in wanted:
            write_pool(code, arguments.folder, *size, count, arguments.seed)
            print(f"{count} scenes of {size[0]}x{size[1]}", flush=True)


if __name__ == "__main__":
    main()
