"""Plan the pilots of an estimate, and run them in Slurm or on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from aiflux.cli.json_output import print_json
from aiflux.cli.render.run import typed
from aiflux.cli.start import run_here, run_local, show_local_choices, submit_planned
from aiflux.core.batch.input_file import InputSummary, scan_input
from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.settings import CHUNK, SKIP, RunOptions
from aiflux.core.runs.directory import RunDirectory, checked_output
from aiflux.core.runs.input_copy import plain_input
from aiflux.core.runs.open import draft_of, draft_run, refuse_own_input, with_long_prompts
from aiflux.core.runs.plan import Plan, input_rules, make_plan
from aiflux.core.runs.status_file import read_status
from aiflux.engines.kinds import engine_kind
from aiflux.engines.sizing import context_length
from aiflux.errors import (
    AifluxError,
    EngineError,
    ExitCode,
    OutputExistsError,
    RunConflictError,
    StoppedError,
    UsageError,
)
from aiflux.estimates.energy import Rates
from aiflux.estimates.estimate import LOCAL, SLURM
from aiflux.estimates.pilot import Drawn, Pilot
from aiflux.image.container import find_image
from aiflux.slurm.preflight.local import Finding, check_fields, finding_text
from aiflux.util.files import absolute, short
from aiflux.util.records import to_json
from aiflux.util.text import counted
from aiflux.util.times import pause_after, walltime_seconds

if TYPE_CHECKING:
    from aiflux.slurm.run_view import RunView
    from aiflux.slurm.submit import PlannedRun

LONGEST = "01:00:00"
# The settings that determine the speed of a job; others may differ between two calls.
_HARDWARE = ("partition", "nodes", "gpus_per_node", "gres", "constraint", "cpus_per_task", "mem")


@dataclass(frozen=True)
class Asked:
    """What a user wants to know about one engine.

    Attributes:
        requests: size of the pilot.
        given: the options of the full run as they were given, for the recommended command.
        engine: the kind, if several engines are compared.
        again: process the pilot's requests again although they are finished.
        noun: what the pilot is called.
        size_option: the option that sets the size of the pilot.
        can_wait: whether the command has --wait.
    """

    config: Config
    input: Path
    output: Path
    requests: int
    given: Mapping[str, Any]
    engine: str | None = None
    local: bool = False
    wait: bool = False
    again: bool = False
    preflight: bool = True
    as_json: bool = False
    noun: str = "pilot"
    size_option: str = "--requests"
    can_wait: bool = True

    @property
    def rates(self) -> Rates:
        """The site's rates for energy and GPU-hours."""
        return Rates.of(self.config)

    @property
    def where(self) -> str:
        """Where the pilot's engine is."""
        url: str | None = self.config.get("engine_url")
        return url or (LOCAL if self.local else SLURM)


@dataclass(frozen=True)
class PlannedPilot:
    """A run to estimate, and its pilot.

    Attributes:
        summary: of the input; None if the sample is drawn from something else.
    """

    asked: Asked
    whole: Plan
    summary: InputSummary | None
    pilot: Pilot

    @cached_property
    def refusal(self) -> UsageError | None:
        """Why the full run would be refused without ``--force``; None if it would not."""
        try:
            draft_of(self.whole)
        except (OutputExistsError, RunConflictError) as error:
            return error
        return None

    @property
    def options(self) -> RunOptions:
        """The pilot's options: the context of the full run, and any number of failures."""
        too_long = CHUNK if self.whole.options.too_long == CHUNK else SKIP
        options = replace(
            self.whole.options, max_failures="100%", retry_failed=False, too_long=too_long
        )
        if not engine_kind(options).managed:
            return options
        return replace(options, context_length=context_length(self.whole))

    def begin(self, first: tuple[Pilot, Drawn] | None = None) -> Drawn:
        """Draw a new sample; see ``Pilot.begin``."""
        if self.summary is None:
            raise ValueError("the sample of a pilot is drawn from its input")
        return self.pilot.begin(self.summary, self.asked.requests, self.settings, first)

    @property
    def settings(self) -> dict[str, Any]:
        """What the pilot depends on; stored with it."""
        asked = self.asked
        return {
            "plan": self.whole.id,
            "input": to_json(self.whole.input),
            "requests": asked.requests,
            "where": asked.where,
            "options": self.options.to_json(),
            "slurm": hardware(asked.config) if asked.where == SLURM else None,
        }


def hardware(config: Config) -> dict[str, Any]:
    """Return the settings that determine the speed of a job."""
    slurm = asdict(config.get_slurm_config())
    return {name: slurm[name] for name in _HARDWARE}


def pilot_walltime(slurm: SlurmConfig) -> str | None:
    """Return the time limit of a pilot's job."""
    longer = walltime_seconds(slurm.time) > walltime_seconds(LONGEST)
    return LONGEST if longer else slurm.time


@contextmanager
def named_engine(asked: Asked) -> Iterator[None]:
    """Name the engine in an error, if several are compared."""
    try:
        yield
    except AifluxError as error:
        if asked.engine is not None:
            error.message = f"{asked.engine}: {error.message}"
        raise


