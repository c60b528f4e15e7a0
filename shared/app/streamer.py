"""Streams weights through a GPU smaller than the model, block by block, each copied while the one before it runs.

What is where:

    trunk      what belongs to no block (embedders, the final layer, pad tokens): on the GPU while its model is in use
    resident   as many blocks as the budget has room for: on the GPU while their model is in use
    ring       two buffers, each of the size of the largest other block: these pass through, one computes, one fills
    host       all weights, all the time: a page-locked copy each, or where no RAM is to be locked, as the loader left
               them (mapped from the file) and read through two small page-locked buffers
    embedding  a large table of a model that does not fit stays on the host, where its rows are looked up

A block is a child of a ModuleList that stands in no other. It is one piece of memory on either side, so its copy is one
transfer, and its tensors on the GPU are views made once. Between forwards a streamed block's attributes are the host's
tensors again: whoever reads a weight finds the numbers. What runs next is learned from what ran before, the first block
of the next step after the last of this one included; stream_schedule.py's `simulate` tells what that hides.

The weights of all models together never take more than the budget on the GPU: a model that comes into use takes its
room from the one that was in use, at no cost, for nothing has to be copied back.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared.app.offload import GIB, MIB
from shared.app.stream_schedule import ALIGNMENT, DEPTH, choose_resident

logger = logging.getLogger(__name__)

STAGING_BYTES = 64 * MIB  # each of the two; large enough for the full rate of any bus, small enough to lock anywhere
HOST_TABLE_BYTES = 64 * MIB  # an embedding table below this is not worth the way to the host and back

Ticket = Any  # a moment on the copying or the computing side: a CUDA event


class Lane(Protocol):
    """How bytes get to a device beside its computing. Copies are done one after the other."""

    @property
    def device(self) -> torch.device: ...

    def lock(self, memory: Tensor) -> bool:
        """Page-lock host memory; False where the system refuses."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy bytes, both (n,) uint8, source page-locked, after all earlier copies; returns at once."""

    def copied(self) -> Ticket:
        """The moment when all copies so far have ended."""

    def computed(self) -> Ticket:
        """The moment when all computing so far has ended."""

    def copy_after(self, moment: Ticket) -> None:
        """Copies from now on begin after that moment of computing."""

    def compute_after(self, moment: Ticket) -> None:
        """Computing from now on begins after that moment of copying."""

    def wait(self, moment: Ticket) -> None:
        """The program itself waits."""

    def close(self) -> None:
        """Wait for everything, and unlock the host memory."""


