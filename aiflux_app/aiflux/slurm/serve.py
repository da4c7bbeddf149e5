"""Serve an engine as a Slurm job: submit it, find it, and stop it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_urlsafe

from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.serve_directory import (
    CRASHED,
    ENDED,
    SIGNAL,
    STARTING,
    ServeDirectory,
    ServeSettings,
    ServeState,
)
from aiflux.engines.kinds import engine_kind, storing_kind
from aiflux.errors import ConfigError, RunConflictError
from aiflux.image.container import refuse_seal
from aiflux.slurm.cluster import ask_cluster
from aiflux.slurm.commands import call, cancel, task_states
from aiflux.slurm.jobs import JobId, TaskState, known_submissions
from aiflux.slurm.preflight.nodes import requested_gpus
from aiflux.slurm.script import log_file
from aiflux.slurm.submit import PlannedRun, plan_job, submit_job
from aiflux.util.files import atomic_write, write_json
from aiflux.util.records import to_json

PENDING = "pending"
"""The phase of a job that waits; the others are those of ``ServeState``."""

# The requests by which the engine is sized like that of any run: as many as the largest number of
# slots, each with a context that most conversations fit into.
_REQUESTS = 256
_TOKENS = 8000
_DAYS = 365
_LOG_LINES = 15
# Why a job ended, by Slurm's state of it.
_ENDS = {
    "CANCELLED": "stopped",
    "TIMEOUT": "time limit",
    "DEADLINE": "time limit",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "the node failed",
    "OUT_OF_MEMORY": "out of memory",
}
_CERTIFICATE = """\
[req]
prompt = no
distinguished_name = name
x509_extensions = extensions
[name]
CN = aiflux serve
[extensions]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth
subjectAltName = {names}
"""


def serve_options(config: Config, slurm: SlurmConfig) -> RunOptions:
    """Return the options of a served engine: all GPUs of the job are the engine's.

    The kind is that of the configuration; if that names none, it follows from the model.

    Raises:
        ConfigError: no model is named, or the kind cannot be served.
    """
    model = config.get("model")
    if model is None:
        raise ConfigError("no model is named", "aiflux serve --model NAME")
    changes: dict[str, object] = {}
    if config.values["engine"].origin == "default" and config.engine == "ollama":
        hub = storing_kind(model).name == "vllm" or os.path.isdir(model)
        changes["engine"] = "vllm" if hub else "llamacpp"
    if config.values["gpus_per_engine"].origin == "default":
        changes["gpus_per_engine"] = max(1, sum(requested_gpus(slurm).values()))
    options = config.run_options(tune=False, **changes)
    kind = engine_kind(options)
    if not kind.managed:
        raise ConfigError(
            f"engine_url is set ({config.values['engine_url'].origin}), but aiflux serve starts an "
            "engine",
            "unset engine_url",
        )
    if not kind.can_be_served:
        raise ConfigError(
            f"a server of the engine {kind.name} cannot require a key, so every user of the "
            "cluster could use it",
            "use --engine llamacpp, which serves the same GGUF models"
            if kind.name == "ollama"
            else "use --engine llamacpp or --engine vllm",
        )
    if options.nodes_per_engine > 1:
        raise ConfigError(
            f"nodes_per_engine = {options.nodes_per_engine}, but a served engine uses one node",
            "leave nodes_per_engine at 1",
        )
    return options


def default_name(model: str) -> str:
    """Return a name for a served model: ``llama3.2-3b`` for ``llama3.2:3b``."""
    last = model.removesuffix(".gguf").rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._")[:40] or "engine"


def plan_serve(
    config: Config,
    slurm: SlurmConfig,
    directory: ServeDirectory,
    options: RunOptions,
    *,
    idle_seconds: float,
    tunnel: bool,
    check: bool = True,
    environ: Mapping[str, str] | None = None,
) -> PlannedRun:
    """Check everything, and write the files of a served engine, with a new key.

    Args:
        directory: of its name; one of an engine that has ended is replaced.
        tunnel: it listens on its node's loopback only.

    Raises:
        RunConflictError: the name is in use.
        ConfigError: the job is to be sealed, or no certificate can be made.
        UsageError: see ``plan_job``.
    """
    refuse_seal(config, "other programs are to reach the engine, so it cannot be sealed")
    directory.refuse_foreign()
    if directory.settings.is_file():
        _refuse_taken(view_of(directory, environ))
    shutil.rmtree(directory.path, ignore_errors=True)
    directory.create()
    try:
        addresses = None if tunnel else node_addresses(slurm, environ)
        write_json(directory.settings, to_json(ServeSettings(idle_seconds, addresses)))
        _write_requests(directory, options)
        write_key(directory)
        make_certificate(directory, (addresses or {}).values(), environ)
        return plan_job(
            config,
            _unsealed(slurm),
            directory.request,
            directory.output,
            options,
            check=check,
            environ=environ,
        )
    except BaseException:
        shutil.rmtree(directory.path, ignore_errors=True)
        raise


def submit_serve(
    directory: ServeDirectory, planned: PlannedRun, environ: Mapping[str, str] | None = None
) -> JobId:
    """Submit the job of a served engine; remove its files if Slurm refuses it.

    Raises:
        SlurmError: Slurm is missing or refused the job.
    """
    try:
        (job,) = submit_job(planned, environ)
    except BaseException:
        shutil.rmtree(directory.path, ignore_errors=True)
        raise
    return job


def _refuse_taken(view: ServeView) -> None:
    if view.phase != ENDED:
        raise RunConflictError(
            f"the name {view.name} is taken: its engine is {view.phase} (job {view.job})",
            f"stop it: aiflux serve stop {view.name}; or choose another name: --name NAME",
        )


def _unsealed(slurm: SlurmConfig) -> SlurmConfig:
    return SlurmConfig(**{**to_json(slurm), "seal": False, "shards": 1, "max_running": None})


def _write_requests(directory: ServeDirectory, options: RunOptions) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": _TOKENS}
    with atomic_write(directory.request, 0o600) as file:
        for number in range(_REQUESTS):
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps({**line, "body": body}).encode() + b"\n")


def write_key(directory: ServeDirectory) -> None:
    """Make a key, and write it for the engine and for curl."""
    key = token_urlsafe(32)
    for path, text in ((directory.key, key), (directory.header, f"Authorization: Bearer {key}")):
        with atomic_write(path, 0o600) as file:
            file.write(text.encode() + b"\n")


def node_addresses(slurm: SlurmConfig, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the IPv4 address of each possible node, as this machine resolves it.

    Nodes without one are left out.
    """
    wanted = {*(slurm.partition or "").split(",")} - {""}
    found = {}
    for node in ask_cluster(environ).nodes:
        if not wanted or wanted & {*node.partitions}:
            with suppress(OSError):
                found[node.name] = socket.gethostbyname(node.address or node.name)
    return found


