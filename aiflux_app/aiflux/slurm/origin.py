"""Which run a job works for, asked of Slurm: for jobs that are not in the user's registry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.registry import JOB
from aiflux.slurm.calling import attempt, clean_environment
from aiflux.slurm.job_id import JobId


def run_directory_of(text: str, environ: Mapping[str, str]) -> Path | None:
    """Return the run directory that a job's script lies in; None where Slurm cannot tell.

    Args:
        text: ``123``, ``123_4`` or ``123;cluster``.
    """
    match = JOB.fullmatch(text)
    if match is None:
        return None
    job = JobId(match["number"], match["cluster"])
    scripts = (Path(path) for path in _scripts(job, clean_environment(environ)))
    folders = (path.parent for path in scripts if path.suffix == ".sbatch" and path.is_absolute())
    return next((folder for folder in folders if RunDirectory(folder).plan.is_file()), None)


def _scripts(job: JobId, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield what may be the path of the job's script."""
    # Without -o each field has its own line, and a path may hold blanks.
    shown = attempt(["scontrol", *job.options, "show", "job", job.number], environment) or ""
    yield from re.findall(r"^\s*Command=(/.*\.sbatch)\s*$", shown, re.MULTILINE)
    asked = ["sacct", *job.options, "-X", "-n", "-P", "-j", job.number, "-o", "SubmitLine"]
    for line in (attempt(asked, environment) or "").splitlines():
        yield from re.findall(r" -- (/.*\.sbatch)\s*$", line)
