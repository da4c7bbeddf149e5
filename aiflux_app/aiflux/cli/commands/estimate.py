"""``aiflux estimate``: run a sample of the requests and estimate the full run."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

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
from aiflux.cli.render.estimate import forecast, full_command
from aiflux.cli.run_argument import make_console, show
from aiflux.cli.start import run_here, run_local, show_local_choices, submit_planned
from aiflux.core.batch.input_file import InputSummary, scan_input
from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.settings import RunOptions, given_settings
from aiflux.core.runs.directory import RunDirectory, checked_output, named_output
from aiflux.core.runs.open import draft_run
from aiflux.core.runs.plan import Plan, input_rules, make_plan, read_plan
from aiflux.core.runs.status_file import read_status
from aiflux.engines.kinds import engine_kind
from aiflux.engines.sizing import context_length
from aiflux.errors import EngineError, ExitCode, RunConflictError, StoppedError, UsageError
from aiflux.estimates.estimate import LOCAL, SLURM, Estimate, keep_estimate
from aiflux.estimates.estimate import estimate as make_estimate
from aiflux.estimates.pilot import FEWEST, REQUESTS, Drawn, Pilot, observe
from aiflux.slurm.preflight.local import finding_text
from aiflux.util.files import short
from aiflux.util.records import to_json
from aiflux.util.times import walltime_seconds

LONGEST = "01:00:00"
_INTERVAL = 5.0
# The settings that determine the speed of a job; others may differ between two calls.
_HARDWARE = ("partition", "nodes", "gpus_per_node", "gres", "constraint", "cpus_per_task", "mem")


@command(
    "estimate",
    examples=["aiflux estimate prompts.jsonl --model llama3.2:3b --wait"],
)
@input_parameters("Requests, *.jsonl", rare=True)
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
@settings_options("run", "slurm", "paths")
def estimate(
    input_argument: str | None, input_option: str | None, output: str | None, **more: Any
) -> int:
    """Run a sample of the requests in a small job, or here, and estimate the full run.

    Repeat the command to see the job's progress, and its result at the end.
    """
    source = the_input(input_argument, input_option)
    config = Config(arguments=given_settings(more))
    path = Path(source)
    if more["local"] and config.get("engine_url"):
        raise UsageError(
            "--local and --engine-url cannot be combined",
            "--local starts an engine; --engine-url uses a server that is already running",
        )
    return estimate_run(
        Asked(
            config,
            path,
            named_output(output, path),
            more["requests"],
            given={"input": source, "output": output, **given_settings(more)},
            local=more["local"],
            wait=more["wait"],
            again=more["force"],
            preflight=not more["no_preflight"],
            as_json=more["as_json"],
        )
    )


@dataclass(frozen=True)
class Asked:
    """What a user wants to know.

    Attributes:
        requests: size of the pilot.
        given: the options of the full run as they were given, for the recommended command.
        again: process the pilot's requests again although they are finished.
    """

    config: Config
    input: Path
    output: Path
    requests: int
    given: Mapping[str, Any]
    local: bool = False
    wait: bool = False
    again: bool = False
    preflight: bool = True
    as_json: bool = False

    @property
    def where(self) -> str:
        """Where the pilot's engine is."""
        url: str | None = self.config.get("engine_url")
        return url or (LOCAL if self.local else SLURM)


def estimate_run(asked: Asked) -> int:
    """Process the rest of the pilot; print the estimate, or the job's progress."""
    options = asked.config.run_options()
    kind = engine_kind(options)
    summary = scan_input(asked.input, options.model, rules=input_rules(kind, options))
    output = checked_output(asked.output)
    RunDirectory.of_output(output).refuse_foreign()
    whole = make_plan(summary, output, options, asked.config.models_dir, kind)
    pilot = Pilot.of_output(output)
    pilot.run.refuse_foreign()
    drawn = _drawn(asked, pilot, whole, summary)
    if not pilot.done():
        ended = _do(asked, pilot, _pilot_options(whole))
        if ended is not None:
            return ended
    return _show(asked, pilot, whole, drawn)


def _drawn(asked: Asked, pilot: Pilot, whole: Plan, summary: InputSummary) -> Drawn:
    """Return the sample; draw a new one if no pilot has the same settings."""
    slurm = asdict(asked.config.get_slurm_config())
    settings = {
        "plan": whole.id,
        "input": to_json(whole.input),
        "requests": asked.requests,
        "where": asked.where,
        "options": _pilot_options(whole).to_json(),
        "slurm": {name: slurm[name] for name in _HARDWARE} if asked.where == SLURM else None,
    }
    drawn = None if asked.again else pilot.drawn(settings)
    if drawn is None:
        _refuse_active(pilot)
        drawn = pilot.begin(summary, asked.requests, settings)
    return drawn


