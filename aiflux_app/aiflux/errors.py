"""All errors that AI-Flux raises on purpose, and their exit codes.

::

    AifluxError                      exit 1 (never raised itself)
    ├── UsageError                   exit 2: nothing was sent
    │   ├── ConfigError              a setting is invalid; names its location
    │   ├── InputError               the input file is invalid; names its lines
    │   ├── RunConflictError         the run directory belongs to another run
    │   ├── OutputExistsError        the output already exists and --force was not given
    │   ├── ImageError               the image cannot be found, built or read
    │   ├── BundleError              a bundle is damaged, for another machine, or not possible
    │   ├── SlurmError               Slurm is missing, or rejected the job
    │   └── PreflightError           the job cannot work here; lists all reasons
    ├── TooManyFailuresError         exit 3: finished, but too many requests failed
    ├── EngineError                  exit 4: the engine or the model is not available
    │   ├── ModelError               the model is unknown, or could not be pulled
    │   └── RejectedError            the engine accepts no request: wrong address, key or model
    └── StoppedError                 exit 5: stopped before the end; resumable
        ├── RequeueError             the job's time is up; another start of it continues
        ├── StorageError             the journal or output could not be written
        └── MissingResultsError      the journals lack results; names the shards

A message states what was found and what follows from it; ``remedy`` states what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the CLI, the worker and the batch job (the same in all of them)."""

    OK = 0
    BUG = 1
    USAGE = 2
    FAILURES = 3
    ENGINE = 4
    STOPPED = 5


class AifluxError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what was found, and what follows from it.
        remedy: what the user can do next; shown on a separate line.

    ``str()`` returns all of it, so that a traceback shows it too.
    """

    exit_code: ExitCode = ExitCode.BUG
    problems: tuple[str, ...] = ()

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.message, *(f"  {problem}" for problem in self.problems)]
        return "\n".join([*lines, f"  -> {self.remedy}"] if self.remedy else lines)


class UsageError(AifluxError):
    """Usage, configuration or input is invalid; nothing was sent."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """A setting has an invalid value or an unknown name."""


class InputError(UsageError):
    """The input is missing, unreadable or has invalid lines (``problems``, one text each).

    Attributes:
        lines: the numbers of the first invalid lines, each with its problem.
        count: number of invalid lines.
    """

    def __init__(
        self,
        message: str,
        remedy: str | None = None,
        problems: tuple[str, ...] = (),
        *,
        lines: tuple[tuple[int, str], ...] = (),
        count: int = 0,
    ) -> None:
        super().__init__(message, remedy)
        self.problems = problems
        self.lines = lines
        self.count = count


class RunConflictError(UsageError):
    """The run directory belongs to another model or other parameters, or is in use."""


class OutputExistsError(UsageError):
    """The output exists and was not made by this run, or was changed since."""


class ImageError(UsageError):
    """The image, or Apptainer, is missing or does not work."""


class BundleError(UsageError):
    """A bundle cannot be created, is damaged, or is for another machine."""


class SlurmError(UsageError):
    """Slurm is missing, did not respond, or rejected the job."""


class PreflightError(UsageError):
    """The job cannot work here (``problems``, one text each, with its fix)."""

    def __init__(
        self, message: str, remedy: str | None = None, problems: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, remedy)
        self.problems = problems


class TooManyFailuresError(AifluxError):
    """The run finished and more requests failed than ``--max-failures`` allows."""

    exit_code = ExitCode.FAILURES


class EngineError(AifluxError):
    """The engine could not be started, or keeps crashing."""

    exit_code = ExitCode.ENGINE


class ModelError(EngineError):
    """The model is unknown, or could not be pulled."""


class RejectedError(EngineError):
    """No request can succeed until the command or the server is fixed."""


class StoppedError(AifluxError):
    """The run stopped before the end; the same command resumes it."""

    exit_code = ExitCode.STOPPED


class RequeueError(StoppedError):
    """The job's time is up, and it goes back to the queue: nothing is left to do for the user."""


class StorageError(StoppedError):
    """The journal or the output could not be written (disk full, quota, ...)."""


class MissingResultsError(StoppedError):
    """Requests have no result in the journals (``shards``: the number per shard)."""

    def __init__(self, message: str, remedy: str, shards: Mapping[int, int]) -> None:
        super().__init__(message, remedy)
        self.shards = dict(shards)


def describe(error: AifluxError) -> str:
    """Return an error as shown to the user: what was found, where, and the remedy."""
    return f"error: {error}"
