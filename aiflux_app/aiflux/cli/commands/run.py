"""``aiflux run``: as a Slurm job, in the image here, or against an engine that is up."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.cli.json_output import add_json, print_json, then_told
from aiflux.cli.parser import whole_number
from aiflux.cli.pipes import kept_input
from aiflux.cli.start import (
    register,
    run_here,
    run_local,
    show_local_choices,
    submit_planned,
)
from aiflux.core.config.arguments import add_settings
from aiflux.core.config.config import Config
from aiflux.core.config.settings import given_settings
from aiflux.core.runs.directory import RunDirectory, checked_output, named_output
from aiflux.core.runs.open import OpenedRun, draft_run, open_run
from aiflux.engines.kinds import engine_kind, kind_named
from aiflux.errors import UsageError
from aiflux.estimates.estimate import carry_estimate
from aiflux.estimates.pilot import FEWEST
from aiflux.slurm.preflight.local import check_fields, told
from aiflux.util.streams import STDIN
from aiflux.util.unicode import json_text

if TYPE_CHECKING:
    from aiflux.slurm.submit import PlannedRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Check the input, plan the run and submit it to Slurm (or process it here)."
    )
    parser.epilog = (
        "example: aiflux run --model llama3.2:3b --input prompts.jsonl --output out.json"
    )
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="requests, *.jsonl; - for a pipe"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="results, *.json or *.jsonl (default: INPUT's name with .results.json, here)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="process it here, in the foreground")
    where.add_argument("--dry-run", action="store_true", help="print the plan and the script only")
    parser.add_argument("--force", action="store_true", help="replace an output that is there")
    parser.add_argument(
        "--force-resume", action="store_true", help="go on although model or parameters changed"
    )
    parser.add_argument(
        "--no-preflight",
        action="store_true",
        help="submit without asking Slurm, the image and the disks whether they will have it",
    )
    parser.add_argument(
        "--pilot",
        type=whole_number(FEWEST),
        metavar="K",
        help="do K requests only, and say what the whole will take (see aiflux estimate)",
    )
    add_json(parser)
    add_settings(parser, "run", "slurm", "paths")


def execute(arguments: argparse.Namespace) -> int:
    """Run one input."""
    config = Config(arguments=given_settings(vars(arguments)))
    input_path = Path(arguments.input)
    if arguments.input == STDIN:
        input_path = kept_input(sys.stdin.buffer, arguments.output)
    output = named_output(arguments.output, input_path)
    if arguments.local and config.get("engine_url"):
        raise UsageError(
            "--local and --engine-url exclude each other",
            "--local starts an engine here; --engine-url uses one that is up",
        )
    if arguments.pilot is not None:
        from aiflux.cli.commands.estimate import Asked, foretell

        asked = Asked(arguments, config, input_path, output, arguments.pilot)
        return foretell(replace(asked, as_json=arguments.json))
    if arguments.json and not arguments.dry_run:
        run = RunDirectory.of_output(checked_output(output))
        return then_told(lambda: _run(arguments, config, input_path, output), run)
    return _run(arguments, config, input_path, output)


def _run(arguments: argparse.Namespace, config: Config, input_path: Path, output: Path) -> int:
    if arguments.local:
        return run_local(_open(arguments, config, input_path, output), config)
    managed = kind_named(config.engine).managed
    if not managed and arguments.dry_run:
        return _show_plan(arguments, config, input_path, output)
    if not managed:
        show_local_choices(config, None)
        return run_here(_open(arguments, config, input_path, output))
    return _submit(arguments, config, input_path, output)


def _open(
    arguments: argparse.Namespace, config: Config, input_path: Path, output: Path
) -> OpenedRun:
    """Open a run that is to be done here, and let `aiflux jobs` know it."""
    options = config.run_options()
    opened = open_run(
        input_path,
        output,
        options,
        config.models_dir,
        engine_kind(options),
        force=arguments.force,
        force_resume=arguments.force_resume,
    )
    if not opened.finished:
        register(opened.plan)
        carry_estimate(opened.plan, opened.run)
        for finding in check_fields(opened.plan):
            print(f"warning: {told(finding)}", file=sys.stderr)
    return opened


def _show_plan(
    arguments: argparse.Namespace, config: Config, input_path: Path, output: Path
) -> int:
    """Print the plan of a run that needs neither Slurm nor an image: its engine runs already."""
    options = config.run_options()
    draft = draft_run(
        input_path,
        output,
        options,
        config.models_dir,
        engine_kind(options),
        force=arguments.force,
        force_resume=arguments.force_resume,
    )
    plan = draft.plan.to_json()
    if arguments.json:
        print_json({"plan": plan, "image": None, "scripts": [], "warnings": []})
    else:
        print(json_text(plan, indent=2))
    return 0


def _submit(arguments: argparse.Namespace, config: Config, input_path: Path, output: Path) -> int:
    from aiflux.slurm.submit import plan_job

    slurm = config.get_slurm_config()
    planned = plan_job(
        config,
        slurm,
        input_path,
        output,
        config.run_options(),
        force=arguments.force,
        force_resume=arguments.force_resume,
        check=not arguments.no_preflight,
        write=not arguments.dry_run,
    )
    show_local_choices(config, planned.image)
    for finding in planned.findings:
        print(f"warning: {told(finding)}", file=sys.stderr)
    if arguments.dry_run and arguments.json:
        print_json(_dry(planned))
        return 0
    if arguments.dry_run:
        print(json_text(planned.opened.plan.to_json(), indent=2))
        for _, script in planned.scripts:
            print()
            print(script, end="")
        return 0
    return submit_planned(planned)


def _dry(planned: PlannedRun) -> dict[str, Any]:
    """Return what a dry run shows."""
    return {
        "plan": planned.opened.plan.to_json(),
        "image": planned.image,
        "scripts": [text for _, text in planned.scripts],
        "warnings": [told(finding) for finding in planned.findings],
    }
