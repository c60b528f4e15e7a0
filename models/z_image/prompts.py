"""What a model draws while its layers are watched (`wgp.py quantize --calibrate`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Subjects, light, styles and texts of many kinds: each layer should meet what it will meet later.
SCENES: tuple[str, ...] = (
    "a lighthouse on a cliff at dusk, waves breaking below",
    "portrait of an elderly fisherman with a weathered face, soft window light",
    "a bowl of ripe cherries on a wooden table, macro photograph",
    "a crowded street market in the rain, reflections of neon signs",
    "a red fox standing in fresh snow, shallow depth of field",
    'a shop window with the words "OPEN TODAY" in gold letters',
    "isometric drawing of a small workshop full of tools",
    "watercolour of a mountain lake with pine trees",
    "two children flying a kite on a beach, seen from far away",
    "a glass teapot with green tea, morning light, steam rising",
    "a steam locomotive crossing a stone bridge, oil painting",
    "the interior of a library with tall shelves and a spiral staircase",
    "a black and white photograph of a dancer in mid-air",
    "a robot watering plants on a balcony, animation film style",
    "aerial view of a river delta, strong colours",
    "a plate of dumplings with chopsticks, restaurant table, warm light",
)

SHAPES: tuple[str, ...] = (
    "a red circle in the middle of a blue background",
    "a green square on a white background",
    "a yellow triangle at the top of a black background",
    "a small purple star on an orange background",
    "a large cyan circle on a grey background",
    "a white square at the left of a red background",
    "a blue triangle at the bottom of a yellow background",
    "an orange circle and a green square on a black background",
    "two pink circles on a white background",
    "a grey star at the right of a green background",
    "a black square in the middle of a pink background",
    "three yellow squares on a purple background",
)

# The demo is 384 wide and knows nothing but shapes; the published model is 3840.
_SMALL_DIM = 1024


def calibration_prompts(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Prompts that suit a model of this config (diffusers' keys): shapes for one as small as the demo."""
    return SHAPES if int(config["dim"]) < _SMALL_DIM else SCENES
