"""Read an input's lines one by one, and split it into parts that can be read separately."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from aiflux.errors import AifluxError, InputError
from aiflux.util.compression import PlainFile
from aiflux.util.files import open_regular
from aiflux.util.process_limits import exhausted

BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 256 * 1024 * 1024
_BUFFER = 1 << 20
_LOOK = 1 << 16


def read_lines(
    path: Path, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, int, bytes]]:
    """Yield ``(number, offset, line)`` of all nonblank lines, without line ending and BOM.

    Args:
        path: the input; a compressed one is decompressed.
        start: byte offset of the first line, which gets the number 1.
        end: byte offset of the line to stop at; None for the end of the file.

    Raises:
        InputError: the file cannot be read.
    """
    if end is not None and start >= end:
        return
    try:
        with PlainFile(path, open_regular) as file:
            file.seek(start)
            offset = start
            for number, line in enumerate(file, start=1):
                raw = line.rstrip(b"\r\n")
                if offset == 0 and raw.startswith(BOM):
                    raw = raw[len(BOM) :]
                if raw and not raw.isspace():
                    yield number, offset, raw
                offset += len(line)
                if end is not None and offset >= end:
                    return
    except OSError as error:
        raise unreadable(path, error) from error


def cut_at_lines(
    path: Path, part_bytes: int, start: int = 0, end: int | None = None
) -> list[tuple[int, int]]:
    """Return ``(start, end)`` of contiguous parts of about ``part_bytes`` with complete lines.

    Args:
        start: offset of the start of a line.
        end: offset of the end of a line; None for the end of the file.

    Raises:
        OSError: the file cannot be read.
    """
    parts = []
    with open(path, "rb", buffering=0, opener=open_regular) as file:
        end = file.seek(0, os.SEEK_END) if end is None else end
        while start < end:
            following = _next_line(file.fileno(), start + part_bytes, end)
            parts.append((start, following))
            start = following
    return parts


def _next_line(descriptor: int, position: int, end: int) -> int:
    """Return the offset of the first line that starts at or after ``position``, or ``end``."""
    position -= 1  # the line break before a line that starts at the position itself
    while position < end:
        block = os.pread(descriptor, _LOOK, position)
        found = block.find(b"\n")
        if found >= 0:
            return min(end, position + found + 1)
        if not block:
            break
        position += len(block)
    return end


def ends_line(path: Path, end: int) -> bool:
    """Return whether the byte before ``end`` is a line feed; the last line may have none.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0, opener=open_regular) as file:
        file.seek(max(0, end - 1))
        return file.read(1) == b"\n"


def line_numbers(path: Path, offsets: Sequence[int]) -> list[int]:
    """Return the number (from 1) of the lines that start at the ascending ``offsets``.

    Raises:
        OSError: the file cannot be read.
    """
    numbers = []
    number, position = 1, 0
    with open(path, "rb", buffering=0, opener=open_regular) as file:
        for offset in offsets:
            while position < offset:
                block = file.read(min(_BUFFER, offset - position))
                if not block:
                    break
                number += block.count(b"\n")
                position += len(block)
            numbers.append(number)
    return numbers


def unreadable(path: Path, error: OSError) -> AifluxError:
    """Return the error for an input that cannot be read."""
    return exhausted(error) or InputError(
        f"cannot read the input {str(path)!r}: {error.strerror}",
        "check the path and its permissions",
    )
