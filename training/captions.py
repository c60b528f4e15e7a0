"""Captions in varied natural wording for drawn scenes, and a record of what each caption promises.

A caption may leave attributes unmentioned. A size that is not mentioned is medium, the place of a single shape the
centre, and one shape is left of or above another across the middle of the picture: nobody says more when that is what
they see, and a picture that the caption settles is one that few steps can draw. Colours and kinds that are not
mentioned may be any. A judge checks only what was said. Some sentence frames are kept for held-out captions, so that
judging uses wordings the model never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.scenes import OPPOSITES, Scene

KIND_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "disc", "dot", "ball"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "diamond": ("diamond", "diamond", "rhombus"),
    "ring": ("ring", "ring", "ring", "hoop", "donut"),
    "moon": ("moon", "moon", "crescent", "crescent moon"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "teal": ("teal", "teal", "turquoise"),
    "purple": ("purple", "purple", "violet"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "medium-size"),
    "large": ("large", "large", "big", "huge"),
}
PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "at the left", "on the left side", "to the left"),
    "right": ("on the right", "at the right", "on the right side", "to the right"),
    "top": ("at the top", "at the top", "in the upper part", "near the top"),
    "bottom": ("at the bottom", "at the bottom", "in the lower part", "near the bottom"),
    "centre": ("in the centre", "in the center", "in the middle", "centred", "centered"),
    "top left": ("in the top left corner", "at the top left", "in the upper left corner", "in the top left"),
    "top right": ("in the top right corner", "at the top right", "in the upper right corner", "in the top right"),
    "bottom left": (
        "in the bottom left corner",
        "at the bottom left",
        "in the lower left corner",
        "in the bottom left",
    ),
    "bottom right": (
        "in the bottom right corner",
        "at the bottom right",
        "in the lower right corner",
        "in the bottom right",
    ),
}

# {a} is the described shape with its article, {A} without, {p} its place, {g} the ground's colour;
# {b}, {B} and {q} belong to the second shape
_GROUND_WORDS = ("background", "background", "background", "ground", "backdrop")
_JOINTS = ("on", "over", "against", "before", "upon", "across", "set against", "placed before", "ahead of")
_ONE_SHAPE = (
    "{a} {p} on {g_a} {w}",
    "{a} on {g_a} {w}, {p}",
    "{a} {p}, {g} {w}",
    "{A}, {p}, {g} {w}",
    "{g_a} {w} with {a} {p}",
    "{g_a} {w}, {a} {p}",
    "on {g_a} {w} there is {a} {p}",
    "there is {a} {p} on {g_a} {w}",
    "{p} of {g_a} picture: {a}",
    "{a} {p}, on {g}",
    "a picture of {a} {p} on {g_a} {w}",
    "{A} {p} over {g}",
    "draw {a} {p} on {g_a} {w}",
    "{a} sits {p} against {g_a} {w}",
    "{a} {p} {j} {g_a} {w}",
    "{a} {p} {j} {g_a} {w}",
    "{A} {j} {g_a} {w}, {p}",
    "{g} {w} with {A} {p}",
    "{g} {w}: {a} {p}",
    "{w} in {g}, {A} {p}",
    "{g} everywhere, {A} {p}",
    "{A} {p}; {g} {w}",
    "{a} {p} with {g_a} {w} behind it",
    "{g_a} {w} behind {a} {p}",
    "a sketch of {a} {p}, {g} {w}",
    "a painting of {A} {p}, {g}",
    "{a} {p}, the {w} is {g}",
    "the {w} is {g} and there is {a} {p}",
    "i want {a} {p}, {g} {w}",
    "can you make {a} {p} {j} {g_a} {w}",
    "the {A} is {p} and the {w} is {g}",
    "{a} at the front, {p}, {g} {w} at the back",
    "{g} {w} at the back, {a} {p} to the front",
)
_ONE_SHAPE_HELD_OUT = (
    "{a} {p} in front of {g_a} {w}",
    "a drawing of {a} {p}, {g} {w}",
    "{g} {w}, {A} {p}",
)
_TWO_SHAPES = (
    "{a} {p} and {b} {q} on {g_a} {w}",
    "{a} {p}, {b} {q}, {g} {w}",
    "{g_a} {w} with {a} {p} and {b} {q}",
    "on {g_a} {w} there is {a} {p} and {b} {q}",
    "{A} {p} and {B} {q}, {g} {w}",
    "a picture of {a} {p} and {b} {q} on {g}",
    "two shapes on {g_a} {w}: {a} {p}, {b} {q}",
    "{a} {p} with {b} {q}, on {g_a} {w}",
    "{a} {p} and {b} {q} {j} {g_a} {w}",
    "there are {a} {p} and {b} {q}, {g} {w}",
    "{g} {w}: {A} {p}, {B} {q}",
    "{g} {w} with {A} {p} and {B} {q}",
    "{w} in {g}, {A} {p}, {B} {q}",
    "a sketch of {a} {p} and {b} {q}, {g} {w}",
    "{a} is {p}, {b} is {q}, the {w} is {g}",
    "the {w} is {g} and there is {a} {p}, {b} {q}",
)
_TWO_SHAPES_HELD_OUT = (
    "there is {a} {p} and {b} {q} on {g_a} {w}",
    "{g} {w}, {A} {p}, {B} {q}",
)
_BESIDE = ("{a} to the left of {b} on {g_a} {w}", "{a} left of {b}, {g} {w}", "{b} to the right of {a} on {g_a} {w}")
_ABOVE = ("{a} above {b} on {g_a} {w}", "{a} over {b}, {g} {w}", "{b} below {a} on {g_a} {w}", "{b} under {a}, {g} {w}")

# words that people add and that change nothing here
_OPENINGS = (
    "a picture of",
    "an illustration of",
    "a simple drawing of",
    "a photo of",
    "an image showing",
    "please draw",
    "show",
    "a sketch of",
    "a graphic with",
)
_CLOSINGS = (
    ", flat design",
    ", simple shapes",
    ", minimalist",
    ", high quality",
    ", soft shadow",
    ", clean illustration",
)
# frames that begin like this read badly with an opening before them
_COMPLETE_OPENINGS = (
    "a picture", "draw", "on ", "there", "a drawing", "two shapes", "a sketch", "a painting", "i want", "can you",
    "the ",
)  # fmt: skip
_P_FILLER = 0.12
# people leave these out when they are in a hurry, and the order of what is left still tells
_SMALL_WORDS = frozenset({"a", "an", "the", "there", "is", "are", "on", "with", "and", "it"})
_P_TERSE = 0.1

_P_UNMENTIONED = {"ground": 0.05, "colour": 0.03, "kind": 0.02}
_P_MEDIUM_UNMENTIONED = 0.65
_P_CENTRE_UNMENTIONED = 0.4  # of a single shape
_P_RELATION = 0.5  # where two shapes stand opposite each other


@dataclass(frozen=True)
class Promise:
    """What a caption says about one shape; None where it says nothing."""

    kind: str | None
    colour: str | None
    size: str | None
    place: str | None


@dataclass(frozen=True)
class Caption:
    """A text and what it promises: the ground's colour (None: unsaid), and a promise per shape in the scene's order."""

    text: str
    ground: str | None
    shapes: tuple[Promise, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every attribute of the scene is mentioned."""
        said = [self.ground] + [v for s in self.shapes for v in (s.kind, s.colour, s.size, s.place)]
        return None not in said


