"""A contact sheet: small pictures in rows and columns, columns named on top, rows in the margin."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

CELL = 128  # pixels, the longer side of a small picture
_GAP = 4
_MARGIN = 190  # pixels for the words of a row
_HEADING = 34
_TEXT_SIZE = 12
_LINE_CHARACTERS = 30  # of _TEXT_SIZE, in the margin
_PAPER, _INK = (250, 250, 250), (30, 30, 30)


class ContactSheet:
    """Columns are added one by one, so that a comparison keeps its pictures small from the start."""

    def __init__(self, rows: Sequence[str]) -> None:
        self._rows = tuple(rows)
        self._columns: list[tuple[str, list[Image.Image]]] = []

    def add(self, name: str, pictures: Sequence[Image.Image]) -> None:
        """A column; pictures: one for each row, from the first (missing ones stay empty)."""
        small = []
        for picture in pictures:
            copy = picture.copy()
            copy.thumbnail((CELL, CELL))
            small.append(copy)
        self._columns.append((name, small))

    def draw(self) -> Image.Image:
        """The sheet as an RGB picture."""
        from PIL import Image, ImageDraw, ImageFont

        font = ImageFont.load_default(size=_TEXT_SIZE)
        step = CELL + _GAP
        size = (_MARGIN + step * len(self._columns), _HEADING + step * len(self._rows))
        sheet = Image.new("RGB", size, _PAPER)
        pen = ImageDraw.Draw(sheet)
        for number, words in enumerate(self._rows):
            lines = textwrap.wrap(words, _LINE_CHARACTERS)[: CELL // (_TEXT_SIZE + _GAP)]
            pen.multiline_text((_GAP, _HEADING + number * step), "\n".join(lines), fill=_INK, font=font)
        for number, (name, pictures) in enumerate(self._columns):
            left = _MARGIN + number * step
            pen.multiline_text((left, _GAP), "\n".join(textwrap.wrap(name, 18)[:2]), fill=_INK, font=font)
            for row, picture in enumerate(pictures):
                sheet.paste(picture, (left, _HEADING + row * step))
        return sheet
