"""Errors that are shown to a person without a traceback: each says what, which, got, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: a wrong size, an unknown preset, a file that cannot be used (exit code 2)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class RunError(UserError):
    """Something failed that is not the user's mistake: no network, a full disk, NaN in the result (exit code 1)."""


class NumbersError(RunError):
    """NaN, infinity or one value everywhere where a picture should be, whatever could be done about it in place."""


class CheckpointError(UserError):
    """A weights file that cannot be used: truncated, foreign, a pickle."""


class LayerMismatchError(CheckpointError):
    """A weights file whose tensors do not fit the model: missing, unexpected, or of another shape."""


class UnknownFormatError(CheckpointError):
    """A weights file whose number format is not readable by this version."""
