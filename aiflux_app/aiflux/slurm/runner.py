"""The Python API: submit a run from Python and follow its job."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.core.config import Config, SlurmConfig
from aiflux.core.preflight import told
from aiflux.core.registry import register
from aiflux.core.rundir import default_output
from aiflux.core.settings import BY_NAME, parse_setting
from aiflux.errors import ConfigError, OutputExistsError, SlurmError
from aiflux.slurm import commands
from aiflux.slurm.jobs import JobState, join_jobs, overall_state, parse_jobs
from aiflux.slurm.queue import task_states
from aiflux.slurm.submission import plan_job, submit_job

_log = logging.getLogger(__name__)


class SlurmRunner:
    """Submits runs to Slurm.

    Args:
        config: what to ask of Slurm (default: as configured; see ``Config.get_slurm_config``).
        workspace: where relative paths, ``aiflux.yaml``, ``.env`` and ``aiflux.sif`` are looked
            for (default: the current directory).

    Raises:
        ConfigError: a setting is wrong.
    """

    def __init__(
        self, config: SlurmConfig | None = None, workspace: str | Path | None = None
    ) -> None:
        self.workspace = (
            Path.cwd() if workspace is None else Path(workspace).expanduser().absolute()
        )
        self.settings = Config(directory=self.workspace)
        self.config = self.settings.get_slurm_config() if config is None else config

    def run(
        self,
        input_path: str | Path,
        output_path: str | Path | None = None,
        *,
        force: bool = False,
        force_resume: bool = False,
        preflight: bool = True,
        **options: Any,
    ) -> str:
        """Check the input, plan the run, submit it and return the job's id.

        Args:
            input_path: requests, OpenAI Batch JSONL.
            output_path: ``*.json`` or ``*.jsonl`` (default: ``<input stem>.results.json`` in the
                workspace).
            force: replace an output that is there; a finished run starts anew.
            force_resume: go on although model or parameters changed.
            preflight: ask Slurm, the image and the disks first whether they will have it; what
                they warn of is logged.
            options: settings of the run (``model``, ``batch_size``, ``max_retries``,
                ``temperature``, ...), of Slurm (``account``, ``time``, ...) and paths (``image``,
                ``models_dir``, ...); None means not given. Without one that is given here, the
                environment, ``.env`` and ``aiflux.yaml`` hold, and for Slurm this runner's
                ``config``.

        Returns:
            the job's id; ``id;cluster`` where sbatch names a cluster, and ``id,id`` where the run
            needed several arrays. ``status``, ``wait`` and ``cancel`` take it as it is.

        Raises:
            ConfigError: an option is unknown or wrong.
            PreflightError: the checks found what will go wrong; names all of it.
            InputError: the input is wrong; lists its lines.
            OutputExistsError: the run is finished already, or the output is another's.
            RunConflictError: the run directory is another's, or a job of this run is active.
            ImageError: the image is missing.
            SlurmError: Slurm is missing or refused the job.
            StorageError: the run directory cannot be written.
        """
        sections = _by_section(options)
        config = Config(arguments=self._paths(sections["paths"]), directory=self.workspace)
        slurm = _with(self.config, sections["slurm"])
        source = self._path(input_path)
        output = default_output(source, self.workspace)
        planned = plan_job(
            config,
            slurm,
            source,
            output if output_path is None else self._path(output_path),
            config.run_options(**sections["run"]),
            cwd=self.workspace,
            force=force,
            force_resume=force_resume,
            check=preflight,
        )
        for finding in planned.findings:
            _log.warning(told(finding))
        opened = planned.opened
        if opened.finished:
            raise OutputExistsError(
                f"the run is finished: its results are in {opened.plan.output}",
                "use them; force=True runs it anew",
            )
        if not opened.open_shards:
            raise OutputExistsError(
                "every request is done, and only the output is missing",
                f"write it: aiflux merge {quote(str(opened.run.path))}",
            )
        jobs = submit_job(planned)
        plan = opened.plan
        warning = register(
            opened.run.path,
            plan.output,
            [str(job) for job in jobs],
            input=plan.input_path,
            models=plan.models,
            requests=plan.requests,
        )
        if warning:
            _log.warning(warning)
        return join_jobs(jobs)

    def status(self, job_id: str) -> JobState:
        """Return the state of a job; for an array that of its tasks together.

        Raises:
            SlurmError: Slurm is missing, or knows no such job.
        """
        states = task_states(parse_jobs(job_id))
        state = overall_state(state for tasks in states.values() for state in tasks.values())
        if state is None:
            raise SlurmError(
                f"Slurm knows no job {job_id}",
                "check the id; what is known of a job that ended long ago: aiflux status RUN",
            )
        return state

    def cancel(self, job_id: str) -> None:
        """Cancel a job; what was done is kept.

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
            interval: seconds between two questions to Slurm.
            timeout: seconds after which to give up; None waits for ever.

        Raises:
            SlurmError: Slurm knows no such job, or the time is up.
        """
        began = time.monotonic()
        while (state := self.status(job_id)).active:
            if timeout is not None and time.monotonic() - began >= timeout:
                raise SlurmError(
                    f"job {job_id} is still {state.name} after {timeout:g} s", "wait longer"
                )
            sleep(interval)
        return state

    def _paths(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value if name == "log_level" else self._path(value)
            for name, value in options.items()
        }

    def _path(self, path: str | Path) -> Path:
        return self.workspace / Path(path).expanduser()


def _by_section(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort keywords into the sections of the settings; None is dropped.

    Raises:
        ConfigError: a keyword is unknown; lists the known ones.
    """
    sections: dict[str, dict[str, Any]] = {"run": {}, "slurm": {}, "paths": {}}
    for name, value in options.items():
        if name not in BY_NAME:
            known = ", ".join(sorted(BY_NAME))
            raise ConfigError(f"run() has no option {name!r}", f"known are: {known}")
        if value is not None:
            sections[BY_NAME[name].section][name] = value
    return sections


def _with(slurm: SlurmConfig, changes: Mapping[str, Any]) -> SlurmConfig:
    settings = {name: BY_NAME[name] for name in changes}
    return replace(
        slurm,
        **{
            item.name: parse_setting(item, changes[name], "run()")
            for name, item in settings.items()
        },
    )
