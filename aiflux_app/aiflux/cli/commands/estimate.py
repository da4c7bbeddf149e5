"""``aiflux estimate``: run a sample of the requests and estimate the full run."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.api.local_run import local_image
from aiflux.cli.engine_list import given_engines, refuse_one_program
from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import (
    FILE,
    WholeNumber,
    command,
    input_parameters,
    option,
    settings_options,
    the_input,
)
from aiflux.cli.pilots import (
    Asked,
    PlannedPilot,
    draw,
    ended,
    failure_of,
    follow,
    job_views,
    named_engine,
    plan_pilots,
    print_progress,
    print_repeat,
    progress_json,
    run_pilot,
    submit_missing,
)
from aiflux.cli.render.estimate import engines_forecast, forecast, full_command
from aiflux.cli.run_argument import make_console, show, text_width
from aiflux.cli.start import refuse_local_at_url, show_unused_settings
from aiflux.core.config.config import Config
from aiflux.core.config.settings import given_settings
from aiflux.core.runs.directory import named_output
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import read_status
from aiflux.engines.kinds import kind_named
from aiflux.errors import (
    AifluxError,
    ExitCode,
    InputError,
    OutputExistsError,
    StoppedError,
    UsageError,
)
from aiflux.estimates.estimate import LOCAL, SLURM, Estimate, Range, keep_estimate
from aiflux.estimates.estimate import estimate as make_estimate
from aiflux.estimates.pilot import FEWEST, REQUESTS, Drawn, observe
from aiflux.estimates.recommendation import Recommendation, recommend
from aiflux.slurm.preflight.local import check_lengths, finding_text
from aiflux.util.records import to_json

if TYPE_CHECKING:
    from aiflux.slurm.run_view import RunView

STEPS_SUFFIXES = (".yaml", ".yml")


@command(
    "estimate",
    examples=[
        "aiflux estimate prompts.jsonl --model llama3.2:3b --wait",
    ],
)
@input_parameters("Requests, *.jsonl, or the steps of a chain, *.yaml", rare=True)
@option(
    "-o",
    "--output",
    metavar="FILE",
    type=FILE,
    help="Output of the full run; the sample's is FILE.pilot",
)
@option(
    "--requests",
    type=WholeNumber(FEWEST),
    default=REQUESTS,
    metavar="K",
    help=f"Size of the sample (default: {REQUESTS})",
)
@option("--local", is_flag=True, help="Run the sample on this machine, in the foreground")
@option("--wait", is_flag=True, help="Wait for the job")
@option("--force", is_flag=True, help="Run the sample again")
@option(
    "--no-preflight",
    is_flag=True,
    rare=True,
    help="Skip the checks of Slurm, image and disk space",
)
@json_option("Print everything as JSON")
@settings_options("run", "slurm", "paths", "accounting", repeatable=["engine"], without=["tune"])
def estimate(
    input_argument: str | None, input_option: str | None, output: str | None, **more: Any
) -> int:
    """Run a sample of the requests in a small job, or here, and estimate the full run.

    Repeat the command to see the job's progress, and its result at the end. Several --engine
    KIND[=MODEL], or one with commas, compare engines on the same sample.
    """
    source = the_input(input_argument, input_option)
    path = Path(source)
    if path.suffix.lower() in STEPS_SUFFIXES:
        from aiflux.cli.chain_estimate import estimate_chain  # which loads the readers of tables

        return estimate_chain(source, output, more)
    given = given_engines("estimate", given_settings(more))
    asked = [
        Asked(
            Config(arguments=settings),
            path,
            named_output(output, path),
            more["requests"],
            given={"input": source, "output": output, **settings},
            engine=settings["engine"] if len(given) > 1 else None,
            local=more["local"],
            wait=more["wait"],
            again=more["force"],
            preflight=not more["no_preflight"],
            as_json=more["as_json"],
        )
        for settings in given
    ]
    refuse_local_at_url(asked[0].config, local=more["local"])
    show_unused_settings(kind_named(asked[0].config.engine), given[0])
    return estimate_run(asked[0]) if len(asked) == 1 else _estimate_engines(asked)


def estimate_run(asked: Asked) -> int:
    """Process the rest of the pilot; print the estimate, or the job's progress."""
    (one,) = plan_pilots([asked])
    _print_lengths([one])
    (drawn,) = draw([one])
    if not one.pilot.done():
        if asked.where != SLURM:
            code = run_pilot(one)
            if not one.pilot.done():
                return code or int(ExitCode.STOPPED)
        elif not follow(one, "estimate"):
            return 0
    found, wait = _estimate(one, drawn), None
    if asked.where == SLURM:
        try:
            found, wait = _scheduled(asked, found)
        except UsageError as error:  # the pilot was smaller than the run; its estimate is good
            _print_refused(error)
    command = _full_command(one, found)
    if asked.as_json:
        waiting = {} if wait is None else {"seconds_to_start": round(wait)}
        print_json({"estimate": found.to_json(asked.rates), **waiting, "command": command})
    else:
        console = make_console()
        show(console, forecast(found, command, asked.rates, wait, text_width(console)))
    _print_refusals([one])
    return 0


