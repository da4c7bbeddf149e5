"""``aiflux cancel``: stop a run's jobs; what was done is kept."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from aiflux.cli.json_output import add_json, then_told
from aiflux.cli.render.run import typed
from aiflux.cli.run_argument import add_run, located, short
from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import UsageError
from aiflux.slurm.commands import cancel
from aiflux.slurm.job_id import JobId
from aiflux.slurm.monitor.collect import RunView, ShardState, active_jobs, gather


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = "Cancel every job of a run. What was done is kept."
    parser.epilog = "example: aiflux cancel results.json"
    add_run(parser)
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Cancel a run's jobs."""
    run = located(arguments.run)
    run.refuse_foreign()
    jobs = active_jobs(run, os.environ)
    if arguments.json:
        cancelled = {"cancelled": [str(job) for job in jobs]}
        return then_told(lambda: _cancel(run, jobs), run, cancelled)
    return _cancel(run, jobs)


def _cancel(run: RunDirectory, jobs: Sequence[JobId]) -> int:
    view = gather(run)
    if not jobs:
        return _nothing_to_cancel(run, view)
    for job in jobs:
        cancel(job, os.environ)
    name = typed(short(view.output))
    print(f"cancelled {'job' if len(jobs) == 1 else 'jobs'} {', '.join(map(str, jobs))}")
    print(f"  kept: {view.done} of {view.total} results, in {short(run.path / 'journal')}")
    print(f"  go on later: aiflux resume {name}")
    return 0


def _nothing_to_cancel(run: RunDirectory, view: RunView) -> int:
    here = [shard for shard in view.shards if shard.state is ShardState.RUNNING and shard.pid]
    if here:
        shard = here[0]
        raise UsageError(
            f"{short(view.output)} is no Slurm job: process {shard.pid} on {shard.host} works on "
            "it in the foreground",
            f"press Ctrl-C where it runs, or on {shard.host}: kill -TERM {shard.pid}",
        )
    print(f"{short(view.output)} has no job that waits or runs: it is {view.state.value}")
    if view.next_command is not None:
        print(f"  go on: {view.next_command}")
    return 0
