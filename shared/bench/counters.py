"""Exact counts of what a piece of work asks of a device, seen from the CPU: no GPU is needed, and no clock.

A TorchDispatchMode sees every operation below autograd and the composite ones, which is nearly what a GPU would launch.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one call.

    ops: operations that compute or move numbers. views: those that only look at them differently. host_reads: answers
    the host waits for (`.item()`, `bool(tensor)`, `nonzero`): each stalls a GPU. bytes_moved: all inputs and outputs of
    the ops, what would go through memory if nothing were fused. scratch_bytes: the most memory that tensors made by the
    call took at one moment. by_op: ops by their aten name.
    """

    ops: int
    views: int
    host_reads: int
    bytes_moved: int
    scratch_bytes: int
    by_op: Mapping[str, int]

    def gated(self) -> dict[str, int]:
        """The figures that a gate holds."""
        return {
            "ops": self.ops,
            "views": self.views,
            "host_reads": self.host_reads,
            "bytes_moved": self.bytes_moved,
            "scratch_bytes": self.scratch_bytes,
        }


def count(work: Callable[[], Any]) -> Counts:
    """Run work() once and count."""
    with _Watch() as watch:
        work()
    return Counts(
        ops=sum(watch.by_op.values()),
        views=watch.views,
        host_reads=watch.host_reads,
        bytes_moved=watch.bytes_moved,
        scratch_bytes=watch.most,
        by_op=dict(watch.by_op.most_common()),
    )


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.by_op: Counter[str] = Counter()
        self.views = self.host_reads = self.bytes_moved = self.most = 0
        self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a tensor, such as its device
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in given:
            self._follow(tensor, size=0)
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.host_reads += 1
        if _is_view(func, given, made):
            self.views += 1
        else:
            self.by_op[str(func.overloadpacket)] += 1
            self.bytes_moved += sum(t.numel() * t.element_size() for t in (*given, *made))
        for tensor in made:
            self._follow(tensor, _nbytes(tensor))
        return result

    def _follow(self, tensor: Tensor, size: int) -> None:
        """Count `size` bytes behind a tensor that is new here until its memory is freed and its key is used again."""
        key = _memory(tensor)
        if key in self._known:
            return
        self._known.add(key)
        self._held += size
        self.most = max(self.most, self._held)
        weakref.finalize(tensor if tensor.is_mkldnn else tensor.untyped_storage(), self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._held -= size
        self._known.discard(key)


def _is_view(func: Any, given: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    """Whether an operation only returned another look at its input's memory, changing nothing."""
    if not made or func._schema.is_mutable:
        return False
    owners = {_memory(tensor) for tensor in given}
    return all(_memory(tensor) in owners for tensor in made)


def _memory(tensor: Tensor) -> int:
    """What tells a tensor's memory from others'; oneDNN's tensors show none and stand for it themselves."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.is_mkldnn else tensor.untyped_storage().nbytes()
