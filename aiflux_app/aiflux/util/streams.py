"""Standard streams and arguments from the shell: closed, full, gone, or badly encoded.

``aiflux`` and the worker write to stdout and stderr through ``Outlet``. If a reader has ended, a
disk is full or a terminal is closed, only the affected output is lost.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from aiflux.errors import StorageError, UsageError
from aiflux.util.text import terminal_text

STDIN = STDOUT = "-"  # instead of a file name
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_PATIENCE = 1.0


class Outlet(io.RawIOBase):
    """Raw stream for stdout or stderr; closing it keeps the descriptor open.

    Attributes:
        strict: raise OSError if a write fails; otherwise drop what cannot be written.
        failure: the last error that was not raised; None if nothing was dropped.
    """

    def __init__(self, descriptor: int, *, strict: bool) -> None:
        super().__init__()
        self.strict = strict
        self.failure: OSError | None = None
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Write some of the bytes, or drop all of them; return their number."""
        try:
            return self._write(data)
        except OSError as error:
            if self.strict:
                raise
            # The next write is tried again: a disk may have space again.
            self.failure = error
            return len(data)

    def _write(self, data: Any) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                # Another program with the same pipe or terminal has set O_NONBLOCK.
                patience = None if self.strict else 0.0 if self.failure else _PATIENCE
                if not select.select([], [self._descriptor], [], patience)[1]:
                    raise


class _TerminalStream:
    """A text stream that makes everything safe for a terminal.

    Args:
        after: a stream to flush first, so that both are in order in one file (``2>&1``).

    ``rich_proxied_file`` gives rich the underlying stream: ``TerminalConsole`` makes the text safe,
    and adds its own escape sequences.
    """

    def __init__(self, stream: TextIO, after: TextIO | None = None) -> None:
        self.rich_proxied_file = stream
        self._after = after

    def write(self, text: str) -> int:
        if self._after is not None:
            with suppress(OSError, ValueError):  # reported when it is written or flushed itself
                self._after.flush()
        self.rich_proxied_file.write(terminal_text(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def open_streams() -> Iterator[Outlet]:
    """Use outlets for stdout and stderr; yield the strict outlet of stdout.

    A stream that the shell closed (``>&-``) drops its output; otherwise the next opened file would
    get its descriptor, and children would write to it. A character that the stream's encoding lacks
    is replaced. Printed text is made safe (``terminal_text``); bytes written to
    ``sys.stdout.buffer`` are data and stay unchanged.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        mode = "r" if name == "stdin" else "w"
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - closed below
    before = sys.stdout, sys.stderr
    out, err = Outlet(1, strict=True), Outlet(2, strict=False)
    out_text = _behind(sys.stdout, sys.__stdout__, out, line_buffering=out.isatty())
    err_text = _behind(sys.stderr, sys.__stderr__, err, line_buffering=True)
    sys.stdout = cast(TextIO, _TerminalStream(out_text))
    sys.stderr = cast(TextIO, _TerminalStream(err_text, after=out_text))
    try:
        yield out
    finally:
        out.strict = False
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        for name in closed:
            getattr(sys, name).close()
            setattr(sys, name, None)


def _behind(stream: Any, own: Any, outlet: Outlet, *, line_buffering: bool) -> Any:
    """Return a stream that writes to the outlet; keep a stream that was replaced before."""
    if stream is not own:
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(outlet),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=line_buffering,
    )


def refused(error: OSError) -> StorageError:
    """Return the error for a stream that cannot be written."""
    return StorageError(
        f"cannot write to stdout: {error.strerror}",
        "free some space, or redirect stdout elsewhere",
    )


def refuse_broken_names(words: Sequence[str]) -> None:
    """Reject arguments that are not text: file names become part of plans and results in UTF-8.

    Raises:
        UsageError: an argument has bytes that are invalid in this locale.
    """
    for word in words:
        if not _is_text(word):
            raise UsageError(
                f"{os.fsencode(word)!r} is not valid in this locale's encoding "
                f"({sys.getfilesystemencoding()})",
                "rename the file, or set LC_ALL=C.UTF-8",
            )


def refuse_lost_folder() -> None:
    """Reject a working directory that no longer exists.

    Raises:
        UsageError: the current directory was removed, or is not readable.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(
            f"the current directory cannot be used any more: {error.strerror}", "cd to another one"
        ) from error


def _is_text(word: str) -> bool:
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
