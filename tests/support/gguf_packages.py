"""GGUF files by the gguf package's own writer."""

from __future__ import annotations

from pathlib import Path

import numpy
from gguf import GGMLQuantizationType, GGUFWriter

Tensors = dict[str, tuple[numpy.ndarray, str]]


def package_file(path: Path, tensors: Tensors, keys: dict | None = None) -> Path:
    """A file of the gguf package's own writer. tensors: name -> (array, or packed bytes, and type)."""
    writer = GGUFWriter(path, "lumina2")
    for key, value in (keys or {}).items():
        (writer.add_array if isinstance(value, list) else writer.add_string)(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=None if kind in ("F32", "F16") else GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
