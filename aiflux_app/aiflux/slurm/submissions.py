"""Which Slurm jobs work on a run: ``jobs.json`` in its directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.core.config.config import SlurmConfig
from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import RunConflictError, SlurmError
from aiflux.slurm.job_id import JobId
from aiflux.util.files import fits, read_file, write_json

_TEXT = (str, type(None))
_FORM = {
    "image": str,
    "slurm": dict,
    "submissions": [
        {
            "submitted": str,
            "cluster": _TEXT,
            "log": str,
            "jobs": [{"job_id": str, "array": _TEXT, "first": int, "shards": [int]}],
        }
    ],
}


@dataclass(frozen=True)
class Job:
    """One Slurm job of a run.

    Attributes:
        array: the value of ``--array``; None for a job that is no array.
        first: the shard of task 0.
        shards: the shards that the job works on.
    """

    job_id: str
    array: str | None
    first: int
    shards: tuple[int, ...]


@dataclass(frozen=True)
class Submission:
    """What one submission of a run brought into the queue."""

    submitted: str
    cluster: str | None
    jobs: tuple[Job, ...]
    log: Path

    @property
    def ids(self) -> tuple[JobId, ...]:
        """The jobs, as Slurm's commands name them."""
        return tuple(JobId(job.job_id, self.cluster) for job in self.jobs)


@dataclass(frozen=True)
class Submissions:
    """Every submission of a run, and what is asked of Slurm for the next one."""

    image: Path
    slurm: dict[str, Any]
    submissions: tuple[Submission, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what ``jobs.json`` holds."""
        content = asdict(self)
        content["image"] = str(self.image)
        for submission in content["submissions"]:
            submission["log"] = str(submission["log"])
        return content


def read_submissions(run: RunDirectory) -> Submissions | None:
    """Return the submissions of a run; None where there were none.

    Raises:
        RunConflictError: the file is damaged.
        StorageError: it cannot be read.
    """
    written = read_file(run.submissions)
    if written is None:
        return None
    try:
        content = json.loads(written)
        if not fits(content, _FORM):
            raise TypeError("a part of it is of another type")
        return Submissions(
            Path(content["image"]),
            dict(content["slurm"]),
            tuple(_submission(item) for item in content["submissions"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError, SlurmError) as error:
        raise RunConflictError(
            f"{run.submissions} is damaged: {error!r}",
            f"move it away (mv {quote(str(run.submissions))} ELSEWHERE); the run's jobs are then "
            "unknown here: look for those that still wait or run with squeue --me",
        ) from error


def known_submissions(run: RunDirectory) -> Submissions | None:
    """Return the submissions of a run for a view of it, which a damaged file does not prevent."""
    try:
        return read_submissions(run)
    except RunConflictError:
        return None


def _submission(content: dict[str, Any]) -> Submission:
    cluster = None if content["cluster"] is None else str(content["cluster"])
    jobs = tuple(_job(item, cluster) for item in content["jobs"])
    return Submission(str(content["submitted"]), cluster, jobs, Path(content["log"]))


def _job(content: dict[str, Any], cluster: str | None) -> Job:
    # What is not an id could be an option of Slurm's commands.
    id_ = JobId.parse(str(JobId(str(content["job_id"]), cluster)))
    array = None if content["array"] is None else str(content["array"])
    shards = tuple(int(shard) for shard in content["shards"])
    if not shards:
        raise ValueError("a job works on at least one shard")
    return Job(id_.number, array, int(content["first"]), shards)


def remember(run: RunDirectory, image: Path, slurm: SlurmConfig, submission: Submission) -> None:
    """Write a submission down; one that has the same jobs and more takes the place of its former.

    Raises:
        StorageError: the disk refused.
    """
    earlier = read_submissions(run)
    before = earlier.submissions if earlier is not None else ()
    if before and before[-1].submitted == submission.submitted:
        before = before[:-1]
    write_json(run.submissions, Submissions(image, asdict(slurm), (*before, submission)).to_json())
