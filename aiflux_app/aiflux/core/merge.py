"""Merging: whoever ends the last shard writes the output, once."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from aiflux.core.lease import acquire
from aiflux.core.outputs import answered_words
from aiflux.core.plan import Plan
from aiflux.core.results import Counts, finalise
from aiflux.core.rundir import RunDirectory
from aiflux.core.status import Status, all_done, finished_counts, read_run_status, run_status
from aiflux.errors import AifluxError, RunConflictError, StorageError


def merge_when_last(plan: Plan, run: RunDirectory, say: Callable[[str], None]) -> Counts | None:
    """Write the output where every shard is done; None where that is left to somebody else.

    Every process calls this after it said in its shard's status that the shard is done: so the
    last one sees all of them done, however many end at the same time.

    Raises:
        StoppedError: a request has no result after all; nothing is written.
        StorageError: the disk refused.
    """
    if not all_done(plan, run):
        return None
    try:
        return merge(plan, run, say)
    except RunConflictError as conflict:
        say(conflict.message)
        return None


def merge(
    plan: Plan, run: RunDirectory, say: Callable[[str], None], *, again: bool = False
) -> Counts:
    """Write the output from the journals, unless that was done before.

    Args:
        again: write it although it is there.

    Raises:
        RunConflictError: another process is writing it.
        StoppedError: a request has no result yet; nothing is written.
        StorageError: the disk refused.
    """
    with acquire(run.merge_lease, f"writing {plan.output}"):
        counts = finished_counts(plan, run)
        if counts is not None and not again:
            return Counts(counts["total"], counts["failed"])
        status = _begun(plan, run)
        began = time.monotonic()
        try:
            written = finalise(plan, run)
        except AifluxError:
            with suppress(StorageError):
                status.enter("in_progress")
            raise
        status.completed, status.failed = written.completed, written.failed
        status.details["empty_answers"] = dict(written.empty)
        status.details["merge"] = {
            "seconds": round(time.monotonic() - began, 3),
            "bytes": plan.output.stat().st_size,
            "by": f"process {os.getpid()} on {socket.gethostname()}",
        }
        status.enter("completed")
    say(f"wrote {plan.output}")
    if written.empty:
        say(answered_words(written.completed, written.empty))
    return written


def merge_partial(plan: Plan, run: RunDirectory) -> tuple[Path, Counts]:
    """Write what is done so far beside the output; return where, and how much it is.

    Raises:
        StorageError: the disk refused.
    """
    target = plan.output.with_name(f"{plan.output.stem}.partial{plan.output.suffix}")
    return target, finalise(plan, run, partial=target)


def _begun(plan: Plan, run: RunDirectory) -> Status:
    earlier = (read_run_status(run) or {}).get("aiflux", {})
    status = run_status(plan, run)
    status.details["replace"] = bool(earlier.get("replace"))
    status.enter("finalizing")
    return status