def plan_pilots(all_: Sequence[Asked]) -> list[PlannedPilot]:
    """Check the input in one pass and plan the full runs.

    Nothing is written, except the plain copy of a compressed input.
    """
    rules = []
    for asked in all_:
        with named_engine(asked):
            # A sample is too short for it, and each point of a benchmark has its own settings.
            options = asked.config.run_options(tune=False)
            rules.append((options, input_rules(engine_kind(options), options)))
    scanned = {name: rule for _, each in rules for name, rule in each.ignored_fields.items()}
    options, first = rules[0]
    with named_engine(all_[0]):
        refuse_own_input(absolute(all_[0].input), checked_output(all_[0].output))
        wide = replace(first, ignored_fields=scanned)
        path, source = plain_input(all_[0].input, checked_output(all_[0].output))
        found = scan_input(path, options.model, rules=wide, source=source)
    planned = []
    for asked, (options, each) in zip(all_, rules, strict=True):
        with named_engine(asked):
            summary = found.of_engine(options.model, each, scanned)
            summary = summary or scan_input(path, options.model, rules=each, source=source)
            planned.append(_plan_pilot(asked, options, summary))
    return planned


def _plan_pilot(asked: Asked, options: RunOptions, summary: InputSummary) -> PlannedPilot:
    output = checked_output(asked.output)
    RunDirectory.of_output(output).refuse_foreign()
    kind = engine_kind(options)
    whole = make_plan(summary, output, options, asked.config.models_dir, kind)
    if options.too_long == CHUNK:  # the number of parts determines the work
        whole, _ = with_long_prompts(whole, summary, kind, asked.config.models_dir)
    pilot = Pilot.of_output(output, asked.engine)
    pilot.run.refuse_foreign()
    return PlannedPilot(asked, whole, summary, pilot)


def draw(all_: Sequence[PlannedPilot]) -> list[Drawn]:
    """Return the samples; draw a new one for the pilots that have other settings now.

    Raises:
        RunConflictError: a job of such a pilot waits or runs. No sample was drawn.
    """
    known = [_known(one) for one in all_]
    for one, drawn in zip(all_, known, strict=True):
        if drawn is None:
            with named_engine(one.asked):
                _refuse_active(one)
    # The points of a benchmark have other inputs and numbers than each other: only equal samples
    # are copied.
    first: dict[tuple[Path, int], tuple[Pilot, Drawn]] = {}
    samples = []
    for one, drawn in zip(all_, known, strict=True):
        kind = (one.asked.input, one.asked.requests)
        sample = drawn or one.begin(first.get(kind))
        if drawn is None:
            first.setdefault(kind, (one.pilot, sample))
        samples.append(sample)
    return samples


def _known(one: PlannedPilot) -> Drawn | None:
    """Return the sample of an earlier call; None if its results are not asked for, or not whole."""
    drawn = None
    if not one.asked.again and not _other_image(one):
        drawn = one.pilot.drawn(one.settings)
    if drawn is not None and one.pilot.done() and not one.pilot.whole():
        place = f"{one.asked.engine}: " if one.asked.engine else ""
        print(
            f"note: {place}results of the finished {one.asked.noun} are missing or damaged: its "
            "requests are processed again",
            file=sys.stderr,
        )
        return None
    return drawn


def _other_image(one: PlannedPilot) -> bool:
    """Return whether another image is named than that of the pilot's job.

    Raises:
        ImageError: it cannot be used. The pilot would be removed for nothing.
    """
    from aiflux.slurm.jobs import read_submissions

    named = one.asked.config.image
    if named is None or one.asked.where != SLURM:
        return False
    known = read_submissions(one.pilot.run)
    if known is None or known.image in (None, named):
        return False
    find_image(one.asked.config, Path.cwd())
    return True


def _refuse_active(one: PlannedPilot) -> None:
    from aiflux.slurm.jobs import read_submissions
    from aiflux.slurm.submit import active_shards

    pilot, noun = one.pilot, one.asked.noun
    active = active_shards(pilot.run) if read_submissions(pilot.run) is not None else {}
    for job, state in active.values():
        same = pilot.drawn(one.settings) is not None and not _other_image(one)
        raise RunConflictError(
            f"job {job} of this {noun} is {state.name}; it cannot be started again meanwhile"
            if same
            else f"job {job} of a {noun} with other settings is {state.name}",
            f"wait for it, or cancel it: aiflux cancel {quote(str(pilot.output))}",
        )


def run_pilot(one: PlannedPilot) -> int:
    """Process the pilot's requests in the foreground; return the exit code."""
    asked, options = one.asked, one.options
    opened = draft_run(
        one.pilot.input, one.pilot.output, options, asked.config.models_dir, engine_kind(options)
    ).open()
    if asked.where == LOCAL:
        return run_local(opened, asked.config)
    show_local_choices(asked.config, None)
    return run_here(opened)


