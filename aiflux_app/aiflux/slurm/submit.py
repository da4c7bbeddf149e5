"""Submit a run: plan it, render its scripts, submit them and record the jobs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.core.batch.input_file import InputSummary
from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory, checked_output
from aiflux.core.runs.input_copy import is_compressed
from aiflux.core.runs.local_process import forget_process, refuse_process
from aiflux.core.runs.open import OpenedRun, RunDraft, draft_run
from aiflux.core.runs.output import shards_left
from aiflux.core.runs.plan import Plan, auto_shards, make_plan, read_plan, same_work
from aiflux.core.runs.status_file import finished_counts
from aiflux.engines.kinds import engine_kind
from aiflux.errors import ConfigError, ImageError, InputError, RunConflictError, SlurmError
from aiflux.estimates.estimate import SLURM, carry_estimate, known_estimate
from aiflux.image.container import (
    find_image,
    image_names,
    no_image_used,
    refuse_container,
    refuse_seal,
)
from aiflux.slurm.commands import jobs_of_script, max_array_size, submit, task_states
from aiflux.slurm.jobs import (
    Job,
    JobId,
    Submission,
    Submissions,
    TaskState,
    array_ranges,
    dependency,
    join_jobs,
    parse_ranges,
    read_submissions,
    remember,
    split_arrays,
)
from aiflux.slurm.limits import SiteLimit, most_shards, refuse_excess, site_limits
from aiflux.slurm.preflight.cluster import preflight
from aiflux.slurm.preflight.local import Finding, problem_with, refuse
from aiflux.slurm.script import JobScript, log_file, make_logs, render, render_then
from aiflux.slurm.start_time import ending_first
from aiflux.util.files import absolute, atomic_write, expanded, read_file
from aiflux.util.lease import acquire, refuse_living
from aiflux.util.records import to_json
from aiflux.util.times import utc_now, walltime_seconds
from aiflux.util.value_parsers import SERVE


@dataclass(frozen=True)
class PlannedRun:
    """A run that is checked, planned and rendered, but not submitted.

    Attributes:
        job: what the scripts have in common.
        scripts: each array (or the single job) and its batch script.
        image: None if the worker runs outside a container.
        active: shards that already wait or run, and are left alone.
        findings: warnings of the checks before submission.
        known: the submissions of the run when it was planned.
    """

    opened: OpenedRun
    job: JobScript
    image: Path | None
    slurm: SlurmConfig
    logs: Path
    scripts: tuple[tuple[JobScript, str], ...]
    active: int = 0
    findings: tuple[Finding, ...] = ()
    known: Submissions | None = None

    @property
    def run(self) -> RunDirectory:
        """The run directory."""
        return self.opened.run

    @property
    def script(self) -> str:
        """The text of the first script."""
        return self.scripts[0][1]


@dataclass(frozen=True)
class LaterRun:
    """A run whose jobs make its plan when they start; the attributes are those of PlannedRun."""

    run: RunDirectory
    image: Path | None
    slurm: SlurmConfig
    logs: Path
    scripts: tuple[tuple[JobScript, str], ...]
    known: Submissions | None = None


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
        ConfigError: the run requests more than the site permits.
        UsageError: settings, input, output or image are wrong (see ``draft_run``, ``find_image``).
        RunConflictError: a job of this run already waits or runs.
        StorageError: the run directory cannot be written.
    """
    kind = engine_kind(options)
    slurm = slurm.checked()
    limits = site_limits(os.environ if environ is None else environ)
    output = checked_output(output)
    run = RunDirectory.of_output(output)
    place = Path.cwd() if cwd is None else cwd
    job, found = job_script(config, slurm, input_path, output, options, place, limits, check=check)
    if is_compressed(expanded(input_path)):
        refuse_second(run, environ)  # its jobs read the copy, which the draft may replace
    draft = _draft(
        input_path,
        output,
        options,
        config.models_dir,
        kind,
        shards=_shard_count(job, slurm, output, options, limits, environ),
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
    return PlannedRun(
        opened, job, job.image, slurm, job.log, scripts, findings=findings, known=known
    )


def plan_later(
    config: Config,
    input_path: Path,
    output: Path,
    plan_step: Sequence[str],
    *,
    shards: int,
    environ: Mapping[str, str] | None = None,
) -> LaterRun:
    """Render jobs that make the plan of their run when they start.

    Args:
        input_path: made by ``plan_step``.
        plan_step: command that makes the input and the plan.
        shards: the largest number of shards that the plan may have.

    Raises:
        UsageError: as ``plan_job`` does.
    """
    options, slurm = config.run_options(), config.get_slurm_config().checked()
    limits = site_limits(os.environ if environ is None else environ)
    job, _ = job_script(config, slurm, input_path, output, options, Path.cwd(), limits, check=False)
    names = () if options.model is None else (options.model,)
    paths = [engine_kind(options).model_path(name) for name in (*names, *options.lora.values())]
    models = tuple(path for path in paths if path is not None)
    job = replace(job, plan_step=tuple(plan_step), model_paths=models)
    scripts = _array_scripts(job, range(shards), shards, slurm, environ)
    run = RunDirectory.of_output(checked_output(output))
    return LaterRun(run, job.image, slurm, job.log, scripts, read_submissions(run))


def job_script(
    config: Config,
    slurm: SlurmConfig,
    input_path: Path,
    output: Path,
    options: RunOptions,
    place: Path,
    limits: Mapping[str, SiteLimit],
    *,
    check: bool,
) -> tuple[JobScript, Path | None]:
    """Return the script of a run without its models, and the image if there is one.

    Values that cannot be rendered are refused before the input is read or anything is written.

    Args:
        place: first directory to search for an image.
        check: a missing image is reported later, with other problems.

    Raises:
        ConfigError: the run requests more than the site permits, or a setting cannot be used.
        ImageError: there is no image.
    """
    kind = engine_kind(options)
    refuse_excess(slurm, options, limits)
    if (options.engine_url or "").startswith(SERVE):
        raise ConfigError(
            f"a job cannot use {options.engine_url}: its container does not see the engine's files",
            "run it on this machine: aiflux run",
        )
    if options.nodes_per_engine > 1:
        refuse_seal(
            config,
            "a run with --nodes-per-engine cannot be sealed: the ranks of its engine need the "
            "network between the nodes",
        )
    if kind.worker_in_image:
        found = _image(config, place, kind.name, missing_ok=check)
        image = found or place / image_names(kind.name, slurm.gpu_vendor)[0]
    else:
        refuse_container(config)
        found = image = None
    job = JobScript.of_run(
        absolute(input_path),
        output,
        options,
        config.models_dir if kind.stores_models else None,
        slurm,
        image,
        logs_folder(config, RunDirectory.of_output(output)),
    )
    render(job)
    return job, found


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
    job: JobScript,
    slurm: SlurmConfig,
    output: Path,
    options: RunOptions,
    limits: Mapping[str, SiteLimit],
    environ: Mapping[str, str] | None,
) -> int | Callable[[InputSummary], int]:
    """Return the requested shards; for ``auto``, those of a pilot, or else a rule of thumb."""
    if isinstance(slurm.shards, int):
        return slurm.shards

    def automatic(summary: InputSummary) -> int:
        plan = make_plan(summary, output, options, None, engine_kind(options))
        estimate = known_estimate(plan, options.engine_url or SLURM)
        if estimate is None:
            found = auto_shards(summary, walltime_seconds(slurm.time))
        else:
            least = estimate.recommended(slurm.time)
            found = ending_first(least, job, most_shards(slurm, limits), environ)[0].shards
        return int(min(found, limits["shards"].amount)) if "shards" in limits else found

    return automatic


