"""What is asked of a plan: by flags first, else by the configuration; and Choice, a decision with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.app.presets import QUANTIZATIONS
from shared.quant.errors import UserError
from shared.quant.kernels import COMPUTES

if TYPE_CHECKING:
    from shared.app.context import AppContext


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and why, in words."""

    value: str
    reason: str

    def as_dict(self) -> dict[str, str]:
        """JSON-able."""
        return {"value": self.value, "reason": self.reason}


def requested_profile(ctx: AppContext) -> float | None:
    """The memory profile of the flag, else of the configuration; None leaves the choice to the program."""
    for value in (getattr(ctx.args, "profile", None), ctx.config.get("profile")):
        if value is not None and value != -1:
            return float(value)
    return None


def requested_offload(ctx: AppContext) -> str:
    """How weights are to be moved: the flag, else the configuration, else "auto"."""
    return str(getattr(ctx.args, "offload", None) or ctx.config.get("offload") or "auto").strip().lower()


def requested_attention(ctx: AppContext) -> str:
    """The attention of the flag, else of the configuration, else "auto"."""
    return str(getattr(ctx.args, "attention", "") or ctx.config.get("attention") or "auto")


def requested_device(ctx: AppContext) -> str:
    """The device of the --gpu flag; "" leaves the choice to the program."""
    return str(getattr(ctx.args, "gpu", None) or "")


def requested_quantization(ctx: AppContext, key: str) -> str:
    """Of the flag, else of Wan2GP's key in the configuration; "" leaves it to the order of the preset's files."""
    asked = str(getattr(ctx.args, key, None) or ctx.config.get(key) or "").strip().lower()
    if asked and asked not in QUANTIZATIONS:
        flag = f"--{key.replace('_', '-')}"
        raise UserError(f"{flag} {asked}: there is no such choice.", f"Choose from: {', '.join(QUANTIZATIONS)}.")
    return asked


def choose_compute(ctx: AppContext) -> Choice:
    """How packed weights are to be multiplied: the flag, else the configuration, else "auto".

    Raises UserError for a kind that does not exist.
    """
    flag = str(getattr(ctx.args, "compute", None) or "")
    asked = (flag or str(ctx.config.get("compute") or "auto")).strip().lower()
    if asked not in COMPUTES:
        raise UserError(f"Unknown kind of compute {asked!r}.", f"Choose from: {', '.join(COMPUTES)}.")
    if asked == "auto":
        return Choice(asked, "for each packed layer what is known to be fastest on this device; wgp.py doctor lists it")
    return Choice(asked, "asked for" if flag else "from the configuration")
