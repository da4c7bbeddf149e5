"""The streams and the words that a shell hands over: closed, full, or in no encoding."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from aiflux.errors import StorageError, UsageError

STDIN = STDOUT = "-"  # in place of a file's name
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextmanager
def open_streams() -> Iterator[None]:
    """Let a stream that was closed by the shell (``>&-``) swallow what is written to it, and a
    character that stdout's encoding lacks cost nothing but itself.

    In place of a closed stream the next file that is opened would stand, for children to write to.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        mode = "r" if name == "stdin" else "w"
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - closed below
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for name in closed:
            getattr(sys, name).close()
            setattr(sys, name, None)


def drop_stdout() -> None:
    """Let what is still to be written to stdout go nowhere: nobody can take it any more."""
    try:
        fileno = sys.stdout.fileno()
    except (OSError, ValueError):  # a stream of a test, without a file
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fileno)
    os.close(nowhere)


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