def _scripts(
    job: JobScript,
    plan: Plan,
    shards: Sequence[int],
    slurm: SlurmConfig,
    environ: Mapping[str, str] | None,
) -> tuple[tuple[JobScript, str], ...]:
    """Render a script for each necessary array of the shards."""
    return _array_scripts(job.with_models(plan), shards, len(plan.shards), slurm, environ)


def _array_scripts(
    job: JobScript,
    shards: Sequence[int],
    total: int,
    slurm: SlurmConfig,
    environ: Mapping[str, str] | None,
) -> tuple[tuple[JobScript, str], ...]:
    if total == 1:
        return ((job, render(job)),)
    at_once = "" if slurm.max_running is None else f"%{slurm.max_running}"
    scripts: list[tuple[JobScript, str]] = []
    for first, tasks in split_arrays(shards, max_array_size(environ)):
        part = replace(job, tasks=array_ranges(tasks) + at_once, first=first)
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
        ConfigError: a setting is wrong, or exceeds a limit of the site.
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
    refuse_excess(slurm, plan.options, site_limits(os.environ if environ is None else environ))
    if image is not None and not engine_kind(plan.options).worker_in_image:
        raise no_image_used(image)
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
    return PlannedRun(opened, job, image, slurm, logs, scripts, len(active), known=records)


