"""Prompts as people write them: several in one text, macros, choices and wildcards; what is drawn is plain text.

First the text is divided: lines that begin with # are notes and left out; a macro line

    ! {Animal}="cat","dog" : {Colour}="black","white"

makes one copy of the lines below it for each of its values (the first of each, the second of each ...); then the mode
says what is one prompt: FG the whole text, G each line, PG each paragraph. That is Wan2GP's syntax.

Then, for each picture by its own seed, {red|blue} becomes one of its parts and __animals/cats__ a line of the file
animals/cats.txt in the wildcards folder. Both nest. "3::red" is three times as likely as "red". A backslash before
{ | } or _ takes its meaning away.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.quant.errors import UserError

if TYPE_CHECKING:
    from shared.app.settings import GenerationSettings

WHOLE, LINES, PARAGRAPHS = "FG", "G", "PG"
MODES = (WHOLE, LINES, PARAGRAPHS)
# Wan2GP's other spellings: numbers of its older versions, and its modes for the windows of a film.
_MODE_NAMES: Mapping[str, str] = {
    "": WHOLE, "0": LINES, "1": LINES, "2": WHOLE, "P": PARAGRAPHS, "W": LINES, "PW": PARAGRAPHS,
}  # fmt: skip

WILDCARD_FOLDER = "wildcards"
_DEPTH = 20  # of wildcards within wildcards; more is a circle

_MACRO_LINE = re.compile(r"!\s*\{")
_VARIABLE = re.compile(r'\{\s*([^{}|]+?)\s*\}\s*=\s*("[^"]*"(?:\s*,\s*"[^"]*")*)\s*(?::|$)')
_REFERENCE = re.compile(r"(?<!\\)\{\s*([^{}|]+?)\s*\}")
_WILDCARD = re.compile(r"__([\w\-./ ]+?)__")
_WEIGHT = re.compile(r"\s*(\d+(?:\.\d+)?)::")
_ESCAPED = re.compile(r"\\([{}|_])")
_SPECIAL = re.compile(r"\{|(?<=\\)[}|_]|__")


def mode_of(value: object) -> str:
    """The mode that a setting means, Wan2GP's other spellings included. Raises UserError naming the known ones."""
    text = str(value).strip().upper()
    mode = _MODE_NAMES.get(text, text)
    if mode not in MODES:
        raise UserError(
            f'"multi_prompts_gen_type" must be {WHOLE} (one prompt), {LINES} (one per line) or {PARAGRAPHS} (one per '
            f'paragraph), got "{value}".'
        )
    return mode


def pictures(settings: GenerationSettings, wildcards: Path) -> tuple[GenerationSettings, ...]:
    """The settings of each picture alone: for each prompt of the text, `batch_size` pictures, with plain prompts.

    wildcards: the folder of wildcard files. Raises UserError for a macro or a wildcard that cannot be used.
    """
    files = Wildcards(wildcards)
    alone = []
    for prompt in split(settings.prompt, settings.multi_prompts_gen_type):
        for index in range(settings.batch_size):
            picture = settings.for_image(index)
            chance = random.Random(
                f"{picture.seed} {picture.sampling.variation_seed}"
            )  # a text: the same on every Python
            texts = [expand(text, chance, files) for text in (prompt, settings.negative_prompt)]
            alone.append(picture.with_plain_prompts(*texts))
    return tuple(alone)


def split(text: str, mode: str) -> list[str]:
    """The prompts in a text, macros worked out and notes left out; an empty text is one empty prompt.

    Raises UserError for a macro line that cannot be read, an unknown variable, or a text of notes alone.
    """
    lines = [line.rstrip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    text_left = "\n".join(_without_macros(lines)).strip()
    if not text_left:
        if text.strip():
            raise UserError("The prompt has notes (# ...) and macro lines (! ...) only.", "Add a line to draw.")
        return [""]
    if mode == WHOLE:
        return [text_left]
    parts = text_left.split("\n") if mode == LINES else re.split(r"\n\s*\n", text_left)
    return [part.strip() for part in parts if part.strip()]


def expand(text: str, chance: random.Random, wildcards: Wildcards) -> str:
    """The text with every choice and wildcard replaced by what `chance` picks, backslashes before specials gone."""
    return plain(_expanded(text, chance, wildcards, ()))


def plain(text: str) -> str:
    """Text without the backslashes that take a sign's meaning away."""
    return _ESCAPED.sub(r"\1", text)


def escape(text: str) -> str:
    """Plain text so written that `expand` gives it back; most texts stay as they are."""
    if not (("{" in text and "|" in text) or "__" in text or _ESCAPED.search(text)):
        return text
    return _SPECIAL.sub(lambda found: "".join(f"\\{sign}" for sign in found[0]), text)


@dataclass(frozen=True, slots=True)
class Wildcards:
    """The text files of a folder: `lines("animals/cats")` are those of animals/cats.txt."""

    folder: Path

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.folder).with_suffix("").as_posix() for path in self.folder.rglob("*.txt"))

    def lines(self, name: str) -> list[str]:
        """The file's lines without empty ones and notes. Raises UserError if there is no such file, or it is empty."""
        path = (self.folder / f"{name}.txt").resolve()
        if not (path.is_relative_to(self.folder.resolve()) and path.is_file()):
            known = self.names()
            closest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"Closest: {', '.join(closest)}." if closest else f"Known: {', '.join(known) or 'none'}."
            raise UserError(
                f"__{name}__: there is no wildcard file {name}.txt in {self.folder}.",
                rf"{hint} Write \__ for underscores that stay.",
            )
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error}).", "Save it as plain text.") from error
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise UserError(f"{path}: the wildcard file is empty.", "Write one choice per line.")
        return lines


