"""How much memory tensors made by a piece of work take on one device, at most at a time.

With torch's FakeTensorMode nothing is computed and nothing allocated: the published network at any size, in seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered. most: bytes at the fullest moment, of memory made by operations since then."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.most = 0
        self._kind = device.type
        self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self._kind:
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self._known:
                    self._follow(storage)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._held += size
        self.most = max(self.most, self._held)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._held -= size
