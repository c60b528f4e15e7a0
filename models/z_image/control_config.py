"""Sizes of a control branch (control.py), and which published release has them. Torch-free, for `inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Refiner = Literal["plain", "layers", "own"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """Sizes of one branch; widths are the trunk's.

    places: the trunk layers that get the hints of the branch's layers, in order. refiner_places: likewise of the
    trunk's noise refiner, empty for a "plain" refiner. in_channels: of the control context, 16 or 33.
    """

    places: tuple[int, ...]
    in_channels: int
    refiner: Refiner
    refiner_places: tuple[int, ...] = ()

    @property
    def can_inpaint(self) -> bool:
        """Whether the context has channels for a mask and the picture to repaint."""
        return self.in_channels > 16


def release_of(config: ControlConfig) -> str:
    """Which published branch has these sizes, in words."""
    layers = len(config.places)
    if config.refiner == "plain":
        return "Fun ControlNet Union 1.0"
    if config.refiner == "layers":
        return "Fun ControlNet Union 2.0 (its own refiner was never trained; the control layers stand in for it)"
    return "Fun ControlNet 2.1-lite" if layers < 6 else "Fun ControlNet 2.1 (Union, 8-step, Tile or Base)"
