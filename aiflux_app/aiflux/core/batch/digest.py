"""The digest of an input: BLAKE2b-128 of its lines that are not blank, each with a line feed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from aiflux.util.lines import read_lines

_BLOCK = 1 << 20
_SIZE = 16


class InputDigest:
    """Computes the digest of a file, part by part in their order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = blake2b(digest_size=_SIZE)

    def add(self, start: int, end: int, plain: bool) -> None:
        """Add the lines from byte ``start`` to byte ``end``.

        Args:
            plain: nothing stands there but lines as they are digested; they are not taken apart.

        Raises:
            OSError: the file cannot be read.
            InputError: likewise.
        """
        if not plain:
            for _, _, raw in read_lines(self._path, start, end):
                self._hash.update(raw + b"\n")
            return
        with open(self._path, "rb", buffering=0) as file:
            file.seek(start)
            while start < end and (block := file.read(min(_BLOCK, end - start))):
                self._hash.update(block)
                start += len(block)

    def hexdigest(self) -> str:
        """Return the digest of what was added so far."""
        return self._hash.hexdigest()


class LineDigest:
    """Computes the same digest of lines that are read one by one, and counts them."""

    def __init__(self) -> None:
        self.lines = 0
        self._hash = blake2b(digest_size=_SIZE)

    def add(self, raw: bytes) -> None:
        """Add the next line, without its line ending."""
        self.lines += 1
        self._hash.update(raw + b"\n")

    def hexdigest(self) -> str:
        """Return the digest of the lines so far."""
        return self._hash.hexdigest()


Add = Callable[[int, int, bool], None]


@contextmanager
def beside(add: Add) -> Iterator[Add]:
    """Yield ``add`` in a thread: each call waits for the one before; at the end all are done.

    Hashing lets other threads run meanwhile.
    """
    with ThreadPoolExecutor(1, "digest") as executor:
        pending: list[Future[None]] = []
        alone = False

        def submit(start: int, end: int, plain: bool) -> None:
            nonlocal alone
            if pending:
                pending.pop().result()
            if not alone:
                try:
                    pending.append(executor.submit(add, start, end, plain))
                except RuntimeError:  # no thread can be started
                    alone = True
            if alone:
                add(start, end, plain)

        yield submit
        if pending:
            pending.pop().result()
