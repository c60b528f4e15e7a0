"""Captions promise what they say, and held-out wordings and scenes stay out of training."""

import numpy as np

from training import captions
from training.captions import COLOUR_WORDS, KIND_WORDS, write_caption
from training.scenes import COLOURS, Scene, Shape, is_held_out, sample_scene

SCENE = Scene("teal", (Shape("star", "red", "small", "top left"), Shape("ring", "black", "medium", "right")))


def test_complete_caption_names_every_attribute() -> None:
    rng = np.random.default_rng(0)

    for _ in range(200):
        caption = write_caption(SCENE, rng, complete=True)
        words = caption.text.lower()

        assert caption.is_complete
        assert any(word in words for word in COLOUR_WORDS["teal"])
        assert "red" in words and "black" in words
        assert any(word in words for word in KIND_WORDS["star"]) and any(word in words for word in KIND_WORDS["ring"])


def test_unmentioned_attributes_are_not_promised() -> None:
    rng = np.random.default_rng(1)

    for _ in range(300):
        caption = write_caption(SCENE, rng)
        for promise, shape in zip(caption.shapes, SCENE.shapes, strict=True):
            if promise.colour is None:
                others = {c for c in COLOURS if c in caption.text.lower().split()}
                assert shape.colour not in others
        if caption.ground is None:
            assert not any(word in caption.text.lower() for word in COLOUR_WORDS["teal"])


def test_no_unfilled_slot_or_doubled_space_is_left() -> None:
    rng = np.random.default_rng(2)

    for i in range(2000):
        text = write_caption(sample_scene(rng, held_out=False), rng, held_out=bool(i % 2), wordy=i % 5 == 0).text

        assert not set("{}") & set(text)
        assert "  " not in text and " ," not in text and ",," not in text
        assert text == text.strip()


def test_held_out_scenes_never_come_from_the_training_side() -> None:
    rng = np.random.default_rng(3)

    assert not any(is_held_out(sample_scene(rng, held_out=False)) for _ in range(300))
    assert all(is_held_out(sample_scene(rng, held_out=True)) for _ in range(30))


def test_split_does_not_depend_on_the_order_of_shapes() -> None:
    rng = np.random.default_rng(4)
    scenes = [sample_scene(rng, held_out=bool(i % 2), num_shapes=2) for i in range(40)]

    assert all(is_held_out(s) == is_held_out(Scene(s.ground, s.shapes[::-1])) for s in scenes)


def test_held_out_sentence_frames_are_not_used_in_training() -> None:
    assert not set(captions._ONE_SHAPE) & set(captions._ONE_SHAPE_HELD_OUT)
    assert not set(captions._TWO_SHAPES) & set(captions._TWO_SHAPES_HELD_OUT)


def test_what_a_caption_leaves_out_is_medium_and_in_the_centre() -> None:
    rng = np.random.default_rng(5)
    unsaid: set[str] = set()

    for _ in range(1500):
        scene = sample_scene(rng, held_out=False)
        caption = write_caption(scene, rng)
        for promise, shape in zip(caption.shapes, scene.shapes, strict=True):
            if promise.size is None:
                unsaid.add("size")
                assert shape.size == "medium"
            if promise.place is None and len(scene.shapes) == 1:
                unsaid.add("place")
                assert shape.place == "centre"
            elif promise.place is None:
                unsaid.add("relation")
                assert {s.place for s in scene.shapes} in ({"left", "right"}, {"top", "bottom"})

    assert unsaid == {"size", "place", "relation"}


def test_relation_names_the_shapes_the_right_way_round() -> None:
    left, right = Shape("star", "red", "small", "left"), Shape("ring", "black", "small", "right")
    rng = np.random.default_rng(6)
    texts = {write_caption(Scene("white", (left, right)), rng).text.lower() for _ in range(200)}
    beside = [text for text in texts if "left of" in text]

    assert beside
    assert all(text.index("red") < text.index("black") for text in beside if "red" in text and "black" in text)
