"""``aiflux run``: as a Slurm job, in the image here, or against an engine that is up."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.cli.jsonout import add_json, print_json, then_told
from aiflux.cli.piped import STDIN, kept_input
from aiflux.core.arguments import add_settings, given_settings
from aiflux.core.config import Config
from aiflux.core.container import find_image, find_runtime
from aiflux.core.merge import merge
from aiflux.core.opening import OpenedRun, open_run
from aiflux.core.plan import Plan
from aiflux.core.preflight import told
from aiflux.core.registry import register_plan
from aiflux.core.rundir import RunDirectory, checked_output, default_output
from aiflux.core.status import finished_line, refuse_failures
from aiflux.errors import ImageError, UsageError

if TYPE_CHECKING:
    from aiflux.slurm.jobs import JobId
    from aiflux.slurm.submission import PlannedRun


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
        type=pilot_size,
        metavar="K",
        help="do K requests only, and say what the whole will take (see aiflux estimate)",
    )
    add_json(parser)
    add_settings(parser, "run", "slurm", "paths")


def pilot_size(text: str) -> int:
    """Return the number of a pilot's requests.

    Raises:
        argparse.ArgumentTypeError: it is none, or too few to tell how requests differ.
    """
    if not text.isascii() or not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 2")
    return int(text)


def execute(arguments: argparse.Namespace) -> int:
    """Run one input."""
    config = Config(arguments=given_settings(arguments))
    input_path = Path(arguments.input)
    if arguments.input == STDIN:
        input_path = kept_input(sys.stdin.buffer, arguments.output)
    output = Path(arguments.output or default_output(input_path, Path.cwd()))
    if arguments.local and config.get("engine_url"):
        raise UsageError(
            "--local and --engine-url exclude each other",
            "--local starts an engine here; --engine-url uses one that is up",
        )
    if arguments.pilot is not None:
        from aiflux.cli.estimate import Asked, foretell

        asked = Asked(arguments, config, input_path, output, arguments.pilot)
        return foretell(replace(asked, as_json=arguments.json))
    if arguments.json and not arguments.dry_run:
        run = RunDirectory.of_output(checked_output(output))
        return then_told(lambda: _run(arguments, config, input_path, output), run)
    return _run(arguments, config, input_path, output)


def _run(arguments: argparse.Namespace, config: Config, input_path: Path, output: Path) -> int:
    if arguments.local:
        return run_local(_open(arguments, config, input_path, output), config)
    if config.get("engine_url") and not arguments.dry_run:
        return run_here(_open(arguments, config, input_path, output))
    return _submit(arguments, config, input_path, output)


def _open(
    arguments: argparse.Namespace, config: Config, input_path: Path, output: Path
) -> OpenedRun:
    """Open a run that is to be done here, and let `aiflux jobs` know it."""
    opened = open_run(
        input_path,
        output,
        config.run_options(),
        config.models_dir,
        force=arguments.force,
        force_resume=arguments.force_resume,
    )
    if not opened.finished:
        _register(opened.plan)
    return opened


def _submit(arguments: argparse.Namespace, config: Config, input_path: Path, output: Path) -> int:
    from aiflux.slurm.submission import plan_job

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
    for finding in planned.findings:
        print(f"warning: {told(finding)}", file=sys.stderr)
    if arguments.dry_run and arguments.json:
        print_json(_dry(planned))
        return 0
    if arguments.dry_run:
        print(json.dumps(planned.opened.plan.to_json(), indent=2, ensure_ascii=False))
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


def submit_planned(planned: PlannedRun) -> int:
    """Submit a planned run and say so; write the output where only that is missing."""
    from aiflux.slurm.jobs import join_jobs
    from aiflux.slurm.submission import submit_job

    opened = planned.opened
    if opened.finished:
        return _tell_finished(opened)
    if not opened.open_shards:
        return write_output(opened.plan, opened.run)
    jobs = submit_job(planned)
    _register(opened.plan, jobs)
    plan, shards = opened.plan, len(opened.open_shards)
    parts = "" if len(plan.shards) == 1 else f" in {shards} of {len(plan.shards)} shards"
    noun = "job" if len(jobs) == 1 else "jobs"
    print(f"submitted {noun} {join_jobs(jobs)}: {plan.requests} requests{parts} -> {plan.output}")
    print(f"  run directory: {opened.run.path}")
    name = jobs[0].number
    print(f"  see it: aiflux watch {name}    stop it: aiflux cancel {name}")
    return 0


def _register(plan: Plan, jobs: Sequence[JobId] = ()) -> None:
    """Let `aiflux jobs` know the run."""
    warning = register_plan(plan, jobs)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def write_output(plan: Plan, run: RunDirectory, *, again: bool = False) -> int:
    """Write a run's output from its journals.

    Raises:
        TooManyFailuresError: more requests failed than are allowed.
    """
    counts = merge(plan, run, print, again=again)
    refuse_failures(plan, {"total": counts.total, "failed": counts.failed})
    return 0


def run_local(opened: OpenedRun, config: Config) -> int:
    """Run in the image where Apptainer and the image are, else on an ollama found on PATH.

    AIFLUX_OLLAMA names an ollama to use in either case.
    """
    if opened.finished:
        return _tell_finished(opened)
    if os.environ.get("AIFLUX_OLLAMA"):
        return run_here(opened)
    try:
        runtime, image = find_runtime(), find_image(config, Path.cwd())
    except ImageError as error:
        if config.image is not None or shutil.which("ollama") is None:
            raise ImageError(
                f"{error.message}; and there is no ollama on PATH either", error.remedy
            ) from error
        return run_here(opened)
    from aiflux.cli.container import run_in_container

    return run_in_container(opened, runtime, image, seal=config.get("seal"))


def run_here(opened: OpenedRun) -> int:
    """Work in this process, in the foreground."""
    from aiflux.worker.progress import make_reporter
    from aiflux.worker.run import Context, ensure_models, work
    from aiflux.worker.stopper import Stopper

    if opened.finished:
        return _tell_finished(opened)
    stopper = Stopper()
    stopper.install()
    context = Context(make_reporter(), stopper, api_key=os.environ.get("AIFLUX_API_KEY"))
    try:
        ensure_models(opened.plan, opened.run, context)
        work(opened.plan, opened.run, 0, context)
    finally:
        context.reporter.close()
    return 0


def _tell_finished(opened: OpenedRun) -> int:
    print(finished_line(opened.plan, opened.counts))
    refuse_failures(opened.plan, opened.counts)
    return 0