def _scheduled(asked: Asked, found: Estimate) -> tuple[Estimate, float | None]:
    """Return the estimate with the shards that end first, and the seconds until they start.

    Raises:
        UsageError: the full run would be refused.
    """
    from aiflux.slurm.limits import most_shards, site_limits
    from aiflux.slurm.start_time import ending_first
    from aiflux.slurm.submit import job_script

    slurm, limits = asked.config.get_slurm_config().checked(), site_limits(os.environ)
    options = asked.config.run_options()
    job, _ = job_script(
        *(asked.config, slurm, asked.input, asked.output, options, Path.cwd(), limits), check=True
    )
    return ending_first(found, job, most_shards(slurm, limits))


# --- several engines -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    """The pilot of one of several engines.

    Attributes:
        view: of a job that has not ended.
        failure: why there is no estimate.
    """

    one: PlannedPilot
    estimate: Estimate | None = None
    view: RunView | None = None
    failure: AifluxError | None = None

    @property
    def engine(self) -> str:
        """The kind of the engine."""
        return self.one.whole.options.engine

    @property
    def command(self) -> str | None:
        """The command of the full run with this engine."""
        return None if self.estimate is None else _full_command(self.one, self.estimate)

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON."""
        found, failure = self.estimate, self.failure
        return {
            "engine": self.engine,
            "models": list(self.one.whole.models),
            "estimate": None if found is None else found.to_json(self.one.asked.rates),
            "tokens_per_second": None if found is None else _rate_json(found.tokens_rate),
            "requests_per_second": None if found is None else _rate_json(found.requests_rate),
            "pilot": None if self.view is None else progress_json(self.view),
            "error": None if failure is None else str(failure),
            "command": self.command,
        }


def _rate_json(rate: Range) -> dict[str, Any]:
    return {**to_json(rate), "high": None if math.isinf(rate.high) else rate.high}


def _estimate_engines(asked: Sequence[Asked]) -> int:
    """Run a pilot with each engine; print the estimates side by side, or the jobs' progress."""
    refuse_one_program(local=asked[0].local)
    all_ = plan_pilots(asked)
    _print_lengths(all_)
    if asked[0].where == LOCAL:
        for one in all_:
            with named_engine(one.asked):
                local_image(one.whole, one.asked.config, Path.cwd())
    drawn = draw(all_)
    _refuse_other_sample(all_)
    do = _do_in_slurm if asked[0].where == SLURM else _do_in_turn
    unfinished = do([one for one in all_ if not one.pilot.done()])
    results = [unfinished.get(one.asked.engine) or _result(one, sample)
               for one, sample in zip(all_, drawn, strict=True)]  # fmt: skip
    _print_results(results, as_json=asked[0].as_json)
    _print_refusals([result.one for result in results if result.estimate is not None])
    failures = [result.failure for result in results if result.failure is not None]
    return int(failures[0].exit_code) if failures else 0


def _refuse_other_sample(all_: Sequence[PlannedPilot]) -> None:
    """Refuse to compare engines whose pilots do not have the same requests.

    Raises:
        InputError: the input changed while the samples were drawn.
    """
    if len({one.pilot.digest() for one in all_}) > 1:
        raise InputError(
            "the pilots have different requests: the input or a sample was changed",
            "run the same command again with --force when the file is complete",
        )


def _do_in_slurm(all_: Sequence[PlannedPilot]) -> dict[str | None, _Result]:
    """Submit the pilots together, once all are checked; return those without an estimate."""
    submit_missing(all_)
    found = {}
    for one, view in zip(all_, job_views(all_) if all_ else [], strict=True):
        if one.pilot.done():
            continue
        failure = failure_of(one, view) if view.ended else None
        found[one.asked.engine] = _Result(one, view=view, failure=failure)
    return found


