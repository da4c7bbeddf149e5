"""Starting a run that is opened: as Slurm jobs, in the image here, or in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aiflux.core.config.config import Config
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.merge import merge
from aiflux.core.runs.open import OpenedRun
from aiflux.core.runs.plan import Plan
from aiflux.core.runs.registry import register_plan
from aiflux.core.runs.status_file import finished_line, refuse_failures
from aiflux.errors import ImageError, ModelError
from aiflux.image.container import find_image, find_runtime, local_choices
from aiflux.slurm.preflight.memory import check_names

if TYPE_CHECKING:
    from aiflux.slurm.job_id import JobId
    from aiflux.slurm.submit import PlannedRun


def show_local_choices(config: Config, image: Path | None) -> None:
    """Say on stderr, before anything starts, what the current directory decides."""
    line = local_choices(config, image)
    if line is not None:
        print(f"note: {line}", file=sys.stderr)


def submit_planned(planned: PlannedRun) -> int:
    """Submit a planned run and say so; write the output where only that is missing."""
    from aiflux.slurm.job_id import join_jobs
    from aiflux.slurm.submit import submit_job

    opened = planned.opened
    if opened.finished:
        return _tell_finished(opened)
    if not opened.open_shards:
        return write_output(opened.plan, opened.run)
    jobs = submit_job(planned)
    register(opened.plan, jobs)
    plan, shards = opened.plan, len(opened.open_shards)
    parts = "" if len(plan.shards) == 1 else f" in {shards} of {len(plan.shards)} shards"
    noun = "job" if len(jobs) == 1 else "jobs"
    print(f"submitted {noun} {join_jobs(jobs)}: {plan.requests} requests{parts} -> {plan.output}")
    print(f"  run directory: {opened.run.path}")
    name = jobs[0].number
    print(f"  see it: aiflux watch {name}    stop it: aiflux cancel {name}")
    return 0


def register(plan: Plan, jobs: Sequence[JobId] = ()) -> None:
    """Let `aiflux jobs` know a run."""
    warning = register_plan(plan, jobs)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def write_output(plan: Plan, run: RunDirectory, *, again: bool = False) -> int:
    """Write a run's output from its journals.

    Raises:
        TooManyFailuresError: more requests failed than are allowed.
    """
    counts = merge(plan, run, print, again=again)
    refuse_failures(plan, {"total": counts.total, "failed": counts.failed})
    return 0


def run_local(opened: OpenedRun, config: Config) -> int:
    """Run in the image where Apptainer and the image are, else on an Ollama of this machine.

    AIFLUX_OLLAMA names an Ollama to use in either case (see ``find_program``).
    """
    from aiflux.engines.process import find_program

    if opened.finished:
        return _tell_finished(opened)
    for finding in check_names(opened.plan, config.catalogue()):
        raise ModelError(finding.what, finding.fix)
    if os.environ.get("AIFLUX_OLLAMA"):
        show_local_choices(config, None)
        return run_here(opened)
    try:
        runtime, image = find_runtime(), find_image(config, Path.cwd())
    except ImageError as error:
        if config.image is not None or find_program(os.environ) is None:
            raise ImageError(
                f"{error.message}; and there is no ollama on PATH either", error.remedy
            ) from error
        show_local_choices(config, None)
        return run_here(opened)
    show_local_choices(config, image)
    from aiflux.cli.local_container import run_in_container

    return run_in_container(opened, runtime, image, seal=config.get("seal"))


def run_here(opened: OpenedRun) -> int:
    """Work in this process, in the foreground."""
    from aiflux.worker.progress import make_reporter
    from aiflux.worker.shard import Context, ensure_models, work
    from aiflux.worker.stop import Stopper

    if opened.finished:
        return _tell_finished(opened)
    stopper = Stopper()
    stopper.install()
    context = Context(make_reporter(), stopper, api_key=os.environ.get("AIFLUX_API_KEY"))
    try:
        ensure_models(opened.plan, opened.run, context)
        work(opened.plan, opened.run, 0, context)
    finally:
        context.reporter.close()
    return 0


def _tell_finished(opened: OpenedRun) -> int:
    print(finished_line(opened.plan, opened.counts))
    refuse_failures(opened.plan, opened.counts)
    return 0
