"""The Python API: submit a run from Python and follow its job."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.declaration import known_setting, parse_setting, refuse_two_names
from aiflux.core.config.settings import BY_NAME, section_settings
from aiflux.core.config.sources import ModelConfig
from aiflux.core.runs.directory import RunDirectory, default_output
from aiflux.core.runs.registry import register_plan, with_job
from aiflux.errors import OutputExistsError, SlurmError
from aiflux.image.container import local_choices
from aiflux.slurm import commands
from aiflux.slurm.commands import job_state
from aiflux.slurm.jobs import JobId, JobState, join_jobs, parse_jobs
from aiflux.slurm.monitor import jobs_to_wait_for
from aiflux.slurm.preflight.local import finding_text
from aiflux.slurm.script import checked_then
from aiflux.slurm.submit import PlannedRun, plan_job, submit_job, submit_then
from aiflux.util import value_parsers
from aiflux.util.files import absolute, expanded

_log = logging.getLogger(__name__)
_OF_SLURM = {item.name for item in fields(SlurmConfig)}


class SlurmRunner:
    """Submits runs to Slurm.

    Args:
        config: the Slurm resources (``Config.get_slurm_config``), or a whole ``Config``, whose
            other settings then apply too (default: the configuration of the workspace).
        workspace: directory of relative paths, ``aiflux.yaml``, ``.env`` and ``aiflux.sif``
            (default: the current directory).

    Raises:
        ConfigError: a setting is wrong.
    """

    def __init__(
        self, config: SlurmConfig | Config | None = None, workspace: str | Path | None = None
    ) -> None:
        self.workspace = Path.cwd() if workspace is None else absolute(workspace)
        self.settings = config if isinstance(config, Config) else Config(directory=self.workspace)
        self.config = (
            config if isinstance(config, SlurmConfig) else self.settings.get_slurm_config()
        )

    def run(
        self,
        input_path: str | Path,
        output_path: str | Path | None = None,
        *,
        force: bool = False,
        force_resume: bool = False,
        preflight: bool = True,
        dry_run: bool = False,
        model_config: ModelConfig | str | Path | None = None,
        after: Sequence[str] = (),
        then: str = "",
        **options: Any,
    ) -> str:
        """Check the input, plan the run, submit it and return the job's id.

        Args:
            input_path: requests, OpenAI Batch JSONL.
            output_path: ``*.json`` or ``*.jsonl`` (default: ``<input stem>.results.json`` in the
                workspace).
            force: replace an existing output; restart a finished run.
            force_resume: resume although model or parameters changed.
            preflight: check Slurm, image and disk space first; warnings are logged.
            dry_run: submit and write nothing, and return the batch script (all of them, if the run
                needs several arrays).
            model_config: of ``Config.load_model_config``, or such a file: its model and parameters
                apply if nothing else sets them.
            after: runs or ids of jobs, as ``run`` returns them, that have to succeed first.
            then: shell command to execute in a small job once the run is over.
            options: settings of the run (``model``, ``batch_size``, ``max_retries``,
                ``temperature``, ...), of Slurm (``account``, ``time``, ...) and paths (``image``,
                ``models_dir``, ...); None means not given. Settings that are not given here
                come from the environment, ``.env`` and ``aiflux.yaml``, and for Slurm from this
                runner's ``config``.

        Returns:
            the job's id; ``id;cluster`` if sbatch names a cluster, and ``id:id`` if the run needed
            several arrays. ``status``, ``wait``, ``cancel`` and ``after`` accept all forms.

        Raises:
            ConfigError: an option is unknown or wrong.
            PreflightError: the checks found problems; lists all of them.
            InputError: the input is wrong; lists its lines.
            OutputExistsError: the run is already finished, or the output is another's.
            RunConflictError: the run directory is another's, or a job of this run is active.
            ImageError: the image is missing.
            SlurmError: Slurm is missing or refused the job.
            StorageError: the run directory cannot be written.
        """
        if then:
            checked_then(then)
        waits = tuple(job for name in after for job in jobs_to_wait_for(name, warn=_log.warning))
        planned = self.plan(
            input_path,
            output_path,
            force=force,
            force_resume=force_resume,
            preflight=preflight,
            write=not dry_run,
            model_config=model_config,
            **options,
        )
        if dry_run:
            return "\n".join(text for _, text in planned.scripts)
        opened = planned.opened
        if opened.finished:
            raise OutputExistsError(
                f"the run is finished: its results are in {opened.plan.output}",
                "use them, or run it again with force=True",
            )
        if not opened.open_shards:
            raise OutputExistsError(
                "every request is done, and only the output is missing",
                f"write it with aiflux merge {quote(str(opened.run.path))}",
            )
        return join_jobs(self.submit(planned, waits, then))

    def plan(
        self,
        input_path: str | Path,
        output_path: str | Path | None = None,
        *,
        force: bool = False,
        force_resume: bool = False,
        preflight: bool = True,
        write: bool = True,
        model_config: ModelConfig | str | Path | None = None,
        **options: Any,
    ) -> PlannedRun:
        """Check the input and plan the run, without submitting it; see ``run``.

        Args:
            write: write the plan into the run directory; necessary for ``submit``.
        """
        config, slurm = self.configured(model_config, **options)
        planned = plan_job(
            config,
            slurm,
            *self.paths(input_path, output_path),
            config.run_options(),
            cwd=self.workspace,
            force=force,
            force_resume=force_resume,
            check=preflight,
            write=write,
        )
        choices = local_choices(config, planned.image)
        if choices is not None:
            _log.warning(choices)
        for finding in planned.findings:
            _log.warning(finding_text(finding))
        return planned

    def submit(
        self, planned: PlannedRun, after: Sequence[JobId] = (), then: str = ""
    ) -> tuple[JobId, ...]:
        """Submit a planned run that is not finished, and return its jobs; see ``run``."""
        jobs = submit_job(planned, after=after)
        warning = register_plan(planned.opened.plan, jobs)
        if warning:
            _log.warning(warning)
        if then:
            submit_then(planned, then, jobs)
        return jobs

    def configured(
        self, model_config: ModelConfig | str | Path | None = None, **options: Any
    ) -> tuple[Config, SlurmConfig]:
        """Return the settings of a run with these options; see ``run``.

        Raises:
            ConfigError: an option is unknown or wrong.
        """
        given = _known(options)
        loaded = model_config if isinstance(model_config, ModelConfig) else None
        if model_config is not None and loaded is None:
            given["model_config"] = model_config
        for name, value in given.items():
            if BY_NAME[name].parse is value_parsers.path:
                given[name] = self._setting(value)
        of_slurm = {name: value for name, value in given.items() if name in _OF_SLURM}
        return self.settings.changed(given, loaded), _with(self.config, of_slurm)

    def paths(
        self, input_path: str | Path, output_path: str | Path | None = None
    ) -> tuple[Path, Path]:
        """Return the paths of input and output; see ``run``."""
        source = self._path(input_path)
        output = default_output(source, self.workspace)
        return source, output if output_path is None else self._path(output_path)

    def status(self, job_id: str) -> JobState:
        """Return the state of a job; for an array, the overall state of its tasks.

        Raises:
            SlurmError: Slurm is missing, or does not know the job.
        """
        return job_state(parse_jobs(job_id))

    def cancel(self, job_id: str) -> None:
        """Cancel a job; results so far are kept.

        Its run records that, for when Slurm has forgotten the job.

        Raises:
            SlurmError: Slurm is missing or refused.
            RunConflictError: the record of the run's jobs is damaged.
            StorageError: it cannot be read or written.
        """
        jobs = parse_jobs(job_id)
        entry = with_job(str(jobs[0]), os.environ)
        run = None if entry is None or entry.gone else RunDirectory(entry.run_dir)
        commands.cancel_jobs(run, jobs)

    def wait(
        self,
        job_id: str,
        *,
        interval: float = 10.0,
        timeout: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> JobState:
        """Wait until a job has ended and return its last state.

        Args:
            interval: seconds between two queries to Slurm.
            timeout: seconds after which to give up; None waits forever.

        Raises:
            SlurmError: Slurm does not know the job, or the time is up.
        """
        began = time.monotonic()
        while (state := self.status(job_id)).active:
            if timeout is not None and time.monotonic() - began >= timeout:
                raise SlurmError(
                    f"job {job_id} is still {state.name} after {timeout:g} s", "wait longer"
                )
            sleep(interval)
        return state

    def _setting(self, value: Any) -> Any:
        """Return a path below the workspace; the configuration refuses other values."""
        return self._path(value) if isinstance(value, str | Path) else value

    def _path(self, path: str | Path) -> Path:
        return self.workspace / expanded(path)


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given keywords by the names of their settings.

    Raises:
        ConfigError: a keyword is unknown (lists the known ones), or two name one setting.
    """
    refuse_two_names(options, lambda _: "run()", BY_NAME)
    named = {name: known_setting(name, "run(): ", BY_NAME).name for name in options}
    return {named[name]: value for name, value in options.items() if value is not None}


def _with(slurm: SlurmConfig, changes: Mapping[str, Any]) -> SlurmConfig:
    known = section_settings("slurm")
    return replace(
        slurm,
        **{name: parse_setting(known[name], value, "run()") for name, value in changes.items()},
    )
