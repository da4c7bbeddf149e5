"""Slurm's own commands: submit, ask, cancel. The only place where they are called.

Formats are those that every Slurm since 20.11 prints alike (``squeue -o``, ``sacct -P``,
``scontrol -o``); ``--json`` differs by version. Source: the man pages of these commands.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiflux.errors import SlurmError

_TIMEOUT = 120.0  # seconds; a busy controller answers late
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
_DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)
_ACTIVE = {
    "PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD",
    "REQUEUE_FED", "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED",
}  # fmt: skip


@dataclass(frozen=True)
class JobId:
    """A job's number, and its cluster where sbatch names one."""

    number: str
    cluster: str | None = None

    def __str__(self) -> str:
        return self.number if self.cluster is None else f"{self.number};{self.cluster}"

    @classmethod
    def parse(cls, text: str) -> JobId:
        """Read ``id`` or ``id;cluster``, as ``sbatch --parsable`` prints it.

        Raises:
            SlurmError: it is neither.
        """
        match = re.fullmatch(r"([1-9]\d*)(?:;([^\s;]+))?", text.strip())
        if match is None:
            raise SlurmError(f"{text.strip()!r} is no Slurm job id", "an id is a number: 12345")
        return cls(match[1], match[2])

    @property
    def options(self) -> list[str]:
        """The options that direct a command to the job's cluster."""
        return [] if self.cluster is None else [f"--clusters={self.cluster}"]


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job.

    Attributes:
        name: Slurm's word, such as PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED.
        exit_code: of the batch script; None while it is not known.
        reason: why it waits or ended so, where Slurm tells.
    """

    name: str
    exit_code: int | None = None
    reason: str | None = None

    @property
    def active(self) -> bool:
        """Whether the job waits or runs."""
        return self.name in _ACTIVE


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` without what would change a submission.

    ``SBATCH_*`` are options in disguise. Inside a job, its ``SLURM_*`` and its devices would go
    into the new one.
    """
    inside = "SLURM_JOB_ID" in environ
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT
        or not (name.startswith(("SBATCH_", "SLURM_", "SLURMD_")) or (inside and name in _DEVICES))
    }


