"""Collect the facts about a run: its files, its logs and Slurm's states."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.local_process import LocalProcess, read_process
from aiflux.core.runs.plan import Plan, Shard, read_plan
from aiflux.core.runs.status_file import (
    READ_TO_SHOW,
    StatusFile,
    output_change,
    output_there,
    read_run_status,
    read_status,
)
from aiflux.errors import AifluxError, ExitCode, RunConflictError, SlurmError, UsageError
from aiflux.slurm.commands import has_accounting, located, task_states
from aiflux.slurm.jobs import (
    JobId,
    Submissions,
    join_jobs,
    known_submissions,
    parse_jobs,
    read_submissions,
)
from aiflux.slurm.run_view import (
    ACTIVE,
    QUIET_SECONDS,
    RunFacts,
    RunState,
    RunView,
    ShardFacts,
    ShardState,
    ShardView,
    TaskId,
    Tasks,
    assemble,
    outcome,
)
from aiflux.slurm.script import log_file
from aiflux.util.lease import holder_lives

__all__ = [
    "Observer",
    "RunState",
    "RunView",
    "ShardState",
    "ShardView",
    "active_jobs",
    "gather",
    "gather_all",
    "outcome",
]

SLURM_SECONDS = 10.0


@dataclass(frozen=True)
class _Answer:
    """Slurm's answer: ``tasks``, or why there is none."""

    tasks: Tasks | None = None
    refusal: str | None = None


def gather(
    run: RunDirectory, environ: Mapping[str, str] | None = None, now: float | None = None
) -> RunView:
    """Return the state of a run.

    Slurm is asked only about unfinished shards. If it is missing or does not answer, the view comes
    from the files alone, and says so.

    Raises:
        RunConflictError: the run has no plan that can be read.
    """
    moment = time.time() if now is None else now
    facts = read_facts(run, moment)
    answer = _ask(facts.open_jobs, environ)
    return assemble(facts, answer.tasks, moment, answer.refusal)


def gather_all(
    runs: Iterable[RunDirectory], environ: Mapping[str, str] | None = None
) -> dict[Path, RunView | AifluxError]:
    """Return the states of several runs by run directory, with one query to Slurm.

    A run that cannot be read has its error instead.
    """
    now = time.time()
    known: dict[Path, RunFacts | AifluxError] = {}
    for run in runs:
        try:
            known[run.path] = read_facts(run, now)
        except AifluxError as error:
            known[run.path] = error
    read = [facts for facts in known.values() if isinstance(facts, RunFacts)]
    answer = _ask([job for facts in read for job in facts.open_jobs], environ)
    return {
        path: facts
        if isinstance(facts, AifluxError)
        else assemble(facts, answer.tasks, now, answer.refusal if facts.open_jobs else None)
        for path, facts in known.items()
    }


class Observer:
    """Observes one run, and asks Slurm at most every ten seconds.

    Raises:
        RunConflictError: the run has no plan that can be read.
    """

    def __init__(self, run: RunDirectory, environ: Mapping[str, str] | None = None) -> None:
        self.run = run
        self._environ = environ
        self._asked = float("-inf")
        self._jobs: Sequence[JobId] = ()
        self._answer = _Answer()

    def look(self) -> RunView:
        """Return the state of the run. An end is confirmed with Slurm first."""
        view = self._look(SLURM_SECONDS)
        if view.ended and self._asked_before:
            view = self._look(0.0)
        return view

    @property
    def _asked_before(self) -> bool:
        return time.monotonic() - self._asked > 1.0

    def _look(self, most: float) -> RunView:
        now = time.time()
        facts = read_facts(self.run, now)
        jobs = facts.open_jobs
        added = not set(jobs) <= set(self._jobs)
        if added or time.monotonic() - self._asked >= most:
            self._answer = _ask(jobs, self._environ)
            self._asked, self._jobs = time.monotonic(), jobs
        return assemble(facts, self._answer.tasks, now, self._answer.refusal if jobs else None)


def is_active(run: RunDirectory) -> bool:
    """Return whether a process or a job works on a run or waits for that; False without a plan.

    Raises:
        RunConflictError: the run directory is another user's, or others can write it.
    """
    if not run.plan.is_file():
        return False
    run.refuse_foreign()
    return gather(run).count(*ACTIVE) > 0


def active_jobs(run: RunDirectory, environ: Mapping[str, str] | None = None) -> list[JobId]:
    """Return the waiting and running jobs of a run, including earlier submissions.

    Raises:
        RunConflictError: the run has no plan that can be read.
        SlurmError: Slurm is missing or does not answer.
    """
    facts = read_facts(run, time.time())
    jobs = dict.fromkeys((*facts.jobs, *facts.open_jobs))
    if not jobs:
        return []
    tasks = task_states(list(jobs), environ)
    return [job for job in jobs if any(task.active for task in tasks.get(job.number, {}).values())]


def _ignore(text: str) -> None:
    pass


def _refuse_unknown(
    jobs: Sequence[JobId], environ: Mapping[str, str] | None, warn: Callable[[str], None]
) -> None:
    """Refuse jobs that Slurm does not know: a run that waits for them would start at once."""
    states = task_states(jobs, environ)
    unknown = [job for job in jobs if job.number not in states]
    if not unknown:
        return
    named = f"Slurm does not know the job {join_jobs(unknown)}"
    if has_accounting(unknown[0], environ):
        raise UsageError(named, "check the id, or name the run or its output")
    warn(
        f"{named}: it ended a while ago, or never existed (without accounting, Slurm soon forgets "
        "jobs); the run then starts at once"
    )


