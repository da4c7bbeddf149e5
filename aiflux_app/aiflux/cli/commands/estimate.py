"""``aiflux estimate``: some requests first, and from them what the whole will take."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.cli.json_output import add_json, print_json
from aiflux.cli.parser import whole_number
from aiflux.cli.render.estimate import forecast, full_command
from aiflux.cli.run_argument import make_console, short, show
from aiflux.cli.start import run_here, run_local, show_local_choices, submit_planned
from aiflux.core.batch.input_file import InputSummary, scan_input
from aiflux.core.config.arguments import add_settings
from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.run_options import RunOptions
from aiflux.core.config.settings import given_settings
from aiflux.core.runs.directory import RunDirectory, checked_output, named_output
from aiflux.core.runs.open import open_run
from aiflux.core.runs.plan import Plan, make_plan, read_plan
from aiflux.core.runs.status_file import read_status
from aiflux.engines.kinds import engine_kind
from aiflux.engines.sizing import context_length
from aiflux.errors import EngineError, ExitCode, RunConflictError, StoppedError, UsageError
from aiflux.estimates.estimate import LOCAL, SLURM, Estimate, estimate, keep_estimate
from aiflux.estimates.pilot import FEWEST, REQUESTS, Drawn, Pilot
from aiflux.estimates.throughput import observe
from aiflux.slurm.preflight.local import told
from aiflux.util.records import to_json
from aiflux.util.times import walltime_seconds

LONGEST = "01:00:00"
_INTERVAL = 5.0
# What decides how fast a job is; other settings may differ between two calls.
_HARDWARE = ("partition", "nodes", "gpus_per_node", "gres", "constraint", "cpus_per_task", "mem")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Do some requests, spread over the whole input, in a small job (or here), and tell from "
        "them what the whole will take. The same command again tells how the job is, and the "
        "estimate once it has ended."
    )
    parser.epilog = "example: aiflux estimate --model llama3.2:3b --input prompts.jsonl --wait"
    parser.add_argument("--input", required=True, metavar="FILE", help="requests, *.jsonl")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where the whole run's results will go (default: as for aiflux run); the pilot's "
        "files go beside it, into FILE.pilot",
    )
    parser.add_argument(
        "--requests",
        type=whole_number(FEWEST),
        default=REQUESTS,
        metavar="K",
        help=f"requests to do (default: {REQUESTS})",
    )
    parser.add_argument("--local", action="store_true", help="do them here, in the foreground")
    parser.add_argument("--wait", action="store_true", help="wait for the job")
    parser.add_argument("--force", action="store_true", help="do them again")
    parser.add_argument(
        "--no-preflight", action="store_true", help="submit without the checks before (see run)"
    )
    add_json(parser, "everything, as one JSON object")
    add_settings(parser, "run", "slurm", "paths")


def execute(arguments: argparse.Namespace) -> int:
    """Tell what a run will take, or how far the pilot is that can tell it."""
    config = Config(arguments=given_settings(vars(arguments)))
    input_path = Path(arguments.input)
    output = named_output(arguments.output, input_path)
    if arguments.local and config.get("engine_url"):
        raise UsageError(
            "--local and --engine-url exclude each other",
            "--local starts an engine here; --engine-url uses one that is up",
        )
    return foretell(
        Asked(
            arguments,
            config,
            input_path,
            output,
            arguments.requests,
            wait=arguments.wait,
            anew=arguments.force,
            as_json=arguments.json,
        )
    )


@dataclass(frozen=True)
class Asked:
    """What a user wants to know.

    Attributes:
        arguments: those of the command line, for the command that is recommended.
        requests: of the pilot.
        anew: do the requests again although they are done.
    """

    arguments: argparse.Namespace
    config: Config
    input: Path
    output: Path
    requests: int
    wait: bool = False
    anew: bool = False
    as_json: bool = False

    @property
    def where(self) -> str:
        """Where the pilot's engine is."""
        url: str | None = self.config.get("engine_url")
        return url or (LOCAL if self.arguments.local else SLURM)


def foretell(asked: Asked) -> int:
    """Do what is left of the pilot; print the estimate, or how far the job is."""
    options = asked.config.run_options()
    kind = engine_kind(options)
    summary = scan_input(asked.input, options.model, rules=kind.input_rules)
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
    return _tell(asked, pilot, whole, drawn)


def _drawn(asked: Asked, pilot: Pilot, whole: Plan, summary: InputSummary) -> Drawn:
    """Return what was drawn; draw where there is no pilot that tells of what is asked."""
    slurm = asdict(asked.config.get_slurm_config())
    settings = {
        "plan": whole.id,
        "input": to_json(whole.input),
        "requests": asked.requests,
        "where": asked.where,
        "options": _pilot_options(whole).to_json(),
        "slurm": {name: slurm[name] for name in _HARDWARE} if asked.where == SLURM else None,
    }
    drawn = None if asked.anew else pilot.drawn(settings)
    if drawn is None:
        _refuse_active(pilot)
        drawn = pilot.begin(summary, asked.requests, settings)
    return drawn


