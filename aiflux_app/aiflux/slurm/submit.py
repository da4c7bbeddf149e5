"""Submit a run: plan it, render its scripts, submit them and record the jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.core.batch.input_file import InputSummary
from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory, checked_output
from aiflux.core.runs.open import OpenedRun, RunDraft, draft_run
from aiflux.core.runs.output import shards_left
from aiflux.core.runs.plan import Plan, auto_shards, make_plan, read_plan, same_work
from aiflux.core.runs.status_file import finished_counts
from aiflux.engines.kinds import engine_kind
from aiflux.errors import ConfigError, ImageError, InputError, RunConflictError
from aiflux.estimates.estimate import SLURM, carry_estimate, known_estimate
from aiflux.image.container import find_image, image_names
from aiflux.slurm.commands import max_array_size, submit, task_states
from aiflux.slurm.jobs import (
    Job,
    JobId,
    Submission,
    Submissions,
    TaskState,
    array_ranges,
    parse_ranges,
    read_submissions,
    remember,
    split_arrays,
)
from aiflux.slurm.preflight.cluster import preflight
from aiflux.slurm.preflight.local import Finding, problem_with, refuse
from aiflux.slurm.script import JobScript, render
from aiflux.util.files import atomic_write, expanded, storage_error
from aiflux.util.lease import acquire
from aiflux.util.records import to_json
from aiflux.util.times import utc_now, walltime_seconds


@dataclass(frozen=True)
class PlannedRun:
    """A run that is checked, planned and rendered, but not submitted.

    Attributes:
        scripts: each array (or the single job) and its batch script.
        image: None if the worker runs outside a container.
        active: shards that already wait or run, and are left alone.
        findings: warnings of the checks before submission.
        known: the submissions of the run when it was planned.
    """

    opened: OpenedRun
    image: Path | None
    slurm: SlurmConfig
    logs: Path
    scripts: tuple[tuple[JobScript, str], ...]
    active: int = 0
    findings: tuple[Finding, ...] = ()
    known: Submissions | None = None

    @property
    def script(self) -> str:
        """The text of the first script."""
        return self.scripts[0][1]


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
    check: bool = True,
    write: bool = True,
    environ: Mapping[str, str] | None = None,
) -> PlannedRun:
    """Check everything, plan the run and render its batch scripts.

    Args:
        cwd: first directory to search for ``aiflux.sif`` (default: the current one).
        check: check Slurm, image and disk space before (preflight).
        write: False plans without touching the disk (a dry run).

    Raises:
        PreflightError: the checks found problems; lists all of them.
        UsageError: settings, input, output or image are wrong (see ``draft_run``, ``find_image``).
        RunConflictError: a job of this run already waits or runs.
        StorageError: the run directory cannot be written.
    """
    kind = engine_kind(options)
    slurm = slurm.checked()
    if options.nodes_per_engine > 1:
        refuse_seal(
            config,
            "a run with --nodes-per-engine cannot be sealed: the ranks of its engine need the "
            "network between the nodes",
        )
    output = checked_output(output)
    run = RunDirectory.of_output(output)
    place = Path.cwd() if cwd is None else cwd
    if kind.worker_in_image:
        found = _image(config, place, kind.name, missing_ok=check)
        image = found or place / image_names(kind.name, slurm.gpu_vendor)[0]
    else:
        refuse_container(config)
        found = image = None
    job = JobScript.of_run(
        expanded(input_path).absolute(),
        output,
        options,
        config.models_dir if kind.stores_models else None,
        slurm,
        image,
        logs_folder(config, run),
    )
    # Values that cannot be rendered are refused before the input is read or anything is written.
    render(job)
    draft = _draft(
        input_path,
        output,
        options,
        config.models_dir,
        kind,
        shards=_shard_count(slurm, output, options),
        force=force,
        force_resume=force_resume,
    )
    findings: tuple[Finding, ...] = ()
    if check and (isinstance(draft, InputError) or not draft.finished):
        plan = None if isinstance(draft, InputError) else draft.plan
        findings = preflight(config, slurm, options, found, plan, environ, place, submits=write)
    if isinstance(draft, InputError):
        raise problem_with(draft, findings)
    refuse(findings)
    known = read_submissions(run)
    if write and not draft.finished:
        refuse_second(run, environ)
    opened = draft.open(write=write)
    if write and not opened.finished:
        carry_estimate(opened.plan, opened.run)
    scripts = _scripts(job, opened.plan, opened.open_shards, slurm, environ)
    return PlannedRun(opened, job.image, slurm, job.log, scripts, findings=findings, known=known)


def refuse_container(config: Config) -> None:
    """Refuse a seal and an image that somebody asked for, for a run without a container.

    Raises:
        ConfigError: the image is given as an argument, or the seal is set and not by default.
    """
    refuse_seal(
        config,
        "a run with --engine-command cannot be sealed: there is no container, and the command's "
        "programs have the node's network",
        ", or use an engine with an image (--engine)",
    )
    image = config.values["image"]
    if image.origin == "argument":
        raise _no_image_used(image.value)


def refuse_seal(config: Config, why: str, otherwise: str = "") -> None:
    """Refuse a seal that somebody asked for, for a run that cannot be sealed.

    Raises:
        ConfigError: the seal is set, and not by default.
    """
    seal = config.values["seal"]
    if seal.value and seal.origin != "default":
        raise ConfigError(
            f"seal = true ({seal.origin}), but {why}", f"accept that with --no-seal{otherwise}"
        )


def _no_image_used(image: Path) -> ConfigError:
    return ConfigError(
        f"the image {image} would not be used: a run with --engine-command has no container",
        "omit --image; the command can start a container itself",
    )


def _image(config: Config, cwd: Path, engine: str, *, missing_ok: bool) -> Path | None:
    """Return the image; None if it is missing, and that can be reported later."""
    try:
        return find_image(config, cwd, engine=engine)
    except ImageError:
        if missing_ok:
            return None
        raise


def _draft(*arguments: Any, **keywords: Any) -> RunDraft | InputError:
    """Draft a run; return the error of a wrong input, to report it with other problems."""
    try:
        return draft_run(*arguments, **keywords)
    except InputError as error:
        return error


def _shard_count(
    slurm: SlurmConfig, output: Path, options: RunOptions
) -> int | Callable[[InputSummary], int]:
    """Return the requested shards; for ``auto``, those of a pilot, or else a rule of thumb."""
    if isinstance(slurm.shards, int):
        return slurm.shards

    def automatic(summary: InputSummary) -> int:
        plan = make_plan(summary, output, options, None, engine_kind(options))
        estimate = known_estimate(plan, options.engine_url or SLURM)
        if estimate is not None:
            return estimate.shards_for(slurm.time)
        return auto_shards(summary, walltime_seconds(slurm.time))

    return automatic


def _scripts(
    job: JobScript,
    plan: Plan,
    shards: Sequence[int],
    slurm: SlurmConfig,
    environ: Mapping[str, str] | None,
) -> tuple[tuple[JobScript, str], ...]:
    """Render a script for each necessary array of the shards."""
    job = job.with_models(plan)
    run = RunDirectory(job.run_dir)
    if len(plan.shards) == 1:
        job = replace(job, script=run.script_part(1))
        return ((job, render(job)),)
    at_once = "" if slurm.max_running is None else f"%{slurm.max_running}"
    scripts: list[tuple[JobScript, str]] = []
    for first, tasks in split_arrays(shards, max_array_size(environ)):
        script = run.script_part(len(scripts) + 1)
        part = replace(job, tasks=array_ranges(tasks) + at_once, first=first, script=script)
        scripts.append((part, render(part)))
    return tuple(scripts)


def plan_resume(
    run: RunDirectory,
    changes: Mapping[str, Any],
    image: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> PlannedRun:
    """Render batch scripts for the rest of a run that was submitted before.

    Shards that are done, wait or run are skipped. The plan is unchanged.

    Args:
        changes: Slurm settings that differ from the last submission.
        image: another image than the last submission's.

    Raises:
        ImageError: the image does not exist.
        RunConflictError: there is no plan, or it was never submitted.
        ConfigError: a setting is wrong.
    """
    run.refuse_foreign()
    plan = read_plan(run)
    records = read_submissions(run)
    if records is None:
        raise RunConflictError(
            f"the run {run.path} was never submitted to Slurm",
            f"continue it on this machine: aiflux resume --local {quote(str(plan.output))}; or "
            "submit it: run the same `aiflux run` command again",
        )
    slurm = _recorded(records.slurm, changes)
    if slurm.shards != records.slurm.shards:
        raise ConfigError(
            "a run cannot be resumed with another number of shards",
            "use the whole `aiflux run` command with another --shards: it splits the input again",
        )
    if image is not None and not engine_kind(plan.options).worker_in_image:
        raise _no_image_used(image)
    image = image or records.image
    if image is not None and not image.exists():
        raise ImageError(f"image not found: {image}", "use another with --image")
    counts = finished_counts(plan, run)
    left = () if counts is not None else shards_left(plan, run)
    active = active_shards(run, environ)
    missing = tuple(shard for shard in left if shard not in active)
    logs = records.submissions[-1].log
    job = JobScript.of_run(
        plan.input_path, plan.output, plan.options, plan.models_dir, slurm, image, logs
    )
    opened = OpenedRun(plan, run, True, counts, missing)
    scripts = _scripts(job, plan, missing, slurm, environ) if missing else ()
    return PlannedRun(opened, image, slurm, logs, scripts, len(active), known=records)


def _recorded(recorded: SlurmConfig, changes: Mapping[str, Any]) -> SlurmConfig:
    return SlurmConfig(**{**to_json(recorded), **changes}).checked()


def submit_job(planned: PlannedRun, environ: Mapping[str, str] | None = None) -> tuple[JobId, ...]:
    """Write the scripts into the run directory, submit them and record the jobs there.

    With ``max_running``, several arrays wait for each other, so that no more run in total. If the
    same command is started several times at once, one submits the run; the others are refused.

    Raises:
        RunConflictError: another command planned or submitted the run since it was planned here.
        SlurmError: Slurm is missing or refused a job; those before it stay submitted.
        StorageError: the run directory cannot be written.
    """
    run = planned.opened.run
    try:
        planned.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, planned.logs) from error
    with acquire(run.plan_lease, f"the run {planned.opened.plan.output}", wait=True):
        if not same_work(read_plan(run), planned.opened.plan) or (
            read_submissions(run) != planned.known
        ):
            raise RunConflictError(
                f"another command planned or submitted {planned.opened.plan.output} at the same "
                "time",
                f"check it with aiflux status {quote(str(run.path))}",
            )
        return _submit(planned, environ)


def _submit(planned: PlannedRun, environ: Mapping[str, str] | None) -> tuple[JobId, ...]:
    run = planned.opened.run
    for mark in run.path.glob("status/*.requeue"):
        mark.unlink(missing_ok=True)
    submission = Submission(utc_now(), None, (), planned.logs)
    for number, (job, text) in enumerate(planned.scripts, start=1):
        script = run.script_part(number)
        with atomic_write(script, 0o600) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
        id_ = submit(script, _after(submission, planned.slurm), environ=environ)
        jobs = (*submission.jobs, Job(id_.number, job.tasks, job.first, _shards_of(job)))
        submission = replace(submission, cluster=id_.cluster, jobs=jobs)
        remember(run, planned.image, planned.slurm, submission)
    return submission.ids


def _after(submission: Submission, slurm: SlurmConfig) -> list[str]:
    if slurm.max_running is None or not submission.jobs:
        return []
    return [f"--dependency=afterany:{submission.jobs[-1].job_id}"]


def _shards_of(job: JobScript) -> tuple[int, ...]:
    if job.tasks is None:
        return (job.shard,)
    return tuple(job.first + task for task in parse_ranges(job.tasks))


def logs_folder(config: Config, run: RunDirectory) -> Path:
    """Return the directory of the job's log: the configured one, or else the run directory's."""
    return config.logs_dir or run.logs


def refuse_second(run: RunDirectory, environ: Mapping[str, str] | None = None) -> None:
    """Refuse to work on a run that a job waits for or works on.

    Raises:
        RunConflictError: there is such a job.
        SlurmError: Slurm is missing or does not answer.
    """
    active = active_shards(run, environ)
    if active:
        job, state = next(iter(active.values()))
        raise RunConflictError(
            f"job {job} of this run is already {state.name}",
            f"wait for it, or cancel it first: aiflux cancel {quote(str(run.path))}",
        )


def active_shards(
    run: RunDirectory, environ: Mapping[str, str] | None = None
) -> dict[int, tuple[JobId, TaskState]]:
    """Return the shards of a run that wait or run in Slurm, each with its job.

    Jobs that Slurm no longer knows are ignored.

    Raises:
        SlurmError: Slurm is missing or does not answer.
    """
    records = read_submissions(run)
    submissions = records.submissions if records is not None else ()
    ids = [id_ for each in submissions for id_ in each.ids]
    states = task_states(ids, environ) if ids else {}
    active = {}
    for submission in submissions:
        for job, id_ in zip(submission.jobs, submission.ids, strict=True):
            for task, state in states.get(job.job_id, {}).items():
                if state.active:
                    shard = job.shards[0] if task is None else job.first + task
                    active[shard] = (id_, state)
    return active
