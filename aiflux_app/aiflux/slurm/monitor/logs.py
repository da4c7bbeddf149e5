"""Where the logs of a run's shards are."""

from __future__ import annotations

from pathlib import Path

from aiflux.core.runs.directory import RunDirectory
from aiflux.slurm.directives import log_file
from aiflux.slurm.submissions import read_submissions


def job_logs(run: RunDirectory) -> dict[int, list[Path]]:
    """Return the logs of the jobs that worked on each shard, in the order of submission.

    A log is named here before its job has begun and made the file.
    """
    logs: dict[int, list[Path]] = {}
    submissions = read_submissions(run)
    for submission in () if submissions is None else submissions.submissions:
        for job in submission.jobs:
            for shard in job.shards:
                task = None if job.array is None else shard - job.first
                file = log_file(submission.log, job.job_id, task)
                known = logs.setdefault(shard, [])
                if file not in known:
                    known.append(file)
    return logs


def engine_logs(run: RunDirectory, shard: int) -> list[Path]:
    """Return the engines' logs of a shard that are there now."""
    prefix = run.engine_log(shard, 0).name.removesuffix("-0.log")
    return sorted(run.logs.glob(f"{prefix}-*.log"))