def _do_in_turn(all_: Sequence[PlannedPilot]) -> dict[str | None, _Result]:
    """Run the pilots one after the other, as they share the GPU; return those that failed.

    Raises:
        StoppedError: a pilot was stopped, or its files cannot be written.
    """
    failed: dict[str | None, _Result] = {}
    for number, one in enumerate(all_, start=1):
        engine = one.asked.engine
        print(f"pilot {number} of {len(all_)}: {engine}", file=sys.stderr)
        try:
            with redirect_stdout(sys.stderr):
                code = run_pilot(one)
                if not one.pilot.done():
                    raise ended(one, code)
        except StoppedError:
            raise
        except AifluxError as error:
            failed[engine] = _Result(one, failure=error)
    return failed


def _result(one: PlannedPilot, drawn: Drawn) -> _Result:
    try:
        return _Result(one, _estimate(one, drawn))
    except StoppedError as error:
        return _Result(one, failure=error)


def _print_results(results: Sequence[_Result], *, as_json: bool) -> None:
    found = {result.engine: result.estimate for result in results if result.estimate is not None}
    going = [result for result in results if result.view is not None and not result.failure]
    choice = recommend(found) if len(found) > 1 and not going else None
    if as_json:
        recommended = None if choice is None else _recommended_json(choice, results)
        print_json(
            {"estimates": [each.to_json() for each in results], "recommendation": recommended}
        )
        return
    if found and not going:
        models = {result.engine: ", ".join(result.one.whole.models) for result in results}
        commands = {result.engine: result.command or "" for result in results}
        rates, console = results[0].one.asked.rates, make_console()
        width = text_width(console)
        show(console, engines_forecast(found, models, commands, choice, rates, width))
        if len(found) < len(results):
            print()
    for result in results:
        if going and result.estimate is not None:
            print(f"{result.engine}: the pilot has ended")
        elif result.failure is not None:
            print(f"{result.engine}: {result.failure}")
        elif result.view is not None:
            print_progress(result.one, result.view)
    if going:
        print_repeat("estimate", "s")


def _recommended_json(choice: Recommendation, results: Sequence[_Result]) -> dict[str, Any]:
    command = next(result.command for result in results if result.engine == choice.best)
    facts = {"engine": choice.engine, "decided": choice.decided, **to_json(choice)}
    return {**facts, "command": command}


# --- the estimate ----------------------------------------------------------------------------


def _full_command(one: PlannedPilot, found: Estimate) -> str:
    asked, slurm = one.asked, one.asked.where == SLURM
    given = {
        **asked.given,
        "no_preflight": (slurm and not asked.preflight) or None,
        "force": isinstance(one.refusal, OutputExistsError) or None,
        "local": asked.local or None,
    }
    return full_command(given, slurm, found)


def _print_lengths(all_: Sequence[PlannedPilot]) -> None:
    """Print in how many parts the full run sends prompts that are too long."""
    plans = [one.whole for one in all_ if one.whole.long_prompts is not None]
    texts = [finding_text(finding) for plan in plans for finding in check_lengths(plan)]
    for text in dict.fromkeys(texts):
        print(f"warning: {text}", file=sys.stderr)


def _print_refusals(all_: Sequence[PlannedPilot]) -> None:
    """Print why the printed commands need more, or are refused."""
    for error in {str(one.refusal): one.refusal for one in all_ if one.refusal}.values():
        if isinstance(error, OutputExistsError):
            print(f"note: --force overwrites the output: {error.message}", file=sys.stderr)
        else:
            _print_refused(error)


def _print_refused(error: UsageError) -> None:
    print(f"note: the full run is refused until this is solved: {error}", file=sys.stderr)


def _estimate(one: PlannedPilot, drawn: Drawn) -> Estimate:
    """Make the estimate and store it.

    Raises:
        StoppedError: the pilot's results cannot be read.
    """
    asked, pilot = one.asked, one.pilot
    observations = observe(read_plan(pilot.run), pilot.run)
    status = read_status(pilot.run, 0)
    if not observations or status is None:
        raise StoppedError(f"the pilot in {pilot.folder} left no results", "run it again: --force")
    limit = asked.config.get_slurm_config().time if asked.where == SLURM else None
    found = make_estimate(
        one.whole, drawn, observations, status, limit, asked.where, asked.size_option
    )
    keep_estimate(found, one.whole, pilot)
    return found
