"""File formats of weights: each finds its layers in a checkpoint by what the tensors say, and unpacks them.

A layer in a file is a module path and its tensors by suffix:

    layers.0.attention.qkv   weight (I8), weight_scale (F32), comfy_quant (U8: {"format": "int8_tensorwise"})

`FORMATS` is asked in order; the first that claims a layer reads it. Detection is per layer, because mixed files are the
normal case, and never by a file's name. A new format is one module here, named in _MODULES.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from shared.quant.checkpoint import Checkpoint, TensorInfo
from shared.quant.errors import CheckpointError, UnknownFormatError

if TYPE_CHECKING:
    from torch import Tensor

    from shared.quant.packing import Packed

# Asked in this order: formats with unmistakable tensors first, plain numbers last.
_MODULES: tuple[str, ...] = (
    "svdq",
    "gguf",
    "quanto_int8",
    "nvfp4",
    "mxfp8",
    "comfy_int8",
    "fp8_scaled",
    "bitsandbytes",
    "fp8_plain",
)

PLAIN_DTYPES = ("F32", "F16", "BF16")

# Plain too, but for matrices: norms, biases and pad tokens that were cast along with a bare FP8 file's weights.
SMALL_PLAIN_DTYPES = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Layer:
    """One linear (or other module) of a file: where it is, its tensors by suffix, and what its marker says.

    marker: the JSON of a `.comfy_quant` tensor or of the header's `_quantization_metadata`, {} without one.
    read_once: what a format has read of the layer besides its numbers, so that it is not read for every question.
    """

    checkpoint: Checkpoint
    module: str
    tensors: Mapping[str, TensorInfo]
    marker: Mapping[str, Any]
    read_once: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def load(self, *suffixes: str) -> list[Tensor]:
        """These tensors' data, in order."""
        names = [self.tensors[s].name for s in suffixes]
        loaded = self.checkpoint.load(names)
        return [loaded[n] for n in names]

    def fail(self, problem: str, hint: str = "Download the file again.") -> CheckpointError:
        """An error that names file and layer."""
        return CheckpointError(f"{self.checkpoint.path}: {self.module}: {problem}", hint)


class Format(Protocol):
    """What a module in this package defines at its top level."""

    NAME: str  # for people: "SVDQ int4"
    SUFFIXES: frozenset[str]  # tensors of a layer that this format uses, besides "weight" and "bias"
    # Optional, FILE_TENSORS: frozenset[str]: tensors that mark a whole file and belong to no layer.
    # Optional, check(layer, packed): looks through the numbers of what read() gave; raises CheckpointError for those
    # that cannot be. A format without one has no scales.

    def claims(self, layer: Layer) -> bool:
        """Whether the layer is of this format, judged by names, types and marker only."""

    def shape(self, layer: Layer) -> tuple[int, int]:
        """(rows, columns) of the matrix that a claimed layer stands for, from the header alone."""

    def describe(self, layer: Layer) -> dict[str, Any]:
        """What `inspect` shows of a claimed layer: format, and rank or group where it has one."""

    def read(self, layer: Layer) -> Packed:
        """What a claimed layer holds, mapped as it lies in the file. Raises CheckpointError for impossible shapes and
        types. Numbers are looked through by check()."""


@cache
def formats() -> tuple[Format, ...]:
    """All formats in the order they are asked."""
    return tuple(import_module(f"{__name__}.{name}") for name in _MODULES)  # type: ignore[misc]


def layers_of(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Layer]:
    """Group tensors by module. Tensors whose last parts are no known suffix keep their whole name, suffix "".

    A module's suffix may contain dots ("weight._data"), so the longest known one is cut off. Tensors that mark a whole
    file ("scaled_fp8", behind any prefix) are left out.
    """
    suffixes = {"weight", "bias"} | {s for f in formats() for s in f.SUFFIXES}
    file_tensors = {name for f in formats() for name in getattr(f, "FILE_TENSORS", ())}
    grouped: dict[str, dict[str, TensorInfo]] = {}
    for name in names:
        if name.rpartition(".")[2] in file_tensors:
            continue
        module, suffix = _cut(name, suffixes)
        grouped.setdefault(module, {})[suffix] = checkpoint.tensors[name]
    header = _header_markers(checkpoint)
    return {m: Layer(checkpoint, m, tensors, _marker(checkpoint, m, tensors, header)) for m, tensors in grouped.items()}


