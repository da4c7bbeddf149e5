"""The streams and the words that a shell hands over: closed, full, gone, or in no encoding.

``aiflux`` and the image's worker write to stdout and stderr through ``Outlet``: a reader that went
away, a full disk or a closed terminal costs the words that were meant for it, and nothing else.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from aiflux.errors import StorageError, UsageError
from aiflux.util.unicode import terminal_text

STDIN = STDOUT = "-"  # in place of a file's name
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_PATIENCE = 1.0


class Outlet(io.RawIOBase):
    """The raw end of stdout or stderr; the descriptor stays open when this is closed.

    Attributes:
        heeded: raise OSError where a write fails; False drops what cannot be written.
        failure: the last error that was not raised; None where nothing was dropped.
    """

    def __init__(self, descriptor: int, *, heeded: bool) -> None:
        super().__init__()
        self.heeded = heeded
        self.failure: OSError | None = None
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Write some of the bytes, or drop all of them; return how many."""
        try:
            return self._write(data)
        except OSError as error:
            if self.heeded:
                raise
            # The next write is tried all the same: a disk may have room again.
            self.failure = error
            return len(data)

    def _write(self, data: Any) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                # Another program with the same pipe or terminal has set O_NONBLOCK.
                patience = None if self.heeded else 0.0 if self.failure else _PATIENCE
                if not select.select([], [self._descriptor], [], patience)[1]:
                    raise


class _TerminalStream:
    """A text stream on which everything written is made safe to show.

    ``rich_proxied_file`` leads rich to the stream itself: ``TerminalConsole`` makes the text safe,
    and adds sequences of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(terminal_text(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def open_streams() -> Iterator[Outlet]:
    """Write to stdout and stderr through outlets; yield that of stdout, which is heeded.

    A stream that was closed by the shell (``>&-``) swallows what is written to it: in its place the
    next file that is opened would stand, for children to write to. A character that the encoding of
    a stream lacks costs nothing but itself. What is printed is made safe to show
    (``terminal_text``); bytes that are written to ``sys.stdout.buffer`` are data, and stay.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        mode = "r" if name == "stdin" else "w"
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - closed below
    before = sys.stdout, sys.stderr
    out, err = Outlet(1, heeded=True), Outlet(2, heeded=False)
    out_text = _behind(sys.stdout, sys.__stdout__, out, line_buffering=out.isatty())
    err_text = _behind(sys.stderr, sys.__stderr__, err, line_buffering=True)
    sys.stdout, sys.stderr = (cast(TextIO, _TerminalStream(each)) for each in (out_text, err_text))
    try:
        yield out
    finally:
        out.heeded = False
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        for name in closed:
            getattr(sys, name).close()
            setattr(sys, name, None)


def _behind(stream: Any, own: Any, outlet: Outlet, *, line_buffering: bool) -> Any:
    """Return a stream that writes to the outlet; one that is not the process's own stays."""
    if stream is not own:
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(outlet),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=line_buffering,
    )


def refused(error: OSError) -> StorageError:
    """Return the error of a stream that takes no more."""
    return StorageError(
        f"what was to be printed could not be written: {error.strerror}",
        "make room where stdout goes, or send it elsewhere",
    )


def refuse_broken_names(words: Sequence[str]) -> None:
    """Refuse words that are no text: names of files go into plans and results, which are UTF-8.

    Raises:
        UsageError: a word has bytes that this locale cannot read.
    """
    for word in words:
        if not _is_text(word):
            raise UsageError(
                f"{os.fsencode(word)!r} is no text in this locale's encoding "
                f"({sys.getfilesystemencoding()})",
                "rename the file, or set LC_ALL=C.UTF-8",
            )


def refuse_lost_folder() -> None:
    """Refuse to work in a folder that is gone.

    Raises:
        UsageError: the current folder was removed, or may not be read.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(
            f"the current folder cannot be used any more: {error.strerror}", "cd to another one"
        ) from error


def _is_text(word: str) -> bool:
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