def make_certificate(
    directory: ServeDirectory, addresses: Iterable[str], environ: Mapping[str, str] | None = None
) -> None:
    """Make a certificate for localhost and addresses, which nobody else signs.

    Raises:
        ConfigError: there is no ``openssl``, or it failed.
    """
    environment = os.environ if environ is None else environ
    program = shutil.which("openssl", path=environment.get("PATH"))
    if program is None:
        raise ConfigError(
            "no openssl on PATH, which makes the certificate of a served engine",
            "load the site's module that has it, or ask for the package openssl on this machine",
        )
    ips = dict.fromkeys(("127.0.0.1", *addresses))
    names = ", ".join(["DNS:localhost", *(f"IP:{ip}" for ip in ips)])
    wanted = directory.path / "cert.cnf"
    with atomic_write(wanted, 0o600) as file:
        file.write(_CERTIFICATE.format(names=names).encode())
    done = call(
        [program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", str(_DAYS), "-config",
         str(wanted), "-keyout", str(directory.certificate_key), "-out",
         str(directory.certificate)],
        environment,
    )  # fmt: skip
    if done.returncode != 0:
        raise ConfigError(
            f"openssl made no certificate: {(done.stderr.strip().splitlines() or ['?'])[-1]}",
            f"check {program} (openssl version)",
        )
    directory.certificate_key.chmod(0o600)


