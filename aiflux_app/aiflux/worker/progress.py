"""What a person sees meanwhile: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from aiflux.worker.stats import Stats

LINE_INTERVAL = 30.0


_MEGABYTE = 10**6


class Reporter(Protocol):
    """Where the worker says what it does.

    Attributes:
        quiet: leave out everything but errors.
    """

    quiet: bool

    def say(self, text: str) -> None:
        """Tell one line."""

    def show(self, stats: Stats, *, final: bool = False) -> None:
        """Show how far the requests are."""

    def pull(self, step: dict[str, Any]) -> None:
        """Show how far a model's pull is."""

    def close(self) -> None:
        """Leave the terminal in order."""


def make_reporter(stream: TextIO | None = None) -> Reporter:
    """Return a reporter that suits the stream (default: what standard error is now)."""
    stream = sys.stderr if stream is None else stream
    return TerminalReporter(stream) if stream.isatty() else LineReporter(stream)


def summary_line(stats: Stats) -> str:
    """Return progress as one line. Pure but for the clock."""
    requests, tokens = stats.rates()
    remaining = stats.remaining_seconds()
    share = 100 * stats.done // max(stats.total, 1)
    eta = "" if remaining is None or not stats.total - stats.done else f", ETA {clock(remaining)}"
    return (
        f"{stats.done}/{stats.total} done ({share} %), {stats.failed} failed, "
        f"{requests:.1f} requests/s, {tokens:.0f} tokens/s{eta}"
    )


def clock(seconds: float) -> str:
    """Return a duration as H:MM:SS."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class LineReporter:
    """Writes plain lines with the time of day in front, for log files."""

    def __init__(self, stream: TextIO, interval: float = LINE_INTERVAL) -> None:
        self.quiet = False
        self._stream = stream
        self._interval = interval
        self._shown = time.monotonic()
        self._pulled = (0.0, "")

    def say(self, text: str) -> None:
        """Tell one line."""
        if self.quiet:
            return
        print(time.strftime("%H:%M:%S"), text, file=self._stream, flush=True)

    def show(self, stats: Stats, *, final: bool = False) -> None:
        """Show progress, at most every half minute."""
        now = time.monotonic()
        if final or now - self._shown >= self._interval:
            self._shown = now
            self.say(summary_line(stats))

    def pull(self, step: dict[str, Any]) -> None:
        """Show a pull's stage when it changes, and its share every half minute."""
        status = str(step.get("status", ""))
        now = time.monotonic()
        at, last = self._pulled
        if status == last and now - at < self._interval:
            return
        self._pulled = (now, status)
        total = step.get("total")
        share = f" {100 * step.get('completed', 0) // total} %" if total else ""
        self.say(f"pull: {status}{share}")

    def close(self) -> None:
        """Nothing to leave in order."""


class TerminalReporter:
    """A live bar."""

    def __init__(self, stream: TextIO) -> None:
        self.quiet = False
        self._console = Console(file=stream)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """Tell one line, above the bar."""
        if self.quiet:
            return
        self._console.print(text, highlight=False, markup=False, style="dim")

    def show(self, stats: Stats, *, final: bool = False) -> None:
        """Update the bar."""
        requests, tokens = stats.rates()
        remaining = stats.remaining_seconds()
        failed = f"[red]{stats.failed} failed[/red]" if stats.failed else "0 failed"
        eta = "" if remaining is None or final else f" · ETA {clock(remaining)}"
        detail = f"{failed} · {requests:.1f} req/s · {tokens:.0f} tok/s{eta}"
        self._update("requests", stats.done, stats.total, detail)
        if final:
            self.close()

    def pull(self, step: dict[str, Any]) -> None:
        """Update the bar of a pull."""
        done, total = (step.get(key, 0) // _MEGABYTE for key in ("completed", "total"))
        detail = "MB" if total else ""
        self._update(str(step.get("status", "pull"))[:32], done, max(total, 1), detail)
        if step.get("status") == "success":
            self.close()

    def close(self) -> None:
        """Stop drawing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._task = None, None

    def _update(self, label: str, done: int, total: int, detail: str) -> None:
        if self.quiet:
            return
        if self._progress is None or self._task is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task(label, total=total, detail=detail)
            self._progress.start()
        self._progress.update(
            self._task, description=label, completed=done, total=total, detail=detail
        )
