"""``aiflux resume``: submit what is left of a run, or continue it here."""

from __future__ import annotations

import argparse
import os

from aiflux.cli.json_output import add_json, then_told
from aiflux.cli.run_argument import located
from aiflux.cli.start import register, run_here, run_local, submit_planned
from aiflux.core.config.arguments import add_settings
from aiflux.core.config.config import Config
from aiflux.core.config.declaration import parse_setting
from aiflux.core.config.settings import BY_NAME, given_settings
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.open import open_run
from aiflux.core.runs.plan import read_plan
from aiflux.engines.kinds import engine_kind
from aiflux.errors import SlurmError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Submit the shards of a run that are neither done nor in the queue. Options change what is "
        "asked of Slurm; what was asked before holds for the rest. A run with --engine-url that "
        "began here continues here, in the foreground, and so does any other with --local."
    )
    parser.epilog = "example: aiflux resume results.json --time 08:00:00"
    parser.add_argument("run", metavar="R", help="job id, run directory or output")
    parser.add_argument("--image", metavar="PATH", help="another image than before")
    parser.add_argument(
        "--local", action="store_true", help="continue on this machine, in the foreground"
    )
    add_json(parser)
    add_settings(parser, "slurm")


def execute(arguments: argparse.Namespace) -> int:
    """Submit what is left."""
    run = located(arguments.run)
    if arguments.json:
        return then_told(lambda: _resume(arguments, run), run)
    return _resume(arguments, run)


def _resume(arguments: argparse.Namespace, run: RunDirectory) -> int:
    from aiflux.slurm.submit import plan_resume

    # A job may use an engine elsewhere, too (SlurmRunner): what was submitted goes to Slurm again.
    managed = engine_kind(read_plan(run).options).managed
    if arguments.local or (not managed and not run.submissions.exists()):
        return _continue_here(arguments, run)
    changes = {
        name: parse_setting(BY_NAME[name], value, f"the argument {BY_NAME[name].option}")
        for name, value in given_settings(vars(arguments)).items()
        if value is not None and BY_NAME[name].section == "slurm"
    }
    image = Config(arguments={"image": arguments.image}).image if arguments.image else None
    planned = plan_resume(run, changes, image, os.environ)
    if planned.opened.open_shards or planned.opened.finished or not planned.active:
        return submit_planned(planned)
    raise SlurmError(
        f"all that is left of {planned.opened.plan.output} waits or runs already "
        f"({planned.active} shards)",
        f"aiflux watch {arguments.run}",
    )


def _continue_here(arguments: argparse.Namespace, run: RunDirectory) -> int:
    """Continue a run in the foreground, as `aiflux run` with the same options would."""
    from aiflux.slurm.submit import refuse_second

    if run.submissions.exists():
        refuse_second(run)
    plan = read_plan(run)
    kind = engine_kind(plan.options)
    opened = open_run(
        plan.input_path, plan.output, plan.options, plan.models_dir, kind, shards=len(plan.shards)
    )
    if not opened.finished:
        register(opened.plan)
    if not kind.managed:
        return run_here(opened)
    return run_local(opened, Config(arguments={"image": arguments.image}))
