"""What packings in blocks share whose scales may lie as tensor cores read them: rows are cut and joined in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from shared.quant.pieces import Stackable
from shared.quant.swizzle import BAND

if TYPE_CHECKING:
    from torch import Tensor


class BlockScaled(Stackable):
    """swizzled: whether the tensor called `scales` is in the order of swizzle.py, padded; a field of the packing.

    block_bytes: of the codes that share a scale. Besides these two a packing may have numbers for rows, (rows, 1), or
    (1, 1) where one serves all of them.
    """

    swizzled: bool
    scales: ClassVar[str]
    block_bytes: ClassVar[int]

    def natural(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with row n of each belonging to output n."""
        from shared.quant.swizzle import unswizzle

        rows, width = tensors["codes"].shape
        natural = _spread(tensors, rows)
        if self.swizzled:
            natural[self.scales] = unswizzle(tensors[self.scales], rows, width // self.block_bytes)
        return natural

    def take_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Swizzled scales are cut where a band ends, or the matrix does; elsewhere they are put in order to be cut."""
        rows = len(tensors["codes"])
        if self.swizzled and not start % BAND and (not stop % BAND or stop == rows):
            bands = tensors[self.scales][start : -(-stop // BAND) * BAND]
            return {name: tensor[start:stop] for name, tensor in _spread(tensors, rows).items()} | {self.scales: bands}
        return self._as_kept({name: tensor[start:stop] for name, tensor in self.natural(tensors).items()})

    def stack_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]] | None:
        """None where a part ends within a band, whose swizzled scales other rows would have to share."""
        if self.swizzled and any(len(part["codes"]) % BAND for part in parts[:-1]):
            return None
        return {name: _pieces(name, parts) for name in parts[0]}

    def join_rows(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        import torch

        joined = super().join_rows(parts)
        if joined is not None:
            return joined
        natural = [self.natural(part) for part in parts]
        return self._as_kept({name: torch.cat([part[name] for part in natural]) for name in natural[0]})

    def _as_kept(self, natural: dict[str, Tensor]) -> dict[str, Tensor]:
        from shared.quant.swizzle import swizzle

        return natural | {self.scales: swizzle(natural[self.scales])} if self.swizzled else natural


def _pieces(name: str, parts: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """A tensor's pieces, one of each part; or one, where it is a number that serves all rows of all parts."""
    import torch

    pieces = [part[name] for part in parts]
    heights = [len(part["codes"]) for part in parts]
    if not any(len(piece) == 1 < height for piece, height in zip(pieces, heights, strict=True)):
        return pieces
    if all(torch.equal(piece, pieces[0]) for piece in pieces):
        return pieces[:1]
    return [piece.expand(height, -1).contiguous() for piece, height in zip(pieces, heights, strict=True)]


def _spread(tensors: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The tensors, a number that serves all rows repeated for each."""
    return {name: tensor.expand(rows, -1) if len(tensor) == 1 else tensor for name, tensor in tensors.items()}
