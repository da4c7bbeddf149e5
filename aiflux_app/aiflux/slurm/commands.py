"""Submitting and cancelling jobs."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping, Sequence
from pathlib import Path

from aiflux.errors import SlurmError
from aiflux.slurm.arrays import array_ranges
from aiflux.slurm.calling import attempt, call, clean_environment, words
from aiflux.slurm.job_id import JobId


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
