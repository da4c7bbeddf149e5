"""Read compressed files like plain ones; gzip and Zstandard are recognized by their content."""

from __future__ import annotations

import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

from aiflux.errors import InputError
from aiflux.util.extras import need
from aiflux.util.text import error_text

_BUFFER = 1 << 20
_START = 4
_GZIP = b"\x1f\x8b"
# A Zstandard frame, or a skippable frame before it, as pzstd writes.
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)
_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")
_TOO_LARGE_WINDOW = "too much memory"

Opener = Callable[[str, int], int]


def compression_of(start: bytes) -> str | None:
    """Return ``gzip`` or ``zstd`` if a file starts with these bytes, else None."""
    if start.startswith(_GZIP):
        return "gzip"
    return "zstd" if _ZSTD.match(start) else None


def plain_name(path: Path) -> Path:
    """Return a path without the suffix of a compressed file, such as ``.gz``."""
    return path.with_suffix("") if path.suffix.lower() in _SUFFIXES else path


class PlainFile(io.BufferedReader):
    """A file that is open for reading; a compressed one is decompressed in bounded memory.

    Positions are those of the decompressed content. Going back starts from the beginning.

    Attributes:
        compression: see ``compression_of``.

    Raises:
        OSError: the file cannot be opened.
        InputError: while it is read: the compressed data is damaged or incomplete.
        ConfigError: the library for Zstandard is not installed.
    """

    def __init__(self, path: Path, opener: Opener | None = None) -> None:
        self._source = open(path, "rb", buffering=0, opener=opener)  # noqa: SIM115 - see close
        try:
            self.compression = compression_of(os.pread(self._source.fileno(), _START, 0))
            raw: Any = self._source
            if self.compression is not None:
                raw = _Decompressed(path, self._source, self.compression)
            super().__init__(raw, _BUFFER)
        except BaseException:
            self._source.close()
            raise

    @property
    def consumed(self) -> int:
        """Number of bytes of the file that were read, for a progress bar."""
        return self.tell() if self.compression is None else self._source.tell()

    def close(self) -> None:
        """Close the file."""
        try:
            super().close()
        finally:
            self._source.close()


def plain_stream(stream: BinaryIO, path: Path) -> BinaryIO:
    """Return the decompressed content of a pipe, or the pipe if it is not compressed.

    Args:
        path: names the pipe in errors, which are those of ``PlainFile``.
    """
    start = stream.peek(_START)[:_START] if isinstance(stream, io.BufferedReader) else b""
    compression = compression_of(start)
    if compression is None:
        return stream
    return io.BufferedReader(_Decompressed(path, stream, compression), _BUFFER)


class _Decompressed(io.RawIOBase):
    """The decompressed content of an open file."""

    def __init__(self, path: Path, source: Any, compression: str) -> None:
        self._path = path
        self._compression = compression
        self._damages: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
        self._stream: Any
        if compression == "gzip":
            self._stream = gzip.GzipFile(fileobj=source)
        else:
            library = _zstd()
            self._stream = library.ZstdFile(source)
            self._damages = (EOFError, library.ZstdError)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            position: int = self._stream.seek(offset, whence)
        except self._damages as error:
            raise self._damaged(error) from error
        return position

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._stream.read(len(buffer))
        except self._damages as error:
            raise self._damaged(error) from error
        buffer[: len(block)] = block
        return len(block)

    def _damaged(self, error: Exception) -> InputError:
        name, kind = str(self._path), self._compression
        program = "gzip" if kind == "gzip" else "zstd"
        if _TOO_LARGE_WINDOW in str(error):
            return InputError(
                f"{name!r} was compressed with a window that is too large (zstd --long or --ultra)",
                f"decompress it first: zstd -d --long=31 {quote(name)}",
            )
        if isinstance(error, EOFError):
            problem = f"is incomplete: its {kind} data ends too early"
        elif self._stream.tell():
            place = f"after {self._stream.tell():,} bytes of text"
            problem = f"is damaged, or has other data at its end, {place}: {error_text(error)}"
        else:
            problem = f"is damaged: {error_text(error)}"
        return InputError(
            f"{name!r} {problem}",
            f"check it with {program} -t {quote(name)}, and copy or download it again",
        )


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        return import_module("compression.zstd")
    return need("backports.zstd", "zstd", "reading Zstandard files (.zst)")