class CudaLane:
    """A CUDA stream of its own for the copies."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)
        self._locked: list[Tensor] = []
        # Memory must not be given back to the system while it is locked.
        self._unlock = weakref.finalize(self, _unlock, self._locked)

    @property
    def device(self) -> torch.device:
        return self._device

    def lock(self, memory: Tensor) -> bool:
        # Not pin_memory=True: torch rounds what it locks up to the next power of two.
        error: Any = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(error) != 0:
            return False
        self._locked.append(memory)
        return True

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Ticket:
        return self._stream.record_event()

    def computed(self) -> Ticket:
        return torch.cuda.current_stream(self._device).record_event()

    def copy_after(self, moment: Ticket) -> None:
        self._stream.wait_event(moment)

    def compute_after(self, moment: Ticket) -> None:
        torch.cuda.current_stream(self._device).wait_event(moment)

    def wait(self, moment: Ticket) -> None:
        moment.synchronize()

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        _unlock(self._locked)


class StreamOffload:
    """The Offloader that this module is about."""

    name = "stream"

    def __init__(
        self, *, budget: int, lock: int = 0, lane: Callable[[], Lane] = CudaLane, staging: int = STAGING_BYTES
    ) -> None:
        """budget: most bytes of weights on the GPU. lock: most bytes of RAM to page-lock for copies of the weights.

        staging: bytes of each of the two buffers through which weights that are not locked are read.
        """
        self.budget = budget
        self._lock = lock
        self._make_lane = lane
        self._staging_bytes = staging
        self._lane: Lane | None = None
        self._uploader: _Uploader | None = None
        self._models: list[_Model] = []  # the one in use last

    @property
    def device(self) -> torch.device:
        return torch.device("cuda") if self._lane is None else self._lane.device

    @property
    def held(self) -> int:
        """Bytes of weights on the GPU now, the ring included."""
        return sum(model.held for model in self._models)

    def place(self, modules: Mapping[str, nn.Module]) -> None:
        """Lock the weights as far as allowed, and wait for the first forward. Raises RuntimeError if called twice.

        A budget below what a model takes at least (its trunk and one block) is raised to that, with a warning.
        """
        if self._lane is not None:
            raise RuntimeError("place() was called twice; call release() first")
        self._lane = self._make_lane()
        try:
            self._uploader = _Uploader(self._lane, self._staging_bytes)
            self._models = [
                _Model(name, module.eval().requires_grad_(False), self._uploader, self.budget, self._make_room)
                for name, module in modules.items()
            ]
            least = max((model.least for model in self._models), default=0)
            if least > self.budget:
                logger.warning(
                    "%.0f MiB on the GPU are too few, %.0f are used: so much takes one block and what is no block",
                    self.budget / MIB,
                    least / MIB,
                )
                self.budget = least
            self._lock_parts()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        lane, self._lane = self._lane, None
        if lane is None:
            return
        for model in self._models:
            model.close()
        lane.close()
        self._models, self._uploader = [], None
        gc.collect()
        if lane.device.type == "cuda":
            torch.cuda.empty_cache()

    def describe(self) -> str:
        if not self._models:
            return "streamed by blocks"
        return f"streamed, {self.budget / GIB:.2f} GiB for weights: " + "; ".join(m.describe() for m in self._models)

    def _lock_parts(self) -> None:
        """Page-lock the parts that travel most often first: streamed blocks, then the rest, model by model."""
        left = self._lock
        parts = [part for model in self._models for part in model.parts]
        for part in sorted(parts, key=lambda part: part.stays):  # False first; the order is kept otherwise
            if part.nbytes > left or not part.lock(self._lane):
                return
            left -= part.nbytes

    def _make_room(self, wanted: _Model, nbytes: int) -> None:
        """Take room from the models used longest ago until `nbytes` more are within the budget."""
        self._models.remove(wanted)
        self._models.append(wanted)
        for model in self._models[:-1]:
            over = sum(other.claimed for other in self._models[:-1]) + wanted.held + nbytes - self.budget
            if over <= 0:
                return
            model.yield_room(over)


def _unlock(memory: list[Tensor]) -> None:
    for locked in memory:
        torch.cuda.cudart().cudaHostUnregister(locked.data_ptr())
    memory.clear()


# -- tensors that travel together -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Place:
    """An attribute that holds a tensor, and where its plain tensors begin in the part's memory."""

    table: dict[str, Any]  # a module's _parameters or _buffers
    name: str
    host: Tensor
    offsets: tuple[int, ...]

    def on(self, memory: Tensor) -> Tensor:
        """The same tensor with its numbers in `memory`, (n,) uint8."""
        leaves = list(_leaves(self.host))
        views = [_view(memory, offset, leaf) for offset, leaf in zip(self.offsets, leaves, strict=True)]
        tensor = _rebuilt(self.host, iter(views))
        return nn.Parameter(tensor, requires_grad=False) if isinstance(self.host, nn.Parameter) else tensor