def submit_missing(all_: Sequence[PlannedPilot]) -> None:
    """Submit the pilots that have no job, once all are checked."""
    jobs = _not_submitted(all_)
    for one, planned in jobs:
        show_local_choices(one.asked.config, planned.image)
        for finding in _findings(one, planned):
            print(f"warning: {finding_text(finding)}", file=sys.stderr)
        quiet = redirect_stdout(sys.stderr) if one.asked.as_json else nullcontext()
        with quiet, named_engine(one.asked):
            submit_planned(planned)


def _findings(one: PlannedPilot, planned: PlannedRun) -> list[Finding]:
    """Return the warnings of a pilot's job; those of requests count the whole input."""
    plan = planned.opened.plan
    of_sample = [*check_fields(plan)]
    others = [finding for finding in planned.findings if finding not in of_sample]
    if not one.asked.preflight:
        return others
    return [*others, *check_fields(replace(plan, input=one.whole.input))]


def _not_submitted(all_: Sequence[PlannedPilot]) -> list[tuple[PlannedPilot, PlannedRun]]:
    """Check and plan the jobs of the pilots that have none."""
    from aiflux.slurm.jobs import read_submissions

    planned = []
    for one in all_:
        if read_submissions(one.pilot.run) is None:
            with named_engine(one.asked):
                planned.append((one, _planned(one)))
    return planned


def _planned(one: PlannedPilot) -> PlannedRun:
    from aiflux.slurm.submit import plan_job

    asked, pilot = one.asked, one.pilot
    slurm = asked.config.get_slurm_config()
    limit = pilot_walltime(slurm)
    small: SlurmConfig = replace(slurm, shards=1, max_running=None, time=limit, time_min=None)
    return plan_job(
        asked.config, small, pilot.input, pilot.output, one.options, check=asked.preflight
    )


def job_views(all_: Sequence[PlannedPilot]) -> list[RunView]:
    """Return the states of the pilots; with --wait, once all have ended."""
    from aiflux.slurm.monitor import Observer

    observers = [Observer(one.pilot.run) for one in all_]
    views = [observer.look() for observer in observers]
    began = time.monotonic()
    while all_[0].asked.wait and not all(view.ended for view in views):
        time.sleep(pause_after(time.monotonic() - began))
        views = [observer.look() for observer in observers]
    return views


def failure_of(one: PlannedPilot, view: RunView, again: str = "--force") -> AifluxError:
    """Return why a pilot ended before its requests were finished.

    Args:
        again: the option that starts it again.
    """
    from aiflux.slurm.monitor import outcome

    reason = "; ".join(dict.fromkeys(shard.reason for shard in view.shards if shard.reason))
    kind = EngineError if outcome(view) is ExitCode.ENGINE else StoppedError
    name = typed(short(one.pilot.output))
    # There is no such command if an option has to be corrected first.
    resume = f"; continue: aiflux resume {name}" if view.next_command else ""
    return kind(
        f"the {one.asked.noun} has {view.state.value} with {view.done} of "
        f"{counted(view.total, 'request')} finished" + (f": {reason}" if reason else ""),
        f"its log: aiflux logs {name}{resume}; start over: {again}",
    )


def ended(one: PlannedPilot, code: int) -> AifluxError:
    """Return the error for a pilot in a container that ended before its requests were finished."""
    status = read_status(one.pilot.run, 0)
    reason = (
        status and status.details.ended
    ) or f"the {one.asked.noun} ended with exit code {code}"
    stopped = code in (0, ExitCode.STOPPED) or code > 128  # by a signal
    return (StoppedError if stopped else EngineError)(
        reason, f"its log: aiflux logs {typed(short(one.pilot.output))}"
    )


def progress_json(view: RunView) -> dict[str, Any]:
    """Return the state of a pilot's job as JSON."""
    return {
        "state": view.state.value,
        "jobs": list(view.jobs),
        "done": view.done,
        "total": view.total,
    }


def follow(one: PlannedPilot, result: str) -> bool:
    """Submit the pilot if necessary, and show its state unless it ended; return whether it did.

    Args:
        result: what the same command prints once it has ended.

    Raises:
        EngineError, StoppedError: it ended before its requests were finished.
    """
    submit_missing([one])
    (view,) = job_views([one])
    if one.pilot.done():
        return True
    if view.ended:
        raise failure_of(one, view)
    if one.asked.as_json:
        print_json({result: None, one.asked.noun: progress_json(view)})
    else:
        print_progress(one, view)
        print_repeat(result, can_wait=one.asked.can_wait)
    return False


def print_repeat(result: str, s: str = "", *, can_wait: bool = True) -> None:
    """Print how to get the result of jobs."""
    wait = f"; --wait waits for the job{s}" if can_wait else ""
    print(f"  run the same command again for the {result}{s}{wait}")


def print_progress(one: PlannedPilot, view: RunView) -> None:
    """Print the state of a pilot's job."""
    place = f"{one.asked.engine}: " if one.asked.engine else ""
    jobs, done = ", ".join(view.jobs), f"{view.done} of {counted(view.total, 'request')}"
    print(f"{place}the {one.asked.noun} is {view.state.value} (job {jobs}): {done} finished")
