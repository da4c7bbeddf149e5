"""Temporary folders that do not outlive their process for long: the next one removes them."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "aiflux-"
_LOCK = ".in-use"


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a folder and remove it at the end; remove those of processes that were killed, too.

    Args:
        parent: where to make it (default: TMPDIR).
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    _remove_abandoned(parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
        folder = Path(name)
        # The lock ends with this process, however that ends. It gets its name when it is held:
        # a folder that is just being made has none, and is left alone.
        with open(folder / f"{_LOCK}.new", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / f"{_LOCK}.new").rename(folder / _LOCK)
            yield folder


def _remove_abandoned(parent: Path) -> None:
    """Remove such folders of this user that no process holds."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            _remove_if_abandoned(folder)
        except OSError:
            continue  # another process removed it, or holds it: it is none of this one's business


def _remove_if_abandoned(folder: Path) -> None:
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        return
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
