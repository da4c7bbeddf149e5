"""The digest of an input: BLAKE2b-128 of its lines that are not blank, each ended by a line feed.

Blocks in which every line is as it is digested (no carriage return, no line that is blank or
begins with white space) go into it whole; only others are taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import IO

from aiflux.core.lines import BOM, unreadable

# Where another thread parses meanwhile, every block waits for the interpreter's lock: few blocks.
_BLOCK = 4 << 20
# White space sorts below it; what else does only makes a block be taken apart.
_FIRST_VISIBLE = b"!"


class InputDigest:
    """Computes the digest of a file, block by block."""

    def __init__(self, path: Path, block_bytes: int = _BLOCK) -> None:
        self._path = path
        self._block_bytes = block_bytes
        self._hash = blake2b(digest_size=16)
        self._at_line_start = True
        self._closed = False

    def steps(self) -> Iterator[None]:
        """Digest the file; every ``next`` does one block.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            with open(self._path, "rb") as file:
                if file.read(len(BOM)) != BOM:
                    file.seek(0)
                while not self._closed and (block := file.read(self._block_bytes)):
                    self._add(block, file)
                    yield
            if not self._at_line_start:
                self._hash.update(b"\n")
        except OSError as error:
            raise unreadable(self._path, error) from error

    def complete(self) -> None:
        """Digest the whole file, unless ``close`` ends it early."""
        for _ in self.steps():
            pass

    def close(self) -> None:
        """Digest no further block."""
        self._closed = True

    def hexdigest(self) -> str:
        """Return the digest of what was digested so far."""
        return self._hash.hexdigest()

    def _add(self, block: bytes, file: IO[bytes]) -> None:
        lines = block.split(b"\n")
        if b"\r" in block or self._oddly_begun(lines):
            self._add_apart(block + _rest_of_line(file, block))
            return
        self._hash.update(block)
        self._at_line_start = not lines[-1]

    def _oddly_begun(self, lines: list[bytes]) -> bool:
        """Tell whether one of the lines is blank or begins with white space.

        The first line may be the rest of one, and the last one is empty behind a line feed.
        """
        begun = lines if self._at_line_start else lines[1:]
        if begun and not begun[-1]:
            begun = begun[:-1]
        return bool(begun) and min(begun) < _FIRST_VISIBLE

    def _add_apart(self, block: bytes) -> None:
        """Add whole lines, the first of which may be the rest of one that is not blank."""
        ended = block.removesuffix(b"\n")
        lines = [line.rstrip(b"\r") for line in ended.split(b"\n")]
        kept = [line for line in lines if line and not line.isspace()]
        if not self._at_line_start and (not lines[0] or lines[0].isspace()):
            kept.insert(0, lines[0])
        self._hash.update(b"\n".join([*kept, b""]))
        self._at_line_start = True


def _rest_of_line(file: IO[bytes], block: bytes) -> bytes:
    return b"" if block.endswith(b"\n") else file.readline()
