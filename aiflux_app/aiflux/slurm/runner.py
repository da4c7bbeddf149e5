"""The Python API: submit a run from Python and follow its job."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.declaration import known_setting, parse_setting
from aiflux.core.config.settings import BY_NAME, section_settings
from aiflux.core.config.sources import ModelConfig
from aiflux.core.runs.directory import default_output
from aiflux.core.runs.registry import register_plan
from aiflux.errors import OutputExistsError, SlurmError
from aiflux.image.container import local_choices
from aiflux.slurm import commands
from aiflux.slurm.commands import job_state
from aiflux.slurm.jobs import JobState, join_jobs, parse_jobs
from aiflux.slurm.preflight.local import finding_text
from aiflux.slurm.submit import plan_job, submit_job
from aiflux.util.files import expanded

_log = logging.getLogger(__name__)


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
        self.workspace = Path.cwd() if workspace is None else expanded(workspace).absolute()
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
            options: settings of the run (``model``, ``batch_size``, ``max_retries``,
                ``temperature``, ...), of Slurm (``account``, ``time``, ...) and paths (``image``,
                ``models_dir``, ...); None means not given. Settings that are not given here
                come from the environment, ``.env`` and ``aiflux.yaml``, and for Slurm from this
                runner's ``config``.

        Returns:
            the job's id; ``id;cluster`` if sbatch names a cluster, and ``id,id`` if the run needed
            several arrays. ``status``, ``wait`` and ``cancel`` accept all forms.

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
        sections = _by_section(options)
        loaded = model_config if isinstance(model_config, ModelConfig) else None
        if model_config is not None and loaded is None:
            sections["run"]["model_config"] = self._setting(model_config)
        paths = {name: self._setting(value) for name, value in sections["paths"].items()}
        # A seal that somebody asks for may be impossible.
        seal = {"seal": sections["slurm"].get("seal")}
        config = self.settings.changed({**sections["run"], **seal, **paths}, loaded)
        slurm = _with(self.config, sections["slurm"])
        source = self._path(input_path)
        output = default_output(source, self.workspace)
        planned = plan_job(
            config,
            slurm,
            source,
            output if output_path is None else self._path(output_path),
            config.run_options(),
            cwd=self.workspace,
            force=force,
            force_resume=force_resume,
            check=preflight,
            write=not dry_run,
        )
        choices = local_choices(config, planned.image)
        if choices is not None:
            _log.warning(choices)
        for finding in planned.findings:
            _log.warning(finding_text(finding))
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
        jobs = submit_job(planned)
        warning = register_plan(opened.plan, jobs)
        if warning:
            _log.warning(warning)
        return join_jobs(jobs)

    def status(self, job_id: str) -> JobState:
        """Return the state of a job; for an array, the overall state of its tasks.

        Raises:
            SlurmError: Slurm is missing, or does not know the job.
        """
        return job_state(parse_jobs(job_id))

    def cancel(self, job_id: str) -> None:
        """Cancel a job; results so far are kept.

        Raises:
            SlurmError: Slurm is missing or refused.
        """
        for job in parse_jobs(job_id):
            commands.cancel(job)

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


def _by_section(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort keywords into the sections of the settings, without None.

    Raises:
        ConfigError: a keyword is unknown; lists the known ones.
    """
    sections: dict[str, dict[str, Any]] = {"run": {}, "slurm": {}, "paths": {}}
    for name, value in options.items():
        setting = known_setting(name, "run(): ", BY_NAME)
        if value is not None:
            sections[setting.section][setting.name] = value
    return sections


def _with(slurm: SlurmConfig, changes: Mapping[str, Any]) -> SlurmConfig:
    known = section_settings("slurm")
    return replace(
        slurm,
        **{name: parse_setting(known[name], value, "run()") for name, value in changes.items()},
    )
