"""A pretended CUDA graph on the CPU: a list of torch's operations with the memory they ran on.

record() runs the work once and notes every operation, its arguments and results, as objects. replay() runs the same
operations on the same tensors and writes into the same results. So a replay sees what is written into the recorded
inputs and nothing else, as on a GPU: numbers that Python worked out while recording stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeRecorder:
    """fault: raised by the next record(). recordings: how many were made."""

    def __init__(self) -> None:
        self.recordings = 0
        self.dropped = 0
        self.fault: RuntimeError | None = None

    def record(self, work: Callable[[], Tensor]) -> FakeRecording:
        if self.fault is not None:
            raise self.fault
        self.recordings += 1
        with _Noting() as notes:
            out = work()
        # Recording a graph computes nothing: whoever takes the result without a replay gets no numbers.
        for _, _, _, results in notes.operations:
            for result in results:
                if result.dtype.is_floating_point:
                    result.fill_(float("nan"))
        return FakeRecording(notes.operations, out)

    @property
    def nbytes(self) -> int:
        return 2**20 * self.recordings

    def drop(self) -> None:
        self.dropped += 1


class FakeRecording:
    def __init__(self, operations: list[Any], out: Tensor) -> None:
        self._operations, self.out = operations, out

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, results in self._operations:
            fresh = _tensors(operation(*args, **kwargs))
            for result, numbers in zip(results, fresh, strict=False):
                result.copy_(numbers)


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        shows_other_memory = any(result.alias_info is not None for result in func._schema.returns)
        if func._schema.is_mutable:  # writes where it wrote: nothing of its result is to be copied
            self.operations.append((func, args, kwargs, []))
        elif not shows_other_memory:  # a view needs no replay
            self.operations.append((func, args, kwargs, _tensors(out)))
        return out


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
