"""The plan of a run as a summary of about ten lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from aiflux.core.runs.plan import Plan
from aiflux.util.text import counted, public_url, size_text

if TYPE_CHECKING:
    from aiflux.core.config.config import SlurmConfig
    from aiflux.slurm.submit import PlannedRun


def dry_run_summary(plan: Plan, planned: PlannedRun | None) -> Iterator[str]:
    """Yield what a dry run shows.

    Args:
        planned: how it would be submitted; None for a run in the foreground.
    """
    yield f"dry run: {counted(plan.requests, 'request')}, nothing was started"
    for key, value in _facts(plan, planned):
        yield f"  {key:<11}{value}"
    if planned is not None:
        yield "  --show-script prints the batch script, --json the whole plan"


def _facts(plan: Plan, planned: PlannedRun | None) -> Iterator[tuple[str, str]]:
    options = plan.options
    yield "input", f"{plan.input_path} ({size_text(plan.input.size)})"
    yield "output", str(plan.output)
    yield "model", ", ".join(plan.models)
    if options.parameters:
        yield "parameters", ", ".join(f"{key} {value}" for key, value in options.parameters.items())
    if options.engine_url is not None:
        yield "engine", public_url(options.engine_url)
    if planned is None:
        yield "where", "on this machine, in the foreground"
        return
    yield "image", str(planned.image)
    yield "jobs", _jobs(planned)
    yield "each job", ", ".join(_resources(planned.slurm))
    yield "logs", str(planned.logs)


def _jobs(planned: PlannedRun) -> str:
    shards, left = len(planned.opened.plan.shards), len(planned.opened.open_shards)
    if planned.opened.finished:
        return "none: the run is finished"
    if shards == 1:
        return "1"
    rest = "" if left == shards else f", {left} of them unfinished"
    running = planned.slurm.max_running
    limit = "" if running is None else f", {running} at the same time"
    return f"{shards} shards{rest}{limit}"


def _resources(slurm: SlurmConfig) -> Iterator[str]:
    if slurm.partition:
        yield f"partition {slurm.partition}"
    if slurm.account:
        yield f"account {slurm.account}"
    if slurm.gres:
        yield f"gres {slurm.gres}"
    elif slurm.gpus_per_node != "0":
        yield f"GPUs {slurm.gpus_per_node}"
    if slurm.cpus_per_task:
        yield f"{slurm.cpus_per_task} CPU cores"
    if slurm.mem:
        yield f"memory {slurm.mem}"
    if slurm.time:
        yield f"time limit {slurm.time}"
