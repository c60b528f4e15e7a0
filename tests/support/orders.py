"""What is asked of a session in tests, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.app.context import AppContext
from shared.app.settings import GenerationSettings


def order(ctx: AppContext, preset: str = "one", **overrides: Any) -> GenerationSettings:
    return GenerationSettings.build(ctx.presets.get(preset), {}, {"prompt": "A red Fox!", "seed": 40, **overrides})


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
