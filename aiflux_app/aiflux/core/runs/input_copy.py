"""The copy of a run's input that has no plain file of its own: a run reads it by byte offset."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.local_process import refuse_process
from aiflux.errors import ConfigError, StorageError
from aiflux.util.compression import PlainFile, compression_of
from aiflux.util.files import absolute, atomic_write, open_regular, temporary_folder
from aiflux.util.lease import refuse_living
from aiflux.util.lines import unreadable
from aiflux.util.text import size_text

_BLOCK = 8 << 20
# The copy leaves this much of the disk free: the journal and other users need space, too.
_LARGEST_RESERVE = 1 << 30
_RESERVED_SHARE = 20


def copy_of_input(output: Path) -> Path:
    """Return the path of the copy, ``OUTPUT.input.jsonl``."""
    return output.with_name(f"{output.name}.input.jsonl")


def plain_input(path: Path, output: Path) -> tuple[Path, Path | None]:
    """Return the file that a run reads, and the compressed input if it is a copy of one.

    A compressed input is decompressed to ``copy_of_input``, completely or not at all. A copy with
    the same content is kept, so that the same command resumes the run.

    Raises:
        InputError: the compressed data is damaged, or cannot be read.
        ConfigError: the input is where its copy belongs, or Zstandard is not installed.
        StorageError: the disk has too little space, or cannot be written.
        RunConflictError: a process works with a copy that would be replaced.
    """
    path = absolute(path)
    if not is_compressed(path):
        return path, None
    target = copy_of_input(output)
    if os.path.exists(target) and path.samefile(target):
        raise ConfigError(
            f"the compressed input {path} would be replaced by its plain copy", "rename it"
        )
    if not _has_content_of(path, target):
        run = RunDirectory.of_output(output)
        refuse_living([*run.path.glob(".*.lease")], f"the run {output}")
        refuse_process(run)
        with atomic_write(target) as file:
            _decompress(path, file, target.parent)
    return target, path


class _SameError(Exception):
    """The file already has the same requests."""


def keep_input(
    parts: Iterable[bytes], output: Path, refuse_change: Callable[[], None] = lambda: None
) -> Path:
    """Write requests to ``copy_of_input`` and return the file; equal content is not rewritten.

    Args:
        refuse_change: called before other requests are replaced; raises if they are still needed.

    Raises:
        StorageError: the file cannot be written.
    """
    target = copy_of_input(output)
    with suppress(_SameError), atomic_write(target) as file:
        for part in parts:
            file.write(part)
        file.flush()
        if target.exists():
            if filecmp.cmp(f"/dev/fd/{file.fileno()}", target, shallow=False):
                raise _SameError
            refuse_change()
    return target


@contextmanager
def temporary_copy(path: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield the same as ``plain_input``, with a copy in the temporary directory."""
    path = absolute(path)
    if not is_compressed(path):
        yield path, None
        return
    with temporary_folder() as folder:
        plain = folder / "input.jsonl"
        with atomic_write(plain) as file:
            _decompress(path, file, folder)
        yield plain, path


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed; False for what the check of the input refuses."""
    try:
        with open(path, "rb", buffering=0, opener=open_regular) as file:
            return compression_of(file.read(4)) is not None
    except (OSError, StorageError):
        return False


def _has_content_of(path: Path, copy: Path) -> bool:
    if not os.path.isfile(copy):
        return False
    try:
        with PlainFile(path, open_regular) as new, open(copy, "rb") as old:
            while True:
                block = new.read(_BLOCK)
                if block != old.read(len(block) or 1):
                    return False
                if not block:
                    return True
    except OSError as error:
        raise unreadable(path, error) from error


def _decompress(path: Path, target: IO[bytes], folder: Path) -> None:
    written = 0
    with PlainFile(path, open_regular) as source:
        while block := _read(source, path):
            _refuse_full_disk(path, folder, written)
            target.write(block)
            target.flush()
            written += len(block)


def _read(source: PlainFile, path: Path) -> bytes:
    try:
        return source.read(_BLOCK)
    except OSError as error:
        raise unreadable(path, error) from error


def _refuse_full_disk(path: Path, folder: Path, written: int) -> None:
    disk = os.statvfs(folder)
    free, whole = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    reserve = min(_LARGEST_RESERVE, whole // _RESERVED_SHARE)
    if free < _BLOCK + reserve:
        raise StorageError(
            f"{path} decompresses to more than {size_text(written)}, and {folder} has only "
            f"{size_text(free)} left",
            "free disk space there, or use a directory on another disk for the output",
        )
