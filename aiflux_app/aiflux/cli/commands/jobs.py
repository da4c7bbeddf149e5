"""``aiflux jobs`` and ``aiflux cancel``: the user's runs, and the jobs of one of them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from aiflux.api.cancellation import refuse_foreground, stop_process
from aiflux.cli.chains import (
    cancel_chain,
    cancel_step,
    chain_named,
    waiting_step_in,
    waiting_step_named,
)
from aiflux.cli.json_output import json_option, print_json, then_status
from aiflux.cli.parser import command, option
from aiflux.cli.render.run import STYLES, moment, typed
from aiflux.cli.run_argument import make_console, run_argument, show
from aiflux.core.runs.directory import RunDirectory, user_output
from aiflux.core.runs.registry import RegistryEntry, entries, forget_gone
from aiflux.core.runs.status_file import read_run_status
from aiflux.errors import AifluxError
from aiflux.slurm.commands import cancel_jobs, located
from aiflux.slurm.jobs import JobId
from aiflux.slurm.monitor import RunView, active_jobs, gather, gather_all
from aiflux.util.files import short
from aiflux.util.text import counted
from aiflux.util.times import unix_seconds

RECENT_SECONDS = 86400.0
_LEAST_OUTPUT = 12
_FEWEST_COLUMNS = 3  # state, done and output: the others are omitted in narrow terminals
_Known = RunView | AifluxError | None


@command("jobs", examples=["aiflux jobs --all"])
@option("--all", "every", is_flag=True, help="List every run, including deleted ones")
@option("--prune", is_flag=True, help="Forget runs whose directory was deleted")
@json_option("Print a JSON array")
def jobs(every: bool, prune: bool, as_json: bool) -> int:
    """List your runs, newest first: those in progress and those of the last 24 hours."""
    if prune:
        forgotten = forget_gone(os.environ)
        if as_json:
            print_json([entry.to_json() for entry in forgotten])
            return 0
        for entry in forgotten:
            print(f"forgotten: {entry.run_dir}")
        return 0
    since = float("-inf") if every else time.time() - RECENT_SECONDS
    candidates = [entry for entry in entries(os.environ) if not _long_finished(entry, since)]
    existing = [RunDirectory(entry.run_dir) for entry in candidates if not entry.gone]
    views = gather_all(existing, os.environ)
    known = [(entry, views.get(entry.run_dir)) for entry in candidates]
    shown = [pair for pair in known if every or _is_recent(*pair, since)]
    if as_json:
        print_json([_to_json(*pair) for pair in shown])
    elif shown:
        _list(shown)
    else:
        more = "" if every else "; older ones: aiflux jobs --all"
        print(f"no runs{more}")
    return 0


def _long_finished(entry: RegistryEntry, since: float) -> bool:
    """Return whether one file shows that a run ended before ``since``."""
    run = RunDirectory(entry.run_dir)
    try:
        old = run.run_status.stat().st_mtime < since
    except OSError:
        return False
    status = read_run_status(run) if old else None
    return status is not None and status.completed


def _is_recent(entry: RegistryEntry, known: _Known, since: float) -> bool:
    if not isinstance(known, RunView):
        return known is not None and unix_seconds(entry.submitted) >= since
    return not known.ended or max(known.updated or 0, unix_seconds(entry.submitted)) >= since


def _state(entry: RegistryEntry, known: _Known) -> str:
    if isinstance(known, RunView):
        return known.state.value
    if known is None:
        return "gone"
    # A step of a chain is planned when its job starts, unless it has nothing to ask.
    waiting = waiting_step_in(entry.run_dir)
    return "unreadable" if waiting is None else waiting[1].state


_SHOWN = (
    "total", "completed", "failed", "left_out", "remaining_seconds", "next_command", "updated",
)  # fmt: skip


def _to_json(entry: RegistryEntry, known: _Known) -> dict[str, Any]:
    content = {**entry.to_json(), "state": _state(entry, known)}
    if isinstance(known, RunView):
        content.update({name: getattr(known, name) for name in _SHOWN})
    return content


def _list(shown: Sequence[tuple[RegistryEntry, _Known]]) -> None:
    console = make_console()
    rows = [["JOB", "STATE", "DONE", "FAILED", "SUBMITTED", "OUTPUT"], *(_row(*p) for p in shown)]
    width = console.width if console.is_terminal else None
    rows = _narrowed(rows, width)
    lines = [_line(row, _widths(rows), width) for row in rows]
    lines[0].stylize("dim")
    show(console, lines)
    views = (known for _, known in shown if isinstance(known, RunView))
    refusal = next((view.slurm for view in views if view.slurm), None)
    if refusal is not None:
        show(console, [Text(f"from the files alone: {refusal}", style="yellow")])


def _row(entry: RegistryEntry, known: _Known) -> list[str]:
    done = failed = ""
    if isinstance(known, RunView):
        done, failed = f"{known.done}/{known.total}", str(known.failed)
    more = "" if len(entry.jobs) < 2 else f" +{len(entry.jobs) - 1}"
    return [
        f"{entry.jobs[-1]}{more}" if entry.jobs else f"({entry.host})",
        _state(entry, known),
        done,
        failed,
        moment(unix_seconds(entry.submitted)),
        short(user_output(entry.output)),
    ]


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]


def _narrowed(rows: list[list[str]], most: int | None) -> list[list[str]]:
    """Omit the least important columns until the output's name fits."""
    for at in (4, 3, 0):  # when it was submitted, what failed, the job
        left = sum(_widths(rows)[:-1]) + 2 * (len(rows[0]) - 1)
        if most is not None and left + _LEAST_OUTPUT > most:
            rows = [[*row[:at], *row[at + 1 :]] for row in rows]
    return rows


