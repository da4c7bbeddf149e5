"""Merging: whoever ends the last shard writes the output, once."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from aiflux.core.batch.results_file import answered_words
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.output import ResultCounts, finalise, output_paths, refuse_changed_input
from aiflux.core.runs.plan import Plan
from aiflux.core.runs.result_index import missing_results
from aiflux.core.runs.status_file import (
    Status,
    finished_counts,
    open_shards,
    read_run_status,
    run_status,
)
from aiflux.errors import AifluxError, MissingResultsError, StorageError
from aiflux.util.files import read_file, remove_leftovers, storage_error
from aiflux.util.lease import acquire

_DONE = b"done\n"


def merge_when_last(
    plan: Plan, run: RunDirectory, shard: int, status: Status, say: Callable[[str], None]
) -> ResultCounts | None:
    """Note that a shard is done, and write the output where every shard is; None where one is not.

    Shards end together, on nodes that each see the other's status late: an NFS client may take a
    file for absent, or for what it was, for a minute. If each waited for the other's word, nobody
    would write the output. So the order is made by what only the server decides. ``O_EXCL`` is such
    a thing, and all of this is done under the lease of the merge, which rests on it: one shard
    after the other makes its mark and then looks for the marks of the rest. Whoever comes last
    finds them all, whatever its client remembers, because it looks by trying to make them.

    Args:
        status: the shard's; it becomes "completed".

    Raises:
        StoppedError: a request has no result after all; nothing is written.
        StorageError: the disk refused.
    """
    with acquire(run.merge_lease, f"writing {plan.output}", wait=True, on_wait=say):
        _make_mark(run.done_mark(shard, plan.id))
        status.enter("completed")
        if not all(_marked(run.done_mark(each, plan.id)) for each in open_shards(plan, run)):
            return None
        return _merge(plan, run, say)


def _make_mark(mark: Path) -> None:
    try:
        mark.write_bytes(_DONE)
    except OSError as error:
        raise storage_error(error, mark) from error


def _marked(mark: Path) -> bool:
    """Tell whether a shard made its mark. Only for the holder of the merge's lease.

    An empty one was made here by a process that was killed before it took it away.
    """
    try:
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if read_file(mark) == _DONE:
            return True
    except OSError as error:
        raise storage_error(error, mark) from error
    mark.unlink(missing_ok=True)
    return False


def merge(
    plan: Plan, run: RunDirectory, say: Callable[[str], None], *, again: bool = False
) -> ResultCounts:
    """Write the output from the journals, unless that was done before.

    Args:
        again: write it although it is there.

    Raises:
        RunConflictError: another process is writing it.
        StoppedError: a request has no result yet; nothing is written.
        StorageError: the disk refused.
    """
    run.refuse_foreign()
    with acquire(run.merge_lease, f"writing {plan.output}"):
        return _merge(plan, run, say, again=again)


def _merge(
    plan: Plan, run: RunDirectory, say: Callable[[str], None], *, again: bool = False
) -> ResultCounts:
    counts = finished_counts(plan, run)
    if counts is not None and not again:
        return ResultCounts(counts["total"], counts["failed"])
    remove_leftovers(*output_paths(plan.output))
    status = _begun(plan, run, own=counts is not None)
    began = time.monotonic()
    try:
        written = finalise(plan, run)
    except AifluxError as error:
        with suppress(StorageError):
            status.enter("in_progress")
            if isinstance(error, MissingResultsError):
                reopen(plan, run, error.shards)
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


def shards_left(plan: Plan, run: RunDirectory) -> tuple[int, ...]:
    """Return the shards that a start has to look at; none where only the output is missing.

    Before that is believed, the journals are read: a status can outlive what it tells of.

    Raises:
        StoppedError: the input is not the planned one any more.
        StorageError: a status or a journal cannot be read.
    """
    left = open_shards(plan, run)
    if left:
        return left
    missing = missing_results(plan, run)
    if missing:
        refuse_changed_input(plan, run)
        reopen(plan, run, missing)
    return tuple(missing)


def reopen(plan: Plan, run: RunDirectory, shards: Iterable[int]) -> None:
    """Take back that shards are done, so that the next start works on them."""
    already_open = open_shards(plan, run)
    for shard in shards:
        # Also of a shard whose status is lost: its mark would have another shard write the output.
        forget_done(plan, run, shard)
        if shard not in already_open:
            try:
                run.status(shard).unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(error, run.status(shard)) from error


def forget_done(plan: Plan, run: RunDirectory, shard: int) -> None:
    """Take away the mark of a shard that is worked on again."""
    mark = run.done_mark(shard, plan.id)
    try:
        mark.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, mark) from error


def merge_partial(plan: Plan, run: RunDirectory) -> tuple[Path, ResultCounts]:
    """Write what is done so far beside the output; return where, and how much it is.

    Raises:
        RunConflictError: another process writes the output.
        StoppedError: the input is not the planned one any more.
        StorageError: the disk refused.
    """
    target = plan.output.with_name(f"{plan.output.stem}.partial{plan.output.suffix}")
    with acquire(run.merge_lease, f"writing {plan.output}"):
        remove_leftovers(*output_paths(target))
        return target, finalise(plan, run, partial=target)


def _begun(plan: Plan, run: RunDirectory, *, own: bool) -> Status:
    earlier = (read_run_status(run) or {}).get("aiflux", {})
    status = run_status(plan, run)
    status.details["replace"] = own or bool(earlier.get("replace"))
    status.enter("finalizing")
    return status
