"""A pretended CUDA graph on the CPU: a list of torch's operations with the memory they ran on.

record() runs the work once and notes every operation, its arguments and results, as objects. replay() runs the same
operations on the same tensors and writes into the same results. So a replay sees what is written into the recorded
inputs and nothing else, as on a GPU: numbers that Python worked out while recording stay as they were. What was not
made while recording is not kept alive, and a replay that reads such memory after it was given back fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class FakeRecorder:
    """fault: raised by the next record(). off: see FakeRecording. recordings: how many were made."""

    def __init__(self) -> None:
        self.recordings = 0
        self.dropped = 0
        self.fault: RuntimeError | None = None
        self.off = 0.0

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
        return FakeRecording(notes.operations, out, self.off)

    @property
    def nbytes(self) -> int:
        return 2**20 * self.recordings

    def drop(self) -> None:
        self.dropped += 1


class FakeRecording:
    """off: added to what a replay gives, to pretend one that goes wrong."""

    def __init__(self, operations: list[Any], out: Tensor, off: float = 0.0) -> None:
        own = {result.untyped_storage()._cdata for *_, results in operations for result in results}

        def borrowed(value: Any) -> Any:
            is_others = isinstance(value, Tensor) and value.untyped_storage()._cdata not in own
            return _Borrowed(value) if is_others else value

        self._operations = [(func, *tree_map(borrowed, (args, kw)), results) for func, args, kw, results in operations]
        self.out, self._off = out, off

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, results in self._operations:
            args, kwargs = tree_map(lambda v: v.now() if isinstance(v, _Borrowed) else v, (args, kwargs))
            fresh = _tensors(operation(*args, **kwargs))
            for result, numbers in zip(results, fresh, strict=False):
                result.copy_(numbers)
        self.out += self._off


class _Borrowed:
    """A tensor in memory that a recording reads where it lay."""

    def __init__(self, tensor: Tensor) -> None:
        self._memory = StorageWeakRef(tensor.untyped_storage())
        self._dtype = tensor.dtype
        self._layout = tensor.storage_offset(), tensor.size(), tensor.stride()

    def now(self) -> Tensor:
        assert not self._memory.expired(), "a recording reads memory that was given back"
        memory = torch.UntypedStorage._new_with_weak_ptr(self._memory.cdata)
        return torch.empty(0, dtype=self._dtype).set_(memory, *self._layout)


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
