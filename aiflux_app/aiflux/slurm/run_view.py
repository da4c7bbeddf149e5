"""Combine the facts about a run, from its files and from Slurm, into one view."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.local_process import LocalProcess
from aiflux.core.runs.plan import Plan, Shard
from aiflux.core.runs.status_file import (
    Counts,
    SlurmJob,
    StatusDetails,
    StatusFile,
    Tuning,
    allowed_besides,
    failed_text,
    seal_of,
)
from aiflux.engines.kinds import engine_kind
from aiflux.engines.server_options import given_options
from aiflux.errors import ExitCode
from aiflux.slurm.jobs import JobId, TaskState, dependency, seconds_until
from aiflux.util.records import to_json
from aiflux.util.text import counted
from aiflux.util.times import duration

QUIET_SECONDS = 45.0  # a lease is renewed every 3 s; the rest allows for clock differences
LONG_QUIET_SECONDS = 180.0
_WORKING = {"validating", "in_progress", "finalizing", "cancelling"}
_ENDING = {"COMPLETING", "SIGNALING", "STAGE_OUT"}
_ON_NODE = {"RUNNING", *_ENDING}
_INTERRUPTED = {"CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "DEADLINE", "REVOKED"}
_CANCELLED_EARLY = "cancelled before the work began"
SHOWN_ERRORS = 5
Tasks = Mapping[str, Mapping[int | None, TaskState]]


class ShardState(str, Enum):
    """The state of a shard; a ``stopped`` one can be resumed."""

    WAITING = "waiting"
    RUNNING = "running"
    STOPPING = "stopping"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"
    NOT_SUBMITTED = "not submitted"


_ENDED = {"cancelled": ShardState.STOPPED, "failed": ShardState.FAILED}
ACTIVE = {ShardState.WAITING, ShardState.RUNNING, ShardState.STOPPING}


@dataclass(frozen=True)
class TaskId:
    """The Slurm task that works on a shard; ``index`` is None for a job that is not an array."""

    job: JobId
    index: int | None

    def __str__(self) -> str:
        return self.job.number if self.index is None else f"{self.job.number}_{self.index}"


@dataclass(frozen=True)
class ShardFacts:
    """The facts about a shard from its files.

    Attributes:
        status: as its worker last wrote it, for this plan.
        task: the one that was last submitted for it; ``cancelled``: whether the user cancelled it.
        lives: whether a living process holds its lease; None if that is unknown here.
        quiet: seconds since its lease (or else its status) changed; None if it has neither.
        process: the one that was last started for it in the background, if no task was since.
        process_lives: whether that one is alive, as far as is known here.
    """

    shard: Shard
    status: StatusFile | None
    task: TaskId | None
    cancelled: bool = False
    lives: bool | None = None
    quiet: float | None = None
    process: LocalProcess | None = None
    process_lives: bool = False

    @property
    def word(self) -> str:
        """The state in its status; "" before a worker has written one."""
        return "" if self.status is None or self.status.unstarted else self.status.state

    @property
    def details(self) -> StatusDetails:
        """AI-Flux's own part of the status."""
        return StatusDetails() if self.status is None else self.status.details

    @property
    def alive(self) -> bool:
        """Whether a process works on the shard, according to its files."""
        if self.process_lives:
            return True
        if self.lives is not None:
            return self.lives
        return self.quiet is not None and self.quiet < QUIET_SECONDS

    @property
    def exit_code(self) -> int | None:
        """The exit code that the worker ended with."""
        return self.details.exit_code

    @property
    def silent(self) -> bool:
        """Whether the process in the background has written no status yet."""
        if self.process is None:
            return False
        moment = None if self.status is None else self.status.moment
        return moment is None or moment < self.process.since


@dataclass(frozen=True)
class ShardVerdict:
    """A shard's state, the reason (may be ""), and the exit code if it ended."""

    state: ShardState
    reason: str = ""
    exit_code: int | None = None