def format_of(layer: Layer) -> Format | None:
    """The format that claims a layer; None for plain numbers.

    Raises UnknownFormatError when the layer is neither plain nor claimed.
    """
    if "format" not in layer.read_once:
        layer.read_once["format"] = _asked(layer)
    found: Format | None = layer.read_once["format"]
    return found


def _asked(layer: Layer) -> Format | None:
    for candidate in formats():
        if candidate.claims(layer):
            return candidate
    odd = [info for suffix, info in layer.tensors.items() if not _is_plain(suffix, info)]
    if odd or layer.marker:
        said = (
            f"marked {dict(layer.marker)}" if layer.marker else f"{odd[0].name} is {odd[0].dtype} {list(odd[0].shape)}"
        )
        raise UnknownFormatError(
            f"{layer.checkpoint.path}: {layer.module} is packed in a way this version does not know ({said}).",
            "Use another file of the same model; `wgp.py presets` lists what is readable.",
        )
    return None


def check_of(found: Format, layer: Layer, packed: Packed) -> Callable[[], None] | None:
    """What looks through the numbers of a layer that was read; None where there is nothing to look at."""
    check = getattr(found, "check", None)
    return None if check is None else partial(check, layer, packed)


def read_checked(found: Format, layer: Layer) -> Packed:
    """A claimed layer whose numbers have been looked through. Raises CheckpointError as read() and check() do."""
    packed = found.read(layer)
    check = check_of(found, layer, packed)
    if check is not None:
        check()
    return packed


def marker_tensor(entries: Mapping[str, Any]) -> Tensor:
    """A layer's `comfy_quant` tensor: the bytes of a JSON object."""
    import torch

    return torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)


def _is_plain(suffix: str, info: TensorInfo) -> bool:
    is_matrix = suffix == "weight" and len(info.shape) == 2
    return info.dtype in PLAIN_DTYPES or (info.dtype in SMALL_PLAIN_DTYPES and not is_matrix)


def _cut(name: str, suffixes: Set[str]) -> tuple[str, str]:
    """At the first dot after which all is a known suffix, the longest one that way."""
    dot = name.find(".")
    while dot >= 0:
        if name[dot + 1 :] in suffixes:
            return name[:dot], name[dot + 1 :]
        dot = name.find(".", dot + 1)
    return name, ""


def _marker(
    checkpoint: Checkpoint, module: str, tensors: Mapping[str, TensorInfo], header: Mapping[str, Any]
) -> dict[str, Any]:
    if "comfy_quant" in tensors:
        text = checkpoint.read_bytes(tensors["comfy_quant"].name)
        found: Any = _json(text, f"{checkpoint.path}: {tensors['comfy_quant'].name}")
    else:
        # The header's layer names may lack the prefix that the tensors have.
        found = next((v for k, v in header.items() if module == k or module.endswith(f".{k}")), {})
    if isinstance(found, str):
        found = {"format": found}
    if not isinstance(found, dict):
        raise CheckpointError(f"{checkpoint.path}: the marker of {module} is {found!r}, not an object.")
    nested = found.get("params")
    return {**found, **(nested if isinstance(nested, dict) else {})}


def _header_markers(checkpoint: Checkpoint) -> dict[str, Any]:
    text = checkpoint.metadata.get("_quantization_metadata")
    if text is None:
        return {}
    found = _json(text.encode(), f"{checkpoint.path}: _quantization_metadata")
    layers = found.get("layers", {}) if isinstance(found, dict) else {}
    return layers if isinstance(layers, dict) else {}


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise CheckpointError(f"{where} is not readable JSON ({error}).") from error
