"""Slurm jobs: their ids, states and task ranges, and ``jobs.json``, the jobs of a run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from shlex import quote

from aiflux.core.config.config import SlurmConfig
from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import ConfigError, RunConflictError, SlurmError
from aiflux.util.files import write_json
from aiflux.util.records import OMITTED, read_record, to_json

_ACTIVE = (
    "RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING", "SUSPENDED",
    "STOPPED", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT",
)  # fmt: skip
_NUMBER = r"[1-9]\d*"


@dataclass(frozen=True)
class JobId:
    """A job's number, and its cluster if sbatch names one."""

    number: str
    cluster: str | None = None

    def __str__(self) -> str:
        return self.number if self.cluster is None else f"{self.number};{self.cluster}"

    @classmethod
    def parse(cls, text: str) -> JobId:
        """Read ``id`` or ``id;cluster``, as ``sbatch --parsable`` prints it.

        Raises:
            SlurmError: it is not a job id.
        """
        match = re.fullmatch(rf"({_NUMBER})(?:;([^\s;,]+))?", text.strip())
        if match is None:
            raise SlurmError(
                f"{text.strip()!r} is not a Slurm job id", "an id is a number, such as 12345"
            )
        return cls(match[1], match[2])

    @property
    def options(self) -> list[str]:
        """The options that direct a command to the job's cluster."""
        return [] if self.cluster is None else [f"--clusters={self.cluster}"]


def parse_jobs(text: str) -> tuple[JobId, ...]:
    """Read what ``join_jobs`` writes: ``101``, ``101;cluster``, ``101:102;cluster``.

    Raises:
        SlurmError: a part of it is not a job id.
    """
    numbers, semicolon, cluster = text.strip().partition(";")
    return tuple(JobId.parse(number + semicolon + cluster) for number in re.split("[:,]", numbers))


def join_jobs(jobs: Sequence[JobId]) -> str:
    """Return the jobs of a run, which are all on one cluster, as one word.

    Slurm reads it after ``afterok:``. (It would read a comma as a new condition: ``afterany``.)
    """
    numbers = ":".join(job.number for job in jobs)
    return str(JobId(numbers, jobs[0].cluster)) if jobs else ""


def dependency(jobs: Sequence[JobId], condition: str = "afterok") -> str:
    """Return jobs as a value of ``--dependency``, such as ``afterok:101:102``; "" for none."""
    return ":".join([condition, *(job.number for job in jobs)]) if jobs else ""


@dataclass(frozen=True)
class JobState:
    """Slurm's state of a job.

    Attributes:
        name: such as PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED.
        exit_code: of the batch script; None while it is unknown.
        reason: why it waits or how it ended, if Slurm shows it.
    """

    name: str
    exit_code: int | None = None
    reason: str | None = None

    @property
    def active(self) -> bool:
        """Whether the job waits or runs."""
        return self.name in _ACTIVE


@dataclass(frozen=True)
class TaskState(JobState):
    """Slurm's state of one task of an array, or of a job that is not an array.

    Attributes:
        nodes: where it runs or ran.
        start: when it started or is expected to, in Slurm's format (the cluster's time).
        elapsed: its run time, in Slurm's format (``[days-]hh:mm:ss``).
        restarts: number of requeues.
    """

    nodes: str | None = None
    start: str | None = None
    elapsed: str | None = None
    restarts: int | None = None


# A job without a time limit counts as one of a year, or Slurm names a year such as 2537: a start
# that depends on its end is unknown.
_LONGEST_WAIT = 90 * 86400.0


def seconds_until(start: str) -> float | None:
    """Return the seconds until a start that Slurm expects; None if it is unknown.

    Args:
        start: in Slurm's format, in the time of the cluster.
    """
    try:
        wait = datetime.fromisoformat(start).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return max(0.0, wait) if wait <= _LONGEST_WAIT else None


def overall_state(states: Iterable[JobState]) -> JobState | None:
    """Return one state for many tasks.

    It is the most active state, or if all have ended, the worst one; the exit code is the highest.
    """
    tasks = list(states)
    active = [task for task in tasks if task.active]
    if active:
        first = min(active, key=lambda task: _ACTIVE.index(task.name))
        return JobState(first.name, None, first.reason)
    if not tasks:
        return None
    worst = min(tasks, key=lambda task: {"COMPLETED": 2, "CANCELLED": 1}.get(task.name, 0))
    codes = [task.exit_code for task in tasks if task.exit_code is not None]
    return JobState(worst.name, max(codes, default=None), worst.reason)


_PART = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?\Z")


