"""Progress bars on the terminal; nothing is drawn elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from aiflux.worker.console import TerminalConsole

_DRAW_SECONDS = 0.1

Move = Callable[[int, int], None]
"""Moves a bar to how much is done, and of how much (0 where that is not known)."""


@contextmanager
def count_bar(label: str) -> Iterator[Move]:
    """Show a bar and the remaining time; yield what moves it."""
    with _bar(label, TaskProgressColumn(), TimeRemainingColumn()) as move:
        yield move


@contextmanager
def byte_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes and their rate; yield what is called with each further number of them."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        move(done, max(total, 1))

    with _bar(label, DownloadColumn(), TransferSpeedColumn()) as move:
        yield advance


@contextmanager
def _bar(label: str, *columns: ProgressColumn) -> Iterator[Move]:
    console = TerminalConsole(stderr=True)
    # Without a thread of its own: the system may allow none.
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), *columns,
        console=console, transient=True, auto_refresh=False, disable=not console.is_terminal,
    )  # fmt: skip
    drawn = 0.0

    def move(done: int, total: int) -> None:
        nonlocal drawn
        progress.update(task, completed=done, total=total or None)
        if time.monotonic() - drawn >= _DRAW_SECONDS:
            drawn = time.monotonic()
            progress.refresh()

    with progress:
        task = progress.add_task(label, total=None)
        yield move
