"""``process.json``: the process that works on a run in the background, on one machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import RunConflictError
from aiflux.util.files import storage_error, write_json
from aiflux.util.lease import process_identity, process_lives
from aiflux.util.records import read_record, to_json

_LOAD_SECONDS = 45.0


@dataclass(frozen=True)
class LocalProcess:
    """A process that was started for a run.

    It holds the shard's lease only once it has loaded; this record bridges the time before.

    Attributes:
        started, namespace: identify it, together with its pid (see ``util.lease``).
        since: Unix time at which it was started.
        log: file of its output.
        cancelled: whether the user cancelled it.
    """

    host: str
    pid: int
    started: str
    namespace: str
    since: float
    log: Path
    cancelled: bool = False

    @property
    def lives(self) -> bool | None:
        """Whether it is alive; None if that is unknown on this machine."""
        return process_lives(self.pid, self.started, self.namespace)

    def works(self, now: float) -> bool:
        """Return whether it works on the run; if that is unknown here, only while it may load."""
        lives = self.lives
        return now - self.since < _LOAD_SECONDS if lives is None else lives

    @classmethod
    def of(cls, pid: int, since: float, log: Path) -> LocalProcess:
        """Return the record of a process of this machine."""
        return cls(**process_identity(pid), since=since, log=log)


def read_process(run: RunDirectory) -> LocalProcess | None:
    """Return the process that was last started for a run; None if there was none.

    A damaged record counts as none: then only the shard's lease shows whether a process works.

    Raises:
        StorageError: the record cannot be read.
    """
    try:
        return read_record(LocalProcess, run.process)
    except ValueError:
        return None


def write_process(run: RunDirectory, process: LocalProcess) -> None:
    """Record the process that was last started for a run.

    Raises:
        StorageError: writing failed.
    """
    write_json(run.process, to_json(process))


def refuse_process(run: RunDirectory) -> None:
    """Refuse to start on a run for which a process was started that is still alive.

    Raises:
        RunConflictError: there is one.
    """
    process = read_process(run)
    if process is not None and process.lives:
        seconds = time.time() - process.since
        raise RunConflictError(
            f"process {process.pid} on {process.host} has been working on this run for "
            f"{seconds:.0f} s",
            f"wait for it to end, or cancel it first: aiflux cancel {quote(str(run.path))}",
        )


def forget_process(run: RunDirectory) -> None:
    """Remove the record of a process that has ended, because the run starts in another way.

    Raises:
        StorageError: it cannot be removed.
    """
    try:
        run.process.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, run.process) from error
