"""PackedLinear: a linear layer whose weight stays packed, and which everything else still takes for an nn.Linear.

* `isinstance(layer, nn.Linear)` holds, so that LoRA and offloaders find it.
* The packed tensors are plain buffers: they move with `.to(device)`, are saved, and never change their type, however
  often somebody calls `.to(bfloat16)` (float8 counts as floating point, so a plain module would be destroyed by that).
* `weight` tells shape and type and is no tensor: code that would compute with it fails at once. (A meta tensor would
  not: F.linear with one returns uninitialised memory on torch 2.13.)
* forward() is straight: one kernel (kernels/__init__.py), no fallback. kernels/resolve.py chooses it at load; without
  that a layer chooses when it first meets a device.
* What a kernel wants in another order than it lies in is put in order where it lies: for a GPU when the kernel is
  chosen, so that whoever moves the layers finds them as they stay; on a CPU when the layer is first used, so that a
  model is opened without reading its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.ops.rounding import Kind, Rounded, Sums
from shared.quant import kernels
from shared.quant.kernels.scratch import Scratch
from shared.quant.mapping import forget
from shared.quant.packing import Packed
from shared.quant.pieces import as_one


class WeightSpec(NamedTuple):
    """What a packed layer's `weight` tells: enough to fit a LoRA, too little to compute with."""

    shape: torch.Size
    dtype: torch.dtype


