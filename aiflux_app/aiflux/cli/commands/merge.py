"""``aiflux merge``: write a run's output from its journals."""

from __future__ import annotations

import argparse

from aiflux.cli.json_output import add_json, print_json, then_told
from aiflux.cli.run_argument import located
from aiflux.cli.start import write_output
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.output import merge_partial
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import finished_counts, finished_line, refuse_failures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Write the output of a run whose requests are all done. The job that ends last does this "
        "by itself; by hand it is for a run whose last job was killed meanwhile."
    )
    parser.epilog = "example: aiflux merge results.json --partial"
    parser.add_argument("run", metavar="R", help="job id, run directory or output")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--again", action="store_true", help="write it although it is there")
    how.add_argument(
        "--partial",
        action="store_true",
        help="write what is done so far to OUTPUT.partial.json (or .jsonl); the run goes on",
    )
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Write the output."""
    run = located(arguments.run)
    if arguments.partial:
        return _partial(arguments, run)
    if arguments.json:
        return then_told(lambda: _merge(arguments, run), run)
    return _merge(arguments, run)


def _partial(arguments: argparse.Namespace, run: RunDirectory) -> int:
    plan = read_plan(run)
    path, counts = merge_partial(plan, run)
    if arguments.json:
        done = {"written": counts.total, "failed": counts.failed, "total": plan.requests}
        print_json({"output": path, **done})
    else:
        print(f"wrote {counts.total} of {plan.requests} results ({counts.failed} failed) to {path}")
    return 0


def _merge(arguments: argparse.Namespace, run: RunDirectory) -> int:
    plan = read_plan(run)
    done = finished_counts(plan, run, changed_ok=arguments.again)
    if done is not None and not arguments.again:
        print(finished_line(plan, done))
        refuse_failures(plan, done.failed)
        return 0
    return write_output(plan, run, again=arguments.again)
