"""``--input -``: requests that come through a pipe are kept in a file, for they are read again."""

from __future__ import annotations

import filecmp
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from aiflux.core.runs.directory import checked_output
from aiflux.errors import InputError, UsageError
from aiflux.util.files import atomic_write
from aiflux.util.streams import STDIN

_BLOCK = 1 << 20


class _SameError(Exception):
    """The file holds the very same requests already."""


def kept_input(stream: BinaryIO, output: str | None) -> Path:
    """Return ``OUTPUT.input.jsonl`` with what the stream holds; the same again leaves it alone.

    Raises:
        UsageError: no output is named, or nothing is piped.
        InputError: nothing came.
        StorageError: the file cannot be written.
    """
    if output is None:
        raise UsageError(f"--input {STDIN} needs a name for the output", "--output results.json")
    if stream.isatty():
        raise UsageError(
            f"--input {STDIN} reads requests from a pipe, and there is none",
            "aiflux convert ... --output - | aiflux run --input - ...",
        )
    target = checked_output(Path(output))
    target = target.with_name(f"{target.name}.input.jsonl")
    with suppress(_SameError), atomic_write(target) as file:
        shutil.copyfileobj(stream, file, _BLOCK)
        file.flush()
        if not file.tell():
            raise InputError("no request came through the pipe", "see what the command before says")
        if target.exists() and filecmp.cmp(f"/dev/fd/{file.fileno()}", target, shallow=False):
            raise _SameError
    return target
