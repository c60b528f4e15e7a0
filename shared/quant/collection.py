"""Opening a file without Python's search for reference cycles in between."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_put_off() -> Iterator[None]:
    """Work that makes many objects, all of which stay: a header's tensors, a network's modules.

    Their number sets off searches for garbage through all objects of all libraries, 0.1 s each: half of what opening a
    file of 6 GB takes. Serves as a decorator, too.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