class PackedLinear(nn.Linear):
    """y = x W^T + b with W packed. Activations come and go in their own type."""

    # mmgp then adds its LoRAs to forward()'s result instead of computing with `weight`.
    _mm_requires_native_linear_forward = True

    def __init__(self, packed: Packed, bias: Tensor | None, dtype: torch.dtype, *, compute: str = "auto") -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.compute = compute
        self.scratch = Scratch()  # its own, until resolve() gives all layers of a model the same
        self._names: tuple[str, ...] = ()
        self._keep(packed)
        self._spec = WeightSpec(torch.Size(packed.shape), dtype)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._kernels: dict[str, kernels.Kernel] = {}  # by type of device
        self._awaits_layout = False  # whether the CPU's kernel has not been given the order it reads

    @property
    def weight(self) -> WeightSpec:  # type: ignore[override]
        return self._spec

    @property
    def packed(self) -> Packed:
        """The weight as it is kept now, on whatever device it is."""
        tensors = {name: self.get_buffer(name) for name in self._names}
        return Packed(self.packing, (self.out_features, self.in_features), tensors)

    def forward(self, x: Tensor | Rounded) -> Tensor:
        return kernels.run(self.ready(x.codes.device if isinstance(x, Rounded) else x.device), self, x)

    def unscaled(self, x: Tensor | Rounded) -> Tensor | Sums:
        """forward(), or the integers that it would scale where its kernel can hand on these; for a layer that nothing
        hangs on."""
        return kernels.run_unscaled(self.ready(x.codes.device if isinstance(x, Rounded) else x.device), self, x)

    def takes(self, device: torch.device) -> Kind | None:
        """In which 8 bits forward() takes activations that are rounded already; None: in none.

        Whatever hangs on this layer, such as a LoRA, reads the activations themselves.
        """
        if self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self):
            return None
        return self.kernel(device).takes(self)

    def kernel(self, device: torch.device) -> kernels.Kernel:
        """What computes this layer on `device`, chosen once."""
        if device.type not in self._kernels:
            self.use(kernels.select(self, device).kernel, device)
        return self._kernels[device.type]

    def use(self, kernel: kernels.Kernel, device: torch.device) -> None:
        """From now on compute with `kernel` on devices of this type; the weight is laid out for it, where it lies.

        On a CPU that is done when the layer is first used: until then the weight may lie in a file, unread.
        """
        self._kernels[device.type] = kernel
        if device.type == "cpu":
            self._awaits_layout = not kernel.reads(self)
        elif not kernel.reads(self):
            self._lay_out_for(kernel)

    def twin(self, device: torch.device, kernel: kernels.Kernel | None = None) -> PackedLinear:
        """A layer of the same numbers on `device`, laid out for `kernel`, to try things with."""
        packed = self.packed
        packed = Packed(packed.packing, packed.shape, {name: t.to(device) for name, t in packed.tensors.items()})
        if kernel is not None and kernel.arrange is not None:
            packed = kernel.arrange(packed)
        bias = None if self.bias is None else self.bias.detach().to(device)
        twin = PackedLinear(packed, bias, self._spec.dtype, compute=self.compute)
        twin.scratch = self.scratch
        return twin

    def dequantize(self) -> Tensor:
        """The weight (out, in) in the layer's type."""
        return self.packed.dequantize(self._spec.dtype)

    def extra_repr(self) -> str:
        chosen = ", ".join(f"{device}: {kernel.name}" for device, kernel in self._kernels.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packing}, {chosen or 'unused'}"

    def ready(self, device: torch.device) -> kernels.Kernel:
        """What computes this layer on `device`, its weight in the order that it reads."""
        kernel = self.kernel(device)
        if self._awaits_layout and device.type == "cpu":
            self._awaits_layout = False
            if not kernel.reads(self):
                self._lay_out_for(kernel)
        return kernel

    def _lay_out_for(self, kernel: kernels.Kernel) -> None:
        before = tuple(self.buffers())
        with torch.inference_mode(False):  # tensors that a later pass with gradients may read, too
            self._keep(self._arranged(kernel))
        # Somebody else may still hold what lies in a file, to look through it: at least it takes no memory.
        kept = {buffer.untyped_storage().data_ptr() for buffer in self.buffers()}
        forget(t for t in before if t.untyped_storage().data_ptr() not in kept)

    def _arranged(self, kernel: kernels.Kernel) -> Packed:
        assert kernel.arrange is not None
        return kernel.arrange(self.packed)

    def _keep(self, packed: Packed) -> None:
        """Hold these tensors instead of those held so far."""
        for name in self._names:
            del self._buffers[name]
        self.packing = packed.packing
        self._names = tuple(packed.tensors)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move as asked, keep every type: a cast would destroy packed numbers and round their scales."""

        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device
            return tensor if device == tensor.device else tensor.to(device)

        return super()._apply(move, recurse)


class JoinedLinear(nn.Linear):
    """Linears over the same input, their outputs side by side: a fused layer whose parts are kept differently.

    Some are packed and some are not, or they lie apart in a mapped file. Where all are packed it takes and hands on
    integers as one PackedLinear would: activations are rounded once for all parts. Plain parts that an offloader has
    laid one behind the other on a GPU are one product; packed ones are a StackedLinear, where they can be laid so.
    """

    _mm_requires_native_linear_forward = True

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        nn.Module.__init__(self)
        self.in_features = parts[0].in_features
        self.out_features = sum(p.out_features for p in parts)
        self.parts: Any = nn.ModuleList(parts)
        self.register_parameter("bias", None)
        self._spec = WeightSpec(torch.Size((self.out_features, self.in_features)), parts[0].weight.dtype)
        self._all_plain = all(type(part) is nn.Linear and part.bias is None for part in parts)
        self._all_packed = all(type(part) is PackedLinear and part.bias is None for part in parts)

    @property
    def weight(self) -> WeightSpec:  # type: ignore[override]
        return self._spec

    def forward(self, x: Tensor | Rounded) -> Tensor:
        if self._all_plain and isinstance(x, Tensor) and not x.requires_grad:
            if x.device.type == "cpu":
                return self._side_by_side(x)
            if (weight := as_one([part.weight for part in self.parts])) is not None:
                return F.linear(x, weight)
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def unscaled(self, x: Tensor | Rounded) -> Tensor | Sums:
        """As PackedLinear's."""
        if not (self._all_packed and isinstance(x, Rounded)):
            return self(x)  # type: ignore[no-any-return]
        answers = [part.unscaled(x) for part in self.parts]
        sums = [answer for answer in answers if isinstance(answer, Sums)]
        if len(sums) < len(answers):
            tensors = [answer.restore() if isinstance(answer, Sums) else answer for answer in answers]
            return torch.cat(tensors, dim=-1)
        first = sums[0]  # all have the scales of the same activations
        numbers, columns = torch.cat([s.sums for s in sums], dim=1), torch.cat([s.column for s in sums])
        return Sums(numbers, first.row, columns, torch.Size((*first.shape[:-1], self.out_features)), first.dtype)

    def takes(self, device: torch.device) -> Kind | None:
        """As PackedLinear's."""
        if not self._all_packed or self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self):
            return None
        kinds: set[Kind | None] = {part.takes(device) for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else None

    def dequantize(self) -> Tensor:
        """The weight (out, in) in the layer's type."""
        weights: list[Tensor] = [p.dequantize() if isinstance(p, PackedLinear) else p.weight for p in self.parts]
        return torch.cat(weights)

    def _side_by_side(self, x: Tensor) -> Tensor:
        """Each product straight into its columns: a copy of the outputs takes 4 % of their time."""
        out = x.new_empty(*x.shape[:-1], self.out_features)
        rows, columns = x.flatten(0, -2), 0
        for part in self.parts:
            torch.mm(rows, part.weight.t(), out=out.flatten(0, -2)[:, columns : columns + part.out_features])
            columns += part.out_features
        return out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