@dataclass(frozen=True)
class ServeView:
    """A served engine, according to its files and to Slurm.

    Attributes:
        phase: ``pending``, ``starting``, ``ready`` or ``ended``.
        why: why it waits, or ended.
        job: None if none was submitted.
        state: what the job wrote; None before it starts.
        log: of the job.
    """

    directory: ServeDirectory
    phase: str
    why: str = ""
    job: JobId | None = None
    state: ServeState | None = None
    log: Path | None = None

    @property
    def name(self) -> str:
        """The engine's name."""
        return self.directory.name

    @property
    def started(self) -> ServeState:
        """What the job wrote; an empty state before it starts."""
        return self.state or ServeState(PENDING)

    @property
    def log_end(self) -> str:
        """The last lines of the job's log."""
        try:
            text = self.log.read_text("utf-8", "replace") if self.log else ""
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-_LOG_LINES:])


def view_of(directory: ServeDirectory, environ: Mapping[str, str] | None = None) -> ServeView:
    """Return what is known of a served engine.

    Raises:
        SlurmError: Slurm is missing or does not answer.
        RunConflictError: the files are damaged.
    """
    return next(views_of([directory], environ))


def views_of(
    directories: Iterable[ServeDirectory], environ: Mapping[str, str] | None = None
) -> Iterator[ServeView]:
    """Yield what is known of served engines; Slurm is asked once."""
    known = []
    for directory in directories:
        submissions = known_submissions(directory.run)
        last = submissions.submissions[-1] if submissions else None
        known.append((directory, last))
    jobs = [last.ids[0] for _, last in known if last is not None]
    states = task_states(jobs, environ) if jobs else {}
    for directory, last in known:
        state = directory.read_state()
        if last is None:
            yield ServeView(directory, ENDED, "it was not submitted")
            continue
        job = last.ids[0]
        if state is not None and state.job not in ("", job.number):
            state = None  # written by a job that was served under this name before, and ends late
        tasks = states.get(job.number, {})
        # A job that completes may also be requeued, unless the user stopped it.
        stopped = directory.stopped.exists()
        phase, why = (ENDED, "stopped") if stopped else _phase(state, tasks.get(None))
        yield ServeView(directory, phase, why, job, state, log_file(last.log, job.number))


def _phase(state: ServeState | None, job: TaskState | None) -> tuple[str, str]:
    """Return the phase, and why the engine waits or has ended."""
    if job is None or not job.active:
        return ENDED, _end(state, job)
    if job.name == "COMPLETING":  # it ends, or is about to be requeued
        over = state is not None and state.phase == ENDED and state.reason != SIGNAL
        return (ENDED, _end(state, job)) if over else (PENDING, "its job is completing")
    if job.name != "RUNNING":
        name = "" if job.name == "PENDING" else job.name.lower()
        again = "again after a requeue" if state is not None else ""
        return PENDING, ", ".join(filter(None, (job.reason or name, again)))
    if state is None or state.reason == SIGNAL or state.node != job.nodes:
        return STARTING, ""
    return state.phase, _end(state, None) if state.phase == ENDED else ""


def _end(state: ServeState | None, job: TaskState | None) -> str:
    if state is not None and state.phase == ENDED and state.reason != SIGNAL:
        return state.end
    if job is None:
        known = state is not None and state.reason == SIGNAL
        return "stopped" if known else "Slurm no longer knows its job"
    code = "" if job.exit_code in (None, 0) else f" (exit status {job.exit_code})"
    return _ENDS.get(job.name, f"{CRASHED}: job {job.name.lower()}{code}")


def stop(view: ServeView, environ: Mapping[str, str] | None = None) -> bool:
    """Cancel the job of an engine; remove the files of one that has ended.

    Returns:
        whether a job was cancelled.

    Raises:
        SlurmError: scancel is missing or refused.
    """
    if view.phase != ENDED and view.job is not None:
        cancel(view.job, environ)
        with atomic_write(view.directory.stopped, 0o600):
            pass
        return True
    shutil.rmtree(view.directory.path, ignore_errors=True)
    return False
