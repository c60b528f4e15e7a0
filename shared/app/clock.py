"""How long a generation still takes, by the steps and pictures so far."""

from __future__ import annotations

import time


class Clock:
    """Estimates the seconds left from the steps and pictures so far."""

    def __init__(self, *, images: int, steps: int) -> None:
        self._images, self.steps = images, steps  # steps: of one picture
        self._started = self._step_at = time.perf_counter()
        self._step_seconds: list[float] = []
        self._image_seconds: list[float] = []

    def step_done(self, step: int) -> float | None:
        """Seconds left after this step (from 1) of the present picture; None while there is nothing to go by."""
        now = time.perf_counter()
        if step > 1:  # the first interval of a picture holds its text encoding and all warming up
            self._step_seconds.append(now - self._step_at)
        self._step_at = now
        if not self._step_seconds and not self._image_seconds:
            return None
        images_left = self._images - len(self._image_seconds) - 1
        if self._image_seconds:
            per_image = sum(self._image_seconds) / len(self._image_seconds)
            return max(0.0, per_image * (images_left + 1) - (now - self._started))
        per_step = sum(self._step_seconds) / len(self._step_seconds)
        return per_step * (self.steps - step + images_left * self.steps)

    def image_done(self) -> None:
        now = time.perf_counter()
        self._image_seconds.append(now - self._started)
        self._started = self._step_at = now
