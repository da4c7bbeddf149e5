"""The user's list of runs, and how to find a run by output, directory or job id.

The registry is a convenience. Foreign files are skipped, and a home that cannot be written causes a
warning, never a failed submission. Each run has its own file, replaced atomically: any number of
processes can write at the same time.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.core.runs.directory import CHAIN_STEPS, TABLE_RESULTS, RunDirectory
from aiflux.core.runs.plan import Plan
from aiflux.errors import StorageError, UsageError
from aiflux.util.files import absolute, same_file, write_json
from aiflux.util.text import error_text
from aiflux.util.times import utc_now

JOB = re.compile(r"(?P<number>[1-9]\d*)(?:_(?P<task>\d+))?(?:;(?P<cluster>[^\s;]+))?")


@dataclass(frozen=True)
class RegistryEntry:
    """One run of this user.

    Attributes:
        run_dir, output: absolute paths.
        input: absolute path; None if unknown.
        requests: number of requests; None if unknown.
        submitted: when the run was last registered (UTC ISO-8601).
        jobs: every job that was submitted for it, ``id`` or ``id;cluster``; none for a run in the
            foreground.
        host: where it was registered.
    """

    run_dir: Path
    output: Path
    input: Path | None
    models: tuple[str, ...]
    requests: int | None
    submitted: str
    jobs: tuple[str, ...]
    host: str

    @property
    def gone(self) -> bool:
        """Whether the run directory does not exist (any longer, or on this machine)."""
        return not os.path.isdir(self.run_dir)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the entry's file."""
        content = asdict(self)
        for name in ("run_dir", "output", "input"):
            content[name] = None if content[name] is None else str(content[name])
        return content


def state_folder(environ: Mapping[str, str]) -> Path:
    """Return the directory of what AI-Flux remembers of this user: ``$XDG_STATE_HOME/aiflux``.

    Raises:
        RuntimeError: there is no home directory.
    """
    named = environ.get("XDG_STATE_HOME", "")
    home = Path(environ["HOME"]) if environ.get("HOME") else None
    state = Path(named) if Path(named).is_absolute() else (home or Path.home()) / ".local/state"
    return state / "aiflux"


def folder(environ: Mapping[str, str]) -> Path:
    """Return the directory of the entries: ``$XDG_STATE_HOME/aiflux/runs``.

    Raises:
        RuntimeError: there is no home directory.
    """
    return state_folder(environ) / "runs"


def register(
    run_dir: Path,
    output: Path,
    jobs: Sequence[str],
    environ: Mapping[str, str] | None = None,
    *,
    input: Path | None = None,
    models: Sequence[str] = (),
    requests: int | None = None,
) -> str | None:
    """Add a run. Jobs of earlier submissions stay in its entry.

    Args:
        jobs: those just submitted, ``id`` or ``id;cluster``.

    Returns:
        None, or a warning if the run could not be added.
    """
    try:
        place = folder(os.environ if environ is None else environ)
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        run_dir = _known_path(run_dir, place)
        file = place / _name(run_dir)
        earlier = _read(file)
        before = earlier.jobs if earlier is not None else ()
        entry = RegistryEntry(
            run_dir,
            output,
            input,
            tuple(models),
            requests,
            utc_now(),
            tuple(dict.fromkeys((*before, *jobs))),
            socket.gethostname(),
        )
        write_json(file, entry.to_json())
    except (OSError, RuntimeError, UnicodeError, StorageError) as error:
        return (
            f"the run is not in the list of `aiflux jobs`: {error_text(error)}; "
            f"use its directory instead: {run_dir}"
        )
    return None


def register_plan(plan: Plan, jobs: Iterable[object]) -> str | None:
    """Add the run of a plan (see ``register``)."""
    return register(
        RunDirectory.of_output(plan.output).path,
        plan.output,
        [str(job) for job in jobs],
        input=plan.input.named,
        models=plan.models,
        requests=plan.requests,
    )


def entries(environ: Mapping[str, str]) -> list[RegistryEntry]:
    """Return the user's runs, newest first, without unreadable entries."""
    return sorted(_entries(environ), key=lambda entry: entry.submitted, reverse=True)


def forget_gone(environ: Mapping[str, str]) -> list[RegistryEntry]:
    """Remove the entries of runs whose directory is gone; return them."""
    gone = [entry for entry in _entries(environ) if entry.gone]
    for entry in gone:
        with suppress(OSError):
            (folder(environ) / _name(entry.run_dir)).unlink()
    return gone


def with_job(text: str, environ: Mapping[str, str]) -> RegistryEntry | None:
    """Return the newest run that has a job: ``123``, ``123_4`` (its task) or ``123;cluster``."""
    wanted = JOB.fullmatch(text)
    if wanted is None:
        return None
    known = entries(environ)
    return next((entry for entry in known if any(_same(job, wanted) for job in entry.jobs)), None)


def _same(job: str, wanted: re.Match[str]) -> bool:
    have = JOB.fullmatch(job)
    if have is None or have["number"] != wanted["number"]:
        return False
    return wanted["cluster"] in (None, have["cluster"])


def _known_path(run_dir: Path, place: Path) -> Path:
    """Return the path by which a run directory was added before, such as through a link."""
    if (place / _name(run_dir)).exists():
        return run_dir
    known = (_read(file) for file in place.glob("[!.]*.json"))
    paths = (entry.run_dir for entry in known if entry and entry.run_dir.name == run_dir.name)
    return next((path for path in paths if same_file(path, run_dir)), run_dir)


