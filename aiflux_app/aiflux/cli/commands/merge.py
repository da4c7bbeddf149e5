"""``aiflux merge``: write a run's output from its journals."""

from __future__ import annotations

from aiflux.cli.json_output import json_option, print_json, then_status
from aiflux.cli.parser import command, option
from aiflux.cli.run_argument import located, run_argument
from aiflux.cli.start import write_output
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.output import merge_partial
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import finished_counts, finished_line, refuse_failures


@command(
    "merge", examples=["aiflux merge results.json --partial"], exclusive=[("again", "partial")]
)
@run_argument
@option("--again", is_flag=True, help="Write the output although it already exists")
@option(
    "--partial",
    is_flag=True,
    help="Write the results so far to OUTPUT.partial.json (or .jsonl); the run continues",
)
@json_option()
def merge(run: str, again: bool, partial: bool, as_json: bool) -> int:
    """Write the output of a run whose requests are all finished.

    The last job of a run does this itself. It is needed by hand only if that job was killed
    while it merged.
    """
    directory = located(run)
    if partial:
        return _partial(directory, as_json=as_json)
    if as_json:
        return then_status(lambda: _merge(directory, again=again), directory)
    return _merge(directory, again=again)


def _partial(run: RunDirectory, *, as_json: bool) -> int:
    plan = read_plan(run)
    path, counts = merge_partial(plan, run)
    if as_json:
        done = {"written": counts.total, "failed": counts.failed, "total": plan.requests}
        print_json({"output": path, **done})
    else:
        print(f"wrote {counts.total} of {plan.requests} results ({counts.failed} failed) to {path}")
    return 0


def _merge(run: RunDirectory, *, again: bool) -> int:
    plan = read_plan(run)
    done = finished_counts(plan, run, changed_ok=again)
    if done is not None and not again:
        print(finished_line(plan, done))
        refuse_failures(plan, done.failed)
        return 0
    return write_output(plan, run, again=again)
