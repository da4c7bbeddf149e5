"""From settings to a submitted job: plan, render, submit, remember."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from aiflux.core.clock import utc_now
from aiflux.core.config import Config, SlurmConfig
from aiflux.core.container import find_image
from aiflux.core.files import atomic_write, storage_error, write_json
from aiflux.core.opening import OpenedRun, open_run
from aiflux.core.options import RunOptions
from aiflux.core.rundir import RunDirectory, checked_output
from aiflux.errors import RunConflictError, SlurmError
from aiflux.slurm.commands import JobId, check_account, job_state, submit
from aiflux.slurm.directives import log_file
from aiflux.slurm.script import JobScript, job_name, render


def plan_job(
    config: Config,
    slurm: SlurmConfig,
    input_path: Path,
    output: Path,
    options: RunOptions,
    *,
    cwd: Path | None = None,
    force: bool = False,
    force_resume: bool = False,
    write: bool = True,
) -> tuple[OpenedRun, str]:
    """Check everything, plan the run and return it with the text of its batch script.

    Args:
        cwd: where ``aiflux.sif`` is looked for first (default: the current directory).
        write: False plans without touching the disk (a dry run).

    Raises:
        UsageError: settings, input, output or image are wrong (see ``open_run``, ``find_image``).
        StorageError: the run directory cannot be written.
    """
    output = checked_output(output)
    run = RunDirectory.of_output(output)
    job = JobScript(
        name=job_name(output),
        slurm=slurm,
        image=find_image(config, Path.cwd() if cwd is None else cwd),
        input=input_path.expanduser().absolute(),
        output_dir=output.parent,
        models_dir=config.models_dir if options.engine_url is None else None,
        run_dir=run.path,
        log=logs_folder(config, run),
    )
    # What cannot be rendered is refused before the input is read and anything is written.
    script = render(job)
    opened = open_run(
        input_path,
        output,
        options,
        config.models_dir,
        force=force,
        force_resume=force_resume,
        write=write,
    )
    return opened, script


def submit_job(
    config: Config,
    slurm: SlurmConfig,
    opened: OpenedRun,
    script: str,
    environ: Mapping[str, str] | None = None,
) -> JobId:
    """Write the script into the run directory, submit it and remember the job there.

    Raises:
        RunConflictError: a job of this run waits or runs already.
        SlurmError: Slurm is missing or refused the job.
        StorageError: the run directory cannot be written.
    """
    run = opened.run
    _refuse_second(run, environ)
    check_account(slurm.account, environ)
    logs = logs_folder(config, run)
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, logs) from error
    with atomic_write(run.script, 0o600) as file:
        file.write(script.encode("utf-8", "surrogateescape"))
    job = submit(run.script, environ=environ)
    write_json(
        run.submission,
        {
            "job_id": job.number,
            "cluster": job.cluster,
            "submitted": utc_now(),
            "log": str(log_file(logs, job.number)),
        },
    )
    return job


def submitted_job(run: RunDirectory) -> JobId | None:
    """Return the job that was submitted last for a run, if one was."""
    try:
        content = json.loads(run.submission.read_text(encoding="utf-8"))
        return JobId(str(content["job_id"]), content["cluster"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def logs_folder(config: Config, run: RunDirectory) -> Path:
    """Return where the job's log goes: the configured folder, else the run directory's."""
    return config.logs_dir or run.logs


def _refuse_second(run: RunDirectory, environ: Mapping[str, str] | None) -> None:
    earlier = submitted_job(run)
    if earlier is None:
        return
    with suppress(SlurmError):  # a job that Slurm has forgotten is in nobody's way
        state = job_state(earlier, environ)
        if state.active:
            raise RunConflictError(
                f"job {earlier} of this run is {state.name} already",
                f"wait for it, or cancel it first: scancel {earlier.number}",
            )