def _recorded(recorded: SlurmConfig, changes: Mapping[str, Any]) -> SlurmConfig:
    return SlurmConfig(**{**to_json(recorded), **changes}).checked()


def submit_job(
    planned: PlannedRun,
    environ: Mapping[str, str] | None = None,
    *,
    after: Sequence[JobId] = (),
) -> tuple[JobId, ...]:
    """Write the scripts into the run directory, submit them and record the jobs there.

    With ``max_running``, several arrays wait for each other, so that no more run in total. If the
    same command is started several times at once, one submits the run; the others are refused.

    Args:
        after: jobs that have to succeed first. If one fails, Slurm cancels the run's jobs.

    Raises:
        RunConflictError: another command planned or submitted the run since it was planned here.
        SlurmError: Slurm is missing or refused a job; those before it stay submitted.
        StorageError: the run directory cannot be written.
    """
    run = planned.opened.run
    make_logs(planned.logs)
    with acquire(run.plan_lease, f"the run {planned.opened.plan.output}", wait=True):
        if not same_work(read_plan(run), planned.opened.plan) or (
            read_submissions(run) != planned.known
        ):
            raise RunConflictError(
                f"another command planned or submitted {planned.opened.plan.output} at the same "
                "time",
                f"check it with aiflux status {quote(str(run.path))}",
            )
        return _submit(planned, after, environ)


def submit_then(
    planned: PlannedRun,
    command: str,
    jobs: Sequence[JobId],
    environ: Mapping[str, str] | None = None,
) -> tuple[JobId, Path]:
    """Submit a small job that executes a shell command once the run is over.

    Args:
        jobs: the run's, which were just submitted.

    Returns:
        the job and its log.

    Raises:
        ConfigError: the command cannot be in a batch script.
        SlurmError: Slurm refused the job; the run stays submitted.
        StorageError: the run directory cannot be written.
    """
    script = planned.run.then_script
    text = render_then(planned.job, command)
    with atomic_write(script, 0o600) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    option = f"--dependency={dependency(jobs, 'afterany')}"
    try:
        job = submit(script, [option], environ)
    except SlurmError as error:
        raise SlurmError(
            f"the run is submitted ({join_jobs(jobs)}), but not the job of --then: {error.message}",
            f"correct the script and submit it: sbatch {option} {quote(str(script))}",
        ) from error
    return job, log_file(planned.logs, job.number)


def refuse_second_then(
    planned: PlannedRun, command: str, environ: Mapping[str, str] | None = None
) -> None:
    """Refuse a command after a run if a job to execute it already waits or runs.

    Raises:
        RunConflictError: there is such a job.
        SlurmError: Slurm is missing or does not answer.
    """
    content = render_then(planned.job, command).encode("utf-8", "surrogateescape")
    job = _unrecorded_job(planned.run.then_script, content, None, environ)
    if job is not None:
        raise RunConflictError(
            f"job {job} already waits for the run, to execute the same command",
            f"leave it, or cancel it: scancel {job.number}",
        )