def jobs_to_wait_for(
    text: str, environ: Mapping[str, str] | None = None, *, warn: Callable[[str], None] = _ignore
) -> tuple[JobId, ...]:
    """Return the jobs that have to succeed before a run is finished; none if it is.

    Args:
        text: the run, as ``located`` accepts it, or ids of other jobs.
        warn: called with a warning if it is unknown whether a job exists.

    Raises:
        UsageError: it names neither a run nor a job that Slurm knows.
        RunConflictError: the run has failed, or no job in the queue will complete it.
        SlurmError: Slurm is missing or does not answer.
    """
    try:
        run = located(text, environ)
    except UsageError as unknown:
        try:
            jobs = parse_jobs(text)
        except SlurmError:
            raise unknown from None
        _refuse_unknown(jobs, environ, warn)
        return jobs
    view = gather(run, environ)
    if view.finished and outcome(view) is ExitCode.OK:
        return ()
    jobs = read_facts(run, time.time()).open_jobs
    if not jobs or view.count(*ACTIVE, ShardState.DONE) < len(view.shards):
        raise RunConflictError(
            f"{view.output} is {view.state.value}, and no job in the queue will complete it",
            view.next_command or "see aiflux status " + shlex.quote(str(view.output)),
        )
    return jobs


def read_facts(run: RunDirectory, now: float) -> RunFacts:
    """Read the files of a run.

    Raises:
        RunConflictError: the run has no plan that can be read.
    """
    plan = read_plan(run)
    submissions = known_submissions(run)
    tasks, cancelled = _submitted_tasks(submissions)
    listed = () if submissions is None else submissions.submissions
    whole = read_run_status(run, plan)
    process = read_process(run)
    working = process is not None and process.works(now)
    return RunFacts(
        run=run,
        plan=plan,
        shards=tuple(
            replace(
                _shard(run, plan, shard, tasks.get(shard.index), process, now),
                cancelled=shard.index in cancelled,
            )
            for shard in plan.shards
        ),
        whole=whole,
        output_there=output_there(plan.output, whole),
        output_change=_output_change(whole, plan),
        merging=working or _held(run.merge_lease, now),
        jobs=tuple(dict.fromkeys(job for each in listed for job in each.ids)),
        submitted=listed[-1].submitted if listed else None,
    )


def _submitted_tasks(submissions: Submissions | None) -> tuple[dict[int, TaskId], set[int]]:
    """Return the last submitted task of each shard, and the shards whose task was cancelled."""
    tasks, cancelled = {}, set[int]()
    for submission in () if submissions is None else submissions.submissions:
        for job in submission.jobs:
            for shard in job.shards:
                index = None if job.array is None else shard - job.first
                tasks[shard] = TaskId(JobId(job.job_id, submission.cluster), index)
                (cancelled.add if job.cancelled else cancelled.discard)(shard)
    return tasks, cancelled


def _shard(
    run: RunDirectory,
    plan: Plan,
    shard: Shard,
    task: TaskId | None,
    process: LocalProcess | None,
    now: float,
) -> ShardFacts:
    status = read_status(run, shard.index, plan)
    facts = ShardFacts(shard, status, task)
    if status is not None and status.completed:
        return facts
    if process is not None:  # only the newest start of a run has this record: no task is newer
        facts = replace(facts, task=None, process=process, process_lives=process.works(now))
    elif status is None:
        return facts
    else:
        facts = replace(facts, task=task or _own_task(status))
    lease = run.lease(shard.index)
    if not lease.exists():
        return replace(facts, quiet=_quiet(run.status(shard.index), now))
    lives = None
    with suppress(AifluxError):
        lives = holder_lives(lease)
    if lives is False and not lease.exists():  # it was released after the status was read
        return _shard(run, plan, shard, task, process, now)
    return replace(facts, lives=lives, quiet=_quiet(lease, now))


def _own_task(status: StatusFile) -> TaskId | None:
    """Return the task that a worker reports to run in: ``jobs.json`` has no job made by hand."""
    slurm = status.details.slurm
    if slurm.array_job and slurm.array_task.isdigit():
        return TaskId(JobId(slurm.array_job), int(slurm.array_task))
    return TaskId(JobId(slurm.job), None) if slurm.job else None


def _output_change(whole: StatusFile | None, plan: Plan) -> str | None:
    if whole is None or not whole.completed:
        return None
    return output_change(plan.output, whole, READ_TO_SHOW)


def _held(lease: Path, now: float) -> bool:
    with suppress(AifluxError):
        lives = holder_lives(lease)
        if lives is not None:
            return lives
    quiet = _quiet(lease, now)
    return quiet is not None and quiet < QUIET_SECONDS


def _quiet(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _ask(jobs: Sequence[JobId], environ: Mapping[str, str] | None) -> _Answer:
    if not jobs:
        return _Answer()
    try:
        return _Answer(task_states(jobs, os.environ if environ is None else environ))
    except SlurmError as error:
        return _Answer(None, error.message)


def job_logs(run: RunDirectory) -> dict[int, list[Path]]:
    """Return the logs of the jobs that worked on each shard, in the order of submission.

    A log is included even before its job has created it. A run in the background has one, too.
    """
    logs: dict[int, list[Path]] = {}
    submissions = read_submissions(run)
    for submission in () if submissions is None else submissions.submissions:
        for job in submission.jobs:
            for shard in job.shards:
                task = None if job.array is None else shard - job.first
                file = log_file(submission.log, job.job_id, task)
                known = logs.setdefault(shard, [])
                if file not in known:
                    known.append(file)
    process = read_process(run)
    if process is not None:
        logs.setdefault(0, []).append(process.log)
    return logs


def engine_logs(run: RunDirectory, shard: int) -> list[Path]:
    """Return the existing engine logs of a shard."""
    prefix = run.engine_log(shard, 0).name.removesuffix("-0.log")
    return sorted(run.logs.glob(f"{prefix}-*.log"))
