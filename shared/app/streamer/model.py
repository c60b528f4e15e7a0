"""One of the models that are streamed: its parts, its ring, and the hooks that move them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shared.app.offload import MIB
from shared.app.stream_schedule import DEPTH, HOST_TABLE_BYTES, choose_resident
from shared.app.streamer.lane import Ticket
from shared.app.streamer.parts import Part, block_roots, leaves_of
from shared.app.streamer.uploader import Uploader


@dataclass(slots=True, eq=False)
class _Buffer:
    """A place of the ring."""

    memory: Tensor
    part: Part | None = None  # whose numbers are in it, or on their way
    used: Ticket = None  # when the last block in it has computed


class StreamedModel:
    """One of the modules that were placed: its parts, its ring, and the hooks that move them."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        uploader: Uploader,
        budget: int,
        make_room: Callable[[StreamedModel, int], None],
    ) -> None:
        self._name, self._uploader, self._lane = name, uploader, uploader.lane
        self._make_room = make_room
        self._active = False  # trunk attached, ring there, and room for everything claimed
        self._ring: list[_Buffer] = []
        self._next: dict[Part, Part] = {}  # by what ran: which block follows which
        self._last: Part | None = None
        self._lent: dict[nn.Module, Callable[[], None]] = {}  # brought alone, out of one block
        self._lent_from: Part | None = None
        self._handles: list[Any] = []

        roots = block_roots(module)
        inside = {m for root in roots.values() for m in root.modules()}
        outside = [m for m in module.modules() if m not in inside]
        total = sum(leaf.nbytes for t in (*module.parameters(), *module.buffers()) for leaf in leaves_of(t))
        tables = [m for m in outside if total > budget and _is_large_table(m)]
        self.trunk = Part(f"{name} outside of blocks", [m for m in outside if m not in tables])
        self.trunk.stays = True
        self.blocks = [Part(f"{name}.{block}", list(root.modules())) for block, root in roots.items()]
        sizes = [part.nbytes for part in self.blocks]
        room = budget - self.trunk.nbytes
        for part, stays in zip(self.blocks, choose_resident(sizes, room), strict=True):
            part.stays = stays
        self._next.update(zip(self.blocks, self.blocks[1:], strict=False))
        streamed = [part.nbytes for part in self.blocks if not part.stays]
        self._buffer_bytes = max(streamed, default=0)
        kept = sum(part.nbytes for part in self.blocks if part.stays)
        fitting = (room - kept) // self._buffer_bytes if streamed else 0
        self._depth = min(len(streamed), max(1, min(DEPTH, fitting)))
        self.least = self.trunk.nbytes + self._buffer_bytes
        self._footprint = self.trunk.nbytes + kept + self._depth * self._buffer_bytes
        self._hook(module, outside, tables, list(roots.values()))

    @property
    def parts(self) -> list[Part]:
        return [self.trunk, *self.blocks]

    @property
    def held(self) -> int:
        """Bytes on the device now."""
        own = sum(part.nbytes for part in self.parts if part.stays and part.memory is not None)
        return own + len(self._ring) * self._buffer_bytes

    @property
    def claimed(self) -> int:
        """Bytes on the device now or soon: all of a model in use."""
        return self._footprint if self._active else self.held

    def describe(self) -> str:
        stay = sum(part.stays for part in self.blocks)
        if stay == len(self.blocks):
            return f"{self._name} whole"
        return (
            f"{self._name} {stay} of {len(self.blocks)} blocks, the others through {self._depth} buffers of "
            f"{self._buffer_bytes / MIB:.0f} MiB"
        )

    def yield_room(self, nbytes: int) -> None:
        """Give up to `nbytes` of the claim back: the ring, then blocks from the last on, then the trunk."""
        freed = self.claimed - self.held
        self._active = False
        self._settle()
        if freed < nbytes:
            freed += self._drop_ring()
        for part in reversed(self.parts):
            if freed < nbytes and part.stays and part.memory is not None:
                part.forget()
                freed += part.nbytes

    def close(self) -> None:
        """Take the hooks off and everything off the device; attributes are the host's tensors again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._settle()
        self._active = False
        self._drop_ring()
        for part in self.parts:
            part.forget()
        self._take_back()

    def _settle(self) -> None:
        """Whatever gets memory that is given up now must not be written into by copies still on their way."""
        self._lane.compute_after(self._lane.copied())

    def _drop_ring(self) -> int:
        for buffer in self._ring:
            if buffer.part is not None:
                buffer.part.forget()
        for part in self.blocks:
            if not part.stays:
                part.forget()  # its views of the ring, too
        freed = len(self._ring) * self._buffer_bytes
        self._ring = []
        return freed

    # -- hooks

    def _hook(
        self, module: nn.Module, outside: Sequence[nn.Module], tables: Sequence[nn.Module], roots: Sequence[nn.Module]
    ) -> None:
        def on(target: nn.Module, before: Callable[[], None], after: Callable[[], None] | None = None) -> None:
            handle = target.register_forward_pre_hook(lambda *_: before(), prepend=True)
            self._handles.append(handle)
            if after is not None:
                # Called after an exception, too, so that attributes never stay behind on the device.
                handle = target.register_forward_hook(lambda *_: after(), always_call=True)
                self._handles.append(handle)

        for owner in outside:
            if owner in tables:
                self._handles.append(owner.register_forward_pre_hook(_to_host, prepend=True))
                self._handles.append(owner.register_forward_hook(self._to_device))
            elif owner is module or _owns_tensors(owner):
                on(owner, self._activate)
        for part, root in zip(self.blocks, roots, strict=True):
            on(root, lambda part=part: self._enter(part), lambda part=part: self._leave(part))  # type: ignore[misc]
            for owner in root.modules():
                if owner is not root and _owns_tensors(owner):
                    # No hook after it: a model may ask a norm whether anything, such as a LoRA, changes its result.
                    on(owner, lambda part=part, owner=owner: self._lend(part, owner))  # type: ignore[misc]

    def _to_device(self, _module: nn.Module, _inputs: Any, rows: Tensor) -> Tensor:
        return rows.to(self._lane.device)

    def _activate(self) -> None:
        """The model comes into use: claim its room, bring its trunk and its ring."""
        if self._active:
            return
        self._make_room(self, self._footprint - self.held)
        if self.trunk.memory is None:
            self._uploader.upload(self.trunk, self._uploader.empty(self.trunk.nbytes))
        self._arrived(self.trunk)
        while len(self._ring) < self._depth:
            self._ring.append(_Buffer(self._uploader.empty(self._buffer_bytes)))
        self._active = True

    def _enter(self, part: Part) -> None:
        """A block begins: its weights are there, those of the next ones on their way."""
        self._take_back()
        self._activate()
        if self._last is not None and self._last is not part:
            self._next[self._last] = part
        self._last = part
        if part.memory is None:
            self._fetch(part, ahead=())
        self._arrived(part)
        self._fetch_ahead(part)

    def _leave(self, part: Part) -> None:
        """A block has ended, or failed, perhaps before it began."""
        if part.stays or not part.attached:
            return
        part.detach()
        for buffer in self._ring:
            if buffer.part is part:
                buffer.used = self._lane.computed()

    def _lend(self, part: Part, owner: nn.Module) -> None:
        """A module inside a block runs: alone, when the block does not. It stays until another block is touched."""
        if part.attached or owner in self._lent:
            return
        if part is not self._lent_from:
            self._take_back()
            self._lent_from = part
        if part.stays:
            self._activate()
            if part.memory is None:
                self._fetch(part, ahead=())
            self._arrived(part)
            return
        self._lent[owner] = part.only(owner, self._lane.device)

    def _take_back(self) -> None:
        for undo in self._lent.values():
            undo()
        self._lent.clear()
        self._lent_from = None

    # -- copies

    def _arrived(self, part: Part) -> None:
        if part.arrival is not None:
            self._lane.compute_after(part.arrival)
            part.arrival = None
        if not part.attached:
            part.attach()

    def _fetch(self, part: Part, ahead: Sequence[Part]) -> bool:
        """Begin to bring a block; False if every buffer of the ring is in use or holds one of `ahead`."""
        if part.stays:
            self._uploader.upload(part, self._uploader.empty(part.nbytes))
            return True
        free = [b for b in self._ring if b.part is None or not (b.part.attached or b.part in ahead)]
        if not free:
            if not ahead:
                raise RuntimeError(f"{part.name} runs inside another block of its model, which cannot be streamed")
            return False
        # An empty one, else one whose block has run, else the one that was fetched in vain last.
        buffer = next((b for b in free if b.part is None), None) or next(
            (b for b in free if b.used is not None), free[-1]
        )
        self._ring.remove(buffer)
        self._ring.append(buffer)
        if buffer.part is not None:
            buffer.part.memory = buffer.part.arrival = None
            buffer.part = None
        if buffer.used is not None:
            self._lane.copy_after(buffer.used)
            buffer.used = None
        self._uploader.upload(part, buffer.memory)
        buffer.part = part
        return True

    def _fetch_ahead(self, part: Part) -> None:
        """Begin to bring the next blocks, as many as the ring has buffers, in the order in which they will run."""
        ahead = [part]
        on_their_way = 0
        while on_their_way < DEPTH:
            following = self._next.get(ahead[-1])
            if following is None or following in ahead:
                return
            ahead.append(following)
            if following.memory is None and not self._fetch(following, ahead):
                return
            on_their_way += following.arrival is not None


def _owns_tensors(module: nn.Module) -> bool:
    return any(tensor is not None for table in (module._parameters, module._buffers) for tensor in table.values())


def _is_large_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.weight.nbytes >= HOST_TABLE_BYTES


def _to_host(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.cpu() for tensor in inputs)
