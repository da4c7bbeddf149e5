"""``aiflux chain``: several steps over the rows of a table, each a run of its own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from aiflux.api.chain import (
    NOT_STARTED,
    StepView,
    answering,
    chain_view,
    refuse_settings,
    step_view,
)
from aiflux.cli.chain_jobs import StepRun, check_steps, show_warnings
from aiflux.cli.commands.convert import show_trial
from aiflux.cli.commands.status import follow
from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import FILE, command, input_parameters, option, settings_options, the_input
from aiflux.cli.render.run import overview, typed
from aiflux.cli.run_argument import frame_of, make_console, show
from aiflux.cli.start import (
    RunArguments,
    open_here,
    refuse_local_at_url,
    run_here,
    run_local,
    show_unused_settings,
    submit,
    write_output,
)
from aiflux.converters.answer_table import is_outdated
from aiflux.converters.chain.folder import ChainRuns, LaterStep, StepRecord
from aiflux.converters.chain.rows import (
    first_requests,
    too_many_filter_failures,
)
from aiflux.converters.chain.steps_file import Step, layered, read_chain
from aiflux.converters.writer import Summary
from aiflux.core.config.config import Config
from aiflux.core.config.settings import given_settings, option_words
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.registry import register
from aiflux.core.runs.status_file import refuse_failures
from aiflux.engines.kinds import kind_named
from aiflux.errors import (
    AifluxError,
    ExitCode,
    RunConflictError,
    UsageError,
)
from aiflux.slurm.jobs import JobId, join_jobs
from aiflux.slurm.monitor import RunState, active_jobs, outcome
from aiflux.slurm.script import package_command
from aiflux.slurm.submit import LaterRun, plan_later, submit_later
from aiflux.util.files import absolute, expanded, short, temporary_folder, write_json
from aiflux.util.records import to_json
from aiflux.util.text import counted

_RARE_SETTINGS = ("validate", "mem", "retry_failed")
_SHOWN = 3
_PAUSE = 2.0  # seconds between looks at a job that waits
_START, _POLL = 10.0, 0.1  # seconds: for the start of a local process, and between looks at it


@command(
    "chain",
    examples=["aiflux chain steps.yaml", "aiflux chain steps.yaml --local"],
    exclusive=[("local", "no_wait"), ("dry_run", "no_wait")],
    note="Run the same command again to resume, to wait for submitted steps, or to write the "
    "table when they have ended. Exit status: as for aiflux run.",
)
@input_parameters("The steps, *.yaml", metavar="STEPS", rare=True)
@option("-o", "--output", metavar="FILE", type=FILE, help="Table to write, instead of the file's")
@option("--local", is_flag=True, help="Run on this machine, in the foreground")
@option("--no-wait", is_flag=True, help="Submit the jobs and return")
@option("--dry-run", is_flag=True, help="Check all steps and their jobs, write nothing")
@option("--force", is_flag=True, help="Overwrite a table; run steps again that changed")
@option(
    "--no-preflight",
    is_flag=True,
    rare=True,
    help="Skip the checks of Slurm, image and disk space",
)
@json_option("Print the chain's status as JSON")
@settings_options("run", "slurm", "paths", rare=_RARE_SETTINGS)
def chain(
    input_argument: str | None, input_option: str | None, output: str | None, **given: Any
) -> int:
    """Ask about each row of a table in several steps, each with the answers of those before.

    The file names the table, the steps and their templates. Settings of the command line apply to
    all steps, and replace those of the file.
    """
    path = expanded(the_input(input_argument, input_option))
    target = None if output is None else absolute(output)
    work = ChainWork(ChainRuns.of(read_chain(path, target)), given)
    work.show_unused(given_settings(given), local=given["local"])
    if given["dry_run"]:
        return work.preview()
    failure: AifluxError | None = None
    code = 0
    with redirect_stdout(sys.stderr) if given["as_json"] else nullcontext():
        try:
            code = work.run()
        except UsageError:
            raise
        except AifluxError as error:
            failure = error
    if given["as_json"]:
        print_json(chain_view(work.runs.folder).to_json())
    if failure is not None:
        raise failure
    return code


class ChainWork:
    """One command line: run the steps, and write the table; whatever of it is missing."""

    again = "run the same command again to wait for the steps and to write the table"

    def __init__(self, runs: ChainRuns, given: Mapping[str, Any]) -> None:
        self.runs = runs
        self.folder = runs.folder
        self.given = given
        self.name = typed(short(self.folder.output))
        kept = {**given_settings(given), "retry_failed": None}
        flags = {name: given[name] or None for name in ("local", "no_preflight")}
        self.options = option_words({**kept, **flags})

    @property
    def steps(self) -> Sequence[Step]:
        return self.runs.chain.steps

    @cached_property
    def configs(self) -> dict[str, Config]:
        """The settings of each step.

        Raises:
            ConfigError, UsageError: they are wrong; names the step.
        """
        found = {}
        for step in self.steps:
            given = layered(step.settings, given_settings(self.given))
            config = Config(arguments=given)
            refuse_local_at_url(config, local=self.given["local"])
            if config.get("model") is None:
                raise UsageError(
                    f"{step.place}: the step has no model", "add model: llama3.2:3b, or use --model"
                )
            refuse_settings(step, config.run_options())
            found[step.name] = config
        return found

    def show_unused(self, given: Mapping[str, Any], *, local: bool = False) -> None:
        """Print which of the given options for Slurm have no effect in any step."""
        kinds = [kind_named(config.engine) for config in self.configs.values()]
        managed = [kind for kind in kinds if kind.managed]
        show_unused_settings((managed or kinds)[0], given, local=local)

    def preview(self) -> int:
        """Check the steps and their jobs, and show the first requests of the first step."""
        configs = self.configs
        self.runs.refuse(self._made_with, force=self.given["force"], active=self._active)
        unfinished = [step for step in self.steps if not self.folder.finished(step.name)]
        with temporary_folder() as folder:
            asked = folder / "requests.jsonl"
            first = unfinished[0] if unfinished else None
            known = 0 if first is None else self._draft(first, asked)
            before = ""
            for step in self.steps:
                about = counted(known, "request") if step is first else self._view(step.name).state
                if step in unfinished[1:] and about == NOT_STARTED:
                    about = f"number and length of its requests: not known before {before} has run"
                print(f"step {step.name}: model {configs[step.name].get('model')}; {about}")
                before = step.name
            runs = (
                self._drafted(step, asked, own=step is first)
                for step in unfinished
                if not self._view(step.name).active
            )
            if known:
                show_warnings(check_steps(runs, preflight=not self.given["no_preflight"]))
        show_trial(first_requests(self.runs.chain, _SHOWN))
        return 0

    def _draft(self, step: Step, target: Path) -> int:
        return self.runs.draft(step, self.configs[step.name].run_options().allowed_failures, target)

    def _drafted(self, step: Step, asked: Path, *, own: bool) -> StepRun:
        """Return the run of a step that may have no folder yet.

        Args:
            asked: its requests, or those of an earlier step.
            own: whether they are its own.
        """
        output, begun = self.folder.results(step.name), self.folder.run(step.name).plan.is_file()
        if not output.parent.is_dir():  # on the same disk, for the check of its space
            output = self.folder.output.with_name(f".{self.folder.output.name}.json")
        replaces = begun and is_outdated(self.folder.run(step.name))
        asked = self.folder.requests(step.name) if begun else asked
        config, in_slurm = self.configs[step.name], self.in_slurm(step)
        return StepRun(step.name, config, asked, output, own or begun, in_slurm, replaces)

    def run(self) -> int:
        """Do the work; return the exit code."""
        code = self.run_steps()
        if code is None:
            self._write()
        return code or 0

    def run_steps(self) -> int | None:
        """Do the work of the steps; return the exit code, or None once all are finished."""
        self.runs.begin(
            self._made_with,
            force=self.given["force"],
            active=self._active,
            options=self.options,
            place=absolute("."),
        )
        submitted = False
        for at, step in enumerate(self.steps, start=1):
            print(f"step {at} of {len(self.steps)}: {step.name}")
            begun = self._view(step.name).active
            if not begun:
                code = self._start(step)
                if code:
                    return code
                if self.folder.finished(step.name):
                    continue
            if self.in_slurm(step) and not submitted:
                submitted = True
                self._submit_later(at)
            code = self._wait(step, shown=not begun)
            if code or not self.folder.finished(step.name):
                return code
        return None

    @property
    def _made_with(self) -> list[dict[str, Any]]:
        """What the answers of each step depend on."""
        return [answering(self.configs[step.name].run_options()) for step in self.steps]

    @property
    def _active(self) -> list[str]:
        """The steps that a process or a job works on."""
        return [name for name in self.runs.names if self._view(name).active]

    def _is_begun(self, step: Step) -> bool:
        """Return whether another process works on a step, or has finished it.

        The same command, started twice, may have begun it a moment ago. What it does shows only
        after its start.
        """
        deadline = time.monotonic() + _START
        while not self._view(step.name).active and not self.folder.finished(step.name):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        return True

    def _view(self, step: str) -> StepView:
        return step_view(self.folder, StepRecord(step, {}, {}))

    @property
    def local(self) -> bool:
        """Whether no step is done by jobs."""
        return not any(map(self.in_slurm, self.steps))

    def in_slurm(self, step: Step) -> bool:
        """Whether a step is done by jobs."""
        return not self.given["local"] and kind_named(self.configs[step.name].engine).managed

    def _start(self, step: Step) -> int:
        """Start the run of a step, or resume it; one in Slurm is only submitted."""
        again = self.given["force"] or self.configs[step.name].get("retry_failed")
        finished = self.folder.finished(step.name)
        allowed = self.configs[step.name].run_options().allowed_failures
        summary, replaced = self.runs.prepare(step, allowed, force=again)
        self._show(step, summary)
        if self.folder.asks_nothing(step.name):
            return 0
        try:
            return self._launch(step, replaced=replaced)
        except RunConflictError:
            if finished or not self._is_begun(step):
                raise
            return 0

    def _launch(self, step: Step, *, replaced: bool) -> int:
        config = self.configs[step.name]
        asked = RunArguments(
            config,
            self.folder.requests(step.name),
            self.folder.results(step.name),
            force=replaced,
            force_resume=False,
            preflight=not self.given["no_preflight"],
            as_json=False,
        )
        if self.in_slurm(step):
            self._check_later(step)
            return submit(asked)
        opened = open_here(asked)
        return run_local(opened, config) if asked.managed else run_here(opened)

    def _check_later(self, first: Step) -> None:
        """Check the jobs of this and later steps before the first one is submitted.

        The requests of later steps are not known: those of the first step stand for them.

        Raises:
            AifluxError: jobs cannot work; names all steps that have the problems.
        """
        asked = self.folder.requests(first.name)
        runs = (
            self._drafted(step, asked, own=step is first)
            for step in self.steps[self.steps.index(first) :]
            if self.in_slurm(step) and self._view(step.name).state == NOT_STARTED
        )
        found = check_steps(runs, preflight=not self.given["no_preflight"])
        found.pop(first.name, None)  # shown when it is submitted
        show_warnings(found)

    def _later(self, step: Step, shards: int) -> LaterRun:
        directory = str(self.folder.directory.path)
        command = package_command("aiflux.api.chain_step", os.environ)
        return plan_later(
            self.configs[step.name],
            self.folder.requests(step.name),
            self.folder.results(step.name),
            (*command, directory, step.name),
            shards=shards,
        )

    def _submit_later(self, at: int) -> None:
        """Submit the steps from a number on, each to start after the one before.

        The first step that cannot be submitted yet, and those after it, wait for this command.
        """
        for before, step in pairwise(self.steps[at - 1 :]):
            view, waited = self._view(step.name), self._view(before.name)
            if view.active:
                continue
            jobs = waited.jobs if waited.run is None else tuple(active_jobs(waited.directory))
            if not (self.in_slurm(step) and jobs) or view.run is not None or view.requests == 0:
                return
            self._submit_after(step, jobs)

    def _submit_after(self, step: Step, jobs: tuple[JobId, ...]) -> None:
        config = self.configs[step.name]
        shards = config.get_slurm_config().shards
        if not isinstance(shards, int):  # auto: the requests are not known
            planned = (self.folder.run(each.name) for each in self.steps)
            shards = max(len(read_plan(run).shards) for run in planned if run.plan.is_file())
        later = self._later(step, shards)
        models = config.models_dir
        write_json(
            self.folder.later(step.name), to_json(LaterStep(config.run_options(), models, shards))
        )
        ids = submit_later(later, jobs)
        warning = register(
            later.run.path,
            self.folder.results(step.name),
            [str(id_) for id_ in ids],
            models=[str(config.get("model"))],
        )
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        noun = "job" if len(ids) == 1 else "jobs"
        print(f"  step {step.name}: {noun} {join_jobs(ids)}, after {join_jobs(jobs)}")

    def _show(self, step: Step, summary: Summary | None) -> None:
        record = self.folder.record()
        made = next(each for each in record.steps if each.name == step.name) if record else None
        if made is None or made.requests is None:
            return
        text = made.filter_text
        print(f"  {counted(made.requests, 'request')}{f'; {text}' if text else ''}")
        for note in () if summary is None else summary.notes:
            print(f"  {note}")
        if summary is not None and summary.skipped:
            some = ", such as" if summary.skipped > len(summary.examples[:_SHOWN]) else ""
            print(f"  skipped {summary.skipped}{some}:")
            for each in summary.examples[:_SHOWN]:
                print(f"    {each}")

    def _wait(self, step: Step, *, shown: bool) -> int:
        """Follow a run until it ends, unless the user does not want to; return its exit code.

        Args:
            shown: what the step asks was printed.
        """
        if self.given["no_wait"]:
            print(f"  {self.again}")
            return 0
        console, run = make_console(), self.folder.run(step.name)
        try:
            unplanned = self._await_plan(step)
            if not shown:
                self._show(step, None)
            if unplanned is not None:
                return unplanned
            view = follow(run, console, live=not self.given["as_json"])
        except KeyboardInterrupt:
            print(
                "the step continues; to wait for it, run the same command again; to stop it: "
                f"aiflux cancel {self.name}",
                file=sys.stderr,
            )
            return int(ExitCode.STOPPED)
        if view.state is RunState.NOT_MERGED:
            return write_output(read_plan(run), run)
        if view.finished:
            refuse_failures(read_plan(run), view.without_answer)
            return 0
        show(console, overview(view, frame_of(console)))
        return int(outcome(view))

    def _await_plan(self, step: Step) -> int | None:
        """Wait until the job of a step has planned it; return the exit code if there is no plan."""
        reason = None
        while (view := self._view(step.name)).run is None and view.active:
            if view.reason != reason:
                reason = view.reason
                print(f"  {view.state}: {reason}")
            time.sleep(_PAUSE)
        if view.run is not None:
            return None
        if view.finished:
            return 0
        record = self.folder.record()
        made = next(each for each in record.steps if each.name == step.name) if record else None
        if made is not None and made.refused:
            raise too_many_filter_failures(
                self.runs.chain, step.name, made.failed, made.samples, made.reason
            )
        print(f"  {view.state}: {view.reason}; run the same command again to resume")
        return int(ExitCode.STOPPED)

    def _write(self) -> None:
        allowed = {
            name: config.run_options().allowed_failures for name, config in self.configs.items()
        }
        found = self.runs.write(allowed, force=self.given["force"])
        if found is None:
            print(f"{self.name} is up to date")
            self.runs.refuse_unusable()
            return
        summary, errors = found
        failed = f", {counted(errors, 'row')} with an error" if errors else ""
        print(f"{counted(summary.rows, 'row')} -> {self.name}{failed}")
        for note in summary.notes:
            print(f"  {note}")
        record = self.folder.record()
        for step in () if record is None else record.steps:
            if step.unusable:
                print(f"  step {step.name}: {step.unusable_text}")
        self.runs.refuse_unusable()