def submit_later(
    later: LaterRun, after: Sequence[JobId], environ: Mapping[str, str] | None = None
) -> tuple[JobId, ...]:
    """Submit jobs that start when others have ended successfully, and record them.

    If one of the others fails, Slurm cancels the jobs.

    Raises:
        RunConflictError: another command planned or submitted the run since.
        SlurmError: Slurm is missing or refused a job; those before it stay submitted.
        StorageError: the run directory cannot be written.
    """
    later.run.make()
    make_logs(later.logs)
    with acquire(later.run.plan_lease, f"the run {later.run.path}", wait=True):
        if later.run.plan.exists() or read_submissions(later.run) != later.known:
            raise RunConflictError(
                f"another command planned or submitted {later.run.path} at the same time",
                "run the same command again",
            )
        return _submit(later, after, environ)


def _submit(
    planned: PlannedRun | LaterRun,
    after: Sequence[JobId],
    environ: Mapping[str, str] | None,
) -> tuple[JobId, ...]:
    run = planned.run
    for mark in run.path.glob("status/*.requeue"):
        mark.unlink(missing_ok=True)
    forget_process(run)
    submission = Submission(utc_now(), None, (), planned.logs)
    for number, (job, text) in enumerate(planned.scripts, start=1):
        script = run.script_part(number)
        content = text.encode("utf-8", "surrogateescape")
        id_ = _unrecorded_job(script, content, planned.known, environ)
        if id_ is None:
            with atomic_write(script, 0o600) as file:
                file.write(content)
            id_ = submit(script, _waits(submission, planned.slurm, after), environ=environ)
        jobs = (*submission.jobs, Job(id_.number, job.tasks, job.first, _shards_of(job)))
        submission = replace(submission, cluster=id_.cluster, jobs=jobs)
        remember(run, planned.image, planned.slurm, submission)
    return submission.ids


def _unrecorded_job(
    script: Path, content: bytes, known: Submissions | None, environ: Mapping[str, str] | None
) -> JobId | None:
    """Return the job of a start that was killed after sbatch, before it recorded the job.

    Without this, the same command would submit the same work a second time.
    """
    if read_file(script) != content:
        return None
    recorded = {id_.number for each in (known.submissions if known else ()) for id_ in each.ids}
    left = [id_ for id_ in jobs_of_script(script, environ) if id_.number not in recorded]
    states = task_states(left, environ) if left else {}
    active = (id_ for id_ in left if any(t.active for t in states.get(id_.number, {}).values()))
    return next(active, None)


def may_be_queued(run: RunDirectory, environ: Mapping[str, str] | None = None) -> bool:
    """Return whether Slurm has a job of a run, or may have one that was not recorded."""
    script = run.script_part(1)
    if run.submissions.exists() or not script.exists():
        return run.submissions.exists()
    try:
        return bool(jobs_of_script(script, environ))
    except SlurmError:
        return True  # its answer to sbatch may be lost, too


def _waits(submission: Submission, slurm: SlurmConfig, after: Sequence[JobId]) -> list[str]:
    """Return the options with which the next job waits for others.

    They replace the dependency in its script.
    """
    before = submission.ids[-1:] if slurm.max_running is not None else ()
    conditions = [text for text in (dependency(after), dependency(before, "afterany")) if text]
    if not conditions:
        return []
    given = slurm.sbatch_arg.get("dependency")
    options = [f"--dependency={','.join([given, *conditions] if given else conditions)}"]
    return [*options, "--kill-on-invalid-dep=yes"] if after else options


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


def refuse_busy(run: RunDirectory) -> None:
    """Refuse a run that a job waits for, or that any process works on.

    Raises:
        RunConflictError: there is one.
        SlurmError: Slurm is missing or does not answer.
    """
    refuse_living(run.path.glob(".shard-*.lease"), f"the run {run.path}")
    refuse_process(run)
    if run.submissions.exists():
        refuse_second(run)


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