class _Part:
    """A block, or what of a model belongs to none: laid out in one piece of memory, attached to it or not."""

    def __init__(self, name: str, modules: Sequence[nn.Module]) -> None:
        self.name = name
        self.stays = False  # in memory of its own while the model is in use
        self.memory: Tensor | None = None  # on the device, with the numbers in it or on their way
        self.arrival: Ticket = None  # when they have arrived; None once somebody has waited
        self.attached = False
        self._places: list[_Place] = []
        self._views: dict[int, tuple[Tensor, list[Tensor]]] = {}  # by id of the memory: the memory, views of it
        self._locked: Tensor | None = None
        end = 0
        seen: dict[int, tuple[int, ...]] = {}  # a tensor that two attributes share travels once
        for module in modules:
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for key, tensor in table.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in seen:
                        offsets = []
                        for leaf in _leaves(tensor):
                            offsets.append(end)
                            end += -(-leaf.nbytes // ALIGNMENT) * ALIGNMENT
                        seen[id(tensor)] = tuple(offsets)
                    self._places.append(_Place(table, key, tensor, seen[id(tensor)]))
        self.nbytes = end

    def lock(self, lane: Lane | None) -> bool:
        """Move the host's numbers into page-locked memory; False where the system refuses."""
        assert lane is not None
        memory = torch.empty(self.nbytes, dtype=torch.uint8)
        if not self.nbytes:
            return True
        if not lane.lock(memory):
            return False
        for place in self._places:
            moved = place.on(memory)
            for to, leaf in zip(_leaves(moved), _leaves(place.host), strict=True):
                to.copy_(leaf)
            place.host = place.table[place.name] = moved
        self._locked = memory
        return True

    def pieces(self) -> Iterator[tuple[int, Tensor, bool]]:
        """(offset, bytes (n,) uint8, whether they are page-locked) of everything that is to be copied."""
        if self._locked is not None:
            yield 0, self._locked, True
            return
        done = set()
        for place in self._places:
            for offset, leaf in zip(place.offsets, _leaves(place.host), strict=True):
                if offset not in done and leaf.numel():
                    done.add(offset)
                    yield offset, _bytes_of(leaf), False

    def attach(self) -> None:
        """Let the modules' attributes be the device's tensors."""
        assert self.memory is not None
        key = id(self.memory)
        if key not in self._views:
            self._views[key] = self.memory, [place.on(self.memory) for place in self._places]
        for place, view in zip(self._places, self._views[key][1], strict=True):
            place.table[place.name] = view
        self.attached = True

    def detach(self) -> None:
        """Let them be the host's again."""
        for place in self._places:
            place.table[place.name] = place.host
        self.attached = False

    def forget(self) -> None:
        """Let go of all memory on the device."""
        self.detach()
        self.memory, self.arrival = None, None
        self._views.clear()

    def only(self, module: nn.Module, device: torch.device) -> Callable[[], None]:
        """Bring the tensors of one module of the part alone; returns what takes them away again."""
        mine = [p for p in self._places if p.table is module._parameters or p.table is module._buffers]
        for place in mine:
            moved = place.host.to(device)
            parameter = isinstance(place.host, nn.Parameter)
            place.table[place.name] = nn.Parameter(moved, requires_grad=False) if parameter else moved

        def undo() -> None:
            for place in mine:
                place.table[place.name] = place.host

        return undo


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: itself, or those inside a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _leaves(getattr(tensor, name))


def _rebuilt(like: Tensor, leaves: Iterator[Tensor]) -> Tensor:
    """A tensor made of `leaves` as `like` is made of its own."""
    if not hasattr(like, "__tensor_flatten__"):
        return next(leaves)
    names, context = like.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(like, name), leaves) for name in names}
    kind: Any = type(like)
    result: Tensor = kind.__tensor_unflatten__(inner, context, like.size(), like.stride())
    return result


