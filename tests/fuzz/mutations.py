"""Changes to good files: bytes anywhere, JSON of headers, and tensors whose offsets stay consistent."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Mapping, Sequence
from typing import Any

Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> dtype, shape, data
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
           "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 3, 15, 16, 31, 64, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63,
            2**64 - 1, 2**64, 10**30, 10**4000, 0.5, -0.0, 1e308, 1e-320, math.nan, math.inf)  # fmt: skip
_TEXTS = ("", "x", "weight", "int8_tensorwise", "nvfp4", "mxfp8", "float8_e4m3fn", "int4", "fp4", "qint8", "nf4", "F32",
          "F4", "F6_E2M3", "{}", "[]", "\ud800", "\0", "é" * 40, "9" * 5000, "../../x", "a.b.c")  # fmt: skip
_ENDINGS = (b"\0", b"\xff", b"\0" * 8, b"{}", b"\x80", b"\xff" * 8, b"\x7f\xff\xff\xff", b"\1\0\0\0\0\0\0\0")


def mutate(seed: bytes | tuple[Tensors, dict[str, str]], rng: random.Random) -> bytes:
    """A file made from a good one by a few changes."""
    if isinstance(seed, bytes):
        data = seed
        if data.startswith(b"{") and rng.random() < 0.7:
            return _change_json_text(data.decode(), rng).encode("utf-8", "surrogatepass")
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            data = _change_bytes(data, rng)
        return data
    tensors, metadata = dict(seed[0]), dict(seed[1])
    for _ in range(rng.randint(1, 3)):
        _change_tensors(tensors, metadata, rng)
    header, body = _header(tensors, metadata)
    if rng.random() < 0.3:
        header = _change_json(header, rng)
    data = safetensors_bytes(header, body, longest=rng.random() < 0.01)
    return _change_bytes(data, rng) if rng.random() < 0.15 else data


def whole(seed: bytes | tuple[Tensors, dict[str, str]]) -> bytes:
    """The good file itself."""
    return seed if isinstance(seed, bytes) else safetensors_bytes(*_header(*seed))


def safetensors_bytes(header: Any, body: bytes, *, longest: bool = False) -> bytes:
    """longest: with a number in it of more digits than Python agrees to read."""
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    if longest:
        text = text.replace(b"[", b"[" + b"9" * 5000, 1)
    return struct.pack("<Q", len(text)) + text + body


def _header(tensors: Tensors, metadata: Mapping[str, str]) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return header, body


def _change_tensors(tensors: Tensors, metadata: dict[str, str], rng: random.Random) -> None:
    """One change that leaves offsets, types and shapes in agreement."""
    if metadata and rng.random() < 0.2:
        key = rng.choice(list(metadata))
        metadata[key] = _change_json_text(metadata[key], rng)
        return
    name = rng.choice(list(tensors))
    dtype, shape, data = tensors[name]
    match rng.randrange(8):
        case 0 if len(tensors) > 1:
            del tensors[name]
        case 1:
            added = [name + ending for ending in ("_2", ".x", "\ud800", "_scale")]
            renamed = rng.choice([*added, *_swapped(name, tensors, rng)])
            tensors[renamed] = tensors.pop(name)
        case 2:
            dtype = rng.choice(list(_WIDTHS))
            tensors[name] = (dtype, shape, _sized(data, math.prod(shape) * _WIDTHS[dtype]))
        case 3 | 4:
            shape = _change_shape(shape, rng)
            tensors[name] = (dtype, shape, _sized(data, math.prod(shape) * _WIDTHS.get(dtype, 1)))
        case 5:
            if data[:1] == b"{":  # a marker: JSON in bytes
                data = _change_json_text(data.decode("utf-8", "replace"), rng).encode("utf-8", "surrogatepass")
                tensors[name] = (dtype, [len(data)], data)
            else:
                tensors[name] = (dtype, shape, _sized(_change_bytes(data or b"\0", rng), len(data)))
        case 6:
            fill = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\x00\x00\xc0\x7f", b"\x7f\x80"))
            tensors[name] = (dtype, shape, (fill * (len(data) + 1))[: len(data)])
        case 7:
            tensors[name + rng.choice((".weight", "_scale", ".comfy_quant", ".alpha"))] = (dtype, shape, data)


def _swapped(name: str, tensors: Tensors, rng: random.Random) -> list[str]:
    """Another tensor's last part on this one's module."""
    other = rng.choice(list(tensors))
    return [f"{name.rpartition('.')[0]}.{other.rpartition('.')[2]}"]


def _change_shape(shape: Sequence[int], rng: random.Random) -> list[int]:
    changed = list(shape)
    match rng.randrange(6):
        case 0:
            changed.reverse()
        case 1:
            changed.append(1)
        case 2 if changed:
            changed.pop(rng.randrange(len(changed)))
        case 3 if changed:
            axis = rng.randrange(len(changed))
            changed[axis] = max(0, changed[axis] + rng.choice((-1, 1, 2, -changed[axis], changed[axis])))
        case 4 if len(changed) > 1:
            changed = [changed[0] * changed[1], *changed[2:]]
        case _:
            changed = [rng.choice((0, 1, 2, 3, 16, 100)) for _ in range(rng.randrange(4))]
    return changed


def _sized(data: bytes, count: int) -> bytes:
    return (data * (count // max(len(data), 1) + 1) + bytes(count))[:count]


def _change_json_text(text: str, rng: random.Random) -> str:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return rng.choice((text[: len(text) // 2], text + "}", "", rng.choice(_TEXTS)))
    if rng.random() < 0.1:
        return rng.choice((text[: rng.randrange(len(text) + 1)], text * 2, "[" * 3000, '{"a":' * 3000, "9" * 5000))
    return json.dumps(_change_json(found, rng))


def _change_json(value: Any, rng: random.Random) -> Any:
    """The value with one of its parts replaced, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        match rng.randrange(6):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(_TEXTS)] = changed[key]
            case _:
                changed[key] = _change_json(changed[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        changed_list = list(value)
        place = rng.randrange(len(changed_list))
        match rng.randrange(5):
            case 0:
                del changed_list[place]
            case 1:
                changed_list.insert(place, changed_list[place])
            case _:
                changed_list[place] = _change_json(changed_list[place], rng)
        return changed_list
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 7, value, -value, 2**32))
    made: tuple[Any, ...] = (None, True, False, [], {}, [value], {"x": value}, [[]], str(value), [1] * 70, [2**40] * 70)
    return rng.choice((rng.choice(_NUMBERS), rng.choice(_TEXTS), rng.choice(made)))


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return rng.choice(_ENDINGS)
    # Most of what a reader believes stands at the beginning.
    place = rng.randrange(len(data)) if rng.random() < 0.5 else min(rng.randrange(600), len(data) - 1)
    match rng.randrange(10):
        case 0 | 7:
            return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        case 1 | 8:
            number = rng.choice([n for n in _NUMBERS if isinstance(n, int) and 0 <= n < 2**64])
            return data[:place] + struct.pack("<Q", number) + data[place + 8 :]
        case 2 | 9:
            number = rng.choice([n for n in _NUMBERS if isinstance(n, int) and 0 <= n < 2**32])
            return data[:place] + struct.pack("<I", number) + data[place + 4 :]
        case 3:
            return data[:place]
        case 4:
            return data[:place] + rng.choice(_ENDINGS) + data[place:]
        case 5:
            return data[:place] + data[place + rng.randrange(1, 40) :]
        case _:
            stop = place + rng.randrange(1, 80)
            return data[:stop] + data[place:stop] + data[stop:]
