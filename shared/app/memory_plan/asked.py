"""What the user wants of a plan: how weights are moved, and how much of the GPU may be used."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared.app.memory import MIB
from shared.app.offload import GIB, Profile, find_profile
from shared.quant.errors import UserError

OFFLOADS = ("auto", "mmgp", "stream", "none")
"""What can be asked for; "none" puts everything on the GPU."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(k|m|g|t)i?)?b?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user wants. offload: one of OFFLOADS. profile: mmgp's, which asks for it. cap: most bytes on the GPU."""

    offload: str = "auto"
    profile: float | None = None
    cap: int | None = None

    def known_profile(self) -> Profile | None:
        """The profile that was asked for. Raises UserError for an unknown kind of offload or profile."""
        if self.offload not in OFFLOADS:
            raise UserError(f"Unknown kind of offload {self.offload!r}.", f"Choose from: {', '.join(OFFLOADS)}.")
        return find_profile(self.profile)


def parse_size(text: str | float | None) -> int | None:
    """Bytes of "4GB", "3.5 GiB", "900MB" or "4" (GB); None for nothing and 0. A GB is 2**30 bytes, as cards are sold.

    Raises UserError for anything else.
    """
    words = str(text or "").strip()
    if not words or words == "0":
        return None
    found = _SIZE.fullmatch(words)
    if found is None:
        raise UserError(f"{words!r} is no amount of memory.", "Write it as 4GB, 3.5GB or 900MB.")
    units = {"k": 2**10, "m": MIB, "g": GIB, "t": 2**40}
    return round(float(found[1]) * units[(found[2] or "g").lower()]) or None
