"""Leave no data of a run that was refused before it began."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import EngineError, RunConflictError, UsageError
from aiflux.slurm.submit import may_be_queued


@contextmanager
def undone_if_refused(run: RunDirectory, *paths: Path) -> Iterator[None]:
    """Remove files and directories that the block created, if the run is refused in it.

    They stay once something has worked on the run or may be about to: then they are needed to
    resume it, and its logs show what happened. A conflict means that they may be another's.
    """
    new = [path for path in paths if not os.path.lexists(path)]
    try:
        yield
    except (UsageError, EngineError) as error:
        if not isinstance(error, RunConflictError) and not _may_have_begun(run):
            for path in new:
                _remove(path)
        raise


def _may_have_begun(run: RunDirectory) -> bool:
    try:
        return run.worked_on() or run.process.exists() or may_be_queued(run)
    except OSError:  # It cannot be seen. The refusal is the error to report, not this one.
        return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