def judge(facts: ShardFacts, task: TaskState | None, answered: bool) -> ShardVerdict:
    """Return the state of a shard.

    Args:
        task: Slurm's state of the shard's task; None if Slurm does not know it.
        answered: whether Slurm answered; if not, the files decide.
    """
    if facts.word == "completed":
        return ShardVerdict(ShardState.DONE)
    if task is not None and task.active:
        return _in_slurm(facts, task)
    if facts.process is not None and facts.silent:
        return _without_sign(facts, facts.process)
    if facts.word in _WORKING:
        return _said_to_work(facts, task)
    if facts.word in _ENDED:
        state = ShardState.STOPPING if facts.process_lives or facts.lives else _ENDED[facts.word]
        return ShardVerdict(state, _ended(facts), facts.exit_code)
    return _without_status(facts, task, answered)


def _in_slurm(facts: ShardFacts, task: TaskState) -> ShardVerdict:
    if task.name not in _ON_NODE:
        return ShardVerdict(ShardState.WAITING, _why_waiting(task))
    if task.name in _ENDING:
        return ShardVerdict(ShardState.STOPPING, task.name.lower())
    if facts.word in _WORKING - {"cancelling"}:
        silent = facts.quiet is not None and facts.quiet > LONG_QUIET_SECONDS
        reason = f"no sign of life for {(facts.quiet or 0) / 60:.0f} min" if silent else ""
        return ShardVerdict(ShardState.RUNNING, reason)
    if facts.word == "cancelling" or _just_ended(facts):
        return ShardVerdict(ShardState.STOPPING, _ended(facts))
    return ShardVerdict(ShardState.RUNNING, "starting")


def _why_waiting(task: TaskState) -> str:
    why = task.reason or task.name.lower()
    known = task.start is not None and seconds_until(task.start) is not None
    return f"{why}, expected to start {task.start}" if known else why


def _just_ended(facts: ShardFacts) -> bool:
    """Return whether the job still exists only because its worker ended a moment ago."""
    recent = facts.quiet is not None and facts.quiet < QUIET_SECONDS
    return facts.word in ("cancelled", "failed") and recent and _of_task(facts)


def _of_task(facts: ShardFacts) -> bool:
    """Return whether the last submitted task wrote the status."""
    slurm = facts.details.slurm
    return facts.task is not None and facts.task.job.number == (slurm.array_job or slurm.job)


def _without_sign(facts: ShardFacts, process: LocalProcess) -> ShardVerdict:
    """Return the state before the process in the background writes its first status."""
    if facts.process_lives or facts.lives:
        return ShardVerdict(ShardState.RUNNING, "starting")
    if process.cancelled:
        return ShardVerdict(ShardState.STOPPED, _CANCELLED_EARLY)
    reason = f"its process ended before the work began; see {process.log}"
    return ShardVerdict(ShardState.FAILED, reason)


def _said_to_work(facts: ShardFacts, task: TaskState | None) -> ShardVerdict:
    """Return the state if the status names an active worker, but Slurm does not."""
    if facts.alive:
        stopping = facts.word == "cancelling" or task is not None
        return ShardVerdict(ShardState.STOPPING if stopping else ShardState.RUNNING)
    if task is None:
        if facts.cancelled:
            return ShardVerdict(ShardState.STOPPED, "its job was cancelled")
        reason = "its process is gone" if facts.task is None else "Slurm no longer has its job"
        return ShardVerdict(ShardState.LOST, reason)
    ended_by_slurm = task.name in _INTERRUPTED - {"NODE_FAIL"}
    state = ShardState.STOPPED if ended_by_slurm else ShardState.LOST
    return ShardVerdict(state, f"its job ended: {_slurm_words(task)}", task.exit_code)