def _line(row: Sequence[str], widths: Sequence[int], most: int | None) -> Text:
    left = "  ".join(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False))
    output = row[-1]
    if most is not None and len(left) + 2 + len(output) > most:
        output = "…" + output[-max(8, most - len(left) - 3) :]
    line = Text(f"{left}  {output}")
    at = 1 if len(row) > _FEWEST_COLUMNS else 0
    start = sum(widths[:at]) + 2 * at
    line.stylize(STYLES.get(row[at], ""), start, start + len(row[at]))
    if most is not None:
        line.truncate(most, overflow="ellipsis")
    return line


@command(
    "cancel",
    examples=["aiflux cancel results.json"],
)
@run_argument
@json_option()
def cancel(run: str, as_json: bool) -> int:
    """Cancel every job of a run, or its process on this machine. Finished results are kept."""
    chain = chain_named(run)
    if chain is not None:
        return cancel_chain(chain, as_json=as_json)
    waiting = waiting_step_named(run)
    if waiting is not None:
        return cancel_step(*waiting, as_json=as_json)
    directory = located(run)
    directory.refuse_foreign()
    process = stop_process(directory)
    jobs = active_jobs(directory, os.environ)
    if as_json:
        cancelled = {
            "cancelled": [str(job) for job in jobs],
            "stopping": process,
        }
        return then_status(lambda: _cancel(directory, jobs, process), directory, cancelled)
    return _cancel(directory, jobs, process)


def _cancel(run: RunDirectory, jobs: Sequence[JobId], process: int | None) -> int:
    view = gather(run)
    if not jobs and process is None:
        return _nothing_to_cancel(view)
    cancel_jobs(run, jobs, os.environ)
    name = typed(short(user_output(view.output)))
    if jobs:
        print(f"cancelled {'job' if len(jobs) == 1 else 'jobs'} {', '.join(map(str, jobs))}")
    if process is not None:
        print(f"process {process} stops: requests in flight get some time to finish")
    print(
        f"  kept: {view.done} of {counted(view.total, 'result')}, in {short(run.path / 'journal')}"
    )
    print(f"  continue it: aiflux resume {name if jobs else f'--local {name}'}")
    return 0


def _nothing_to_cancel(view: RunView) -> int:
    refuse_foreground(view)
    print(f"{short(view.output)} has no pending or running job: it is {view.state.value}")
    if view.next_command is not None:
        print(f"  continue it: {view.next_command}")
    return 0
