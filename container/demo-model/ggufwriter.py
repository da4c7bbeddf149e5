"""Write GGUF files. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Uses only the standard library: scripts that create small models import it from their directory.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Mapping

ALIGNMENT = 32
"""Tensors are padded to a multiple of this number of bytes (``general.alignment``)."""

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
"""Type numbers of metadata values."""

_F32_TENSOR = 0


def string(text: str) -> bytes:
    """Encode a string: its length and UTF-8."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value: object) -> bytes:
    """Encode a metadata value without its type."""
    if kind == STRING:
        return string(str(value))
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)


def entry(key: str, kind: int, value: object) -> bytes:
    """Encode a metadata entry."""
    return string(key) + struct.pack("<I", kind) + scalar(kind, value)


def list_entry(key: str, kind: int, values: Iterable[object]) -> bytes:
    """Encode a metadata entry with an array."""
    items = [scalar(kind, value) for value in values]
    return string(key) + struct.pack("<IIQ", ARRAY, kind, len(items)) + b"".join(items)


def padded(data: bytes) -> bytes:
    """Pad data with zeros to the next multiple of the alignment."""
    return data + bytes(-len(data) % ALIGNMENT)


Tensor = tuple[tuple[int, ...], "array[float]"]
"""A shape, fastest dimension first, and 32-bit values."""


def gguf(entries: list[bytes], tensors: Mapping[str, Tensor]) -> bytes:
    """Return a complete file.

    Args:
        entries: metadata, created with ``entry`` or ``list_entry``.
        tensors: tensors by name.
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