def write_caption(
    scene: Scene, rng: np.random.Generator, *, held_out: bool = False, complete: bool = False, wordy: bool = False
) -> Caption:
    """Describe a scene in one random wording.

    held_out: use the sentence frames that training never uses. complete: mention every attribute. wordy: add
    several of the words about style that people like to add.
    """

    def unmentioned(attribute: str, value: str = "") -> bool:
        chance = {"medium": _P_MEDIUM_UNMENTIONED, "centre": _P_CENTRE_UNMENTIONED}.get(
            value, _P_UNMENTIONED.get(attribute, 0.0)
        )
        return not complete and bool(rng.random() < chance)

    order = list(scene.shapes)
    related, beside = False, False
    if len(order) == 2:
        if rng.random() < 0.5:
            order.reverse()
        places = (order[0].place, order[1].place)
        beside = places == OPPOSITES[0]
        related = places in OPPOSITES and not complete and not held_out and bool(rng.random() < _P_RELATION)
    no_place = related or (len(order) == 1 and unmentioned("place", order[0].place))
    promises = {}
    for shape in order:
        promises[shape] = Promise(
            kind=None if unmentioned("kind") else shape.kind,
            colour=None if unmentioned("colour") else shape.colour,
            size=None if unmentioned("size", shape.size) else shape.size,
            place=None if no_place else shape.place,
        )
    ground = None if unmentioned("ground") else scene.ground
    if related:
        frames = _BESIDE if beside else _ABOVE
    elif len(order) == 1:
        frames = _ONE_SHAPE_HELD_OUT if held_out else _ONE_SHAPE
    else:
        frames = _TWO_SHAPES_HELD_OUT if held_out else _TWO_SHAPES
    text = _fill(str(rng.choice(frames)), [promises[s] for s in order], ground, wordy, rng)
    if not held_out and not related and rng.random() < _P_TERSE:
        text = " ".join(word for word in text.split() if word.lower() not in _SMALL_WORDS)
    return Caption(text, ground, tuple(promises[s] for s in scene.shapes))


