"""The directory of a served engine: its files, by which the job and the commands meet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.registry import state_folder
from aiflux.errors import RunConflictError, UsageError
from aiflux.util.files import read_file, storage_error, write_json
from aiflux.util.records import read_record, to_json
from aiflux.util.text import suggestion
from aiflux.util.value_parsers import SERVE, SERVED_NAME

STARTING, READY, ENDED = "starting", "ready", "ended"
"""The phases of a start of the engine."""

IDLE, TIME_LIMIT, SIGNAL, CRASHED = "idle", "time limit", "signal", "crashed"
"""Why a start ended. After a signal, Slurm knows more: the job was cancelled, or preempted."""

Record = TypeVar("Record")


@dataclass(frozen=True)
class ServeSettings:
    """What `aiflux serve` asks of the job.

    Attributes:
        idle_seconds: the engine ends after this time without requests.
        addresses: IPv4 address of each node, as seen from where `aiflux serve` ran; the engine
            listens on that of its node. None lets it listen on the node's loopback only.
    """

    idle_seconds: float
    addresses: dict[str, str] | None


@dataclass(frozen=True)
class ServeState:
    """The state of the engine, which the job writes.

    Attributes:
        job, restarts: Slurm's id of the job, and the number of its requeues.
        host, port: where the engine listens.
        model: the name under which the engine serves the model.
        engine: a line about it.
        reason: why it ended.
        message: the error, if it crashed.
    """

    phase: str
    job: str = ""
    restarts: str = ""
    node: str = ""
    host: str = ""
    port: int = 0
    model: str = ""
    engine: str = ""
    reason: str = ""
    message: str = ""

    @property
    def url(self) -> str:
        """Address of the engine."""
        return f"https://{self.host}:{self.port}"

    @property
    def end(self) -> str:
        """Why it ended, with the error if it crashed."""
        return f"{self.reason}: {self.message}" if self.message else self.reason


@dataclass(frozen=True)
class ServeDirectory:
    """The files of one served engine; ``path`` is ``$XDG_STATE_HOME/aiflux/serve/NAME``.

    The engine is the work of a run, whose requests are a sample that determines its size.
    """

    path: Path

    @classmethod
    def named(cls, name: str, environ: Mapping[str, str]) -> ServeDirectory:
        """Return the directory of a name.

        Raises:
            UsageError: it cannot be a name.
        """
        if not re.fullmatch(SERVED_NAME, name):
            raise UsageError(
                f"{name!r} cannot be the name of a served engine",
                "use up to 40 of a-z, 0-9, dot, dash and underscore, beginning with a letter or "
                "digit",
            )
        return cls(_root(environ) / name)

    @classmethod
    def existing(cls, name: str, environ: Mapping[str, str]) -> ServeDirectory:
        """Return the directory of an engine that was served under a name.

        Raises:
            UsageError: there is none; suggests others.
            RunConflictError: it belongs to another user, or others can write it.
        """
        found = cls.named(name, environ)
        if not found.settings.is_file():
            names = [each.name for each in served_directories(environ)]
            raise UsageError(
                f"no engine is served as {name!r}",
                suggestion(name, names) if names else "start one: aiflux serve --model NAME",
            )
        found.refuse_foreign()
        return found

    @classmethod
    def of_url(cls, url: str, environ: Mapping[str, str]) -> ServeDirectory | None:
        """Return the directory of the engine at ``serve:NAME``; None for other addresses.

        Raises:
            UsageError, RunConflictError: see ``existing``.
        """
        return cls.existing(url.removeprefix(SERVE), environ) if url.startswith(SERVE) else None

    @classmethod
    def of_run(cls, run: RunDirectory) -> ServeDirectory | None:
        """Return the directory that a run directory belongs to; None for an ordinary run."""
        found = cls(run.path.parent)
        return found if found.run == run and found.settings.is_file() else None

    @property
    def name(self) -> str:
        """The engine's name."""
        return self.path.name

    @property
    def request(self) -> Path:
        """The sample of requests."""
        return self.path / "request.jsonl"

    @property
    def output(self) -> Path:
        """Where a run would write the answers; the job's name is made from it."""
        return self.path / f"serve-{self.name}.jsonl"

    @property
    def run(self) -> RunDirectory:
        """The run directory: plan, script, jobs and logs."""
        return RunDirectory.of_output(self.output)

    @property
    def settings(self) -> Path:
        """What was asked for (``ServeSettings``)."""
        return self.path / "serve.json"

    @property
    def state(self) -> Path:
        """The state of the engine (``ServeState``), replaced atomically."""
        return self.path / "state.json"

    @property
    def stopped(self) -> Path:
        """Written when `aiflux serve stop` has cancelled the job."""
        return self.path / "stopped"

    @property
    def key(self) -> Path:
        """The key of the API."""
        return self.path / "key"

    @property
    def header(self) -> Path:
        """The HTTP header with the key, for curl: its command line is visible to other users."""
        return self.path / "header"

    @property
    def certificate(self) -> Path:
        """The certificate, which is its own authority."""
        return self.path / "cert.pem"

    @property
    def certificate_key(self) -> Path:
        """The private key of the certificate."""
        return self.path / "cert.key"

    def create(self) -> None:
        """Create the directory (mode 0700).

        Raises:
            RunConflictError: it, or the one above, belongs to another user or others can write it.
            StorageError: it cannot be created.
        """
        try:
            self.path.parent.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise storage_error(error, self.path) from error
        RunDirectory(self.path.parent).make()
        RunDirectory(self.path).make()

    def refuse_foreign(self) -> None:
        """Refuse a directory in which other users can create or change files.

        Raises:
            RunConflictError: it belongs to another user, or others can write it.
        """
        RunDirectory(self.path).refuse_foreign()

    def read_settings(self) -> ServeSettings:
        """Return what was asked for.

        Raises:
            RunConflictError: the file is missing or damaged.
        """
        found = _read(self.settings, ServeSettings)
        if found is None:
            raise RunConflictError(f"{self.settings} is missing", "serve the engine again")
        return found

    def read_state(self) -> ServeState | None:
        """Return the state of the engine; None before its job starts.

        Raises:
            RunConflictError: the file is damaged.
        """
        return _read(self.state, ServeState)

    def write_state(self, state: ServeState) -> None:
        """Replace the state."""
        write_json(self.state, to_json(state))

    def read_key(self) -> str:
        """Return the key.

        Raises:
            RunConflictError: there is none.
        """
        written = read_file(self.key)
        if not written:
            raise RunConflictError(f"there is no key in {self.key}", "serve the engine again")
        return written.decode("ascii", "replace").strip()


def _read(path: Path, kind: type[Record]) -> Record | None:
    try:
        return read_record(kind, path)
    except ValueError as error:
        raise RunConflictError(f"{path} is damaged: {error!r}", "serve the engine again") from error


def _root(environ: Mapping[str, str]) -> Path:
    return state_folder(environ) / "serve"


def served_directories(environ: Mapping[str, str]) -> list[ServeDirectory]:
    """Return the directories of the user's served engines, by name."""
    found = (ServeDirectory(path.parent) for path in _root(environ).glob("*/serve.json"))
    return sorted(found, key=lambda each: each.name)
