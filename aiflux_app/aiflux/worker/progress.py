"""Report progress: a bar on a terminal, otherwise an occasional line."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from aiflux.core.runs.status_file import failed_text
from aiflux.worker.console import TerminalConsole
from aiflux.worker.stats import Stats

LINE_INTERVAL = 30.0
_WIDE = 100
_DRAW_SECONDS = 0.25
_MANY = 10


class Reporter(Protocol):
    """The worker's output.

    Attributes:
        quiet: only print errors.
    """

    quiet: bool

    def say(self, text: str) -> None:
        """Print one line."""

    def show(self, stats: Stats, *, final: bool = False) -> None:
        """Show the progress of the requests."""

    def pull(self, step: dict[str, Any]) -> None:
        """Show the progress of a model's pull."""

    def close(self) -> None:
        """Restore the terminal."""


def make_reporter(stream: TextIO | None = None) -> Reporter:
    """Return a reporter for a stream (default: the current stderr)."""
    stream = sys.stderr if stream is None else stream
    return TerminalReporter(stream) if stream.isatty() else LineReporter(stream)


def summary_line(stats: Stats) -> str:
    """Return the progress as one line."""
    requests, tokens = stats.rates()
    remaining = stats.remaining_seconds()
    share = 100 * stats.done // max(stats.total, 1)
    eta = "" if remaining is None or not stats.total - stats.done else f", ETA {clock(remaining)}"
    failed = failed_text(stats.failed, stats.left_out)
    return (
        f"{stats.done}/{stats.total} done ({share} %), {failed}, "
        f"{requests:.1f} requests/s, {tokens:.0f} tokens/s{eta}"
    )


def clock(seconds: float) -> str:
    """Return a duration as H:MM:SS."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def bytes_line(done: float, total: float, speed: float | None, remaining: float | None) -> str:
    """Return the progress of a transfer in at most 41 columns.

    Args:
        speed: bytes per second; ``remaining``: seconds; None if unknown.
    """
    unit, size = next(
        ((unit, size) for unit, size in (("GB", 10**9), ("MB", 10**6)) if total >= size),
        ("KB", 10**3),
    )
    parts = [f"{done / size:.1f} of {total / size:.1f} {unit}"]
    if speed:
        parts.append(f"{speed / 10**6:.0f} MB/s")
    if remaining is not None and done < total:
        parts.append(f"{clock(remaining)} left")
    return ", ".join(parts)


class LineReporter:
    """Writes plain lines with a timestamp, for log files."""

    def __init__(self, stream: TextIO, interval: float = LINE_INTERVAL) -> None:
        self.quiet = False
        self._stream = stream
        self._interval = interval
        self._shown = time.monotonic()
        self._pulled = (0.0, "")

    def say(self, text: str) -> None:
        """Print one line."""
        if self.quiet:
            return
        print(time.strftime("%H:%M:%S"), text, file=self._stream, flush=True)

    def show(self, stats: Stats, *, final: bool = False) -> None:
        """Print the progress, at most every half minute."""
        now = time.monotonic()
        if final or now - self._shown >= self._interval:
            self._shown = now
            self.say(summary_line(stats))

    def pull(self, step: dict[str, Any]) -> None:
        """Print a pull's stage when it changes, and its share every half minute."""
        status = str(step.get("status", ""))
        now = time.monotonic()
        at, last = self._pulled
        if status == last and now - at < self._interval:
            return
        self._pulled = (now, status)
        total = step.get("total")
        share = f" {100 * step.get('completed', 0) // total} %" if total else ""
        self.say(f"{status}{share}")

    def close(self) -> None:
        """Do nothing: plain lines need no cleanup."""


class TerminalReporter:
    """Shows a live progress bar."""

    def __init__(self, stream: TextIO) -> None:
        self.quiet = False
        self._console = TerminalConsole(file=stream)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._drawn = 0.0

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        if self.quiet:
            return
        self._console.print(text, highlight=False, markup=False, style="dim")

    def show(self, stats: Stats, *, final: bool = False) -> None:
        """Update the bar."""
        requests, tokens = stats.rates()
        remaining = stats.remaining_seconds()
        failed = failed_text(stats.failed, stats.left_out)
        if stats.failed > stats.left_out:
            failed = f"[red]{failed}[/red]"
        eta = "" if remaining is None or final else f", ETA {clock(remaining)}"
        speed = f"{requests:.{0 if requests >= _MANY else 1}f} req/s, {tokens:.0f} tok/s"
        label = "requests" if self._wide else ""
        self._update(label, stats.done, stats.total, f"{failed}, {speed}{eta}")
        if final:
            self.close()

    def pull(self, step: dict[str, Any]) -> None:
        """Update the bar of a pull; a step without bytes has none."""
        if self.quiet:
            return
        label, total = str(step.get("status", "pull"))[:32], step.get("total")
        progress = self._progress or self._start(
            SpinnerColumn(), TextColumn("{task.description}"), _PullColumn()
        )
        if self._task is None or label != self._label:  # each layer has its own speed
            if self._task is not None:
                progress.remove_task(self._task)
            self._task, self._label = progress.add_task(label, total=total), label
        progress.update(self._task, completed=step.get("completed", 0), total=total)
        self._draw(progress)
        if label == "success":
            self.close()

    @property
    def _wide(self) -> bool:
        return self._console.width >= _WIDE

    def close(self) -> None:
        """Stop the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._task, self._label = None, None, ""

    def _start(self, *columns: ProgressColumn, transient: bool = True) -> Progress:
        # No refresh thread: the system may not allow one, and the worker updates often enough.
        self._progress = Progress(
            *columns, console=self._console, auto_refresh=False, transient=transient
        )
        self._progress.start()
        return self._progress

    def _draw(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._drawn >= _DRAW_SECONDS:
            self._drawn = now
            progress.refresh()

    def _update(self, label: str, done: int, total: int, detail: str) -> None:
        if self.quiet:
            return
        progress, task = self._progress, self._task
        if progress is None or task is None:
            # If the line is too long, only the bar shrinks.
            whole = Column(no_wrap=True)
            elapsed = [TimeElapsedColumn(table_column=whole)] if self._wide else []
            progress = self._start(
                SpinnerColumn(),
                TextColumn("{task.description}", table_column=whole),
                BarColumn(),
                MofNCompleteColumn(table_column=whole),
                *elapsed,
                TextColumn("{task.fields[detail]}", table_column=whole),
                transient=False,
            )
            task = self._task = progress.add_task(label, total=total, completed=done, detail=detail)
        progress.update(task, description=label, completed=done, total=total, detail=detail)
        self._draw(progress)


class _PullColumn(ProgressColumn):
    """A bar with bytes; empty for a step without bytes."""

    _bar = BarColumn(bar_width=14)

    def render(self, task: Task) -> Text | Table:
        """Draw one step of a pull."""
        if not task.total:
            return Text("")
        both = Table.grid(padding=(0, 1))
        text = bytes_line(task.completed, task.total, task.speed, task.time_remaining)
        both.add_row(self._bar(task), Text(text))
        return both
