"""Read the header of a GGUF file: metadata and tensor sizes. Bounded and read-only.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensor sizes follow ollama's
``fs/ggml/ggml.go`` (0.9.3) and ``type.go``.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiflux.errors import ModelError
from aiflux.util.text import error_text

MAGIC = b"GGUF"
HEADER_LIMIT = 512 * 1024 * 1024
"""Maximum bytes of a header; the largest vocabularies take about 20 MB."""
_MAX_ENTRIES = 1_000_000
_MAX_ARRAY = 4096
_MAX_DIMENSIONS = 8
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip

# Tensor type: (values per block, bytes per block).
TENSOR_TYPES: Mapping[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 4: (32, 17), 6: (32, 22), 7: (32, 24),
    8: (32, 34), 9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176),
    14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50),
    20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 39: (32, 17),
}  # fmt: skip


@dataclass(frozen=True)
class Length:
    """Placeholder for a long array, with its number of items."""

    items: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        metadata: values by key; a long array is a ``Length``, unless ``read_gguf`` was to read it.
        tensors: bytes of each tensor by name.
        parameters: number of all values.
        data_start: offset of the tensor data.
    """

    metadata: dict[str, Any]
    tensors: dict[str, int]
    parameters: int
    data_start: int

    @property
    def architecture(self) -> str:
        """The architecture's name, such as ``llama``."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def number(self, key: str, default: int = 0) -> int:
        """Return an integer of the architecture; for an array (one item per layer), the maximum."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list):
            value = max(value, default=default)
        return int(value) if isinstance(value, int | float) else default

    def size_of(self, *prefixes: str) -> int:
        """Return the bytes of all tensors with these name prefixes."""
        return sum(size for name, size in self.tensors.items() if name.startswith(prefixes))

    @property
    def data_size(self) -> int:
        """Bytes of all tensors."""
        return sum(self.tensors.values())


def read_gguf(path: Path, arrays: Collection[str] = ()) -> GgufHeader:
    """Read a file's header.

    Args:
        arrays: keys whose arrays are read whole, however long.

    Raises:
        ModelError: the file is not a GGUF file, or is truncated.
    """
    if path.exists() and not path.is_file():
        raise ModelError(f"{path} is not a regular file", "use a GGUF file")
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise ValueError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _HeaderReader(content, arrays).header()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    except (ValueError, struct.error, IndexError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path} is not a (complete) GGUF file: {error_text(error)}",
            "download it again; convert models in other formats to GGUF first",
        ) from error


def refuse_truncated(path: Path, header: GgufHeader) -> None:
    """Refuse a file that is shorter than its header describes.

    Raises:
        ModelError: it is.
    """
    size, whole = path.stat().st_size, header.data_start + header.data_size
    if whole > size:
        raise ModelError(
            f"{path} is truncated: its header describes {whole} bytes, but it has {size}",
            "download it again",
        )


class _HeaderReader:
    def __init__(self, content: mmap.mmap, arrays: Collection[str]) -> None:
        self._content = content
        self._arrays = arrays
        self._at = 0

    def header(self) -> GgufHeader:
        if self._content[:4] != MAGIC:
            raise ValueError("it does not start with GGUF")
        self._at = 4
        version, tensors, entries = self._take("<I"), self._take("<Q"), self._take("<Q")
        if version not in (2, 3):
            raise ValueError(f"unknown version {version} (big-endian?)")
        if max(tensors, entries) > _MAX_ENTRIES:
            raise ValueError(f"it claims {tensors} tensors and {entries} entries")
        metadata = dict(self._entry() for _ in range(entries))
        sizes, parameters = self._tensors(tensors)
        alignment = int(metadata.get("general.alignment", 32)) or 32
        return GgufHeader(metadata, sizes, parameters, -(-self._at // alignment) * alignment)

    def _entry(self) -> tuple[str, Any]:
        key, kind = self._string(), self._take("<I")
        if kind == _ARRAY:
            return key, self._array(whole=key in self._arrays)
        return key, self._value(kind)

    def _tensors(self, count: int) -> tuple[dict[str, int], int]:
        sizes: dict[str, int] = {}
        parameters = 0
        for _ in range(count):
            name = self._string()
            dimensions = self._take("<I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"tensor {name} claims {dimensions} dimensions")
            values = math.prod(self._take("<Q") for _ in range(dimensions))
            kind = self._take("<I")
            self._at += 8
            block, size = TENSOR_TYPES.get(kind, (1, 0))
            sizes[name] = values * size // block
            parameters += values
        return sizes, parameters

    def _take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._content, self._at)
        self._move(struct.calcsize(form))
        return value

    def _move(self, count: int) -> None:
        self._at += count
        if self._at > min(len(self._content), HEADER_LIMIT):
            raise ValueError("its header does not end")

    def _string(self) -> str:
        begin = self._skip_string()
        return self._content[begin : self._at].decode("utf-8", "replace")

    def _skip_string(self) -> int:
        length = self._take("<Q")
        begin = self._at
        self._move(length)
        return begin

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind not in _SCALARS:
            raise ValueError(f"metadata of the unknown type {kind}")
        return self._take(_SCALARS[kind])

    def _array(self, *, whole: bool) -> list[Any] | Length:
        kind, count = self._take("<I"), self._take("<Q")
        if kind == _ARRAY:
            raise ValueError("an array of arrays")
        if whole or (count <= _MAX_ARRAY and kind != _STRING):
            return [self._value(kind) for _ in range(count)]
        if kind == _STRING:
            for _ in range(count):
                self._skip_string()
        elif kind in _SCALARS:
            self._move(count * struct.calcsize(_SCALARS[kind]))
        else:
            raise ValueError(f"an array of the unknown type {kind}")
        return Length(count)
