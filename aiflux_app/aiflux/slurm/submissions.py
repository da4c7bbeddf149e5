"""The Slurm jobs of a run: ``jobs.json`` in its directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from aiflux.core.config.config import SlurmConfig
from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import ConfigError, RunConflictError, SlurmError
from aiflux.slurm.job_id import JobId
from aiflux.util.files import read_file, write_json
from aiflux.util.records import from_json, to_json


@dataclass(frozen=True)
class Job:
    """One Slurm job of a run.

    Attributes:
        array: the value of ``--array``; None for a job that is not an array.
        first: the shard of task 0.
        shards: the shards that the job works on, at least one.
    """

    job_id: str
    array: str | None
    first: int
    shards: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("a job works on at least one shard")


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
    """Every submission of a run, and the image and the settings of Slurm for the next one."""

    image: Path
    slurm: SlurmConfig
    submissions: tuple[Submission, ...] = ()


def read_submissions(run: RunDirectory) -> Submissions | None:
    """Return the submissions of a run; None if there were none.

    Raises:
        RunConflictError: the file is damaged.
        StorageError: it cannot be read.
    """
    written = read_file(run.submissions)
    if written is None:
        return None
    try:
        return from_json(Submissions, json.loads(written))
    except (ValueError, RecursionError, SlurmError, ConfigError) as error:
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


def remember(run: RunDirectory, image: Path, slurm: SlurmConfig, submission: Submission) -> None:
    """Store a submission; it replaces an earlier state of the same submission.

    Raises:
        StorageError: writing failed.
    """
    earlier = read_submissions(run)
    before = earlier.submissions if earlier is not None else ()
    if before and before[-1].submitted == submission.submitted:
        before = before[:-1]
    write_json(run.submissions, to_json(Submissions(image, slurm, (*before, submission))))
