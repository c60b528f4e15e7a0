"""What packings in blocks share whose scales may lie as tensor cores read them: rows are cut and joined in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class BlockScaled(ABC):
    """swizzled: whether the tensor called `scales` is in the order of swizzle.py, padded; a field of the packing."""

    swizzled: bool
    scales: ClassVar[str]

    @abstractmethod
    def natural(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with row n of each belonging to output n."""

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        return self._as_kept({name: tensor[start:stop] for name, tensor in self.natural(tensors).items()})

    def join_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        import torch

        natural = [self.natural(part) for part in parts]
        return self._as_kept({name: torch.cat([part[name] for part in natural]) for name in natural[0]})

    def _as_kept(self, natural: dict[str, Tensor]) -> dict[str, Tensor]:
        from shared.quant.swizzle import swizzle

        return natural | {self.scales: swizzle(natural[self.scales])} if self.swizzled else natural
