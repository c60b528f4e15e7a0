"""Errors that are shown to a person without a traceback: each says what, which, got, and what to do."""

from __future__ import annotations

import errno
import sys

# What allocators and libraries say in a plain RuntimeError: CUDA and MPS, torch's CPU allocator, cuBLAS and cuDNN.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether RAM or a device's memory has run out, in any of the forms in which Python and torch say so."""
    if isinstance(error, UserError):
        return False
    torch = sys.modules.get("torch")  # not imported: then the error is not torch's
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
