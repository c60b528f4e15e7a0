"""What a module takes whose files are not here yet: their published sizes, and the family's shapes for headers."""

from __future__ import annotations

from dataclasses import dataclass

from shared.app.memory.sizes import FLOAT32, HALF, ModuleSizes
from shared.quant.assemble import MAPPED_FROM

# Bytes for each number, from which on a file is plain, and from which on its packed numbers have 8 bits.
_PACKED_BELOW, _PACKED_IN_BYTES = 1.9, 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleShapes:
    """What a family knows of one of its published modules without a file, in numbers (weights), not bytes.

    numbers: in all. outside: of them in no block. unpacked: those that packed files keep in 16 bits. blocks: how many;
    width, hidden, products: as in ModuleSizes. largest: of the matrices in a block. table: of the embedding table.
    channels: those that enter a VAE decoder's last stage.
    """

    numbers: int
    outside: int = 0
    unpacked: int = 0
    blocks: int = 0
    width: int = 0
    hidden: int = 0
    products: int = 0
    largest: int = 0
    table: int = 0
    channels: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModule:
    """A module that is not (all) here: bytes of its files, the main one first, and the family's shapes of that one.

    further: bytes of module files (ControlNet), taken for 16 bit numbers in blocks like the main file's. packs_table:
    whether a packed file packs what lies outside blocks too. is_joined: as in module_sizes().
    """

    shapes: ModuleShapes
    nbytes: int
    further: tuple[int, ...] = ()
    packs_table: bool = False
    is_joined: bool = True

    def sizes(self, compute_bytes: int, *, on_cpu: bool = False) -> ModuleSizes:
        """Its sizes as it is loaded to compute in numbers of so many bytes. on_cpu: as in module_sizes()."""
        shapes = self.shapes
        main = (
            self._plain(compute_bytes, on_cpu) if self._stored > _PACKED_BELOW else self._packed(compute_bytes, on_cpu)
        )
        total, mapped, products = main.total, main.mapped, shapes.products
        blocks = ((total - main.outside) // shapes.blocks,) * shapes.blocks if shapes.blocks else ()
        if shapes.blocks:
            plain_block = (shapes.numbers - shapes.outside) * compute_bytes // shapes.blocks
            for size in (nbytes * compute_bytes // HALF for nbytes in self.further):
                count = size // plain_block
                total += size
                mapped += size if compute_bytes == HALF else 0
                blocks += (plain_block,) * count
                products += count * shapes.products // shapes.blocks
        return ModuleSizes(
            nbytes=total,
            mapped=mapped,
            blocks=blocks,
            width=shapes.width,
            hidden=shapes.hidden,
            products=products,
            scratch=main.scratch,
            table=shapes.table * compute_bytes,
        )

    @property
    def _stored(self) -> float:
        """Bytes for each number of the main file."""
        return self.nbytes / self.shapes.numbers

    def _widens(self, compute_bytes: int, on_cpu: bool) -> bool:
        """Whether 16-bit matrices of blocks stay as they are in the file, and are widened where they are multiplied."""
        is_large = self.nbytes >= MAPPED_FROM and self.shapes.blocks > 0
        return on_cpu and compute_bytes == FLOAT32 and is_large

    def _plain(self, compute_bytes: int, on_cpu: bool) -> _Loaded:
        shapes = self.shapes
        outside = shapes.outside * compute_bytes
        if self._widens(compute_bytes, on_cpu) and round(self._stored) == HALF:
            mapped = (shapes.numbers - shapes.outside) * HALF
            return _Loaded(mapped + outside, mapped, outside, shapes.largest * compute_bytes)
        total = shapes.numbers * compute_bytes
        return _Loaded(total, total if round(self._stored) == compute_bytes else 0, outside, 0)

    def _packed(self, compute_bytes: int, on_cpu: bool) -> _Loaded:
        shapes = self.shapes
        kept = 0 if self.packs_table else shapes.unpacked
        if self._stored > _PACKED_IN_BYTES:  # what is more than a byte for each number is the second byte of plain ones
            kept = min(kept, max(0, self.nbytes - shapes.numbers))
        widened = min(kept, shapes.outside) if self._widens(compute_bytes, on_cpu) else kept
        mapped = (kept if compute_bytes == HALF else kept - widened) * HALF
        is_copied = self.is_joined and self.nbytes < MAPPED_FROM
        table = outside = 0
        if self.packs_table:  # it is unpacked once: its bytes in the file give way to the numbers
            table, outside = round(shapes.outside * self._stored), shapes.outside * compute_bytes
        return _Loaded(
            total=self.nbytes + widened * (compute_bytes - HALF) + outside - table,
            mapped=mapped if is_copied else mapped + self.nbytes - kept * HALF - table,
            outside=outside if self.packs_table else min(shapes.outside, kept) * compute_bytes,
            scratch=shapes.largest * compute_bytes,
        )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Bytes of the main file as it is loaded: in all, of these mapped, in no block; and scratch as in ModuleSizes."""

    total: int
    mapped: int
    outside: int
    scratch: int
