"""``aiflux logs``: the logs of a run's jobs, or of its engines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from aiflux.cli.parser import WholeNumber, command, option
from aiflux.cli.run_argument import run_argument
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.errors import UsageError
from aiflux.slurm.commands import located
from aiflux.slurm.monitor import Observer, engine_logs, job_logs
from aiflux.util.files import short

_POLL_SECONDS = 0.5
_TAIL_BYTES = 1 << 16
_LINES_OF_ONE = 50
_LINES_OF_EACH = 5
Find = Callable[[], list[tuple[int, Path]]]


@command("logs", examples=["aiflux logs results.json -f"])
@run_argument
@option("-f", "--follow", is_flag=True, help="Follow the logs until the run ends, or Ctrl-C")
@option("--shard", type=WholeNumber(), metavar="K", help="Only this shard, counted from 0")
@option("--engine", is_flag=True, help="Show the engines' logs instead of the jobs'")
@option(
    "--lines",
    type=WholeNumber(),
    metavar="N",
    help=f"Lines of each log (default: {_LINES_OF_ONE}, with several shards {_LINES_OF_EACH})",
)
def logs(run: str, follow: bool, shard: int | None, engine: bool, lines: int | None) -> int:
    """Show the end of the logs of a run's jobs or engines."""
    directory = located(run)
    shards = _shards(directory, shard)
    find = _finder(directory, shards, engine)
    if lines is None:
        lines = _LINES_OF_ONE if len(shards) == 1 else _LINES_OF_EACH
    tails = _Tails(find, lines, several=len(shards) > 1)
    shown = tails.begin(last=not follow)
    if follow:
        with suppress(KeyboardInterrupt):
            _follow(tails, directory)
    elif not shown:
        raise _no_log(directory, engine, find())
    return 0


def _shards(run: RunDirectory, wanted: int | None) -> range:
    count = len(read_plan(run).shards)
    if wanted is None:
        return range(count)
    if not 0 <= wanted < count:
        known = "its only shard is 0" if count == 1 else f"its shards are 0 to {count - 1}"
        raise UsageError(f"the run has no shard {wanted}", known)
    return range(wanted, wanted + 1)


def _finder(run: RunDirectory, shards: range, engine: bool) -> Find:
    def of_engines() -> list[tuple[int, Path]]:
        return [(shard, path) for shard in shards for path in engine_logs(run, shard)]

    def of_jobs() -> list[tuple[int, Path]]:
        logs = job_logs(run)
        return [(shard, path) for shard in shards for path in logs.get(shard, [])]

    return of_engines if engine else of_jobs


def _no_log(run: RunDirectory, engine: bool, expected: list[tuple[int, Path]]) -> UsageError:
    if engine:
        return UsageError(
            f"no engine of {short(run.path)} has written a log",
            "a server at --engine-url keeps its own log; otherwise the job has not started its "
            "engine yet: see the job's log, without --engine",
        )
    if expected:
        return UsageError(
            f"there is no log yet: {expected[-1][1]}",
            "the job has not started; -f waits for it, `aiflux status` shows why it is pending",
        )
    return UsageError(
        f"{short(run.path)} has no job, and so no job log",
        "a run in the foreground writes to the terminal; --engine shows its engine's log",
    )


def _follow(tails: _Tails, run: RunDirectory) -> None:
    observer = Observer(run, os.environ)
    # Asked before the files are read, so that the last lines before the end are shown.
    while not observer.look().ended:
        for _ in range(4):
            tails.show_new()
            time.sleep(_POLL_SECONDS)
    tails.show_new(last=True)


@dataclass
class _Tails:
    """Logs that are read repeatedly to their ends.

    Attributes:
        lines: number of lines shown of each log at first.
        several: whether lines are prefixed with their shard.
    """

    find: Find
    lines: int
    several: bool
    _places: dict[Path, int] = field(default_factory=dict)

    def begin(self, *, last: bool) -> bool:
        """Show the end of each log, an incomplete last line only with ``last``; return if any."""
        for shard, path in self.find():
            with suppress(OSError):
                text, self._places[path] = _end_of(path, self.lines, last)
                self._print(shard, text)
        return bool(self._places)

    def show_new(self, *, last: bool = False) -> None:
        """Show new lines. A log that is new or was truncated is shown in full."""
        for shard, path in self.find():
            with suppress(OSError):
                text, self._places[path] = _since(path, self._places.get(path, 0), last)
                self._print(shard, text)

    def _print(self, shard: int, text: str) -> None:
        prefix = f"[{shard}] " if self.several else ""
        if text:
            lines = text.removesuffix("\n").split("\n")
            print("\n".join(prefix + line for line in lines), flush=True)


def _end_of(path: Path, lines: int, last: bool) -> tuple[str, int]:
    """Return the last lines of a log, and the offset after them."""
    with open(path, "rb") as file:
        start = file.seek(0, os.SEEK_END)
        content = b""
        while start and content.count(b"\n") <= lines:
            step = min(start, _TAIL_BYTES)
            start -= step
            file.seek(start)
            content = file.read(step) + content
    content = content if last else content[: content.rfind(b"\n") + 1]
    kept = content.splitlines(keepends=True)[-lines:] if lines else []
    return b"".join(kept).decode("utf-8", "replace"), start + len(content)


def _since(path: Path, place: int, last: bool) -> tuple[str, int]:
    """Return the text of a log after an offset, and the offset after that."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) < place:
            place = 0
        file.seek(place)
        content = file.read()
    content = content if last else content[: content.rfind(b"\n") + 1]
    return content.decode("utf-8", "replace"), place + len(content)
