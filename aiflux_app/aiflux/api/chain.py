"""The state of a chain: of each step, from its run, and of the whole."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from shlex import join, quote
from typing import Any

from aiflux.converters.chain.folder import ChainFolder, ChainRecord, StepRecord
from aiflux.converters.chain.steps_file import Step, chain_output
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import refuse_options
from aiflux.core.runs.status_file import file_change
from aiflux.engines.kinds import engine_kind
from aiflux.errors import ConfigError, ExitCode, SlurmError, UsageError
from aiflux.models.endpoints import ENDPOINTS
from aiflux.slurm.commands import task_states
from aiflux.slurm.jobs import JobId, read_submissions
from aiflux.slurm.monitor import gather
from aiflux.slurm.run_view import ACTIVE, RunState, RunView, outcome
from aiflux.util.files import absolute
from aiflux.util.text import without_secrets

NOT_STARTED = "not started"
NOT_WRITTEN = "not written"


@dataclass(frozen=True)
class StepView:
    """The state of a step.

    Attributes:
        state: that of its run; ``not started`` without one.
        requests: their number; None before they are made.
        run: the state of its run; None before it is planned.
        failed: requests that failed, samples for which the filter failed, and those without a
            usable answer.
        jobs: the jobs of a run that is not planned yet.
        reason: why these wait, or why they ended.
    """

    record: StepRecord
    state: str
    requests: int | None
    done: int
    failed: int
    directory: RunDirectory
    run: RunView | None = None
    jobs: tuple[JobId, ...] = ()
    reason: str = ""

    @property
    def active(self) -> bool:
        """Whether a process or a job works on it, or waits for that."""
        if self.run is not None:
            return self.run.count(*ACTIVE) > 0 or not self.run.ended
        return self.state in (RunState.WAITING.value, RunState.RUNNING.value)

    @property
    def finished(self) -> bool:
        """Whether it has all its answers, or nothing to ask."""
        return self.requests == 0 or (self.run is not None and self.run.finished)

    @property
    def failing(self) -> bool:
        """Whether more of its requests failed than are allowed."""
        return self.run is not None and self.run.finished and outcome(self.run) is not ExitCode.OK

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {
            "name": self.record.name,
            "state": self.state,
            "requests": self.requests,
            "done": self.done,
            "failed": self.failed,
            "left_out": 0 if self.run is None else self.run.left_out,
            "samples": self.record.samples,
            "filtered": self.record.stopped,
            "unusable": self.record.unusable,
            "unusable_reason": self.record.unusable_reason,
            "model": self.record.answering.get("model"),
            "run_dir": str(self.directory.path),
            "jobs": [*self.run.jobs] if self.run is not None else [str(id_) for id_ in self.jobs],
        }


@dataclass(frozen=True)
class ChainView:
    """The state of a chain."""

    folder: ChainFolder
    record: ChainRecord
    steps: tuple[StepView, ...]

    @property
    def written(self) -> bool:
        """Whether the table was written, and is unchanged."""
        table = self.record.table
        exists = table is not None and self.folder.output.is_file()
        return exists and file_change(self.folder.output, table) is None

    @property
    def unfinished(self) -> StepView | None:
        """The first step that is not finished."""
        return next((step for step in self.steps if not step.finished), None)

    @property
    def failing(self) -> StepView | None:
        """The step with more failures than are allowed, after which the chain ended."""
        step = self.unfinished
        if step is None or step.active:
            return None
        return next((each for each in self.steps if each.failing), None)

    @property
    def state(self) -> str:
        """The state of the whole: that of the failing or of the first unfinished step."""
        step = self.failing or self.unfinished
        if step is None and self.written and any(each.record.unusable for each in self.steps):
            return RunState.WITH_FAILURES.value
        if step is None:
            return RunState.FINISHED.value if self.written else NOT_WRITTEN
        begun = step.state == NOT_STARTED and step is not self.steps[0]
        return RunState.STOPPED.value if begun else step.state

    @property
    def stopped(self) -> bool:
        """Whether something is left to do, and nothing works on it.

        A chain of which nothing is left to run still has to write its table.
        """
        step = self.unfinished
        return not self.written if step is None else not step.active

    @property
    def next_command(self) -> str | None:
        """The command that completes the chain; None unless it has ``stopped``."""
        return self.command() if self.stopped else None

    def command(self, *, anywhere: bool = False) -> str:
        """Return the command that continues the chain, with the options of the last one.

        Args:
            anywhere: name the directory in which to give it also if it is the current one.
        """
        record = self.record
        words = ["aiflux", "estimate" if record.only else "chain", str(record.file)]
        with suppress(ConfigError):  # such as a file that is gone
            if not record.only and chain_output(record.file) != self.folder.output:
                words += ["--output", str(self.folder.output)]
        options = without_secrets(record.options)  # --engine-command can have a key
        retry = [] if self.failing is None or record.only else ["--retry-failed"]
        text = join([*words, *options, *retry])
        if record.place is not None and (anywhere or record.place != absolute(".")):
            text = f"cd {quote(str(record.place))} && {text}"
        return text

    @property
    def exit_code(self) -> ExitCode:
        """The exit code: that of the first unfinished step."""
        for step in self.steps:
            code = ExitCode.OK if step.run is None else outcome(step.run)
            if step.run is None and step.record.refused and not step.active:
                code = ExitCode.FAILURES
            if code is not ExitCode.OK:
                return code
        if self.unfinished is not None:
            return ExitCode.STOPPED
        records = [step.record for step in self.steps]
        many = any(each.unusable > each.unusable_allowed for each in records)
        return ExitCode.FAILURES if many else ExitCode.OK

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {
            "chain": str(self.record.file),
            "source": str(self.record.source),
            "output": str(self.folder.output),
            "state": self.state,
            "written": self.written,
            "next_command": self.next_command,
            "steps": [step.to_json() for step in self.steps],
        }


def answering(options: RunOptions) -> dict[str, Any]:
    """Return what the answers of a step depend on, in addition to its requests."""
    named: dict[str, Any] = {"model": options.model, "engine": options.engine}
    if options.engine_command is not None:
        named["engine_command"] = options.engine_command
    return {**named, **options.parameters, **options.engine_settings}


def refuse_settings(step: Step, options: RunOptions) -> None:
    """Refuse settings of a step that contradict each other, before the earlier ones are paid for.

    Raises:
        ConfigError, InputError: names the step.
    """
    _, form = step.prompt_and_form
    try:
        refuse_options(options, engine_kind(options), {ENDPOINTS[form.endpoint].url: 1})
    except UsageError as error:
        message = f"{step.place}: {error.message}"
        raise type(error)(message, error.remedy) from error


def find_chain(text: str) -> ChainFolder | None:
    """Return the chain that a text names: its table, its directory or its `steps.yaml`.

    Raises:
        ConfigError: a file of steps is damaged.
    """
    path = absolute(text.strip() or ".")
    folders = [ChainFolder(path)]
    if path.name.endswith(".aiflux"):
        folders.append(ChainFolder(path.with_name(path.name.removesuffix(".aiflux"))))
    if path.suffix in (".yaml", ".yml") and path.is_file():
        output = chain_output(path)
        folders += [] if output is None else [ChainFolder(output)]
    return next((each for each in folders if each.record_path.is_file()), None)


def chain_view(folder: ChainFolder) -> ChainView:
    """Return the state of a chain.

    Raises:
        RunConflictError: a run belongs to another user.
        StorageError: its files cannot be read.
    """
    folder.directory.refuse_foreign()
    record = folder.record()
    assert record is not None  # noqa: S101 - see find_chain
    return ChainView(folder, record, tuple(step_view(folder, each) for each in record.steps))


def step_view(folder: ChainFolder, record: StepRecord) -> StepView:
    """Return the state of a step.

    Raises:
        RunConflictError: its run belongs to another user.
    """
    directory = folder.run(record.name)
    failed = record.failed + record.unusable
    if folder.asks_nothing(record.name):
        return StepView(record, RunState.FINISHED.value, 0, 0, failed, directory)
    if not directory.plan.is_file():
        jobs, state, why = _waiting(directory)
        step = StepView(record, state, record.requests, 0, failed, directory, jobs=jobs, reason=why)
        if record.refused and not step.active:
            return replace(step, state=RunState.FAILED.value, reason=record.reason)
        return step
    view = gather(directory)
    failed += view.failed
    return StepView(record, view.state.value, view.total, view.done, failed, directory, view)


def _waiting(run: RunDirectory) -> tuple[tuple[JobId, ...], str, str]:
    """Return the jobs of a run that is not planned yet, its state and the reason."""
    records = read_submissions(run)
    if records is None:
        return (), NOT_STARTED, ""
    jobs = records.submissions[-1].ids
    try:
        states = task_states(jobs)
    except SlurmError as error:
        return jobs, RunState.WAITING.value, f"submitted; Slurm cannot be asked: {error.message}"
    tasks = [task for each in states.values() for task in each.values()]
    active = [task for task in tasks if task.active]
    if any(task.name == "RUNNING" for task in active):
        return jobs, RunState.RUNNING.value, "its job makes the requests"
    if active:
        return jobs, RunState.WAITING.value, active[0].reason or active[0].name.lower()
    failed = next((task for task in tasks if task.exit_code), None)
    if failed is not None:
        reason = f"its job ended before the work began: {failed.name}, exit code {failed.exit_code}"
        return jobs, RunState.FAILED.value, reason
    reason = ", ".join(dict.fromkeys(task.name.lower() for task in tasks))
    return jobs, RunState.STOPPED.value, f"its job has ended before the work began: {reason}"
