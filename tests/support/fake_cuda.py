"""A pretended NVIDIA GPU: tensors that say they are on it, computed on the CPU, so that results stay bit-identical.

    with fake_cuda() as gpu:
        x = torch.ones(2, device="cuda")       # x.device is cuda:0, x.is_cuda
        x + torch.ones(2)                      # RuntimeError: two devices, as on a real machine
    gpu.peak, gpu.uploads                      # bytes of copied tensors alive at once; every copy's size
    gpu.waits                                  # calls that a real GPU's queue would have to be waited for in

It knows what a GPU program can get wrong on any machine: tensors of two devices in one operation, results that stay
behind, a default device left changed, weights that never left RAM, a host that waits in the middle of the work. It does
not know timing: streams, asynchronous copies and kernels of a real GPU are not pretended. Use it in tests only, and
keep it open while the code runs.

How: a CPU tensor under the type GpuTensor counts as on the GPU. A torch function mode sees every torch call made from
Python: it refuses mixed devices, runs the call on the CPU, and gives the results the type they would have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_iter, tree_map_only

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

# What brings a number of a tensor to Python.
_READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "equal", "allclose")


class GpuTensor(torch.Tensor):
    """Marks a tensor as being on the pretended GPU; its data are in ordinary memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class FakeCuda(TorchFunctionMode):
    """The pretended device and its books."""

    def __init__(self, total_memory: int, capability: tuple[int, int]) -> None:
        super().__init__()
        self.total_memory = total_memory
        self.capability = capability
        self.default_device: torch.device = CPU
        self.uploads: list[int] = []  # bytes of each tensor copied to the GPU
        self.waits: list[str] = []  # names of torch's functions
        self.peak = 0
        self.pinned_bytes = 0
        self._alive: list[tuple[StorageWeakRef, int]] = []
        self._pinned: list[StorageWeakRef] = []

    def resident(self) -> int:
        """Bytes of copied tensors that are still in use. Results computed on the GPU are not counted."""
        self._alive = [(ref, size) for ref, size in self._alive if not ref.expired()]
        return sum(size for _, size in self._alive)

    # -- every torch call passes here ---------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args, kwargs)
        if name == "__set__":
            return self._assign(func, args)
        if func in _device_constructors() or name.endswith("_like"):
            return self._create(func, args, kwargs)
        if name == "__deepcopy__" and on_gpu(args[0]):
            return _copied(args[0], args[1])
        if name in ("to", "cuda", "cpu") and isinstance(args[0], torch.Tensor):
            return self._convert(func, name, args, kwargs)
        if name == "_has_compatible_shallow_copy_type":
            return type(args[0]) is type(args[1]) or on_gpu(args[0]) == on_gpu(args[1])
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name in ("numpy", "__array__") and on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if self._has_to_wait(name, args, kwargs):
            self.waits.append(name)
        target = self._device_of_result(name, args, kwargs)
        return marked(func(*args, **kwargs), target, keep=args)

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return any(ref.cdata == tensor.untyped_storage()._cdata for ref in self._pinned)

    def _has_to_wait(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the host gets its answer when the GPU has done all that was queued before."""
        if name == "copy_" and on_gpu(args[0]) != on_gpu(args[1]):
            return not (kwargs.get("non_blocking") and (on_gpu(args[1]) or self._is_pinned(args[1])))
        return name in _READS and on_gpu(args[0])

    def _device_of_result(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
        """Where the result is; refuses what a GPU would refuse."""
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        if name in ("copy_", "__setitem__", "__getitem__"):
            return place_of(args[0])
        if name == "type_as":
            return place_of(args[1])
        places = {place_of(t) for t in tensors if t.dim() or on_gpu(t)}
        if len(places) > 1:
            shapes = ", ".join(f"{tuple(t.shape)} on {place_of(t)}" for t in tensors)
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {shapes}")
        return places.pop() if places else CPU

    def _attribute(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        tensor, attribute = args[0], getattr(func.__self__, "__name__", "")
        if attribute == "device":
            return place_of(tensor)
        if attribute in ("is_cuda", "is_cpu"):
            return on_gpu(tensor) == (attribute == "is_cuda")
        if attribute == "shape":
            return func(*args)  # a torch.Size, which has methods of its own
        return marked(func(*args, **kwargs), place_of(tensor), keep=args)

    def _assign(self, func: Callable[..., Any], args: Sequence[Any]) -> None:
        target, value = args[:2]
        if isinstance(value, torch.Tensor) and on_gpu(target) != on_gpu(value):
            raise NotImplementedError("the pretended GPU cannot change a tensor's device in place")
        func(*args)

    def _create(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = kwargs.pop("device", None)
        like = args[0] if args and isinstance(args[0], torch.Tensor) else None
        device = place_of(like) if given is None and like is not None else torch.device(given or self.default_device)
        pinned = kwargs.pop("pin_memory", False)
        if like is not None:  # else it would be where that one is, "meta" for one
            kwargs["device"] = CPU if device.type == "cuda" else device
        if func in (torch.tensor, torch.as_tensor) and device.type == "cuda":
            self.waits.append(func.__name__)
        result = marked(func(*args, **kwargs), GPU if device.type == "cuda" else CPU)
        if pinned:
            self._pinned.append(StorageWeakRef(result.untyped_storage()))
            self.pinned_bytes += result.nbytes
        return result

    def _convert(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensor, rest = args[0], list(args[1:])
        source = place_of(tensor)
        target = {"cuda": GPU, "cpu": CPU}.get(name, source)
        if name == "to":
            for i, value in enumerate(rest):
                if isinstance(value, torch.Tensor):
                    target = place_of(value)
                elif isinstance(value, str | torch.device):
                    target, rest[i] = torch.device(value), CPU
            if kwargs.get("device") is not None:
                target = torch.device(kwargs["device"])
                kwargs["device"] = CPU
            result = func(tensor, *rest, **kwargs)
        else:
            result = tensor
        target = GPU if target.type == "cuda" else CPU
        if target == source:
            return marked(result, target, keep=args)
        # A copy to the CPU that is not waited for goes to page-locked memory; torch sees to that.
        if not kwargs.get("non_blocking") or (target == GPU and not self._is_pinned(tensor)):
            self.waits.append(name)
        if result.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            result = plain(result).clone()
        result = marked(plain(result), target)
        if target == GPU:
            self.uploads.append(result.nbytes)
            self._alive.append((StorageWeakRef(result.untyped_storage()), result.nbytes))
            self.peak = max(self.peak, self.resident())
        return result


def on_gpu(tensor: object) -> bool:
    return isinstance(tensor, GpuTensor)


def place_of(tensor: torch.Tensor) -> torch.device:
    return GPU if on_gpu(tensor) else CPU


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor under the ordinary type."""
    return tensor.detach().as_subclass(torch.Tensor)


def marked(value: Any, device: torch.device, keep: Sequence[Any] = ()) -> Any:
    """The results of a call, each under the type of its device; what was handed in and back stays the same object."""
    kept = {id(t) for t in tree_iter(keep)}

    def mark(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in kept or on_gpu(tensor) == (device == GPU):
            return tensor
        return tensor.as_subclass(GpuTensor if device == GPU else torch.Tensor)

    return tree_map_only(torch.Tensor, mark, value)


def _copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """A deep copy on the pretended GPU, a parameter's being a parameter."""
    if id(tensor) not in memo:
        memo[id(tensor)] = copied = plain(tensor).clone().as_subclass(GpuTensor)
        if isinstance(tensor, torch.nn.Parameter):
            copied._is_param = True  # what isinstance asks of another type than Parameter
            copied.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


class _Generator(torch.Generator):
    """Random numbers of the CPU, whatever device they are for."""

    def __new__(cls, device: object = CPU) -> _Generator:
        return super().__new__(cls, CPU)


@contextlib.contextmanager
def fake_cuda(*, total_memory: int = 8 << 30, capability: tuple[int, int] = (8, 9)) -> Iterator[FakeCuda]:
    """Pretend a GPU of `total_memory` bytes and that compute capability, in this thread."""
    gpu = FakeCuda(total_memory, capability)
    properties = SimpleNamespace(
        name="Pretended GPU", total_memory=total_memory, major=capability[0], minor=capability[1]
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_device_name": properties.name,
        "get_arch_list": [f"sm_{capability[0]}{capability[1]}"],
        "default_stream": None,
        "current_stream": None,
        "Stream": None,
        "Event": SimpleNamespace(record=lambda: None, query=lambda: True, synchronize=lambda: None),
        "synchronize": None,
        "empty_cache": None,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
    }

    def set_default_device(device: torch.device | str | None) -> None:
        gpu.default_device = CPU if device is None else torch.device(device)

    def get_default_device() -> torch.device:
        return gpu.default_device

    def memory_allocated(_device: object = None) -> int:
        return gpu.resident()

    def max_memory_allocated(_device: object = None) -> int:
        return gpu.peak

    def mem_get_info(_device: object = None) -> tuple[int, int]:
        return total_memory - gpu.resident(), total_memory

    with contextlib.ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        for function in (memory_allocated, max_memory_allocated, mem_get_info):
            patches.enter_context(mock.patch.object(torch.cuda, function.__name__, function))
        for function in (set_default_device, get_default_device):
            patches.enter_context(mock.patch.object(torch, function.__name__, function))
        patches.enter_context(mock.patch.object(torch, "Generator", _Generator))
        patches.enter_context(gpu)
        yield gpu
