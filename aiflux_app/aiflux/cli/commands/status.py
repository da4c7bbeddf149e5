"""``aiflux status``: show a run's status once."""

from __future__ import annotations

from dataclasses import asdict

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import command
from aiflux.cli.render.estimate import comparison
from aiflux.cli.render.run import overview
from aiflux.cli.run_argument import frame_of, located, make_console, run_argument, show
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import read_run_status, read_status
from aiflux.estimates.estimate import ComparedFigure, compare, read_estimate
from aiflux.slurm.monitor import gather


@command("status", examples=["aiflux status results.json"])
@run_argument
@json_option("Print everything as JSON")
def status(run: str, as_json: bool) -> int:
    """Show a run's status: its shards, its progress and its latest errors.

    The exit code does not depend on the status.
    """
    directory = located(run)
    view = gather(directory)
    rows = _compared(directory) if view.finished else ()
    if as_json:
        estimated = [asdict(row) for row in rows] or None
        print_json({**view.to_json(), "estimate": estimated})
        return 0
    console = make_console()
    lines = overview(view, frame_of(console))
    show(console, [*lines, *comparison(rows)] if rows else lines)
    return 0


def _compared(run: RunDirectory) -> tuple[ComparedFigure, ...]:
    """Compare the estimate of a finished run with what it took; empty if either is missing."""
    plan = read_plan(run)
    estimated = read_estimate(run.estimate, plan)
    statuses = [read_status(run, shard.index) for shard in plan.shards]
    known = [status for status in statuses if status is not None]
    whole = read_run_status(run)
    if estimated is None or whole is None or len(known) < len(statuses):
        return ()
    return compare(estimated, known, whole)
