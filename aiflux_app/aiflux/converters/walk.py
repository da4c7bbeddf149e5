"""The files of a directory in a fixed order, and why some are left out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from aiflux.converters.writer import reading
from aiflux.errors import InputError, UsageError

# ~$ is what Word and Excel leave beside a file that is open.
_HIDDEN = (".", "~$")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class Found:
    """A file: its path, its path inside the directory, and why it is left out, if it is."""

    path: Path
    name: str
    reason: str = ""


@dataclass(frozen=True)
class Walk:
    """Which files of a directory are wanted.

    Patterns are those of the shell (``*.md``, ``drafts/*``) and are held against a file's name and
    its path inside the directory. Hidden files and folders are never looked at; links to files are
    followed, links to folders are not.
    """

    folder: Path
    recursive: bool = False
    patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_size: int | None = None

    def files(self) -> Iterator[Found]:
        """Yield the files that the patterns want.

        Raises:
            InputError: the directory cannot be read.
        """
        if not self.folder.is_dir():
            raise self._no_folder()
        yield from self._below(self.folder, "")

    def _no_folder(self) -> InputError:
        if not self.folder.exists():
            return InputError(f"the input {str(self.folder)!r} is not there", "check the path")
        return InputError(
            f"the input {str(self.folder)!r} is not a directory",
            f"give its folder, with --pattern {self.folder.name!r}",
        )

    def nothing(self) -> str:
        """Return what to do where no file was found."""
        if self.patterns or self.exclude:
            remedy = "see what --pattern and --exclude leave of it"
        else:
            remedy = "check what it holds; hidden files are not read"
        return remedy if self.recursive else f"{remedy}; --recursive reads the folders in it, too"

    def count(self) -> int:
        """Return how many files there are, without looking into them."""
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
                    yield Found(path, inner + "/", "a link to a folder: it may lead in a circle")
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
            return f"{_size(size)} is more than --max-file-size {_size(self.max_size)}"
        return ""


def _matches(name: str, patterns: Sequence[str]) -> bool:
    last = name.rpartition("/")[2]
    return any(fnmatchcase(name, each) or fnmatchcase(last, each) for each in patterns)


def parse_size(text: str) -> int:
    """Return a size such as ``10M`` or ``500K`` in bytes.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text.strip().upper().replace("IB", "B"))
    if match is None:
        raise UsageError(f"{text!r} is not a size", "give one such as 500K, 10M or 2G")
    return int(match[1]) * _UNITS[match[2]]


def _size(size: int) -> str:
    for unit in ("G", "M", "K"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f}".removesuffix(".0") + unit
    return f"{size} bytes"
