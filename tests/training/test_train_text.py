"""Teaching to read: what counts, what is left open, and which shape goes where."""

import torch

from training.captions import Caption, Promise
from training.train_text import _IGNORED, make_targets, reading_loss

STAR = Promise("star", "red", "small", "left")
RING = Promise("ring", None, "large", "top right")


def perfect_logits(targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: 50.0 * torch.nn.functional.one_hot(t.clamp(min=0), 11).float() for name, t in targets.items()}


def test_order_of_two_shapes_is_free() -> None:
    targets = make_targets([Caption("", "white", (STAR, RING))])
    other_way = make_targets([Caption("", "white", (RING, STAR))])

    assert float(reading_loss(perfect_logits(targets), targets)) < 1e-3
    assert float(reading_loss(perfect_logits(other_way), targets)) < 1e-3


def test_single_shape_belongs_to_the_first_token() -> None:
    targets = make_targets([Caption("", "white", (STAR,))])
    exchanged = {name: t.flip(1) if t.ndim == 2 else t for name, t in targets.items()}

    assert float(reading_loss(perfect_logits(targets), targets)) < 1e-3
    assert float(reading_loss(perfect_logits(exchanged), targets)) > 10


def test_unmentioned_attribute_is_not_asked_for() -> None:
    targets = make_targets([Caption("", "white", (STAR, RING))])

    assert int(targets["colour"][0, 1]) == _IGNORED
    logits = perfect_logits(targets)
    logits["colour"][0, 1] = torch.randn(11)
    assert float(reading_loss(logits, targets)) < 1e-3
