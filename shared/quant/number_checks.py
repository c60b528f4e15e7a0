"""Looking through a large file's scales beside the first drawing, so that opening it reads no more than its header.

A scale that is NaN, infinite, or zero where numbers are makes a picture of noise. To find one, scales have to be read:
seconds for gigabytes, of a disk even minutes. So a large model's are looked through by a thread while it draws its
first picture, when their pages come into memory anyway; nothing it drew leaves before they are known to be sound.

    fill()     adds a check for each packed layer
    start()    begins, once; when the model is about to compute
    poll()     between steps: raises what has been found so far
    finish()   before a picture is made: waits for the rest
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

Check = Callable[[], None]


class NumberChecks:
    """The checks of one model's packed layers, each of which raises CheckpointError for bad numbers.

    They hold on to what they are to look at, and let go of it one by one.
    """

    def __init__(self) -> None:
        self._left: deque[Check] = deque()
        self._at_work: Future[None] | None = None

    def add(self, check: Check) -> None:
        self._left.append(check)

    @property
    def left(self) -> int:
        """How many have not been made."""
        return len(self._left)

    def start(self) -> None:
        """Make them, in a thread of their own, unless they are made or being made."""
        if self._at_work is None and self._left:
            executor = ThreadPoolExecutor(1, thread_name_prefix="number-checks")
            self._at_work = executor.submit(self._make)
            executor.shutdown(wait=False)

    def poll(self) -> None:
        """Raise what a check has found. Does not wait."""
        if self._at_work is not None and self._at_work.done():
            self.finish()

    def finish(self) -> None:
        """Wait until all are made, those that nobody started among them. Raises CheckpointError, and again if asked
        again: the numbers stay bad."""
        self.start()
        if self._at_work is not None:
            self._at_work.result()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work that they are made beside: its results are good if this ends without an error."""
        self.start()
        yield
        self.finish()

    def _make(self) -> None:
        # Python waits for threads when it ends; what nobody draws with any more needs no check.
        while self._left and threading.main_thread().is_alive():
            self._left[0]()
            self._left.popleft()
