"""List the files of a directory in a fixed order, and say why files are skipped."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from aiflux.converters.writer import reading
from aiflux.errors import InputError, UsageError

# Word and Excel create ~$ lock files next to open documents.
_HIDDEN = (".", "~$")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class Found:
    """A file: its path, its path relative to the directory, and why it is skipped, if so."""

    path: Path
    name: str
    reason: str = ""


@dataclass(frozen=True)
class Walk:
    """Selects files of a directory.

    Shell patterns (``*.md``, ``drafts/*``) are matched against a file's name and its path relative
    to the directory. Hidden files and directories are skipped. Links to files are followed, links
    to directories are not.
    """

    folder: Path
    recursive: bool = False
    patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_size: int | None = None

    def files(self) -> Iterator[Found]:
        """Yield the selected files.

        Raises:
            InputError: the directory cannot be read.
        """
        if not self.folder.is_dir():
            raise self._no_folder()
        yield from self._below(self.folder, "")

    def _no_folder(self) -> InputError:
        if not self.folder.exists():
            return InputError(f"the input {str(self.folder)!r} does not exist", "check the path")
        return InputError(
            f"the input {str(self.folder)!r} is not a directory",
            f"use its parent directory, with --pattern {self.folder.name!r}",
        )

    def nothing(self) -> str:
        """Return the remedy if no file was found."""
        if self.patterns or self.exclude:
            remedy = "check --pattern and --exclude"
        else:
            remedy = "check its content; hidden files are skipped"
        return remedy if self.recursive else f"{remedy}; use --recursive to include subdirectories"

    def count(self) -> int:
        """Return the number of files without reading them."""
        return sum(1 for _ in self.files())

    def _below(self, folder: Path, prefix: str) -> Iterator[Found]:
        if prefix:
            try:
                names = sorted(os.listdir(folder))
            except OSError as error:
                yield Found(folder, prefix, f"cannot be read: {error.strerror}")
                return
        else:
            with reading(folder):
                names = sorted(os.listdir(folder))
        for name in names:
            path, inner = folder / name, prefix + name
            if name.startswith(_HIDDEN) or _matches(inner, self.exclude):
                continue
            if path.is_dir():
                if self.recursive and path.is_symlink():
                    yield Found(path, inner + "/", "links to directories are not followed")
                elif self.recursive:
                    yield from self._below(path, inner + "/")
            elif not self.patterns or _matches(inner, self.patterns):
                yield Found(path, inner, self._objection(path))

    def _objection(self, path: Path) -> str:
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if not path.is_file():
            return "not a regular file"
        if size == 0:
            return "empty"
        if self.max_size is not None and size > self.max_size:
            return f"{_size(size)} exceeds --max-file-size {_size(self.max_size)}"
        return ""


def _matches(name: str, patterns: Sequence[str]) -> bool:
    last = name.rpartition("/")[2]
    return any(fnmatchcase(name, each) or fnmatchcase(last, each) for each in patterns)


def parse_size(text: str) -> int:
    """Convert a size such as ``10M`` or ``500K`` to bytes.

    Raises:
        UsageError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text.strip().upper().replace("IB", "B"))
    if match is None:
        raise UsageError(f"{text!r} is not a size", "use for example 500K, 10M or 2G")
    return int(match[1]) * _UNITS[match[2]]


def _size(size: int) -> str:
    for unit in ("G", "M", "K"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f}".removesuffix(".0") + unit
    return f"{size} bytes"
