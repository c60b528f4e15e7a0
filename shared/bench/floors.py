"""What the machine itself would need: floors worked out from its measured roofs (C0, B0), never from assumed rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shared.bench.results import Record, Row, Value

# How their rows begin: of attention, of the device's memory, of the link to it, of files that are in memory.
ATTENTION, DEVICE_MEMORY, _LINK, _FILES = "attention", "copy on the device", "pinned copy", "page cache"

# Finds a case's newest record of the machine in question.
Find = Callable[[str], Record | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What has to be computed and read for a figure, at best one after the other at full rate.

    products: GFLOP by types, each taken at the best rate of any of them: ("bf16",), ("int8", "fp8"). attention: GFLOP.
    gigabytes: read once from the device's memory; what takes longer counts, computing or reading. roofs: the case.
    """

    products: Mapping[tuple[str, ...], float]
    roofs: str
    attention: float = 0.0
    gigabytes: float = 0.0

    def ms(self, find: Find, _row: Mapping[str, Value]) -> float | None:
        """Milliseconds; None without the roofs that it takes."""
        roofs = find(self.roofs)
        if roofs is None:
            return None
        rates = {kind: best_rate(roofs.rows, (kind,)) for types in self.products for kind in types}
        rates |= {
            ATTENTION: _rate(roofs.rows, ATTENTION, "gflop"),
            DEVICE_MEMORY: _rate(roofs.rows, DEVICE_MEMORY, "gb"),
        }
        return self.at(rates)

    def at(self, rates: Mapping[str, float]) -> float | None:
        """Milliseconds at rates by type, ATTENTION, DEVICE_MEMORY (GFLOP and GB per ms); None where one is missing."""
        parts = [(max(rates.get(kind, 0.0) for kind in types), gflop) for types, gflop in self.products.items()]
        if self.attention:
            parts.append((rates.get(ATTENTION, 0.0), self.attention))
        if not all(rate for rate, _ in parts) or (self.gigabytes and not rates.get(DEVICE_MEMORY)):
            return None
        computing = sum(gflop / rate for rate, gflop in parts)
        return max(computing, self.gigabytes / rates[DEVICE_MEMORY]) if self.gigabytes else computing


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """A forward whose weights do not all fit: the longer of computing, and copying what has no room.

    computing: (row, who) of B5 whose forwards are not streamed. The capped row itself tells its weights and their room.
    """

    computing: tuple[str, str]
    case: str = "B5"
    roofs: str = "B0"

    def ms(self, find: Find, row: Mapping[str, Value]) -> float | None:
        """Milliseconds; None without the link's rate, the uncapped row, or a plan in the capped one."""
        roofs, record = find(self.roofs), find(self.case)
        free = record.find(*self.computing) if record else {}
        rate = _rate(roofs.rows, _LINK, "gb", who="raw up") if roofs else 0.0
        if not rate or "denoise_seconds" not in free or not {"weights_gb", "room_gb"} <= row.keys():
            return None
        computing = 1e3 * float(free["denoise_seconds"]) / float(free["forwards"])
        return max(computing, max(0.0, float(row["weights_gb"]) - float(row["room_gb"])) / rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Files brought to the GPU: at best at the rate of reading them or of the link, whichever is lower."""

    roofs: str = "B0"

    def ms(self, find: Find, row: Mapping[str, Value]) -> float | None:
        """Milliseconds; None without the rates, or the files' size in the row."""
        roofs = find(self.roofs)
        if roofs is None or "files_gb" not in row:
            return None
        rate = min(_rate(roofs.rows, _FILES, "gb"), _rate(roofs.rows, _LINK, "gb", who="raw up"))
        return float(row["files_gb"]) / rate if rate else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Sizes that arithmetic is worked out from. A block has products of dim x (3 dim + dim + 3 ffn)."""

    dim: int = 3840
    ffn: int = 10240
    layers: int = 30
    refiners: int = 2  # over the picture's tokens; those over the caption's are computed once a picture
    multiple: int = 32  # of tokens, of both streams

    def work(
        self,
        side: int,
        caption: int,
        types: tuple[str, ...],
        *,
        roofs: str,
        forwards: int = 1,
        refined_in: tuple[str, ...] = (),
        pictures: int = 1,
    ) -> Work:
        """Of forwards for a square picture, or several. refined_in: types of the refiners, where they differ."""
        picture, words = self._padded((side // 16) ** 2), self._padded(caption)
        forwards *= pictures
        a_token = 2e-9 * self.dim * (4 * self.dim + 3 * self.ffn)
        products: dict[tuple[str, ...], float] = {}
        for blocks, tokens, kind in (
            (self.layers, picture + words, types), (self.refiners, picture, refined_in or types),
        ):  # fmt: skip
            products[kind] = products.get(kind, 0.0) + forwards * blocks * tokens * a_token
        attended = self.layers * (picture + words) ** 2 + self.refiners * picture**2
        return Work(products=products, attention=forwards * 4e-9 * self.dim * attended, roofs=roofs)

    def block(self, tokens: int, types: tuple[str, ...], *, roofs: str) -> Work:
        """Of one block."""
        products = 2e-9 * self.dim * (4 * self.dim + 3 * self.ffn) * tokens
        return Work(products={types: products}, attention=4e-9 * self.dim * tokens**2, roofs=roofs)

    def _padded(self, tokens: int) -> int:
        return -(-tokens // self.multiple) * self.multiple


def together(*parts: Work) -> Work:
    """One after the other; memory that is read does not count beside other parts."""
    products: dict[tuple[str, ...], float] = {}
    for part in parts:
        for types, gflop in part.products.items():
            products[types] = products.get(types, 0.0) + gflop
    return Work(products=products, attention=sum(part.attention for part in parts), roofs=parts[0].roofs)


def best_rate(rows: Sequence[Row], types: Sequence[str]) -> float:
    """The highest rate of products in any of these types, GFLOP per ms; 0 when none was taken."""
    return max((_rate(rows, "", "gflop", who=f"raw {kind}") for kind in types), default=0.0)


def _rate(rows: Sequence[Row], start: str, key: str, who: str = "") -> float:
    """The highest rate among rows that start so, in the key's unit per ms."""
    fitting = [row for row in rows if row.row.startswith(start) and (not who or row.who == who)]
    return max((float(row.values[key]) / float(row.values["ms"]) for row in fitting if _timed(row, key)), default=0.0)


def _timed(row: Row, key: str) -> bool:
    return {key, "ms"} <= row.values.keys()