def _name(run_dir: Path) -> str:
    digest = blake2b(str(run_dir).encode("utf-8", "surrogateescape"), digest_size=12)
    return f"{digest.hexdigest()}.json"


def _entries(environ: Mapping[str, str]) -> Iterator[RegistryEntry]:
    try:
        files = list(folder(environ).glob("[!.]*.json"))
    except (OSError, RuntimeError):
        return
    for file in files:
        entry = _read(file)
        if entry is not None:
            yield entry


def _read(file: Path) -> RegistryEntry | None:
    try:
        entry = _from_json(json.loads(file.read_text(encoding="utf-8")))
        # A copy of a file under another name would show its run twice.
        return entry if file.name == _name(entry.run_dir) else None
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return None


def _from_json(content: dict[str, Any]) -> RegistryEntry:
    input_path, requests = content["input"], content["requests"]
    return RegistryEntry(
        Path(content["run_dir"]),
        Path(content["output"]),
        None if input_path is None else Path(input_path),
        tuple(str(model) for model in content["models"]),
        None if requests is None else int(requests),
        str(content["submitted"]),
        tuple(str(job) for job in content["jobs"]),
        str(content["host"]),
    )


Ask = Callable[[str], Path | None]


def _planned(run_dir: Path) -> float:
    """Return when a run was planned; 0 before."""
    try:
        return RunDirectory(run_dir).plan.stat().st_mtime
    except OSError:
        return 0


def find_run(text: str, environ: Mapping[str, str], ask: Ask | None = None) -> RunDirectory:
    """Return the run that ``text`` names. An existing path takes precedence over a job id.

    Args:
        text: a run directory, any file in one, an output (existing or not), or a job id:
            ``123``, ``123_4``, ``123;cluster``, or several of one run as
            ``SlurmRunner.run`` returns them (``123:124``).
        environ: environment that locates the registry of runs.
        ask: returns the run directory of a job that the registry does not know, or None.

    Raises:
        UsageError: no run found.
        RunConflictError: it may not be read.
    """
    text = text.strip()
    found = _by_path(text) if text else None
    if found is not None:
        found.refuse_unreadable()
        return found
    job = re.sub(r"[:,][1-9][0-9:,]*", "", text)
    if JOB.fullmatch(job):
        return _by_job(job, environ, ask)
    path = Path(text).absolute()
    for candidate in list(_candidates(path))[:2]:  # itself, and the run directory of an output
        _refuse_waiting_step(candidate, text)
    for candidate in _candidates(path):
        if os.path.isdir(candidate) and not os.access(candidate, os.X_OK):
            RunDirectory(candidate).refuse_unreadable()
        steps = sorted((candidate / CHAIN_STEPS).glob("*.json.aiflux"))
        if steps:
            raise UsageError(
                f"{text!r} is a chain of several runs",
                "name one of its steps, such as the last that began: "
                f"{max(steps, key=_planned).with_suffix('')}; "
                "the same `aiflux chain` command continues all of them",
            )
    raise UsageError(
        f"no run found at {text!r}: it is not a run directory, an output of a run, or a job id",
        "list your runs with `aiflux jobs --all`",
    )


def _by_job(text: str, environ: Mapping[str, str], ask: Ask | None) -> RunDirectory:
    entry = with_job(text, environ)
    if entry is not None and not entry.gone:
        _refuse_waiting_step(entry.run_dir, f"job {text}")
        return RunDirectory(entry.run_dir)
    asked = ask(text) if ask is not None else None
    if asked is not None and RunDirectory(asked).plan.is_file():
        return RunDirectory(asked)
    if entry is not None:
        raise UsageError(
            f"the run directory of job {text} is gone: {entry.run_dir}",
            f"its output was {entry.output}",
        )
    raise UsageError(
        f"no run found for Slurm job {text}",
        "list your runs with `aiflux jobs --all`, or name the run directory or the output",
    )


def waiting_step(run_dir: Path) -> bool:
    """Return whether a run is a step of a chain whose job has not planned it."""
    known = run_dir.parent.name == CHAIN_STEPS and os.path.isdir(run_dir)
    return known and not os.path.isfile(RunDirectory(run_dir).plan)


def _refuse_waiting_step(run_dir: Path, named: str) -> None:
    """Raise UsageError for a step of a chain that has no plan yet."""
    if waiting_step(run_dir):
        raise UsageError(
            f"{named} is a step of a chain, and has no requests yet: its job makes them",
            f"see aiflux status {quote(str(run_dir.parent.parent))}",
        )


def _by_path(text: str) -> RunDirectory | None:
    path = absolute(text)
    runs = (RunDirectory(candidate) for candidate in _candidates(path))
    # Path.is_file raises if a directory cannot be entered.
    return next((run for run in runs if os.path.isfile(run.plan)), None)


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    if path.name:
        own = RunDirectory.of_output(path).path
        yield own
        # A table of answers, or its directory.
        yield RunDirectory.of_output(own / TABLE_RESULTS).path
        yield RunDirectory.of_output(path / TABLE_RESULTS).path
    # A file of a run is in its directory, or in a subdirectory of it.
    yield from list(path.parents)[:2]