def _without_status(facts: ShardFacts, task: TaskState | None, answered: bool) -> ShardVerdict:
    if facts.task is None:
        return ShardVerdict(ShardState.NOT_SUBMITTED)
    if task is None and facts.cancelled:
        return ShardVerdict(ShardState.STOPPED, _CANCELLED_EARLY)
    if task is None and answered:
        return ShardVerdict(ShardState.LOST, "Slurm no longer has its job, and it left no status")
    if task is None:
        return ShardVerdict(ShardState.WAITING, "submitted; Slurm cannot be asked")
    words = f"its job ended before the work began: {_slurm_words(task)}"
    if task.name in _INTERRUPTED or task.exit_code == ExitCode.STOPPED:
        return ShardVerdict(ShardState.STOPPED, words, task.exit_code)
    return ShardVerdict(ShardState.FAILED, words, task.exit_code)


def _slurm_words(task: TaskState) -> str:
    words = task.name
    if task.exit_code:
        words += f", exit code {task.exit_code}"
    known = task.reason in (None, "", "NonZeroExitCode", task.name)
    return words if known else f"{words} ({task.reason})"


def _ended(facts: ShardFacts) -> str:
    return facts.details.ended or ""


class RunState(str, Enum):
    """The state of a run."""

    WAITING = "waiting"
    RUNNING = "running"
    MERGING = "merging"
    FINISHED = "finished"
    WITH_FAILURES = "finished with failures"
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"
    NOT_MERGED = "not merged"
    CHANGED = "output changed"


