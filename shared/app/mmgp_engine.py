"""Streams weights through a small NVIDIA GPU with mmgp. The only module of this program that imports mmgp.

mmgp (by DeepBeepMeep, its own licence: see NOTICE) moves whole models, or blocks of layers, to the GPU right before
they run. What it does besides, and how this file answers:

* Importing it puts its own safetensors reader in place of the stock one, in every module that holds it. Its reader
  lacks an argument that transformers uses, so loading any model by from_pretrained() would fail: the stock functions
  go back right after the import.
* Placing leaves "cuda" behind as torch's default device: put back.
* It rounds float32 weights, and float32 *arguments* of a model (the time of a step!), to bfloat16. Our loader has
  already chosen every type, so each module is marked as locked, without a type: mmgp then leaves both alone.
* A budget given as a plain number is ignored, and "70%" means seventy times the memory: it gets MiB per module.
* It caps a model that is too large for the GPU only when it is told to print: budgets_mib() does that.
* It uploads every streamed block twice (3.8.2): the fetched-ahead copy is never recognised. Put right here.
* It cannot pin weights that are not contiguous (a VAE in channels-last order): such models stay unpinned.
* It prints: what it says while placing goes to the log.
* Its release() leaves hooks on the modules that hold all of them in memory: they are taken off here.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmgp import offload, safetensors2
from mmgp.safetensors2 import _old_safe_open, _old_torch_load_file
from torch import nn

from shared.app.offload import GIB, Profile, budgets_mib, weight_bytes

logger = logging.getLogger(__name__)

# What mmgp calls the GPU; it knows no other. CUDA_VISIBLE_DEVICES chooses between several.
DEVICE = "cuda"


def restore_safetensors() -> list[str]:
    """Put the stock safetensors readers back wherever mmgp's import left its own; returns "module.name" of each.

    mmgp replaces four names, and every module imported after that picked the replacement up too, so all of them are
    searched (some thousand modules, about 15 ms). mmgp itself keeps its reader.
    """
    stock = {safetensors2.safe_open: _old_safe_open, safetensors2.torch_load_file: _old_torch_load_file}
    restored = []
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.partition(".")[0] == "mmgp":
            continue
        for name, value in list(vars(module).items()):
            for replacement, original in stock.items():
                if value is replacement:
                    setattr(module, name, original)
                    restored.append(f"{module_name}.{name}")
    return restored


restore_safetensors()


class MmgpOffload:
    """Modules rest in RAM and visit the GPU, whole or block by block, as a profile says."""

    name = "mmgp"

    def __init__(self, profile: Profile, *, total_memory: int | None = None, loras: Sequence[str] = ()) -> None:
        """total_memory: bytes on the GPU. loras: modules that get slots for mmgp's own LoRA loader."""
        self.profile = profile
        self.budgets: Mapping[str, int] = {}
        self._total_memory = total_memory
        self._loras = tuple(loras)
        self._manager: Any = None
        self._changes: list[_Changes] = []
        self._bytes = 0

    @property
    def device(self) -> torch.device:
        return torch.device(DEVICE)

    def place(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook the modules up, and pin their weights where the profile says so. Raises RuntimeError if called twice."""
        if self._manager is not None:
            raise RuntimeError("place() was called twice; call release() first")
        profile = self.profile
        sizes = {name: weight_bytes(module) for name, module in modules.items()}
        self.budgets = budgets_mib(profile, sizes, self._total_memory)
        before = [_Attributes(m) for m in dict.fromkeys(m for top in modules.values() for m in top.modules())]
        try:
            with _default_device_kept(), _printed_to_log():
                for attributes in before:
                    attributes.lock_dtype()
                self._manager = offload.profile(
                    dict(modules),
                    int(profile.number),
                    verboseLevel=1,
                    quantizeTransformer=False,
                    extraModelsToQuantize=None,
                    convertWeightsFloatTo=None,
                    pinnedMemory=_pinnable(modules, profile),
                    budgets=self.budgets,
                    asyncTransfers=profile.prefetch,
                    loras=list(self._loras) or None,
                )
                _recognise_fetched_blocks(self._manager)
        finally:
            self._changes = [attributes.changes() for attributes in before]
            if self._manager is None:
                self._take_hooks_off()
        self._bytes = sum(sizes.values())

    def release(self) -> None:
        """Take everything off the GPU, and mmgp off the modules. Weights that were pinned stay pinned while in use."""
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.release()
        self._take_hooks_off()
        self._bytes = 0
        gc.collect()
        torch.cuda.empty_cache()

    def describe(self) -> str:
        size = f" ({self._bytes / GIB:.2f} GiB in RAM)" if self._manager is not None else ""
        return f"mmgp, profile {self.profile.number:g}{size}: {self.profile.sentence}"

    def _take_hooks_off(self) -> None:
        changes, self._changes = self._changes, []
        for change in changes:
            change.undo()


def _recognise_fetched_blocks(manager: Any) -> None:
    """Let mmgp see that the block it needs has been fetched ahead already.

    It remembers a block's predecessor as "transformer/layers.0" and the loaded block as "layers.0", and fetches again
    because they differ: twice the traffic, and the second copy is waited for. Here the predecessors get the short name.
    """
    manager.prev_blocks_names = {
        name: previous and previous.removeprefix(name.partition("/")[0] + "/")
        for name, previous in manager.prev_blocks_names.items()
    }


def _pinnable(modules: Mapping[str, nn.Module], profile: Profile) -> list[str]:
    """Names of the modules to keep in page-locked RAM."""
    wanted = {"all": list(modules), "transformer": ["transformer"], "none": []}[profile.pinned]
    return [name for name in wanted if name in modules and _contiguous(modules[name])]


def _contiguous(module: nn.Module) -> bool:
    return all(tensor.is_contiguous() for tensor in (*module.parameters(), *module.buffers()))


class _Attributes:
    """A module's own attributes before mmgp adds to them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.values = dict(vars(module))
        self.children = set(module._modules)

    def lock_dtype(self) -> None:
        """Forbid mmgp to convert this module's weights and arguments: locked, to no type in particular."""
        if not hasattr(self.module, "_lock_dtype"):
            vars(self.module)["_lock_dtype"] = None

    def changes(self) -> _Changes:
        """What was added, and which methods were replaced, since this object was made."""
        now = dict(vars(self.module))
        added = [name for name in now if name not in self.values]
        added += [name for name in self.module._modules if name not in self.children]
        replaced = {n: old for n, old in self.values.items() if callable(old) and now.get(n, old) is not old}
        return _Changes(self.module, added, replaced)


@dataclass(frozen=True, slots=True)
class _Changes:
    """What mmgp did to one module. Attributes that others set later are not touched."""

    module: nn.Module
    added: Sequence[str]
    replaced: Mapping[str, Any]

    def undo(self) -> None:
        for name in self.added:
            if name in vars(self.module) or name in self.module._modules:
                delattr(self.module, name)
        for name, value in self.replaced.items():
            setattr(self.module, name, value)


@contextlib.contextmanager
def _default_device_kept() -> Iterator[None]:
    """Put torch's default device back as it was.

    A default of "cpu" is set as None: that takes torch's device mode off again instead of leaving one that every
    torch call passes through.
    """
    before = torch.get_default_device()
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


@contextlib.contextmanager
def _printed_to_log() -> Iterator[None]:
    """Send what mmgp prints to the log: stdout belongs to the command's own result."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in filter(None, map(str.strip, printed.getvalue().splitlines())):
            logger.debug("%s", line)
