"""What a Slurm job is called and what can be said of it; nothing is asked here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aiflux.errors import SlurmError

_ACTIVE = (
    "RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING", "SUSPENDED",
    "STOPPED", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT",
)  # fmt: skip
_NUMBER = r"[1-9]\d*"


@dataclass(frozen=True)
class JobId:
    """A job's number, and its cluster where sbatch names one."""

    number: str
    cluster: str | None = None

    def __str__(self) -> str:
        return self.number if self.cluster is None else f"{self.number};{self.cluster}"

    @classmethod
    def parse(cls, text: str) -> JobId:
        """Read ``id`` or ``id;cluster``, as ``sbatch --parsable`` prints it.

        Raises:
            SlurmError: it is neither.
        """
        match = re.fullmatch(rf"({_NUMBER})(?:;([^\s;,]+))?", text.strip())
        if match is None:
            raise SlurmError(f"{text.strip()!r} is no Slurm job id", "an id is a number: 12345")
        return cls(match[1], match[2])

    @property
    def options(self) -> list[str]:
        """The options that direct a command to the job's cluster."""
        return [] if self.cluster is None else [f"--clusters={self.cluster}"]


def parse_jobs(text: str) -> tuple[JobId, ...]:
    """Read what ``join_jobs`` writes: ``101``, ``101;cluster``, ``101,102;cluster``.

    Raises:
        SlurmError: a part of it is no job id.
    """
    numbers, semicolon, cluster = text.strip().partition(";")
    return tuple(JobId.parse(number + semicolon + cluster) for number in numbers.split(","))


def join_jobs(jobs: Sequence[JobId]) -> str:
    """Return the jobs of one run, which are all on one cluster, in one word."""
    numbers = ",".join(job.number for job in jobs)
    return str(JobId(numbers, jobs[0].cluster)) if jobs else ""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job.

    Attributes:
        name: Slurm's word, such as PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED.
        exit_code: of the batch script; None while it is not known.
        reason: why it waits or ended so, where Slurm tells.
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
    """What Slurm says of one task of an array, or of a job that is no array.

    Attributes:
        nodes: where it runs or ran.
        start: when it started or is expected to, in Slurm's own words (the cluster's time).
        elapsed: how long it has run, in Slurm's own words (``[days-]hh:mm:ss``).
        restarts: how often it went back to the queue.
    """

    nodes: str | None = None
    start: str | None = None
    elapsed: str | None = None
    restarts: int | None = None


def overall_state(states: Iterable[JobState]) -> JobState | None:
    """Return one state for many tasks.

    It is the liveliest where one is active, else the worst end; the exit code is then the highest.
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