_GOING = {RunState.WAITING, RunState.RUNNING, RunState.MERGING}
_COMPLETE = {RunState.FINISHED, RunState.WITH_FAILURES}


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run from its files.

    Attributes:
        whole: status of the whole run, for this plan.
        output_there: whether the output exists.
        output_change: how the finished output was changed since it was written, or None.
        merging: whether a living process holds the lease for writing the output, or was started
            in the background.
        jobs: every job that was submitted, oldest first.
        submitted: when that was done last (UTC); None for a run in the foreground.
    """

    run: RunDirectory
    plan: Plan
    shards: tuple[ShardFacts, ...]
    whole: StatusFile | None
    output_there: bool
    output_change: str | None
    merging: bool
    jobs: tuple[JobId, ...]
    submitted: str | None

    @property
    def open_jobs(self) -> tuple[JobId, ...]:
        """The jobs that the output still needs: the newest ones of its unfinished shards."""
        if self.finished:
            return ()
        unfinished = [each for each in self.shards if each.word != "completed"] or self.shards
        return tuple(dict.fromkeys(each.task.job for each in unfinished if each.task is not None))

    @property
    def finished(self) -> bool:
        """Whether the output is written."""
        return self.written and self.output_there and self.output_change is None

    @property
    def written(self) -> bool:
        """Whether the output was written, even if it was changed since."""
        return self.whole is not None and self.whole.completed


@dataclass(frozen=True, kw_only=True)
class ProgressFigures:
    """The figures that a shard and a whole run have in common.

    Attributes:
        completed, failed: requests so far.
        left_out: requests that are not sent because their prompts are too long.
        requests_per_second, tokens_per_second: 0 if nothing runs.
        remaining_seconds: None while it is unknown.
        restarts: starts after the first.
        empty_answers: answers without a text, by their reason.
        updated: Unix time of the last status; None without one.
    """

    total: int
    completed: int
    failed: int
    left_out: int
    requests_per_second: float
    tokens_per_second: float
    remaining_seconds: float | None
    restarts: int
    prompt_tokens: int
    completion_tokens: int
    empty_answers: Mapping[str, int]
    gpu_seconds: float
    updated: float | None

    @property
    def done(self) -> int:
        """Requests with a result."""
        return self.completed + self.failed + self.left_out

    @property
    def without_answer(self) -> int:
        """Requests that failed or were left out."""
        return self.failed + self.left_out


@dataclass(frozen=True, kw_only=True)
class ShardView(ProgressFigures):
    """The state of one shard.

    Attributes:
        reason: why it waits, or why it ended; may be "".
        job: ``123_4`` or ``123``; None if none was submitted.
        pid: of the worker, on ``host``.
        in_slurm: whether its job waits or runs.
        sealed: whether its starts had no network; None if it never started, or that is unknown.
        unsealed: why one had a network, or why it is unknown; "" if none had one.
    """

    index: int
    state: ShardState
    reason: str
    exit_code: int | None
    job: str | None
    host: str | None
    pid: int | None
    gpus: tuple[str, ...]
    in_slurm: bool
    sealed: bool | None
    unsealed: str


@dataclass(frozen=True)
class RequestError:
    """The error of a failed request."""

    shard: int
    custom_id: str
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class RunView(ProgressFigures):
    """The state of a run.

    Attributes:
        engine_settings: settings of the engine's server.
        created: when it was planned; ``submitted``: when jobs were submitted last (UTC).
        dependency: option ``--dependency`` of sbatch for a job that needs the output; "" if it is
            written, or no job was submitted.
        allowed_failures: number of requests that may fail before the run counts as failed.
        errors: of the last requests that failed, newest first.
        next_command: command that completes the run; None if there is nothing to do, or an option
            has to be corrected first.
        remedy: what to do about the failure; "" if it did not fail, or nothing is known.
        slurm: why Slurm could not be asked; None if it could, or was not needed.
        output_change: how the output of the finished run was changed since; None if it was not.
        tunings: what ``--tune`` chose, one for each model.
    """

    run_dir: Path
    output: Path
    input: Path
    models: tuple[str, ...]
    engine_settings: dict[str, Any]
    plan: str
    created: str
    submitted: str | None
    dependency: str
    jobs: tuple[str, ...]
    state: RunState
    allowed_failures: int
    errors: tuple[RequestError, ...]
    next_command: str | None
    remedy: str
    slurm: str | None
    output_change: str | None
    shards: tuple[ShardView, ...]
    tunings: tuple[Tuning, ...]

    def __str__(self) -> str:
        """Return the progress in one line."""
        states = states_text(self.shards) if len(self.shards) > 1 else ""
        failed = failed_text(self.without_answer, self.left_out)
        parts = [f"{self.state.value}: {done_text(self)}", failed, states, speed_text(self)]
        return ", ".join(part for part in parts if part)

    @property
    def ended(self) -> bool:
        """Whether nothing works on the run, and nothing will without a user."""
        return self.state not in _GOING

    @property
    def finished(self) -> bool:
        """Whether the output is written."""
        return self.state in _COMPLETE

    def count(self, *states: ShardState) -> int:
        """Return the number of shards in any of the states."""
        return sum(shard.state in states for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return the view as JSON; ``exit_code`` is null until the run has ended."""
        content = asdict(self)
        for name in ("run_dir", "output", "input"):
            content[name] = str(content[name])
        content["tunings"] = [to_json(each) for each in self.tunings]
        return {**content, "exit_code": int(outcome(self)) if self.ended else None}


def outcome(view: RunView) -> ExitCode:
    """Return the exit code of a run; STOPPED if it is not complete."""
    if view.finished:
        return ExitCode.OK if view.failed <= view.allowed_failures else ExitCode.FAILURES
    if view.state is not RunState.FAILED:
        return ExitCode.STOPPED
    codes = [shard.exit_code for shard in view.shards if shard.state is ShardState.FAILED]
    known = [ExitCode(code) for code in codes if code in set(ExitCode) - {ExitCode.OK}]
    return known[0] if known else ExitCode.STOPPED