def _refuse_active(pilot: Pilot) -> None:
    from aiflux.slurm.jobs import read_submissions
    from aiflux.slurm.submit import active_shards

    active = active_shards(pilot.run) if read_submissions(pilot.run) is not None else {}
    for job, state in active.values():
        raise RunConflictError(
            f"job {job} of a pilot with other settings is {state.name}",
            f"wait for it, or cancel it: aiflux cancel {quote(str(pilot.output))}",
        )


def _pilot_options(whole: Plan) -> RunOptions:
    """Return the pilot's options: the context of the full run, and any number of failures."""
    options = replace(whole.options, max_failures="100%", retry_failed=False)
    if not engine_kind(options).managed:
        return options
    return replace(options, context_length=context_length(whole))


def _do(asked: Asked, pilot: Pilot, options: RunOptions) -> int | None:
    """Process the pilot's requests. Return an exit code if it has not ended."""
    if asked.where == SLURM:
        return _do_in_slurm(asked, pilot, options)
    opened = draft_run(
        pilot.input, pilot.output, options, asked.config.models_dir, engine_kind(options)
    ).open()
    if asked.where == LOCAL:
        code = run_local(opened, asked.config)
    else:
        show_local_choices(asked.config, None)
        code = run_here(opened)
    return None if pilot.done() else code or int(ExitCode.STOPPED)


def _do_in_slurm(asked: Asked, pilot: Pilot, options: RunOptions) -> int | None:
    from aiflux.slurm.jobs import read_submissions

    if read_submissions(pilot.run) is None:
        _submit(asked, pilot, options)
    return _follow(asked, pilot)


def _submit(asked: Asked, pilot: Pilot, options: RunOptions) -> None:
    from aiflux.slurm.submit import plan_job

    slurm = asked.config.get_slurm_config()
    limit = LONGEST if walltime_seconds(slurm.time) > walltime_seconds(LONGEST) else slurm.time
    small: SlurmConfig = replace(slurm, shards=1, max_running=None, time=limit)
    planned = plan_job(
        asked.config, small, pilot.input, pilot.output, options, check=asked.preflight
    )
    show_local_choices(asked.config, planned.image)
    for finding in planned.findings:
        print(f"warning: {finding_text(finding)}", file=sys.stderr)
    with redirect_stdout(sys.stderr) if asked.as_json else nullcontext():
        submit_planned(planned)


def _follow(asked: Asked, pilot: Pilot) -> int | None:
    """Show the state of the pilot's job; with --wait, wait until it ends.

    Raises:
        EngineError, StoppedError: it ended before its requests were finished.
    """
    from aiflux.slurm.monitor import Observer, outcome

    observer = Observer(pilot.run)
    view = observer.look()
    while asked.wait and not view.ended:
        time.sleep(_INTERVAL)
        view = observer.look()
    if pilot.done():
        return None
    if not view.ended:
        _show_progress(asked, view.state.value, view.jobs, view.done, view.total)
        return 0
    reason = "; ".join(dict.fromkeys(shard.reason for shard in view.shards if shard.reason))
    kind = EngineError if outcome(view) is ExitCode.ENGINE else StoppedError
    name = quote(short(pilot.output))
    raise kind(
        f"the pilot has {view.state.value} with {view.done} of {view.total} requests finished"
        + (f": {reason}" if reason else ""),
        f"its log: aiflux logs {name}; continue: aiflux resume {name}; start over: --force",
    )


def _show_progress(asked: Asked, state: str, jobs: tuple[str, ...], done: int, total: int) -> None:
    if asked.as_json:
        progress = {"state": state, "jobs": list(jobs), "done": done, "total": total}
        print_json({"estimate": None, "pilot": progress})
        return
    print(f"the pilot is {state} (job {', '.join(jobs)}): {done} of {total} requests finished")
    print("  run the same command again for the estimate; --wait waits for the job")


def _show(asked: Asked, pilot: Pilot, whole: Plan, drawn: Drawn) -> int:
    estimated = _estimate(asked, pilot, whole, drawn)
    keep_estimate(estimated, whole)
    command = full_command(
        {**asked.given, "local": asked.local or None}, asked.where == SLURM, estimated
    )
    if asked.as_json:
        print_json({"estimate": estimated.to_json(), "command": command})
        return 0
    show(make_console(), forecast(estimated, command))
    return 0


def _estimate(asked: Asked, pilot: Pilot, whole: Plan, drawn: Drawn) -> Estimate:
    """Make the estimate.

    Raises:
        StoppedError: the pilot's results cannot be read.
    """
    observations = observe(read_plan(pilot.run), pilot.run)
    status = read_status(pilot.run, 0)
    if not observations or status is None:
        raise StoppedError(f"the pilot in {pilot.folder} left no results", "run it again: --force")
    limit = asked.config.get_slurm_config().time if asked.where == SLURM else None
    return make_estimate(whole, drawn, observations, status, limit, asked.where)