def _refuse_active(pilot: Pilot) -> None:
    from aiflux.slurm.submissions import read_submissions
    from aiflux.slurm.submit import active_shards

    active = active_shards(pilot.run) if read_submissions(pilot.run) is not None else {}
    for job, state in active.values():
        raise RunConflictError(
            f"job {job} of a pilot with other settings is {state.name}",
            f"wait for it, or cancel it: aiflux cancel {quote(str(pilot.output))}",
        )


def _pilot_options(whole: Plan) -> RunOptions:
    """Return the options under which the pilot goes as the whole will: with the same context, and
    to its end, however many requests fail.
    """
    options = replace(whole.options, max_failures="100%", retry_failed=False)
    if not engine_kind(options).managed:
        return options
    return replace(options, context_length=context_length(whole))


def _do(asked: Asked, pilot: Pilot, options: RunOptions) -> int | None:
    """Do the pilot's requests. Return an exit code where that has not come to its end."""
    if asked.where == SLURM:
        return _do_in_slurm(asked, pilot, options)
    opened = open_run(
        pilot.input, pilot.output, options, asked.config.models_dir, engine_kind(options)
    )
    if asked.where == LOCAL:
        code = run_local(opened, asked.config)
    else:
        show_local_choices(asked.config, None)
        code = run_here(opened)
    return None if pilot.done() else code or int(ExitCode.STOPPED)


def _do_in_slurm(asked: Asked, pilot: Pilot, options: RunOptions) -> int | None:
    from aiflux.slurm.submissions import read_submissions

    if read_submissions(pilot.run) is None:
        _submit(asked, pilot, options)
    return _follow(asked, pilot)


def _submit(asked: Asked, pilot: Pilot, options: RunOptions) -> None:
    from aiflux.slurm.submit import plan_job

    slurm = asked.config.get_slurm_config()
    limit = LONGEST if walltime_seconds(slurm.time) > walltime_seconds(LONGEST) else slurm.time
    small: SlurmConfig = replace(slurm, shards=1, max_running=None, time=limit)
    check = not asked.arguments.no_preflight
    planned = plan_job(asked.config, small, pilot.input, pilot.output, options, check=check)
    show_local_choices(asked.config, planned.image)
    for finding in planned.findings:
        print(f"warning: {told(finding)}", file=sys.stderr)
    with redirect_stdout(sys.stderr) if asked.as_json else nullcontext():
        submit_planned(planned)


def _follow(asked: Asked, pilot: Pilot) -> int | None:
    """Look at the pilot's job, and with --wait until it has ended.

    Raises:
        EngineError, StoppedError: it ended without doing its requests.
    """
    from aiflux.slurm.monitor.collect import Observer, outcome

    observer = Observer(pilot.run)
    view = observer.look()
    while asked.wait and not view.ended:
        time.sleep(_INTERVAL)
        view = observer.look()
    if pilot.done():
        return None
    if not view.ended:
        _tell_going(asked, view.state.value, view.jobs, view.done, view.total)
        return 0
    reason = "; ".join(dict.fromkeys(shard.reason for shard in view.shards if shard.reason))
    kind = EngineError if outcome(view) is ExitCode.ENGINE else StoppedError
    name = quote(short(pilot.output))
    raise kind(
        f"the pilot has {view.state.value} with {view.done} of {view.total} requests done"
        + (f": {reason}" if reason else ""),
        f"its log: aiflux logs {name}; to go on: aiflux resume {name}; to begin again: --force",
    )


def _tell_going(asked: Asked, state: str, jobs: tuple[str, ...], done: int, total: int) -> None:
    if asked.as_json:
        going = {"state": state, "jobs": list(jobs), "done": done, "total": total}
        print_json({"estimate": None, "pilot": going})
        return
    print(f"the pilot is {state} (job {', '.join(jobs)}): {done} of {total} requests done")
    print("  the same command again tells the estimate when it has ended; --wait waits")


def _tell(asked: Asked, pilot: Pilot, whole: Plan, drawn: Drawn) -> int:
    foretold = _estimate(asked, pilot, whole, drawn)
    keep_estimate(foretold, whole)
    command = full_command(_given(asked), asked.where == SLURM, foretold)
    if asked.as_json:
        print_json({"estimate": foretold.to_json(), "command": command})
        return 0
    show(make_console(), forecast(foretold, command))
    return 0


def _estimate(asked: Asked, pilot: Pilot, whole: Plan, drawn: Drawn) -> Estimate:
    """Make the estimate.

    Raises:
        StoppedError: what the pilot left cannot be read.
    """
    observations = observe(read_plan(pilot.run), pilot.run)
    status = read_status(pilot.run, 0)
    if not observations or status is None:
        raise StoppedError(f"the pilot in {pilot.folder} left no results", "do it again: --force")
    limit = asked.config.get_slurm_config().time if asked.where == SLURM else None
    return estimate(whole, drawn, observations, status, limit, asked.where)


def _given(asked: Asked) -> Mapping[str, Any]:
    """Return the options of the command that runs the whole, as the user gave them."""
    given = given_settings(vars(asked.arguments))
    paths = {"input": asked.arguments.input, "output": asked.arguments.output}
    return {**paths, **given, "local": asked.arguments.local or None}