def assemble(facts: RunFacts, tasks: Tasks | None, now: float, slurm: str | None = None) -> RunView:
    """Return the view of a run.

    Args:
        tasks: Slurm's state of each task, by job number and index; None if Slurm was not asked.
        now: Unix time.
        slurm: why Slurm could not be asked, if that was necessary.
    """
    shards = tuple(_shard(each, tasks, facts.plan.left_out) for each in facts.shards)
    state = _state(facts, shards, now)
    completed, failed, left_out = _counts(facts, shards)
    return RunView(
        run_dir=facts.run.path,
        output=facts.plan.output,
        input=facts.plan.input.named,
        models=facts.plan.models,
        engine_settings=facts.plan.engine_settings,
        plan=facts.plan.id,
        created=facts.plan.created,
        submitted=facts.submitted,
        dependency=dependency(facts.open_jobs),
        jobs=tuple(str(job) for job in facts.jobs),
        state=state,
        total=facts.plan.requests,
        completed=completed,
        failed=failed,
        left_out=left_out,
        allowed_failures=allowed_besides(
            facts.plan, (each.details for each in facts.shards), left_out
        ),
        requests_per_second=round(sum(shard.requests_per_second for shard in shards), 3),
        tokens_per_second=round(sum(shard.tokens_per_second for shard in shards), 3),
        remaining_seconds=_remaining(shards),
        restarts=sum(shard.restarts for shard in shards),
        prompt_tokens=sum(shard.prompt_tokens for shard in shards),
        completion_tokens=sum(shard.completion_tokens for shard in shards),
        empty_answers=_empty(facts, shards),
        gpu_seconds=round(sum(shard.gpu_seconds for shard in shards), 1),
        errors=tuple(_errors(facts.shards)),
        next_command=_next_command(state, facts, shards),
        remedy=_remedy(state, facts, shards),
        output_change=facts.output_change,
        slurm=slurm,
        updated=_updated(facts),
        shards=shards,
        tunings=_tunings(facts.shards),
    )


def _tunings(shards: Iterable[ShardFacts]) -> tuple[Tuning, ...]:
    """Return what was chosen for each model in the first shard, as shards that start later use."""
    found: dict[str, Tuning] = {}
    for shard in shards:
        for each in shard.details.tunings:
            if each.chosen:
                found.setdefault(each.model, each)
    return tuple(found.values())


def _shard(facts: ShardFacts, tasks: Tasks | None, left_out: int) -> ShardView:
    """Return the view of a shard.

    Args:
        left_out: results of the run that no start made (``Plan.left_out``).
    """
    task = _task(facts, tasks)
    verdict = judge(facts, task, tasks is not None)
    running = verdict.state in (ShardState.RUNNING, ShardState.STOPPING)
    details, total = facts.details, facts.shard.requests
    counts = Counts(total, 0, 0) if facts.status is None else facts.status.counts
    progress, totals = details.progress, details.totals
    rate = progress.requests_per_second if running else 0.0
    left = total - counts.completed - counts.failed
    skipped = min(details.left_out, counts.failed)
    seal = seal_of(details, total - left - max(left_out, skipped))
    return ShardView(
        index=facts.shard.index,
        state=verdict.state,
        reason=verdict.reason,
        exit_code=verdict.exit_code,
        total=total,
        completed=counts.completed,
        failed=counts.failed - skipped,
        left_out=skipped,
        job=None if facts.task is None else str(facts.task),
        host=details.host,
        pid=details.pid,
        gpus=details.gpus,
        requests_per_second=rate,
        tokens_per_second=progress.tokens_per_second if running else 0.0,
        remaining_seconds=_seconds(left, rate, verdict),
        restarts=_restarts(details),
        prompt_tokens=totals.prompt_tokens,
        completion_tokens=totals.completion_tokens,
        empty_answers=totals.empty_answers,
        gpu_seconds=totals.gpu_seconds,
        in_slurm=task is not None and task.active,
        sealed=seal.sealed,
        unsealed=seal.why,
        updated=None if facts.status is None else facts.status.moment,
    )


def _task(facts: ShardFacts, tasks: Tasks | None) -> TaskState | None:
    if facts.task is None or tasks is None:
        return None
    known = tasks.get(facts.task.job.number, {})
    return known.get(facts.task.index, known.get(None))


def _seconds(left: int, rate: float, verdict: ShardVerdict) -> float | None:
    going = verdict.state is ShardState.RUNNING and left and rate > 0
    return round(left / rate, 1) if going else None