def _without_macros(lines: Sequence[str]) -> Iterator[str]:
    """Lines with the variables of the macro line above them put in, one copy of a macro's lines per value."""
    values: dict[str, list[str]] = {}
    block: list[str] = []
    for line in lines:
        if _MACRO_LINE.match(line.lstrip()):
            yield from _copies(block, values)
            values, block = _variables(line), []
        else:
            block.append(line)
    yield from _copies(block, values)


def _copies(block: Sequence[str], values: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if not values:
        yield from block
        return
    unknown = [name for line in block for name in _REFERENCE.findall(line) if name not in values]
    if unknown:
        raise UserError(
            f"{{{unknown[0]}}} is not a variable of the macro line above it.",
            rf"It has {', '.join(f'{{{name}}}' for name in values)}. Write \{{ for braces that stay.",
        )
    for i in range(max(map(len, values.values()))):
        for line in block:
            yield _REFERENCE.sub(lambda found: values[found[1]][i % len(values[found[1]])], line)  # noqa: B023


def _variables(line: str) -> dict[str, list[str]]:
    """{"Animal": ["cat", "dog"], ...} from a macro line."""
    rest = line.strip()[1:].strip()
    found: dict[str, list[str]] = {}
    while rest:
        match = _VARIABLE.match(rest)
        if match is None:
            raise UserError(
                f"The macro line {line.strip()!r} cannot be read at {rest[:40]!r}.",
                'Example: ! {Animal}="cat","dog" : {Colour}="black","white"',
            )
        found[match[1]] = re.findall(r'"([^"]*)"', match[2])
        rest = rest[match.end() :].strip()
    return found


def _expanded(text: str, chance: random.Random, wildcards: Wildcards, inside: tuple[str, ...]) -> str:
    """Text with choices and wildcards resolved from the outside in; escapes stay. inside: wildcards being resolved."""
    result, at = [], 0
    while at < len(text):
        if _ESCAPED.match(text, at):
            result.append(text[at : at + 2])
            at += 2
        elif text[at] == "{" and (parts := _parts(text, at)) is not None:
            end, options = parts
            if len(options) > 1:
                result.append(_expanded(_pick(options, chance), chance, wildcards, inside))
            else:  # braces around a single thing are just braces
                result.append("{" + _expanded(options[0], chance, wildcards, inside) + "}")
            at = end
        elif (found := _WILDCARD.match(text, at)) is not None:
            name = found[1].strip()
            if name in inside or len(inside) == _DEPTH:
                raise UserError(f"Wildcards call each other in a circle: {' > '.join((*inside, name))}.")
            picked = _pick(wildcards.lines(name), chance)
            result.append(_expanded(picked, chance, wildcards, (*inside, name)))
            at = found.end()
        else:
            result.append(text[at])
            at += 1
    return "".join(result)


def _parts(text: str, begin: int) -> tuple[int, list[str]] | None:
    """(position behind the closing brace, parts between the bars) of braces at `begin`; None if they do not close."""
    options: list[str] = []
    depth, start, at = 0, begin + 1, begin
    while at < len(text):
        sign = text[at]
        if _ESCAPED.match(text, at):
            at += 1
        elif sign == "{":
            depth += 1
        elif sign == "}":
            depth -= 1
            if depth == 0:
                return at + 1, [*options, text[start:at]]
        elif sign == "|" and depth == 1:
            options.append(text[start:at])
            start = at + 1
        at += 1
    return None


def _pick(options: Iterable[str], chance: random.Random) -> str:
    """One of the options, by their weights."""
    texts, weights = [], []
    for option in options:
        weight = _WEIGHT.match(option)
        texts.append(option[weight.end() :] if weight else option)
        weights.append(float(weight[1]) if weight else 1.0)
    if not sum(weights):
        raise UserError(f"All choices of {{{'|'.join(options)}}} have the weight 0.", "Give one of them more.")
    return chance.choices(texts, weights)[0]
