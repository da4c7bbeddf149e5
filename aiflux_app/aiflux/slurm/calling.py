"""How Slurm's commands are called: with a clean environment, and an end to the waiting."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

from aiflux.errors import SlurmError

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