def _fill(frame: str, promises: list[Promise], ground: str | None, wordy: bool, rng: np.random.Generator) -> str:
    words = {"w": str(rng.choice(_GROUND_WORDS)), "j": str(rng.choice(_JOINTS))}
    for (with_article, bare, place), promise in zip((("a", "A", "p"), ("b", "B", "q")), promises, strict=False):
        words[bare] = _noun_phrase(promise, rng)
        words[with_article] = _with_article(words[bare])
        words[place] = str(rng.choice(PLACE_WORDS[promise.place])) if promise.place else ""
    if ground is None:
        # a frame without its ground: keep the part that speaks of the shapes
        places = [words["p"]] + ([words["q"]] if "b" in words else [])
        nouns = [words["a"]] + ([words["b"]] if "b" in words else [])
        text = " and ".join(f"{noun} {place}" for noun, place in zip(nouns, places, strict=True))
    else:
        colour = _colour_word(ground, rng)
        text = frame.format(**words, g=colour, g_a=_with_article(colour))
    if rng.random() < _P_FILLER and not text.startswith(_COMPLETE_OPENINGS):
        text = f"{rng.choice(_OPENINGS)} {text}"
    closings = int(rng.integers(2, len(_CLOSINGS) + 1)) if wordy else int(rng.random() < _P_FILLER)
    text += "".join(str(c) for c in rng.choice(_CLOSINGS, size=closings, replace=False))
    return _tidy(text, rng)


def _noun_phrase(promise: Promise, rng: np.random.Generator) -> str:
    size = str(rng.choice(SIZE_WORDS[promise.size])) if promise.size else ""
    colour = _colour_word(promise.colour, rng) if promise.colour else ""
    kind = str(rng.choice(KIND_WORDS[promise.kind])) if promise.kind else "shape"
    return " ".join(word for word in (size, colour, kind) if word)


def _colour_word(colour: str, rng: np.random.Generator) -> str:
    return str(rng.choice(COLOUR_WORDS.get(colour, (colour,))))


def _with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _tidy(text: str, rng: np.random.Generator) -> str:
    text = " ".join(text.split()).replace(" ,", ",").replace(" :", ":").replace(",,", ",").strip(" ,:")
    text = text.removeprefix("of ")
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.3 else "")
