"""Standard input and output of the commands: data that comes from or goes to a pipe (``-``)."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import BinaryIO

from aiflux.core.runs.directory import checked_output, named_output, refuse_precious
from aiflux.core.runs.input_copy import keep_input
from aiflux.errors import InputError, StorageError, UsageError
from aiflux.util.compression import plain_stream
from aiflux.util.files import (
    absolute,
    may_write,
    refuse_existing,
    refuse_special,
    temporary_folder,
)
from aiflux.util.streams import STDIN, STDOUT


def piped_file(kind: str) -> Path:
    """Return the name of stdin, after copying a pipe to a file: it is read more than once.

    Args:
        kind: of input that is converted.

    Raises:
        UsageError: stdin is a terminal, or the kind is not a file.
        StorageError: there is no disk space for the copy.
    """
    if kind == "dir" or sys.stdin.isatty():
        seen = "needs a directory" if kind == "dir" else "reads stdin, which is a terminal"
        raise UsageError(
            f"--input {STDIN} {seen}", "name it, or: cat in.csv | aiflux convert csv --input -"
        )
    if not stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode):
        with tempfile.TemporaryFile(prefix="aiflux-") as file:
            _copy(sys.stdin.buffer, file)
            os.dup2(file.fileno(), sys.stdin.fileno())
    return Path("/dev/stdin")


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    try:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
    except OSError as error:
        raise _no_room(error.strerror or str(error)) from error


def _no_room(reason: str) -> StorageError:
    return StorageError(
        f"cannot store the piped data in {tempfile.gettempdir()}: {reason}",
        "free disk space there, or set TMPDIR to another directory",
    )


def refuse_both(output: str, *, as_json: bool) -> None:
    """Refuse to write both data and a summary to stdout.

    Raises:
        UsageError: both go to stdout.
    """
    if as_json and output == STDOUT:
        raise UsageError(
            "--output - and --json cannot be combined: both write to stdout",
            "name a file with --output, or omit --json",
        )


@contextmanager
def destination(
    name: str, *, force: bool, inputs: Iterable[Path] = (), of_run: bool = False
) -> Iterator[Path]:
    """Yield the file to write; output for stdout is copied there when it is complete.

    A reader of the pipe sees all of it, or nothing.

    Args:
        of_run: a run writes one of its own files.

    Raises:
        OutputExistsError: the file exists and ``force`` is not given.
        StorageError: stdout or the temporary directory is full.
        UsageError: it is not a file, or one of ``inputs`` or of a run (``refuse_precious``).
    """
    if name == STDOUT:
        with temporary_folder() as folder:
            path = folder / "stdout"
            try:
                yield path
            except StorageError as error:
                raise _no_room(error.message) from error
            _to_stdout(path)
        return
    path = absolute(name)
    if name.endswith("/"):
        raise UsageError(f"the output {name} is a directory", "choose a file in it")
    refuse_special(path)
    if not os.path.isdir(path.parent):
        raise UsageError(
            f"the output directory {str(path.parent)!r} does not exist",
            f"mkdir -p {quote(str(path.parent))}",
        )
    if not may_write(path.parent):
        raise UsageError(
            f"you cannot write in the output directory {str(path.parent)!r}",
            "choose another directory",
        )
    if not of_run:
        refuse_precious(path, *inputs)
    if not force:
        refuse_existing(path)
    yield path


def _to_stdout(path: Path) -> None:
    try:
        sys.stdout.flush()
        with open(path, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(
            f"stdout has only part of the output: {error.strerror or error}",
            "free disk space, and run the same command again",
        ) from error


_BLOCK = 1 << 20


def kept_input(stream: BinaryIO, output: str | None) -> Path:
    """Copy the stream to ``OUTPUT.input.jsonl`` and return it; see ``keep_input``.

    A compressed stream is decompressed.

    Raises:
        UsageError: no output is named, or nothing is piped.
        InputError: nothing came.
    """
    if output is None:
        raise UsageError(f"--input {STDIN} needs --output", "--output results.json")
    if stream.isatty():
        raise UsageError(
            f"--input {STDIN} reads stdin, which is a terminal",
            "aiflux convert ... --output - | aiflux run --input - ...",
        )
    plain = plain_stream(stream, Path("/dev/stdin"))
    blocks = iter(lambda: plain.read(_BLOCK), b"")
    first = next(blocks, None)
    if first is None:
        raise InputError(
            "no request came through the pipe", "see the messages of the command before it"
        )
    target = checked_output(named_output(output, Path(STDIN)))
    return keep_input(chain([first], blocks), target)
