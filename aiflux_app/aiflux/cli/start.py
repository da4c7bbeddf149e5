"""Start a planned run: as Slurm jobs, in the image on this machine, or in this process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.settings import AMD
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.open import OpenedRun
from aiflux.core.runs.output import merge
from aiflux.core.runs.plan import Plan
from aiflux.core.runs.registry import register_plan
from aiflux.core.runs.status_file import (
    Counts,
    finished_line,
    refuse_failures,
    requests_left,
)
from aiflux.engines.gpus import VENDOR_VARIABLE, gpu_vendor, visible_devices
from aiflux.engines.kinds import engine_kind
from aiflux.engines.ranks import refuse_several_nodes
from aiflux.errors import ImageError, ModelError
from aiflux.image.container import find_image, find_runtime, local_choices
from aiflux.image.sif import ImageFacts, own_image, refuse_other_engine, refuse_other_vendor
from aiflux.slurm.preflight.nodes import check_names
from aiflux.slurm.script import JobScript, render_local, render_models
from aiflux.util.files import temporary_folder

if TYPE_CHECKING:
    from aiflux.engines.base import EngineKind
    from aiflux.slurm.jobs import JobId
    from aiflux.slurm.submit import PlannedRun


def show_local_choices(config: Config, image: Path | None) -> None:
    """Print on stderr which decisive settings come from the current directory."""
    line = local_choices(config, image)
    if line is not None:
        print(f"note: {line}", file=sys.stderr)


def submit_planned(planned: PlannedRun) -> int:
    """Submit a planned run, or write its output if only that is missing."""
    from aiflux.slurm.jobs import join_jobs
    from aiflux.slurm.submit import submit_job

    opened = planned.opened
    if opened.counts is not None:
        return print_finished(opened.plan, opened.counts)
    if not opened.open_shards:
        return write_output(opened.plan, opened.run)
    plan, shards = opened.plan, len(opened.open_shards)
    left = requests_left(plan, opened.run, opened.open_shards)
    jobs = submit_job(planned)
    register(opened.plan, jobs)
    requests = str(left) if left == plan.requests else f"{left} of {plan.requests}"
    parts = "" if len(plan.shards) == 1 else f" in {shards} of {len(plan.shards)} shards"
    noun = "job" if len(jobs) == 1 else "jobs"
    print(f"submitted {noun} {join_jobs(jobs)}: {requests} requests{parts} -> {plan.output}")
    print(f"  run directory: {opened.run.path}")
    name = jobs[0].number
    print(f"  follow: aiflux watch {name}    cancel: aiflux cancel {name}")
    print(f"  afterwards: aiflux results show {name}    aiflux report {name}")
    return 0


def register(plan: Plan, jobs: Sequence[JobId] = ()) -> None:
    """Add a run to the list of `aiflux jobs`."""
    warning = register_plan(plan, jobs)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def write_output(plan: Plan, run: RunDirectory, *, again: bool = False) -> int:
    """Write a run's output from its journals.

    Raises:
        TooManyFailuresError: more requests failed than are allowed.
    """
    counts = merge(plan, run, print, again=again)
    refuse_failures(plan, counts.failed)
    return 0


def run_local(opened: OpenedRun, config: Config) -> int:
    """Run in the image if Apptainer and an image with the engine are available, else without.

    AIFLUX_ENGINE_PROGRAM names an engine to use in either case (see ``find_program``).
    """
    if opened.counts is not None:
        return print_finished(opened.plan, opened.counts)
    image = local_image(opened.plan, config)
    vendor = config.get("gpu_vendor")
    if image is None:
        show_local_choices(config, None)
        return run_here(opened, vendor)
    show_local_choices(config, image.path)
    return run_in_container(opened, image.path, seal=config.get("seal"), vendor=vendor)


def local_image(plan: Plan, config: Config) -> ImageFacts | None:
    """Check that a run can start on this machine; return its image, None to run without one.

    Raises:
        ConfigError: its engine needs several nodes.
        ModelError: a model is unknown or cannot be used.
        ImageError, EngineError: there is neither a program nor an image with the engine.
    """
    from aiflux.engines.process import engine_program, named_program
    from aiflux.slurm.submit import refuse_container

    kind = engine_kind(plan.options)
    refuse_several_nodes(plan.options)
    for finding in check_names(plan, config.catalog()):
        raise ModelError(finding.what, finding.fix)
    if plan.models_dir is not None:
        for model in plan.models:
            kind.refuse_model(plan.models_dir, model)
    if not kind.worker_in_image:
        refuse_container(config)
        return None
    image = None if named_program(kind, os.environ) else _local_image(kind, config)
    vendor = _with_vendor(config.get("gpu_vendor"))
    if image is None:
        engine_program(kind, os.environ)
    elif visible_devices(vendor) and not plan.options.allow_cpu:
        refuse_other_vendor(image, gpu_vendor(vendor))
    return image


def _local_image(kind: EngineKind, config: Config) -> ImageFacts | None:
    """Return the image of a local run; None to use the engine's program on this machine.

    Raises:
        ImageError: there is neither a program nor an image of ours with this engine, or an image
            was named that cannot be used.
    """
    from aiflux.engines.process import find_program

    program = find_program(kind, os.environ) if config.image is None else None
    try:
        find_runtime()
        path = find_image(config, Path.cwd(), engine=kind.name)
    except ImageError as error:
        if program is None:
            raise ImageError(
                f"{error.message}; and there is no {kind.program} on PATH either", error.remedy
            ) from error
        return None
    image = own_image(path)
    if program is None:
        refuse_other_engine(image, kind.name, kind.title)
    return image if image.suits(kind.name) else None


def _with_vendor(vendor: str) -> dict[str, str]:
    """Return the environment with the vendor of the GPUs, if that is chosen."""
    return {**os.environ, **({} if vendor == "auto" else {VENDOR_VARIABLE: vendor})}


def run_here(opened: OpenedRun, vendor: str = "auto") -> int:
    """Process the run in this process, in the foreground.

    Args:
        vendor: that of the GPUs, or ``auto``.
    """
    from aiflux.worker.progress import make_reporter
    from aiflux.worker.shard import Context, ensure_models, work
    from aiflux.worker.stop import Stopper

    if opened.counts is not None:
        return print_finished(opened.plan, opened.counts)
    stopper = Stopper()
    stopper.install()
    context = Context(make_reporter(), stopper, api_key=os.environ.get("AIFLUX_API_KEY"))
    context = replace(context, environ=_with_vendor(vendor))
    try:
        ensure_models(opened.plan, opened.run, context)
        work(opened.plan, opened.run, 0, context)
    finally:
        context.reporter.close()
    return 0


def print_finished(plan: Plan, counts: Counts) -> int:
    """Report that a run was already finished.

    Raises:
        TooManyFailuresError: more requests failed than are allowed.
    """
    print(finished_line(plan, counts))
    refuse_failures(plan, counts.failed)
    return 0


_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def run_in_container(opened: OpenedRun, image: Path, *, seal: bool, vendor: str = "auto") -> int:
    """Run the script of a job on this machine; return its exit code.

    Args:
        seal: False keeps the network for the work.
        vendor: that of the GPUs, or ``auto``.
    """
    plan = opened.plan
    has_gpus = gpu_vendor(_with_vendor(vendor)) == AMD or shutil.which("nvidia-smi")
    gpus = "1" if has_gpus else "0"
    slurm = SlurmConfig(seal=seal, gpus_per_node=gpus, gpu_vendor=vendor)
    job = JobScript.of_run(
        plan.input_path,
        plan.output,
        plan.options,
        plan.models_dir,
        slurm,
        image,
        opened.run.logs,
    )
    return _run(render_local(replace(job.with_models(plan), max_requeues=0)))


def pull_in_container(model: str, models_dir: Path, image: Path, *, again: bool = False) -> int:
    """Pull a model with the image's Ollama; return the exit code."""
    return _run(
        render_models(image, models_dir, ["--pull", model, *(["--again"] if again else [])])
    )


def create_in_container(model: str, models_dir: Path, image: Path) -> int:
    """Create a model from the staged GGUF file with the image's Ollama; return the exit code."""
    return _run(render_models(image, models_dir, ["--create", model]))


def _run(script: str) -> int:
    """Run a script in the foreground and pass signals on; it ends the container in good order."""
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    # Under nohup SIGHUP is ignored, and stays so.
    numbers = [n for n in _FORWARDED if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        with temporary_folder() as folder:
            file = folder / "run.sh"
            file.write_bytes(script.encode("utf-8", "surrogateescape"))
            process = subprocess.Popen(["bash", str(file)], start_new_session=True)
            for number in early:
                process.send_signal(number)
            return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
