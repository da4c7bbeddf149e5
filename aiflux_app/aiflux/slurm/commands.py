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
        extra: further options of sbatch, such as ``--dependency=afterany:101``; they win over the
            script's directives.
        environ: the environment that the job inherits (default: the process's), scrubbed by
            ``clean_environment``.

    Raises:
        SlurmError: there is no sbatch, it refused, or its answer is no job id.
    """
    environment = clean_environment(os.environ if environ is None else environ)
    done = call(["sbatch", "--parsable", *extra, "--", str(script)], environment)
    if done.returncode != 0:
        raise SlurmError(
            f"sbatch refused {script}: {words(done)}", _remedy(words(done), script, environment)
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


def cancel(
    job: JobId,
    environ: Mapping[str, str] | None = None,
    *,
    tasks: Sequence[int] | None = None,
) -> None:
    """Cancel a job, or some tasks of an array. What has ended already is left as it is.

    Raises:
        SlurmError: scancel is missing or refused.
    """
    environment = clean_environment(os.environ if environ is None else environ)
    target = job.number if tasks is None else f"{job.number}_[{array_ranges(tasks)}]"
    done = call(["scancel", *job.options, target], environment)
    if done.returncode != 0:
        raise SlurmError(f"scancel did not cancel {job}: {words(done)}", "check the job's id")


def _remedy(said: str, script: Path, environment: Mapping[str, str]) -> str:
    if "account" in said.lower():
        return _account_remedy(environment)
    if "partition" in said.lower():
        return "name a partition of this cluster (sinfo lists them): --partition NAME"
    return f"change the option that Slurm names; the script is at {script}"


def _account_remedy(environment: Mapping[str, str]) -> str:
    listed = attempt(
        ["sacctmgr", "-nP", "show", "assoc", f"user={_user()}", "format=account"], environment
    )
    accounts = sorted({line.strip() for line in (listed or "").splitlines() if line.strip()})
    yours = f" (yours: {', '.join(accounts)})" if accounts else ""
    return f"name the account to charge: --account NAME{yours}"


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


_TIMEOUT = 120.0  # seconds; a busy controller answers late
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
_DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)


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


def call(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it said, whatever its exit code.

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
            "the controller may be busy: look with squeue before you try again",
        ) from None


def missing(command: str) -> SlurmError:
    """Return the error for a command of Slurm that is not on PATH."""
    return SlurmError(
        f"{command} is not on PATH: this is no machine that submits to Slurm",
        "log in to a login node, or module load slurm; or run it here: aiflux run --local",
    )


def attempt(command: list[str], environment: Mapping[str, str]) -> str | None:
    """Return what a command prints; None when it is missing or fails."""
    try:
        done = call(command, environment)
    except SlurmError:
        return None
    return done.stdout if done.returncode == 0 else None


def words(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command said, in one line and without its name before each part."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    cleaned = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in lines]
    return "; ".join(line for line in cleaned if line) or f"exit status {done.returncode}"