def submit(
    script: Path, extra: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> JobId:
    """Submit a batch script and return the job's id.

    Args:
        extra: further options of sbatch; they win over the script's directives.
        environ: the environment that the job inherits (default: the process's), scrubbed by
            ``clean_environment``.

    Raises:
        SlurmError: there is no sbatch, it refused, or its answer is no job id.
    """
    environment = clean_environment(os.environ if environ is None else environ)
    done = _run(["sbatch", "--parsable", *extra, "--", str(script)], environment)
    if done.returncode != 0:
        raise SlurmError(
            f"sbatch refused {script}: {_words(done)}", _remedy(_words(done), script, environment)
        )
    # A site's wrapper may say something first; the id is on the last line.
    lines = done.stdout.strip().splitlines()
    try:
        return JobId.parse(lines[-1] if lines else "")
    except SlurmError:
        raise SlurmError(
            f"sbatch answered {done.stdout!r} to {script}, which is no job id",
            "look with squeue whether the job is there",
        ) from None


def check_account(account: str | None, environ: Mapping[str, str] | None = None) -> None:
    """Refuse a submission that this cluster is sure to refuse for want of an account.

    Raises:
        SlurmError: jobs need an account here, none is configured, and the user has no default.
    """
    if account is not None:
        return
    environment = clean_environment(os.environ if environ is None else environ)
    config = _try(["scontrol", "show", "config"], environment) or ""
    enforce = re.search(r"^AccountingStorageEnforce\s*=(.*)$", config, re.MULTILINE)
    if enforce is None or "associations" not in enforce[1].lower():
        return
    default = _try(
        ["sacctmgr", "-nP", "show", "user", _user(), "format=defaultaccount"], environment
    )
    if default is not None and not default.strip():
        raise SlurmError(
            "this cluster charges jobs to accounts, and you have no default account",
            _account_remedy(environment),
        )


def cancel(job: JobId, environ: Mapping[str, str] | None = None) -> None:
    """Cancel a job. One that has ended already is left as it is.

    Raises:
        SlurmError: scancel is missing or refused.
    """
    environment = clean_environment(os.environ if environ is None else environ)
    done = _run(["scancel", *job.options, job.number], environment)
    if done.returncode != 0:
        raise SlurmError(f"scancel did not cancel {job}: {_words(done)}", "check the job's id")


def job_state(job: JobId, environ: Mapping[str, str] | None = None) -> JobState:
    """Return a job's state: from squeue, else sacct, else scontrol.

    Raises:
        SlurmError: Slurm is missing, or knows no such job (any more).
    """
    environment = clean_environment(os.environ if environ is None else environ)
    waiting = _from_squeue(job, environment)
    if waiting is not None and waiting.active:
        return waiting
    state = _from_sacct(job, environment) or _from_scontrol(job, environment) or waiting
    if state is None:
        raise SlurmError(
            f"Slurm knows no job {job}", "check the id; jobs that ended long ago are forgotten"
        )
    return state


def _from_squeue(job: JobId, environment: Mapping[str, str]) -> JobState | None:
    done = _run(
        ["squeue", *job.options, "-h", "-t", "all", "-j", job.number, "-o", "%T|%r"], environment
    )
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise SlurmError(f"squeue did not answer: {_words(done)}", "try again in a minute")
    states = [line.partition("|") for line in done.stdout.splitlines() if "|" in line]
    found = [JobState(name, None, _reason(reason)) for name, _, reason in states]
    return next((state for state in found if state.active), found[0] if found else None)


def _from_sacct(job: JobId, environment: Mapping[str, str]) -> JobState | None:
    text = _try(
        ["sacct", *job.options, "-nPX", "-j", job.number, "-o", "State,ExitCode"], environment
    )
    lines = (text or "").split("\n")
    name, _, code = lines[0].partition("|")
    # CANCELLED comes as "CANCELLED by 1000".
    return JobState(name.split()[0], _exit_code(code)) if name.strip() else None


def _from_scontrol(job: JobId, environment: Mapping[str, str]) -> JobState | None:
    text = _try(["scontrol", *job.options, "-o", "show", "job", job.number], environment) or ""
    fields = dict(re.findall(r"\b(JobState|Reason|ExitCode)=(\S+)", text))
    if "JobState" not in fields:
        return None
    code = _exit_code(fields.get("ExitCode", ""))
    return JobState(fields["JobState"], code, _reason(fields.get("Reason", "")))


def _exit_code(text: str) -> int | None:
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    return int(match[1]) if match else None


def _reason(text: str) -> str | None:
    return None if text in ("", "None") else text


def _remedy(words: str, script: Path, environment: Mapping[str, str]) -> str:
    if "account" in words.lower():
        return _account_remedy(environment)
    if "partition" in words.lower():
        return "name a partition of this cluster (sinfo lists them): --partition NAME"
    return f"change the option that Slurm names; the script is at {script}"


def _account_remedy(environment: Mapping[str, str]) -> str:
    listed = _try(
        ["sacctmgr", "-nP", "show", "assoc", f"user={_user()}", "format=account"], environment
    )
    accounts = sorted({line.strip() for line in (listed or "").splitlines() if line.strip()})
    yours = f" (yours: {', '.join(accounts)})" if accounts else ""
    return f"name the account to charge: --account NAME{yours}"


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command said, in one line and without its name before each part."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    cleaned = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in lines]
    return "; ".join(line for line in cleaned if line) or f"exit status {done.returncode}"


def _try(command: list[str], environment: Mapping[str, str]) -> str | None:
    """Return what a command prints; None when it is missing or fails."""
    try:
        done = _run(command, environment)
    except SlurmError:
        return None
    return done.stdout if done.returncode == 0 else None


def _run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not on PATH: this is no machine that submits to Slurm",
            "log in to a login node, or module load slurm; or run it here: aiflux run --local",
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} did not answer within {_TIMEOUT:.0f} s",
            "the controller may be busy: look with squeue before you try again",
        ) from None
