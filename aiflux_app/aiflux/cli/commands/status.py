"""``aiflux status``: how a run is, once."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from aiflux.cli.json_output import add_json, print_json
from aiflux.cli.render.estimate import comparison
from aiflux.cli.render.run import overview
from aiflux.cli.run_argument import add_run, frame_of, located, make_console, show
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import read_run_status, read_status
from aiflux.estimates.estimate import ComparedFigure, compare, read_estimate
from aiflux.slurm.monitor.collect import gather


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = "Show how a run is: its shards, its progress, its last errors."
    parser.epilog = "example: aiflux status results.json"
    add_run(parser)
    add_json(parser, "everything, as one JSON object")


def execute(arguments: argparse.Namespace) -> int:
    """Show a run once; the exit code does not tell how the run is."""
    run = located(arguments.run)
    view = gather(run)
    rows = _compared(run) if view.finished else ()
    if arguments.json:
        estimated = [asdict(row) for row in rows] or None
        print_json({**view.to_json(), "estimate": estimated})
        return 0
    console = make_console()
    lines = overview(view, frame_of(console))
    show(console, [*lines, *comparison(rows)] if rows else lines)
    return 0


def _compared(run: RunDirectory) -> tuple[ComparedFigure, ...]:
    """Return what was estimated of a finished run beside what it took; nothing without both."""
    plan = read_plan(run)
    told = read_estimate(run.estimate, plan)
    statuses = [read_status(run, shard.index) for shard in plan.shards]
    known = [status for status in statuses if status is not None]
    whole = read_run_status(run)
    if told is None or whole is None or len(known) < len(statuses):
        return ()
    return compare(told, known, whole)
