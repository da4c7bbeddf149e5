"""``aiflux cancel``: cancel a run's jobs; finished results are kept."""

from __future__ import annotations

import os
from collections.abc import Sequence

from aiflux.cli.json_output import json_option, then_status
from aiflux.cli.parser import command
from aiflux.cli.render.run import typed
from aiflux.cli.run_argument import located, run_argument
from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import UsageError
from aiflux.slurm.commands import cancel as cancel_job
from aiflux.slurm.jobs import JobId
from aiflux.slurm.monitor import RunView, ShardState, active_jobs, gather
from aiflux.util.files import short


@command(
    "cancel",
    examples=["aiflux cancel results.json"],
)
@run_argument
@json_option()
def cancel(run: str, as_json: bool) -> int:
    """Cancel every job of a run. Finished results are kept."""
    directory = located(run)
    directory.refuse_foreign()
    jobs = active_jobs(directory, os.environ)
    if as_json:
        cancelled = {"cancelled": [str(job) for job in jobs]}
        return then_status(lambda: _cancel(directory, jobs), directory, cancelled)
    return _cancel(directory, jobs)


def _cancel(run: RunDirectory, jobs: Sequence[JobId]) -> int:
    view = gather(run)
    if not jobs:
        return _nothing_to_cancel(run, view)
    for job in jobs:
        cancel_job(job, os.environ)
    name = typed(short(view.output))
    print(f"cancelled {'job' if len(jobs) == 1 else 'jobs'} {', '.join(map(str, jobs))}")
    print(f"  kept: {view.done} of {view.total} results, in {short(run.path / 'journal')}")
    print(f"  continue it: aiflux resume {name}")
    return 0


def _nothing_to_cancel(run: RunDirectory, view: RunView) -> int:
    here = [shard for shard in view.shards if shard.state is ShardState.RUNNING and shard.pid]
    if here:
        shard = here[0]
        raise UsageError(
            f"{short(view.output)} is not a Slurm job: process {shard.pid} on {shard.host} "
            "processes it in the foreground",
            f"press Ctrl-C where it runs, or on {shard.host}: kill -TERM {shard.pid}",
        )
    print(f"{short(view.output)} has no pending or running job: it is {view.state.value}")
    if view.next_command is not None:
        print(f"  continue it: {view.next_command}")
    return 0
