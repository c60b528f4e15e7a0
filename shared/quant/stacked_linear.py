"""StackedLinear: a packed linear whose rows lie apart in a mapped file, for a GPU where they come to lie as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shared.quant.linear import PackedLinear
from shared.quant.packing import Packed
from shared.quant.pieces import Pieces, stack_rows

if TYPE_CHECKING:
    from shared.quant.kernels import Kernel


class StackedLinear(PackedLinear):
    """A PackedLinear of Pieces: every piece is a buffer of its own, all of a tensor one after the other.

    Whoever lays a block's tensors into one piece of memory begins those called `continued` where the ones before them
    end (app/streamer/parts.py). Then this is one product of the numbers where they lie, as of rows joined in RAM, by
    the same kernel. Anywhere else each use joins what it reads: right, for the rare case, and not fast.
    """

    _buffers_of: dict[str, tuple[str, ...]]  # of each of the packing's tensors
    _heights: Sequence[int]
    continued: frozenset[str]

    @property
    def packed(self) -> Packed:
        """The weight as it is kept now, on whatever device it is; its tensors are Pieces."""
        return Packed(self.packing, (self.out_features, self.in_features), self._pieces)

    @property
    def _pieces(self) -> Pieces:
        own: dict[str, Any] = self._buffers  # get_buffer() takes as long as all else here
        return Pieces(
            self._heights, {name: tuple([own[b] for b in buffers]) for name, buffers in self._buffers_of.items()}
        )

    def _keep(self, packed: Packed) -> None:
        """Hold these tensors, Pieces or not, instead of those held so far."""
        tensors = packed.tensors
        if not isinstance(tensors, Pieces):
            tensors = Pieces(packed.shape[:1], {name: [tensor] for name, tensor in tensors.items()})
        self._heights = tensors.heights
        self._buffers_of = {
            name: (name,) if len(of) == 1 else tuple(f"{name}_{i}" for i in range(len(of)))
            for name, of in tensors.of.items()
        }
        self.continued = frozenset(buffer for buffers in self._buffers_of.values() for buffer in buffers[1:])
        by_buffer = {
            buffer: tensor
            for name, buffers in self._buffers_of.items()
            for buffer, tensor in zip(buffers, tensors.of[name], strict=True)
        }
        super()._keep(Packed(packed.packing, packed.shape, by_buffer))

    def _arranged(self, kernel: Kernel) -> Packed:
        """Part by part, so that what the kernel reads as it lies stays where it is."""
        assert kernel.arrange is not None
        parts = self._pieces.parts(self.packing, self.in_features)
        stacked = stack_rows([kernel.arrange(part) for part in parts])
        return kernel.arrange(self.packed) if stacked is None else stacked
