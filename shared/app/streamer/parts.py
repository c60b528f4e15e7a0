"""Tensors that travel together: a block, or what of a model belongs to none, in one piece of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.app.stream_schedule import ALIGNMENT
from shared.app.streamer.lane import Lane, Ticket
from shared.quant.stacked_linear import StackedLinear


@dataclass(slots=True)
class _Place:
    """An attribute that holds a tensor, and where its plain tensors begin in the part's memory."""

    table: dict[str, Any]  # a module's _parameters or _buffers
    name: str
    host: Tensor
    offsets: tuple[int, ...]

    def on(self, memory: Tensor) -> Tensor:
        """The same tensor with its numbers in `memory`, (n,) uint8."""
        leaves = list(leaves_of(self.host))
        views = [_view(memory, offset, leaf) for offset, leaf in zip(self.offsets, leaves, strict=True)]
        tensor = _rebuilt(self.host, iter(views))
        return nn.Parameter(tensor, requires_grad=False) if isinstance(self.host, nn.Parameter) else tensor


class Part:
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
            continued = module.continued if isinstance(module, StackedLinear) else ()
            for table in tables:
                for key, tensor in table.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in seen:
                        offsets = []
                        for leaf in leaves_of(tensor):
                            offsets.append(end if key in continued else _aligned(end))
                            end = offsets[-1] + leaf.nbytes
                        seen[id(tensor)] = tuple(offsets)
                    self._places.append(_Place(table, key, tensor, seen[id(tensor)]))
        self.nbytes = _aligned(end)

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
            for to, leaf in zip(leaves_of(moved), leaves_of(place.host), strict=True):
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
            for offset, leaf in zip(place.offsets, leaves_of(place.host), strict=True):
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


def block_roots(module: nn.Module) -> dict[str, nn.Module]:
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


def leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: itself, or those inside a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from leaves_of(getattr(tensor, name))


def _aligned(offset: int) -> int:
    """The next place where a tensor may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


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
