"""From what a user types to a run: its directory, its output, a file of it, or a Slurm job id."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.registry import JOB, with_job
from aiflux.errors import UsageError

Ask = Callable[[str], Path | None]


def find_run(text: str, environ: Mapping[str, str], ask: Ask | None = None) -> RunDirectory:
    """Return the run that ``text`` names. A path that is there wins over a job's number.

    Args:
        text: a run directory, any file in one, an output (there already or not), or a job id:
            ``123``, ``123_4``, ``123;cluster``, or several of one run as
            ``SlurmRunner.run`` returns them (``123,124``).
        environ: where the registry of runs is looked for.
        ask: returns the run directory of a job that the registry does not know, or None.

    Raises:
        UsageError: no run is found.
    """
    text = text.strip()
    found = _by_path(text) if text else None
    if found is not None:
        return found
    job = re.sub(r",[1-9][0-9,]*", "", text)
    if JOB.fullmatch(job):
        return _by_job(job, environ, ask)
    raise UsageError(
        f"no run is found at {text!r}: it is no run directory, no output of a run, and no job id",
        "`aiflux jobs --all` lists your runs",
    )


def _by_job(text: str, environ: Mapping[str, str], ask: Ask | None) -> RunDirectory:
    entry = with_job(text, environ)
    if entry is not None and not entry.gone:
        return RunDirectory(entry.run_dir)
    asked = ask(text) if ask is not None else None
    if asked is not None and RunDirectory(asked).plan.is_file():
        return RunDirectory(asked)
    if entry is not None:
        raise UsageError(
            f"job {text} worked for {entry.run_dir}, which is gone",
            f"look for the output: {entry.output}",
        )
    raise UsageError(
        f"no run of yours has the job {text}, as far as this machine and Slurm know",
        "`aiflux jobs --all` lists your runs; or name the run directory or the output",
    )


def _by_path(text: str) -> RunDirectory | None:
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:  # ~ of a user that is unknown
        return None
    runs = (RunDirectory(candidate) for candidate in _candidates(path))
    # Path.is_file raises where a folder may not be entered.
    return next((run for run in runs if os.path.isfile(run.plan)), None)


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    if path.name:
        yield RunDirectory.of_output(path).path
    # A file of a run lies in its directory, or in a folder of it.
    yield from list(path.parents)[:2]
