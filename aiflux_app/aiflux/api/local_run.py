"""Run on this machine: with which image or program, and the process in the background."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.settings import AMD, RunOptions
from aiflux.core.runs.local_process import (
    LocalProcess,
    refuse_process,
    write_process,
)
from aiflux.core.runs.open import OpenedRun, RunDraft, draft_run
from aiflux.core.runs.plan import Plan
from aiflux.engines.gpus import VENDOR_VARIABLE, gpu_vendor, visible_devices
from aiflux.engines.kinds import engine_kind
from aiflux.engines.process import engine_program, find_program, named_program
from aiflux.engines.ranks import refuse_several_nodes
from aiflux.errors import ImageError, ModelError, StoppedError
from aiflux.image.container import find_image, find_runtime, refuse_container
from aiflux.image.sif import (
    ImageFacts,
    own_image,
    refuse_other_engine,
    refuse_other_vendor,
    refuse_other_version,
)
from aiflux.slurm.preflight.nodes import check_names
from aiflux.slurm.script import JobScript, package_command, render_local
from aiflux.util.files import atomic_write, open_private, storage_error
from aiflux.util.lease import acquire, refuse_living
from aiflux.util.process_limits import exhausted, start_thread

if TYPE_CHECKING:
    from aiflux.engines.base import EngineKind


def draft_here(
    config: Config, input_path: Path, output: Path, *, force: bool, force_resume: bool
) -> RunDraft:
    """Check and plan a run that is processed on this machine; see ``draft_run``."""
    options = config.run_options()
    refuse_several_nodes(options)
    return draft_run(
        input_path,
        output,
        options,
        config.models_dir,
        engine_kind(options),
        force=force,
        force_resume=force_resume,
    )


def local_image(plan: Plan, config: Config, folder: Path) -> ImageFacts | None:
    """Check that a run can start on this machine; return its image, None to run without one.

    AIFLUX_ENGINE_PROGRAM names an engine to use in either case (see ``find_program``).

    Args:
        folder: first directory to search for an image.

    Raises:
        ConfigError: its engine needs several nodes.
        ModelError: a model is unknown, cannot be used, or is neither stored nor can be fetched.
        ImageError, EngineError: there is neither a program nor an image with the engine.
    """
    kind = engine_kind(plan.options)
    refuse_several_nodes(plan.options)
    for _, finding in check_names(plan, config.catalog()):
        raise ModelError(finding.what, finding.fix)
    if plan.models_dir is not None:
        for model in plan.models:
            kind.refuse_model(plan.models_dir, model)
            if not kind.is_stored(plan.models_dir, model):
                missing = kind.absent_model(plan.models_dir, model)
                if missing is not None:
                    raise missing
    return local_program(plan.options, config, folder)


def local_program(options: RunOptions, config: Config, folder: Path) -> ImageFacts | None:
    """Check that an engine can start on this machine; return its image, None if it needs none.

    Raises:
        ImageError, EngineError: see ``local_image``.
    """
    kind = engine_kind(options)
    if not kind.worker_in_image:
        refuse_container(config)
        return None
    image = None if named_program(kind, os.environ) else _image(kind, config, folder)
    vendor = with_vendor(config.get("gpu_vendor"))
    if image is None:
        engine_program(kind, os.environ)
    elif visible_devices(vendor) and not options.allow_cpu:
        refuse_other_vendor(image, gpu_vendor(vendor))
    return image


def _image(kind: EngineKind, config: Config, folder: Path) -> ImageFacts | None:
    """Return the image of a local run; None to use the engine's program on this machine.

    Raises:
        ImageError: there is neither a program nor an image of ours with this engine, or an image
            was named that cannot be used.
    """
    program = find_program(kind, os.environ) if config.image is None else None
    try:
        find_runtime()
        path = find_image(config, folder, engine=kind.name)
    except ImageError as error:
        if program is None:
            raise ImageError(
                f"{error.message}; and there is no {kind.program} on PATH either",
                f"{error.remedy}; or install {kind.title}, and name its program in "
                "AIFLUX_ENGINE_PROGRAM if it is not on PATH",
            ) from error
        return None
    image = own_image(path)
    if program is None:
        refuse_other_engine(image, kind.name, kind.title)
    if image.suits(kind.name):
        refuse_other_version(image)
    return image if image.suits(kind.name) else None


def with_vendor(vendor: str) -> dict[str, str]:
    """Return the environment with the vendor of the GPUs, unless that is ``auto``."""
    return {**os.environ, **({} if vendor == "auto" else {VENDOR_VARIABLE: vendor})}


def local_script(opened: OpenedRun, image: Path, config: Config) -> str:
    """Return the script that works on a run in an image on this machine."""
    plan, vendor = opened.plan, config.get("gpu_vendor")
    has_gpus = gpu_vendor(with_vendor(vendor)) == AMD or shutil.which("nvidia-smi")
    gpus = "1" if has_gpus else "0"
    slurm = SlurmConfig(seal=config.get("seal"), gpus_per_node=gpus, gpu_vendor=vendor)
    job = JobScript.of_run(
        plan.input_path,
        plan.output,
        plan.options,
        plan.models_dir,
        slurm,
        image,
        opened.run.logs,
    )
    return render_local(replace(job.with_models(plan), max_requeues=0))


def start_in_background(
    opened: OpenedRun, config: Config, image: Path | None, folder: Path
) -> LocalProcess:
    """Start a process that works on an opened run, and that outlives this one.

    Its output goes to ``logs/local.log`` in the run directory. The API key is in its environment.

    Args:
        image: None to work outside a container.
        folder: directory in which an engine's command runs.

    Raises:
        RunConflictError: another process works on the run.
        StoppedError: the system allows no further process.
        StorageError: the run directory cannot be written.
    """
    run = opened.run
    if image is None:
        command: Sequence[str] = (
            *package_command("aiflux.worker", os.environ),
            "--run-dir",
            str(run.path),
        )
        command = (*command, "--pull-missing")
    else:
        with atomic_write(run.local_script, 0o600) as file:
            script = local_script(opened, image, config)
            file.write(script.encode("utf-8", "surrogateescape"))
        command = ("bash", str(run.local_script))
    environ = {**with_vendor(config.get("gpu_vendor")), "AIFLUX_JOB_DIR": str(folder)}
    what = f"the run {opened.plan.output}"
    # The worker waits for this lease, too, before it reads the plan.
    with acquire(run.plan_lease, what, wait=True):
        refuse_living([run.lease(0)], what)
        refuse_process(run)
        process = _spawn(command, run.logs / "local.log", run.path, environ)
        write_process(run, process)
    return process


def _spawn(
    command: Sequence[str], log: Path, folder: Path, environ: Mapping[str, str]
) -> LocalProcess:
    """Start a process in a session of its own, which does not end with this one.

    Its directory keeps Python from importing files of the current one.
    """
    since = time.time()
    try:
        with open(log, "ab", opener=open_private) as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environ,
                start_new_session=True,
            )
    except OSError as error:
        raise exhausted(error) or storage_error(error, log) from error
    started = LocalProcess.of(process.pid, since, log)

    def reap() -> None:
        process.wait()

    with suppress(StoppedError):  # without a thread, it stays a zombie until this process ends
        start_thread(reap, "aiflux-local-run")
    return started
