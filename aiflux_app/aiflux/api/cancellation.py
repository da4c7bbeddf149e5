"""Stop what works on a run: its jobs, or its process on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from aiflux.core.runs.directory import RunDirectory, user_output
from aiflux.core.runs.local_process import LocalProcess, read_process, write_process
from aiflux.errors import UsageError
from aiflux.slurm.commands import cancel
from aiflux.slurm.jobs import JobId, note_cancelled
from aiflux.slurm.run_view import RunView, ShardState
from aiflux.util.files import short


def stop_process(run: RunDirectory) -> LocalProcess | None:
    """Ask the process in the background to stop; return it, or None if none works on the run.

    It gives requests in flight some time (``drain_seconds``) and keeps all results. A second
    request after 2 seconds aborts what is in flight.

    Raises:
        UsageError: it is on another machine.
        StorageError: its record cannot be read or written.
    """
    process = read_process(run)
    if process is None or process.lives is False:
        return None
    if process.lives is None:
        raise UsageError(
            f"process {process.pid} on {process.host} works on the run, and cannot be seen from "
            "this machine",
            f"cancel the run on {process.host}",
        )
    write_process(run, replace(process, cancelled=True))
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
    return process


def cancel_jobs(
    run: RunDirectory, jobs: Sequence[JobId], environ: Mapping[str, str] | None = None
) -> None:
    """Cancel jobs of a run, and record that for when Slurm has forgotten them.

    Raises:
        SlurmError: scancel is missing or refused.
        RunConflictError: the record of the run's jobs is damaged.
        StorageError: it cannot be read or written.
    """
    for job in jobs:
        cancel(job, environ)
    note_cancelled(run, jobs)


def refuse_foreground(view: RunView) -> None:
    """Refuse to cancel a run that a process in the foreground works on.

    Raises:
        UsageError: there is one.
    """
    here = [shard for shard in view.shards if shard.state is ShardState.RUNNING and shard.pid]
    if here:
        shard = here[0]
        raise UsageError(
            f"{short(user_output(view.output))} is not a Slurm job: process {shard.pid} on "
            f"{shard.host} processes it in the foreground",
            f"press Ctrl-C where it runs, or on {shard.host}: kill -TERM {shard.pid}",
        )
