"""The state of a batch as OpenAI's object, derived each time from its files and from its run's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import Plan, read_plan
from aiflux.core.runs.status_file import Counts, StatusFile, read_run_status
from aiflux.errors import AifluxError
from aiflux.gateway.objects import BatchError, as_errors, window_seconds
from aiflux.gateway.store import BatchFiles, BatchRecord
from aiflux.slurm.monitor import RunState, RunView, gather_all, read_facts
from aiflux.slurm.run_view import assemble
from aiflux.util.files import is_there

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
"""States that nothing changes any more; ``expired`` is OpenAI's, no batch of ours expires."""
_GOING = {
    RunState.WAITING: "in_progress",
    RunState.RUNNING: "in_progress",
    RunState.MERGING: "finalizing",
}
_LEFT_ALONE = {RunState.LOST, RunState.STOPPED, RunState.NOT_MERGED}
_SLURM_SECONDS, _LOCAL_SECONDS, _KEPT_SECONDS = 10.0, 1.0, 3600.0


@dataclass
class _SeenRun:
    """A run as it was seen last, by the clock of this process."""

    view: RunView | AifluxError
    until: float


class RunWatch:
    """The states of unfinished runs; Slurm is asked at most every ten seconds. Thread-safe."""

    def __init__(self) -> None:
        self._asking = threading.Lock()
        self._seen: dict[Path, _SeenRun] = {}

    def views(self, batches: Iterable[BatchFiles]) -> dict[str, RunView | AifluxError]:
        """Return the states of the runs of some batches, by batch id.

        While another thread waits for Slurm's answer, known states are returned as they are.
        """
        wanted = {batch.id: batch.run for batch in batches}
        seen = dict(self._seen)
        known = all(run.path in seen for run in wanted.values())
        if self._asking.acquire(blocking=not known):
            try:
                self._look(wanted.values())
                seen = dict(self._seen)
            finally:
                self._asking.release()
        return {id_: seen[run.path].view for id_, run in wanted.items()}

    def forget(self, batch: BatchFiles) -> None:
        """Look at a run again, because it is about to be started again."""
        with self._asking:
            self._seen.pop(batch.run.path, None)

    def _look(self, runs: Iterable[RunDirectory]) -> None:
        now = time.monotonic()
        for path in [path for path, seen in self._seen.items() if seen.until < now - _KEPT_SECONDS]:
            del self._seen[path]
        old = [
            run for run in runs if run.path not in self._seen or self._seen[run.path].until < now
        ]
        for path, view in gather_all(old).items():
            slurm = isinstance(view, RunView) and bool(view.jobs)
            until = now + (_SLURM_SECONDS if slurm else _LOCAL_SECONDS)
            self._seen[path] = _SeenRun(view, until)


@dataclass
class BatchState:
    """How far a batch is.

    Attributes:
        status: OpenAI's name for it.
        moments: Unix times by the names of OpenAI's fields.
        details: what OpenAI's object does not have.
        may_resume: its run was processed on this machine, and its process is gone.
    """

    status: str
    counts: Counts = field(default_factory=lambda: Counts(0, 0, 0))
    moments: dict[str, int | None] = field(default_factory=dict)
    errors: tuple[BatchError, ...] = ()
    model: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    may_resume: bool = False

    @property
    def ended(self) -> bool:
        """Whether the batch has ended."""
        return self.status in ENDED


def batch_objects(batches: Sequence[BatchFiles], watch: RunWatch) -> list[dict[str, Any]]:
    """Return batches as OpenAI's objects."""
    return [
        _object(batch, batch.record(), state)
        for batch, state in zip(batches, batch_states(batches, watch), strict=True)
    ]


def batch_states(batches: Sequence[BatchFiles], watch: RunWatch) -> list[BatchState]:
    """Return how far batches are; their runs are looked at together."""
    known = [_without_slurm(batch) for batch in batches]
    going = [batch for batch, state in zip(batches, known, strict=True) if state is None]
    views = watch.views(going)
    return [
        _going(batch, views[batch.id]) if state is None else state
        for batch, state in zip(batches, known, strict=True)
    ]


def _without_slurm(batch: BatchFiles) -> BatchState | None:
    """Return the state of a batch as its files show it; None while its run can go on."""
    try:
        return _settled(batch)
    except AifluxError as error:
        return BatchState("failed", errors=(BatchError("run_unreadable", str(error)),))


def _settled(batch: BatchFiles) -> BatchState | None:
    failure = batch.failure()
    if failure is not None:
        return BatchState("failed", moments={"failed_at": failure.at}, errors=failure.errors)
    moments = {
        "cancelling_at": batch.moment(batch.cancelling_file),
        "cancelled_at": batch.moment(batch.cancelled_file),
    }
    if not is_there(batch.run.plan):
        return _without_run(batch, moments)
    plan = read_plan(batch.run)
    whole = read_run_status(batch.run, plan)
    if whole is not None and whole.completed:
        return _with_run(batch, BatchState("completed", whole.counts), plan, whole)
    if moments["cancelled_at"] is not None:
        now = time.time()
        view = assemble(read_facts(batch.run, now), None, now)
        counts = Counts(view.total, view.completed, view.without_answer)
        return _with_run(batch, BatchState("cancelled", counts, moments), plan, whole)
    if batch.submitted_file.exists():
        return None
    # Planned, and being submitted: nothing can be known of the run yet.
    return _with_run(batch, BatchState(_waiting(moments), moments=moments), plan, whole)


