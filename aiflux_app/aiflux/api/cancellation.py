"""Stop the process that works on a run on this machine; for jobs see `aiflux.slurm.commands`."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import replace

from aiflux.core.runs.directory import RunDirectory, user_output
from aiflux.core.runs.local_process import read_process, write_process
from aiflux.errors import UsageError
from aiflux.slurm.run_view import RunView, ShardState
from aiflux.util.files import short
from aiflux.util.lease import holder_here


def stop_process(run: RunDirectory) -> int | None:
    """Ask the process of this machine to stop; return its pid, or None if none works on the run.

    It gives requests in flight some time (``drain_seconds``) and keeps all results. A second
    request after 2 seconds aborts what is in flight.

    Raises:
        UsageError: it is in the background, on another machine.
        StorageError: its record cannot be read or written.
    """
    process = read_process(run)
    if process is None or process.lives is False:
        return _stop_foreground(run)
    if process.lives is None:
        raise UsageError(
            f"process {process.pid} on {process.host} works on the run, and cannot be seen from "
            "this machine",
            f"cancel the run on {process.host}",
        )
    write_process(run, replace(process, cancelled=True))
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
    return process.pid


def _stop_foreground(run: RunDirectory) -> int | None:
    """Ask a process in the foreground to stop; return its pid, or None if none is seen here.

    A process in a container is not seen, and one in a Slurm job ends with its job.
    """
    pid = holder_here(run.lease(0))
    if pid is None:
        return None
    try:
        os.kill(pid, signal.SIGTERM)
    except OSError:  # it has ended, or it is another user's
        return None
    return pid


def refuse_foreground(view: RunView) -> None:
    """Refuse to cancel a run that a process in the foreground works on, which is not seen here.

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
