"""Finding the run that a user names on the command line."""

from __future__ import annotations

import os

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.find import find_run
from aiflux.slurm.origin import run_directory_of


def located(text: str) -> RunDirectory:
    """Return the run that a job id, a run directory or an output path names.

    Raises:
        UsageError: it names none.
    """
    return find_run(text, os.environ, lambda job: run_directory_of(job, os.environ))