def _without_run(batch: BatchFiles, moments: dict[str, int | None]) -> BatchState:
    """Return the state of a batch whose run was not planned, or was removed."""
    if batch.submitted_file.exists():
        gone = f"the run directory {batch.run.path} is gone"
        return BatchState("failed", errors=(BatchError("run_unreadable", gone),))
    if moments["cancelled_at"] is not None:
        return BatchState("cancelled", moments=moments)
    return BatchState(_waiting(moments), moments=moments)


def _waiting(moments: Mapping[str, int | None]) -> str:
    return "validating" if moments["cancelling_at"] is None else "cancelling"


def _going(batch: BatchFiles, view: RunView | AifluxError) -> BatchState:
    """Return the state of a batch whose run was submitted and may be under way."""
    settled = _without_slurm(batch)  # again: it may have ended while its run was looked at
    if settled is not None:
        return settled
    if isinstance(view, AifluxError):
        return BatchState("failed", errors=(BatchError("run_unreadable", str(view)),))
    plan = read_plan(batch.run)
    whole = read_run_status(batch.run, plan)
    counts = Counts(view.total, view.completed, view.without_answer)
    cancelling = batch.moment(batch.cancelling_file)
    status = "cancelling" if cancelling is not None else _GOING.get(view.state, "failed")
    state = BatchState(status, counts, {"cancelling_at": cancelling})
    if status == "failed":
        state.errors = (_stopped(view),)
        state.may_resume = not view.jobs and view.state in _LEFT_ALONE
        state.moments["failed_at"] = None if view.updated is None else int(view.updated)
    state.details = _progress(batch, view)
    return _with_run(batch, state, plan, whole)


def _stopped(view: RunView) -> BatchError:
    reason = next((shard.reason for shard in view.shards if shard.reason), "")
    text = f"the run has ended before all its requests were done ({view.state.value})"
    remedy = view.remedy or (f"resume it: {view.next_command}" if view.next_command else "")
    return BatchError("run_ended", ": ".join(part for part in (text, reason, remedy) if part))


def _progress(batch: BatchFiles, view: RunView) -> dict[str, Any]:
    """Return the state of the run, and its expected end against the completion window."""
    record = batch.record()
    left = view.remaining_seconds
    expected = None if left is None else int(time.time() + left)
    limit = record.created_at + window_seconds(record.completion_window)
    return {
        "jobs": list(view.jobs),
        "state": view.state.value,
        "next_command": view.next_command,
        "reason": next((shard.reason for shard in view.shards if shard.reason), None),
        "expected_at": expected,
        "within_completion_window": None if expected is None else expected <= limit,
    }


def _with_run(
    batch: BatchFiles, state: BatchState, plan: Plan, whole: StatusFile | None
) -> BatchState:
    """Add what the run's plan and status show."""
    state.details = {"run": str(batch.run.path), **state.details}
    state.model = plan.served_names[0] if len(plan.served_names) == 1 else None
    if not state.counts.total:
        state.counts = Counts(plan.requests, 0, 0)
    moments: Mapping[str, int | None] = {
        "in_progress_at": batch.moment(batch.submitted_file),
        **({} if whole is None else _moments(whole, completed=state.status == "completed")),
    }
    state.moments = {**moments, **state.moments}
    return state


def _moments(whole: StatusFile, *, completed: bool) -> dict[str, int | None]:
    names = ("finalizing_at", "completed_at") if completed else ("finalizing_at",)
    values = {name: getattr(whole, name) for name in names}
    return {name: None if value is None else int(value) for name, value in values.items()}


def _object(batch: BatchFiles, record: BatchRecord, state: BatchState) -> dict[str, Any]:
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "model": state.model,
        "errors": as_errors(state.errors) if state.errors else None,
        "input_file_id": record.input_file_id,
        "completion_window": record.completion_window,
        "status": state.status,
        "output_file_id": _part_id(batch, state, "output", state.counts.completed),
        "error_file_id": _part_id(batch, state, "errors", state.counts.failed),
        "created_at": record.created_at,
        "in_progress_at": state.moments.get("in_progress_at"),
        "expires_at": record.created_at + window_seconds(record.completion_window),
        "finalizing_at": state.moments.get("finalizing_at"),
        "completed_at": state.moments.get("completed_at"),
        "failed_at": state.moments.get("failed_at"),
        "expired_at": None,
        "cancelling_at": state.moments.get("cancelling_at"),
        "cancelled_at": state.moments.get("cancelled_at"),
        "request_counts": {
            "total": state.counts.total,
            "completed": state.counts.completed,
            "failed": state.counts.failed,
        },
        "metadata": record.metadata,
        "aiflux": state.details,
    }


def _part_id(batch: BatchFiles, state: BatchState, part: str, results: int) -> str | None:
    """Return the id of an output that the batch wrote, even if it was deleted since."""
    wrote = state.status == "completed" and results > 0
    cancelled = state.status == "cancelled" and batch.part(part) is not None
    return batch.part_id(part) if wrote or cancelled else None