def _restarts(details: StatusDetails) -> int:
    if details.totals.starts:
        return details.totals.starts - 1
    count = details.slurm.restarts
    return int(count) if count.isdigit() else 0


def _counts(facts: RunFacts, shards: tuple[ShardView, ...]) -> tuple[int, int, int]:
    """Return how many requests succeeded, failed and were left out.

    They are the output's own counts once it is written, else those of the shards.
    """
    if facts.finished and facts.whole is not None:
        counts = facts.whole.counts
        left_out = min(facts.whole.details.left_out, counts.failed)
        return counts.completed, counts.failed - left_out, left_out
    return (
        sum(shard.completed for shard in shards),
        sum(shard.failed for shard in shards),
        sum(shard.left_out for shard in shards),
    )


def _empty(facts: RunFacts, shards: tuple[ShardView, ...]) -> Mapping[str, int]:
    """Return the output's own count once it is written, else that of the shards."""
    if facts.finished and facts.whole is not None and facts.whole.details.empty_answers is not None:
        return facts.whole.details.empty_answers
    return dict(sum((Counter(shard.empty_answers) for shard in shards), Counter()))


def _state(facts: RunFacts, shards: tuple[ShardView, ...], now: float) -> RunState:
    if facts.finished:
        _, failed, _ = _counts(facts, shards)
        return RunState.WITH_FAILURES if failed else RunState.FINISHED
    if facts.output_change is not None:
        return RunState.CHANGED
    states = Counter(shard.state for shard in shards)
    if states[ShardState.DONE] == len(shards):
        return _state_of_merge(facts, shards, now)
    for state, run_state in (
        (ShardState.RUNNING, RunState.RUNNING),
        (ShardState.STOPPING, RunState.RUNNING),
        (ShardState.WAITING, RunState.WAITING),
        (ShardState.FAILED, RunState.FAILED),
        (ShardState.LOST, RunState.LOST),
    ):
        if states[state]:
            return run_state
    return RunState.STOPPED


def _state_of_merge(facts: RunFacts, shards: tuple[ShardView, ...], now: float) -> RunState:
    """Return the state of a run whose shards are all done, but whose output is not written."""
    ended = max((shard.updated or 0.0 for shard in shards), default=0.0)
    soon = now - ended < QUIET_SECONDS and not facts.output_there and not facts.written
    if facts.merging or soon or any(shard.in_slurm for shard in shards):
        return RunState.MERGING
    return RunState.NOT_MERGED


def _remaining(shards: tuple[ShardView, ...]) -> float | None:
    """Return the seconds left at the total rate, at least those of the slowest shard."""
    rate = sum(shard.requests_per_second for shard in shards)
    left = sum(shard.total - shard.done for shard in shards if shard.state in ACTIVE)
    if rate <= 0 or not left:
        return None
    slowest = max((shard.remaining_seconds or 0.0 for shard in shards), default=0.0)
    return round(max(left / rate, slowest), 1)


def _errors(shards: Iterable[ShardFacts]) -> Iterator[RequestError]:
    """Yield the last errors: the newest of each shard first, recently updated shards first.

    A status has its errors without times, oldest first.
    """
    ranked = []
    for facts in shards:
        if facts.status is None:
            continue
        newest = list(reversed(facts.status.last_errors))[:SHOWN_ERRORS]
        moment = facts.status.moment or 0.0
        ranked += [(rank, -moment, facts.shard.index, error) for rank, error in enumerate(newest)]
    ranked.sort(key=lambda item: item[:3])
    for _, _, index, error in ranked[:SHOWN_ERRORS]:
        yield RequestError(index, error.param or "", error.code or "", error.message or "")