def array_ranges(tasks: Sequence[int]) -> str:
    """Return task numbers in the format of ``--array``: ``3,7,9-12``."""
    ranges: list[list[int]] = []
    for task in sorted(set(tasks)):
        if ranges and task == ranges[-1][1] + 1:
            ranges[-1][1] = task
        else:
            ranges.append([task, task])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def split_arrays(shards: Sequence[int], max_array_size: int) -> list[tuple[int, tuple[int, ...]]]:
    """Divide shards into the fewest arrays that the cluster accepts.

    Args:
        max_array_size: one more than the highest task number of the cluster.

    Returns:
        for each array the shard of its task 0, and its task numbers: shard = first + task.

    Raises:
        ConfigError: the cluster accepts no arrays.
    """
    if max_array_size < 1:
        raise ConfigError(
            "this cluster accepts no job arrays (MaxArraySize is 0)", "use --shards 1"
        )
    arrays: list[tuple[int, list[int]]] = []
    for shard in sorted(set(shards)):
        if not arrays or shard - arrays[-1][0] >= max_array_size:
            arrays.append((shard, []))
        arrays[-1][1].append(shard - arrays[-1][0])
    return [(first, tuple(tasks)) for first, tasks in arrays]


def parse_ranges(text: str) -> Iterator[int]:
    """Yield the task numbers in Slurm's output: ``4-9%2``, ``1,3``, ``0-8:2``.

    Truncated parts (``1,3,...``) and parts that are not numbers are skipped.
    """
    for part in text.strip("[]").partition("%")[0].split(","):
        match = _PART.match(part)
        if match:
            start, end, step = (int(group or 0) for group in match.groups())
            yield from range(start, max(start, end) + 1, step or 1)


@dataclass(frozen=True)
class Job:
    """One Slurm job of a run.

    Attributes:
        array: the value of ``--array``; None for a job that is not an array.
        first: the shard of task 0.
        shards: the shards that the job works on, at least one.
        cancelled: whether the user cancelled it; without accounting, Slurm soon forgets that.
    """

    job_id: str
    array: str | None
    first: int
    shards: tuple[int, ...]
    cancelled: bool = field(default=False, metadata=OMITTED)

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("a job works on at least one shard")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The job as users see it: ``101``, or ``101_3`` for each task of an array."""
        if self.array is None:
            return (self.job_id,)
        return tuple(f"{self.job_id}_{shard - self.first}" for shard in self.shards)


@dataclass(frozen=True)
class Submission:
    """The jobs of one submission, and the folder of their logs."""

    submitted: str
    cluster: str | None
    jobs: tuple[Job, ...]
    log: Path

    def __post_init__(self) -> None:
        for id_ in self.ids:
            JobId.parse(str(id_))  # what is not an id could be an option of Slurm's commands

    @property
    def ids(self) -> tuple[JobId, ...]:
        """The jobs, as Slurm's commands name them."""
        return tuple(JobId(job.job_id, self.cluster) for job in self.jobs)


@dataclass(frozen=True)
class Submissions:
    """Every submission of a run, and the image and the settings of Slurm for the next one.

    Attributes:
        image: None if the worker runs outside a container.
    """

    image: Path | None
    slurm: SlurmConfig
    submissions: tuple[Submission, ...] = ()


def read_submissions(run: RunDirectory) -> Submissions | None:
    """Return the submissions of a run; None if there were none.

    Raises:
        RunConflictError: the file is damaged.
        StorageError: it cannot be read.
    """
    try:
        return read_record(Submissions, run.submissions)
    except (ValueError, SlurmError, ConfigError) as error:
        raise RunConflictError(
            f"{run.submissions} is damaged: {error!r}",
            f"move it away (mv {quote(str(run.submissions))} ELSEWHERE); the run's jobs are then "
            "unknown here: find those that still wait or run with squeue --me",
        ) from error


def known_submissions(run: RunDirectory) -> Submissions | None:
    """Return the submissions of a run for display; None if the file is damaged."""
    try:
        return read_submissions(run)
    except RunConflictError:
        return None


def remember(
    run: RunDirectory, image: Path | None, slurm: SlurmConfig, submission: Submission
) -> None:
    """Store a submission; it replaces an earlier state of the same submission.

    Raises:
        StorageError: writing failed.
    """
    earlier = read_submissions(run)
    before = earlier.submissions if earlier is not None else ()
    if before and before[-1].submitted == submission.submitted:
        before = before[:-1]
    write_json(run.submissions, to_json(Submissions(image, slurm, (*before, submission))))


def note_cancelled(run: RunDirectory, jobs: Iterable[JobId]) -> None:
    """Record that the user cancelled jobs of a run.

    Raises:
        RunConflictError: the record of the run's jobs is damaged.
        StorageError: it cannot be read or written.
    """
    known, cancelled = read_submissions(run), set(jobs)
    if known is None:
        return
    submissions = tuple(
        replace(
            each,
            jobs=tuple(
                replace(job, cancelled=True) if id_ in cancelled else job
                for job, id_ in zip(each.jobs, each.ids, strict=True)
            ),
        )
        for each in known.submissions
    )
    if submissions != known.submissions:
        write_json(run.submissions, to_json(replace(known, submissions=submissions)))
