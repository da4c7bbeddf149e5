"""Writes GGUF files. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Standard library only: scripts that make small models import it from beside themselves.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Mapping

ALIGNMENT = 32
"""Bytes to whose multiples tensors are padded (``general.alignment``)."""

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
"""Type numbers of metadata values."""

_F32_TENSOR = 0


def string(text: str) -> bytes:
    """A string: its length and UTF-8."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value: object) -> bytes:
    """One metadata value without its type."""
    if kind == STRING:
        return string(str(value))
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)


def entry(key: str, kind: int, value: object) -> bytes:
    """One metadata entry."""
    return string(key) + struct.pack("<I", kind) + scalar(kind, value)


def list_entry(key: str, kind: int, values: Iterable[object]) -> bytes:
    """One metadata entry that is an array."""
    items = [scalar(kind, value) for value in values]
    return string(key) + struct.pack("<IIQ", ARRAY, kind, len(items)) + b"".join(items)


def padded(data: bytes) -> bytes:
    """The data with zeros up to the next multiple of the alignment."""
    return data + bytes(-len(data) % ALIGNMENT)


Tensor = tuple[tuple[int, ...], "array[float]"]
"""A shape, fastest dimension first, and 32-bit numbers."""


def gguf(entries: list[bytes], tensors: Mapping[str, Tensor]) -> bytes:
    """A whole file.

    Args:
        entries: the metadata, each made by ``entry`` or ``list_entry``.
        tensors: by their names.
    """
    infos, blobs, offset = [], [], 0
    for name, (shape, numbers) in tensors.items():
        if sys.byteorder == "big":
            numbers.byteswap()
        dims = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _F32_TENSOR, offset)
        infos.append(string(name) + dims)
        blobs.append(padded(numbers.tobytes()))
        offset += len(blobs[-1])
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries))
    return padded(head + b"".join(entries) + b"".join(infos)) + b"".join(blobs)