def _next_command(state: RunState, facts: RunFacts, shards: tuple[ShardView, ...]) -> str | None:
    name = shlex.quote(str(facts.plan.output))
    if state is RunState.NOT_MERGED:
        return f"aiflux merge {name}"
    if state is RunState.CHANGED:
        return f"aiflux merge --again {name}"
    broken = any(shard.state in (ShardState.FAILED, ShardState.LOST) for shard in shards)
    if not broken and state is not RunState.STOPPED:
        return None
    if _suspect_options(facts, shards):
        return None
    if facts.submitted is not None or not engine_kind(facts.plan.options).managed:
        return f"aiflux resume {name}"
    # AI-Flux did not submit this run: it ran in the foreground, or by `sbatch slurm/run.sbatch`,
    # whose job must not be repeated here.
    by_hand = any(each.details.slurm != SlurmJob() for each in facts.shards)
    return None if by_hand else f"aiflux resume --local {name}"


def _remedy(state: RunState, facts: RunFacts, shards: tuple[ShardView, ...]) -> str:
    if state is not RunState.FAILED:
        return ""
    known = next((each.remedy for each in _failed(facts, shards) if each.remedy), "")
    options = _suspect_options(facts, shards)
    if not options:
        return known
    again = f"correct {options}, and run the whole `aiflux run` command again"
    return f"{known}; {again}" if known else again


def _failed(facts: RunFacts, shards: tuple[ShardView, ...]) -> list[StatusDetails]:
    """Return what the shards wrote that failed."""
    pairs = zip(facts.shards, shards, strict=True)
    return [each.details for each, shard in pairs if shard.state is ShardState.FAILED]


def _suspect_options(facts: RunFacts, shards: tuple[ShardView, ...]) -> str:
    """Return the options with which no engine started; "" if there are none.

    They are stored with the run, so it cannot be resumed with others.
    """
    failed = [each for each in _failed(facts, shards) if each.exit_code == ExitCode.ENGINE]
    if not failed or any(_counts(facts, shards)):
        return ""
    options = facts.plan.options
    if options.engine_command is not None:
        return "--engine-command"
    given = given_options(options)
    named = any(given in f"{each.ended} {each.remedy}" for each in failed)
    return given if named else ""


def _updated(facts: RunFacts) -> float | None:
    written = [facts.whole, *(shard.status for shard in facts.shards)]
    moments = [status.moment for status in written if status is not None]
    return max((moment for moment in moments if moment is not None), default=None)


SHARD_ORDER = (
    ShardState.RUNNING,
    ShardState.STOPPING,
    ShardState.FAILED,
    ShardState.LOST,
    ShardState.STOPPED,
    ShardState.NOT_SUBMITTED,
    ShardState.WAITING,
    ShardState.DONE,
)
"""The order in which shards are shown."""


def done_text(view: RunView) -> str:
    """Return how many requests of a run are done."""
    share = 100 * view.done // max(view.total, 1)
    return f"{view.done}/{view.total} done ({share} %)"


def speed_text(view: RunView) -> str:
    """Return how fast a run is, and the time left; "" if nothing is known."""
    parts = []
    if view.requests_per_second:
        parts.append(f"{view.requests_per_second:.1f} requests/s")
        parts.append(f"{view.tokens_per_second:.0f} tokens/s")
    if view.remaining_seconds is not None:
        parts.append(f"ETA {duration(view.remaining_seconds)}")
    return ", ".join(parts)


def ended_early(view: RunView, what: str) -> str:
    """Return how a run ended before it was finished, and why.

    Args:
        what: names the run.
    """
    how = {RunState.FAILED: "failed", RunState.LOST: "was lost"}.get(view.state, "stopped")
    reasons = dict.fromkeys(shard.reason for shard in view.shards if shard.reason)
    done = f"{what} {how} with {view.done} of {counted(view.total, 'request')} done"
    return ": ".join([done, *list(reasons)[:1]])


def states_text(shards: Iterable[ShardView]) -> str:
    """Return how many shards have each state."""
    counts = Counter(shard.state for shard in shards)
    return ", ".join(f"{counts[state]} {state.value}" for state in SHARD_ORDER if counts[state])
