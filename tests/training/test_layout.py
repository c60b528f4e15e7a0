"""The dense second task says the truth about every image token."""

import numpy as np
import torch

from training.layout import DeepLayoutHeads, layout_targets
from training.scenes import COLOURS, KINDS, Scene, Shape

SCENE = Scene("white", (Shape("star", "red", "small", "left"), Shape("ring", "blue", "small", "right")))


def test_tokens_name_the_shape_that_is_nearest() -> None:
    classes, offsets = layout_targets([SCENE], 384, 256)

    colours = classes["colour"].reshape(16, 24)
    kinds = classes["kind"].reshape(16, 24)
    assert (colours[:, :12] == list(COLOURS).index("red")).all()
    assert (kinds[:, 12:] == KINDS.index("ring")).all()
    assert offsets.shape == (1, 16 * 24, 2)


def test_offsets_lead_to_the_centre() -> None:
    _, offsets = layout_targets([Scene("white", (Shape("moon", "black", "large", "centre"),))], 256, 256)

    grid = offsets.reshape(16, 16, 2).numpy()

    np.testing.assert_allclose(grid[0, 0], [0.5 - 0.5 / 16] * 2, atol=1e-6)
    np.testing.assert_allclose(grid[15, 0] * [1, -1], grid[0, 0], atol=1e-6)


def test_caption_tokens_behind_the_image_are_left_out() -> None:
    torch.manual_seed(0)
    heads = DeepLayoutHeads(16)
    features = [torch.randn(1, 64 + 32, 16) for _ in range(3)]
    changed = [torch.cat([f[:, :64], torch.randn(1, 32, 16)], 1) for f in features]

    torch.testing.assert_close(heads(features, [SCENE], 128, 128), heads(changed, [SCENE], 128, 128))
