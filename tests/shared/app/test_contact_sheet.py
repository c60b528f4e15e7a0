"""The contact sheet: a column for each name, in order, pictures shrunk and never enlarged."""

from __future__ import annotations

from PIL import Image

from shared.app.contact_sheet import CELL, ContactSheet


def test_columns_stand_side_by_side_in_the_order_they_were_added() -> None:
    sheet = ContactSheet(["a prompt", "another prompt that is rather long and is broken into lines"])
    red, blue = Image.new("RGB", (2 * CELL, 2 * CELL), "red"), Image.new("RGB", (CELL, CELL), "blue")

    sheet.add("first", [red, red])
    sheet.add("second", [blue])
    drawn = sheet.draw()

    colours = {colour: count for count, colour in drawn.getcolors(maxcolors=2**20) or []}
    assert colours[(255, 0, 0)] == 2 * CELL * CELL
    assert colours[(0, 0, 255)] == CELL * CELL
    reds = [x for x in range(drawn.width) if drawn.getpixel((x, drawn.height // 3)) == (255, 0, 0)]
    blues = [x for x in range(drawn.width) if drawn.getpixel((x, drawn.height // 3)) == (0, 0, 255)]
    assert max(reds) < min(blues)


def test_a_small_picture_is_not_enlarged() -> None:
    sheet = ContactSheet(["a prompt"])
    sheet.add("tiny", [Image.new("RGB", (16, 16), "red")])

    colours = {colour: count for count, colour in sheet.draw().getcolors(maxcolors=2**20) or []}

    assert colours[(255, 0, 0)] == 16 * 16
