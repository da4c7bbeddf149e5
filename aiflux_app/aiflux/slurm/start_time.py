"""When Slurm expects a job to start, and how many shards therefore end first."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace

from aiflux.errors import SlurmError
from aiflux.estimates.estimate import Estimate
from aiflux.slurm.commands import call, clean_environment
from aiflux.slurm.jobs import seconds_until
from aiflux.slurm.script import JobScript, render

_EXPECTED = re.compile(r"to start at (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)")
_MOST = 64
_GAIN = 0.75


def seconds_to_start(
    job: JobScript, environ: Mapping[str, str] | None = None, *, shards: int = 1
) -> float | None:
    """Return the seconds until Slurm expects a job to start; None if it is unknown.

    Slurm computes it from the time limits of the jobs before it, so most jobs start earlier, and
    some later: those that come after it can have a higher priority. Nothing is submitted
    (``sbatch --test-only``, man sbatch).

    Args:
        shards: jobs that are to start together, each on nodes of its own.
    """
    nodes = job.nodes * shards
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    script = render(replace(job, tasks=None))
    environment = clean_environment(os.environ if environ is None else environ)
    try:
        done = call(["sbatch", "--test-only", *options], environment, script)
    except SlurmError:
        return None
    found = _EXPECTED.search(done.stderr)
    if done.returncode != 0 or found is None:
        return None
    return seconds_until(found[1])


def ending_first(
    found: Estimate, job: JobScript, most: float, environ: Mapping[str, str] | None = None
) -> tuple[Estimate, float | None]:
    """Return the estimate with the shards that end first, and the seconds until they start.

    More shards than necessary are recommended while each doubling ends the run a quarter earlier.
    They need nodes that are free: Slurm is asked when it could start all of them at once.

    Args:
        found: with the fewest shards that fit the time limit (``Estimate.recommended``).
        most: the largest number of shards.
    """
    wait = seconds_to_start(job, environ, shards=found.shards)
    if wait is None:
        return found, seconds_to_start(job, environ)  # they do not start together
    more = found.shards * 2
    while more <= min(most, _MOST, found.requests):
        later = seconds_to_start(job, environ, shards=more)
        next_ = found.in_shards(more)
        if later is None or later + next_.shard_seconds.value > _GAIN * (
            wait + found.shard_seconds.value
        ):
            break
        found, wait, more = next_, later, more * 2
    return found, wait
