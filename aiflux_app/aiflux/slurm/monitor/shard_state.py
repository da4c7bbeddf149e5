"""Determine the state of each shard from its status, its lease and Slurm's state of its task."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from aiflux.core.runs.plan import Shard
from aiflux.core.runs.status_file import StatusDetails, StatusFile
from aiflux.errors import ExitCode
from aiflux.slurm.job_id import JobId, TaskState

QUIET_SECONDS = 45.0  # a lease is renewed every 3 s; the rest allows for clock differences
LONG_QUIET_SECONDS = 180.0
_WORKING = {"validating", "in_progress", "finalizing", "cancelling"}
_ENDING = {"COMPLETING", "SIGNALING", "STAGE_OUT"}
_ON_NODE = {"RUNNING", *_ENDING}
_INTERRUPTED = {"CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "DEADLINE", "REVOKED"}


class ShardState(str, Enum):
    """The state of a shard; a ``stopped`` one can be resumed."""

    WAITING = "waiting"
    RUNNING = "running"
    STOPPING = "stopping"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"
    NOT_SUBMITTED = "not submitted"


ACTIVE = {ShardState.WAITING, ShardState.RUNNING, ShardState.STOPPING}


@dataclass(frozen=True)
class TaskId:
    """The Slurm task that works on a shard; ``index`` is None for a job that is not an array."""

    job: JobId
    index: int | None

    def __str__(self) -> str:
        return self.job.number if self.index is None else f"{self.job.number}_{self.index}"


@dataclass(frozen=True)
class ShardFacts:
    """The facts about a shard from its files.

    Attributes:
        status: as its worker last wrote it, for this plan.
        task: the one that was last submitted for it.
        lives: whether a living process holds its lease; None if that is unknown here.
        quiet: seconds since its lease (or else its status) changed; None if it has neither.
    """

    shard: Shard
    status: StatusFile | None
    task: TaskId | None
    lives: bool | None = None
    quiet: float | None = None

    @property
    def word(self) -> str:
        """The state in its status; "" without a status."""
        return "" if self.status is None else self.status.state

    @property
    def details(self) -> StatusDetails:
        """AI-Flux's own part of the status."""
        return StatusDetails() if self.status is None else self.status.details

    @property
    def alive(self) -> bool:
        """Whether a process works on the shard, according to its files."""
        if self.lives is not None:
            return self.lives
        return self.quiet is not None and self.quiet < QUIET_SECONDS

    @property
    def exit_code(self) -> int | None:
        """The exit code that the worker ended with."""
        return self.details.exit_code


@dataclass(frozen=True)
class ShardVerdict:
    """A shard's state, the reason (may be ""), and the exit code if it ended."""

    state: ShardState
    reason: str = ""
    exit_code: int | None = None


def judge(facts: ShardFacts, task: TaskState | None, answered: bool) -> ShardVerdict:
    """Return the state of a shard.

    Args:
        task: Slurm's state of the shard's task; None if Slurm does not know it.
        answered: whether Slurm answered; if not, the files decide.
    """
    if facts.word == "completed":
        return ShardVerdict(ShardState.DONE)
    if task is not None and task.active:
        return _in_slurm(facts, task)
    if facts.word in _WORKING:
        return _said_to_work(facts, task)
    if facts.word == "cancelled":
        return ShardVerdict(ShardState.STOPPED, _ended(facts), facts.exit_code)
    if facts.word == "failed":
        return ShardVerdict(ShardState.FAILED, _ended(facts), facts.exit_code)
    return _without_status(facts, task, answered)


def _in_slurm(facts: ShardFacts, task: TaskState) -> ShardVerdict:
    if task.name not in _ON_NODE:
        return ShardVerdict(ShardState.WAITING, _why_waiting(task))
    if task.name in _ENDING:
        return ShardVerdict(ShardState.STOPPING, task.name.lower())
    if facts.word in _WORKING - {"cancelling"}:
        silent = facts.quiet is not None and facts.quiet > LONG_QUIET_SECONDS
        reason = f"no sign of life for {(facts.quiet or 0) / 60:.0f} min" if silent else ""
        return ShardVerdict(ShardState.RUNNING, reason)
    if facts.word == "cancelling" or _just_ended(facts):
        return ShardVerdict(ShardState.STOPPING, _ended(facts))
    return ShardVerdict(ShardState.RUNNING, "starting")


def _why_waiting(task: TaskState) -> str:
    why = task.reason or task.name.lower()
    return f"{why}, expected to start {task.start}" if task.start else why


def _just_ended(facts: ShardFacts) -> bool:
    """Return whether the job still exists only because its worker ended a moment ago."""
    recent = facts.quiet is not None and facts.quiet < QUIET_SECONDS
    return facts.word in ("cancelled", "failed") and recent and _of_task(facts)


def _of_task(facts: ShardFacts) -> bool:
    """Return whether the last submitted task wrote the status."""
    slurm = facts.details.slurm
    return facts.task is not None and facts.task.job.number == (slurm.array_job or slurm.job)


def _said_to_work(facts: ShardFacts, task: TaskState | None) -> ShardVerdict:
    """Return the state if the status names an active worker, but Slurm does not."""
    if facts.alive:
        stopping = facts.word == "cancelling" or task is not None
        return ShardVerdict(ShardState.STOPPING if stopping else ShardState.RUNNING)
    if task is None:
        reason = "its process is gone" if facts.task is None else "Slurm no longer has its job"
        return ShardVerdict(ShardState.LOST, reason)
    return ShardVerdict(ShardState.LOST, f"its job ended: {_slurm_words(task)}", task.exit_code)


def _without_status(facts: ShardFacts, task: TaskState | None, answered: bool) -> ShardVerdict:
    if facts.task is None:
        return ShardVerdict(ShardState.NOT_SUBMITTED)
    if task is None and answered:
        return ShardVerdict(ShardState.LOST, "Slurm no longer has its job, and it left no status")
    if task is None:
        return ShardVerdict(ShardState.WAITING, "submitted; Slurm cannot be asked")
    words = f"its job ended before the work began: {_slurm_words(task)}"
    if task.name in _INTERRUPTED or task.exit_code == ExitCode.STOPPED:
        return ShardVerdict(ShardState.STOPPED, words, task.exit_code)
    return ShardVerdict(ShardState.FAILED, words, task.exit_code)


def _slurm_words(task: TaskState) -> str:
    words = task.name
    if task.exit_code:
        words += f", exit code {task.exit_code}"
    known = task.reason in (None, "", "NonZeroExitCode", task.name)
    return words if known else f"{words} ({task.reason})"


def _ended(facts: ShardFacts) -> str:
    return facts.details.ended or ""
