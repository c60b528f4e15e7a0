"""Depth, near bright and far dark: Depth Anything V2, small (Yang et al. 2024, arXiv 2406.09414)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from shared.quant.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import DepthAnythingForDepthEstimation

    from shared.preprocess import Picture

# What the network was trained with, for RGB from 0 to 1 (ImageNet's): preprocessor_config.json beside the weights.
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
DEVIATION = np.array((0.229, 0.224, 0.225), np.float32)


def load(config: Path, weights: Path) -> Callable[[Picture], Picture]:
    """The estimator: (H, W, 3) uint8 RGB to depth in all three channels, the nearest 255, the farthest 0.

    Raises CheckpointError for files that do not make up the network.
    """
    import torch

    model = _open(config, weights)
    side, patch = int(model.config.backbone_config.image_size), int(model.config.patch_size)

    def process(picture: Picture) -> Picture:
        height, width = picture.shape[:2]
        scale = side / min(height, width)
        rows, columns = (max(round(length * scale / patch), 1) * patch for length in (height, width))
        shown = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_CUBIC)
        numbers = (shown.astype(np.float32) / 255 - MEAN) / DEVIATION
        with torch.no_grad():
            found = model(torch.from_numpy(numbers.transpose(2, 0, 1).copy())[None]).predicted_depth[0]
        depth = found.float().numpy()
        if not np.isfinite(depth).all():
            raise CheckpointError(f"{weights}: the depths it finds are not finite.", "Delete it, it is fetched anew.")
        depth = cv2.resize(depth, (width, height), interpolation=cv2.INTER_LINEAR)
        span = float(np.ptp(depth))
        levels = (depth - depth.min()) * (255 / span) if span else np.zeros_like(depth)
        return np.repeat(levels.round().astype(np.uint8)[:, :, None], 3, axis=2)

    return process


def _open(config: Path, weights: Path) -> DepthAnythingForDepthEstimation:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    try:
        sizes = DepthAnythingConfig.from_json_file(config)
        state = load_file(weights)
        model, report = DepthAnythingForDepthEstimation.from_pretrained(
            None, config=sizes, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{weights} with {config}: not a Depth Anything network ({str(error)[:200]}).",
            "Delete both, they are fetched anew.",
        ) from error
    # Older versions of transformers kept no mask token; it is for training.
    missing = [name for name in report["missing_keys"] if not name.endswith("mask_token")]
    if wrong := [*missing, *map(str, report["mismatched_keys"])]:
        raise CheckpointError(
            f"{weights}: {len(wrong)} tensors are missing or misshapen (first: {wrong[0]}).",
            "Delete it, it is fetched anew.",
        )
    return model.eval()