def _view(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """Part of `memory` as a tensor of the type, shape and layout of `like`."""
    numbers = memory[offset : offset + like.nbytes].view(like.dtype)
    return numbers.as_strided(like.shape, like.stride()) if _dense(like) else numbers.view(like.shape)


def _bytes_of(leaf: Tensor) -> Tensor:
    """A tensor's numbers as (n,) uint8 in the order in which they lie."""
    leaf = leaf.detach()
    if not leaf.is_contiguous():
        leaf = leaf.as_strided((leaf.numel(),), (1,)) if _dense(leaf) else leaf.contiguous()
    return leaf.reshape(-1).view(torch.uint8)


def _dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its piece of memory, in whatever order of the axes (channels last, transposed)."""
    axes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, size in axes:
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


class _Uploader:
    """Copies parts into memory on the device; what is not page-locked goes through two buffers that are."""

    def __init__(self, lane: Lane, staging: int) -> None:
        self.lane = lane
        self._size = staging
        self._staging: list[tuple[Tensor, Ticket]] = []  # a buffer, and when its last copy has ended

    def empty(self, nbytes: int) -> Tensor:
        """(n,) uint8 on the device, for copies: they begin when what was queued on this memory before has ended."""
        with torch.inference_mode(False):  # else nothing outside could write into it
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.lane.device)
        self.lane.copy_after(self.lane.computed())
        return memory

    def upload(self, part: _Part, memory: Tensor) -> None:
        """Queue the copies of a part; then its memory and arrival are set."""
        for offset, source, locked in part.pieces():
            if locked:
                self.lane.copy(memory[offset : offset + source.nbytes], source)
                continue
            for start in range(0, source.nbytes, self._size):
                piece = source[start : start + self._size]
                self._send(memory[offset + start : offset + start + piece.nbytes], piece)
        part.memory, part.arrival = memory, self.lane.copied()

    def _send(self, target: Tensor, piece: Tensor) -> None:
        """Copy through the buffer that was used longest ago, once its last copy has ended."""
        if len(self._staging) < 2:
            buffer = torch.empty(self._size, dtype=torch.uint8)
            self.lane.lock(buffer)  # where the system refuses, copies are slower, and right
        else:
            buffer, ended = self._staging.pop(0)
            self.lane.wait(ended)
        staged = buffer[: piece.nbytes].copy_(piece)
        self.lane.copy(target, staged)
        self._staging.append((buffer, self.lane.copied()))


# -- a model --------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Buffer:
    """A place of the ring."""

    memory: Tensor
    part: _Part | None = None  # whose numbers are in it, or on their way
    used: Ticket = None  # when the last block in it has computed


class _Model:
    """One of the modules that were placed: its parts, its ring, and the hooks that move them."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        uploader: _Uploader,
        budget: int,
        make_room: Callable[[_Model, int], None],
    ) -> None:
        self._name, self._uploader, self._lane = name, uploader, uploader.lane
        self._make_room = make_room
        self._active = False  # trunk attached, ring there, and room for everything claimed
        self._ring: list[_Buffer] = []
        self._next: dict[_Part, _Part] = {}  # by what ran: which block follows which
        self._last: _Part | None = None
        self._lent: dict[nn.Module, Callable[[], None]] = {}  # brought alone, out of one block
        self._lent_from: _Part | None = None
        self._handles: list[Any] = []

        roots = _block_roots(module)
        inside = {m for root in roots.values() for m in root.modules()}
        outside = [m for m in module.modules() if m not in inside]
        total = sum(leaf.nbytes for t in (*module.parameters(), *module.buffers()) for leaf in _leaves(t))
        tables = [m for m in outside if total > budget and _is_large_table(m)]
        self.trunk = _Part(f"{name} outside of blocks", [m for m in outside if m not in tables])
        self.trunk.stays = True
        self.blocks = [_Part(f"{name}.{block}", list(root.modules())) for block, root in roots.items()]
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
    def parts(self) -> list[_Part]:
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

    def _enter(self, part: _Part) -> None:
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

    def _leave(self, part: _Part) -> None:
        """A block has ended, or failed, perhaps before it began."""
        if part.stays or not part.attached:
            return
        part.detach()
        for buffer in self._ring:
            if buffer.part is part:
                buffer.used = self._lane.computed()

    def _lend(self, part: _Part, owner: nn.Module) -> None:
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

    def _arrived(self, part: _Part) -> None:
        if part.arrival is not None:
            self._lane.compute_after(part.arrival)
            part.arrival = None
        if not part.attached:
            part.attach()

    def _fetch(self, part: _Part, ahead: Sequence[_Part]) -> bool:
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

    def _fetch_ahead(self, part: _Part) -> None:
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


def _block_roots(module: nn.Module) -> dict[str, nn.Module]:
    """The children of every ModuleList that stands in no other, by name, in order."""
    roots: dict[str, nn.Module] = {}

    def search(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList):
                roots.update((f"{prefix}{name}.{i}", block) for i, block in enumerate(child))
            else:
                search(child, f"{prefix}{name}.")

    search(module, "")
    return roots


def _owns_tensors(module: nn.Module) -> bool:
    return any(tensor is not None for table in (module._parameters, module._buffers) for tensor in table.values())


def _is_large_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.weight.nbytes >= HOST_TABLE_BYTES


def _to_host(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.cpu() for tensor in inputs)
