"""Whether pictures keep what their prompts promise, read by a module that can judge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from importlib import import_module
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol, cast

from shared.app.compare.figures import Pictures
from shared.quant.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Scorer(Protocol):
    """A module that can read pictures, such as training.judge: `--scorer` names it, or the preset's "scorer"."""

    def held_out_captions(self, count: int, seed: int) -> Sequence[Any]:
        """Prompts and what each promises; `text` of each is the prompt."""

    def judge_picture(self, picture: NDArray, caption: Any) -> Any:
        """Which promises an (H, W, 3) uint8 picture keeps: a dataclass of truth values; `everything`: all of them."""


def find_scorer(name: str, prompts: Sequence[str]) -> Scorer | None:
    """The module of that name; None without one, and for prompts of the user's own: nobody knows what they promise."""
    if not name or prompts:
        return None
    try:
        module = import_module(name)
    except ImportError as error:
        raise UserError(f"The scorer {name} cannot be imported: {error}.", "Name a module of this program.") from error
    missing = [part for part in ("held_out_captions", "judge_picture") if not hasattr(module, part)]
    if missing:
        raise UserError(f"The module {name} is no scorer: it has no {' and no '.join(missing)}.")
    return cast("Scorer", module)


def verdicts_on(found: Pictures, scorer: Scorer | None, captions: Sequence[Any]) -> list[Any]:
    """What the scorer reads in each plain picture; none without a scorer."""
    if scorer is None:
        return []
    return [scorer.judge_picture(drawn.picture, c) for drawn, c in zip(found.plain, captions, strict=True)]


def adherence(verdicts: Sequence[Any], before: Sequence[Any]) -> dict[str, Any]:
    """The fields of a row that verdicts give, held against those on the reference's pictures."""
    if not verdicts:
        return {}
    said = [asdict(verdict) for verdict in verdicts] if is_dataclass(verdicts[0]) else [{}]
    whole = [(bool(old.everything), bool(new.everything)) for old, new in zip(before, verdicts, strict=True)]
    return {
        "adherence": fmean(new for _, new in whole),
        "kept": {promise: fmean(bool(verdict[promise]) for verdict in said) for promise in said[0]},
        "lost": whole.count((True, False)),
        "gained": whole.count((False, True)),
    }
