"""Call Slurm's commands with a clean environment: submit and cancel jobs."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from aiflux.errors import SlurmError
from aiflux.slurm.job_id import JobId, array_ranges


def submit(
    script: Path, extra: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> JobId:
    """Submit a batch script and return the job's id.

    Args:
        extra: more options of sbatch, such as ``--dependency=afterany:101``; they take precedence
            over the script's directives.
        environ: the environment for the job (default: the process's), cleaned by
            ``clean_environment``.

    Raises:
        SlurmError: sbatch is missing, refused the job, or its answer is not a job id.
    """
    environment = clean_environment(os.environ if environ is None else environ)
    done = call(["sbatch", "--parsable", *extra, "--", str(script)], environment)
    if done.returncode != 0:
        raise SlurmError(
            f"sbatch refused {script}: {words(done)}", _remedy(words(done), script, environment)
        )
    # A site's wrapper can print something first; the id is on the last line.
    lines = done.stdout.strip().splitlines()
    try:
        return JobId.parse(lines[-1] if lines else "")
    except SlurmError:
        raise SlurmError(
            f"sbatch answered {done.stdout!r} to {script}, which is not a job id",
            "check with squeue whether the job exists",
        ) from None


def cancel(
    job: JobId,
    environ: Mapping[str, str] | None = None,
    *,
    tasks: Sequence[int] | None = None,
) -> None:
    """Cancel a job, or some tasks of an array; those that have ended are unchanged.

    Raises:
        SlurmError: scancel is missing or refused.
    """
    environment = clean_environment(os.environ if environ is None else environ)
    target = job.number if tasks is None else f"{job.number}_[{array_ranges(tasks)}]"
    done = call(["scancel", *job.options, target], environment)
    if done.returncode != 0:
        raise SlurmError(f"scancel did not cancel {job}: {words(done)}", "check the job id")


def _remedy(message: str, script: Path, environment: Mapping[str, str]) -> str:
    if "account" in message.lower():
        return _account_remedy(environment)
    if "partition" in message.lower():
        return "use a partition of this cluster (sinfo lists them): --partition NAME"
    return f"change the option that Slurm reports; the script is {script}"


def _account_remedy(environment: Mapping[str, str]) -> str:
    listed = attempt(
        ["sacctmgr", "-nP", "show", "assoc", f"user={_user()}", "format=account"], environment
    )
    accounts = sorted({line.strip() for line in (listed or "").splitlines() if line.strip()})
    yours = f" (yours: {', '.join(accounts)})" if accounts else ""
    return f"set the account to charge: --account NAME{yours}"


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


_TIMEOUT = 120.0  # seconds; a busy controller answers slowly
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
_DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` without variables that would change a submission.

    ``SBATCH_*`` act as options. Inside a job, its ``SLURM_*`` and its devices would leak into the
    new job.
    """
    inside = "SLURM_JOB_ID" in environ
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT
        or not (name.startswith(("SBATCH_", "SLURM_", "SLURMD_")) or (inside and name in _DEVICES))
    }


def call(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output, whatever its exit code.

    Raises:
        SlurmError: it is missing, or did not answer in time.
    """
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
        raise missing(command[0]) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} did not answer within {_TIMEOUT:.0f} s",
            "the controller may be busy: check with squeue before you try again",
        ) from None


def missing(command: str) -> SlurmError:
    """Return the error for a command of Slurm that is not on PATH."""
    return SlurmError(
        f"{command} is not on PATH: this machine cannot submit to Slurm",
        "log in to a login node, or module load slurm; or run it here with aiflux run --local",
    )


def attempt(command: list[str], environment: Mapping[str, str]) -> str | None:
    """Return the output of a command; None if it is missing or fails."""
    try:
        done = call(command, environment)
    except SlurmError:
        return None
    return done.stdout if done.returncode == 0 else None


def words(done: subprocess.CompletedProcess[str]) -> str:
    """Return a command's messages in one line, without its name before each part."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    cleaned = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in lines]
    return "; ".join(line for line in cleaned if line) or f"exit status {done.returncode}"
