"""``aiflux report``: a run as one HTML page, or as JSON."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from shlex import quote

from markupsafe import Markup

from aiflux.cli.json_output import json_option
from aiflux.cli.parser import FILE, command, option
from aiflux.cli.run_argument import located, run_argument
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import journal_lines
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import read_run_status, read_status
from aiflux.errors import ConfigError
from aiflux.estimates.estimate import read_estimate
from aiflux.report.build import ReportSources, make_report
from aiflux.report.data import Condition, Report
from aiflux.report.journal_summary import tally
from aiflux.report.methods import methods
from aiflux.report.page import page
from aiflux.report.plots import latency_plot, throughput_plot
from aiflux.slurm.jobs import known_submissions
from aiflux.slurm.monitor import ShardView, gather
from aiflux.util.files import atomic_write, expanded, may_write, short, user_name
from aiflux.util.records import to_json
from aiflux.util.streams import STDOUT
from aiflux.util.text import json_text, terminal_text, whole


@command("report", examples=["aiflux report results.json --output report.html"])
@run_argument
@option(
    "-o",
    "--output",
    metavar="FILE",
    type=FILE,
    help="Page to write (default: report.html in the run directory); - for stdout",
)
@json_option("Write JSON instead, to stdout or FILE")
def report(run: str, output: str | None, as_json: bool) -> int:
    """Write a report about a run, as one HTML page that needs no network.

    It shows what ran, the results and the resources used. The run may still be in progress.
    """
    directory = located(run)
    place = output or (STDOUT if as_json else None)
    target = None if place == STDOUT else _target(output, directory)
    made = read_report(directory)
    text, no_plots = _json(made) if as_json else _page(made)
    if target is None:
        print(text, end="")
    else:
        with atomic_write(target, 0o600) as file:
            file.write(terminal_text(text).encode())
        print(f"{made.condition.state}: wrote {short(target)}")
    if no_plots is not None:
        print(f"  without plots: {no_plots}", file=sys.stdout if target else sys.stderr)
    return 0


def _json(report: Report) -> tuple[str, None]:
    content = {**report.to_json(), "methods": methods(report)}
    return f"{json_text(whole(content), indent=2, only_ascii=True)}\n", None


def _page(report: Report) -> tuple[str, str | None]:
    """Return the page, and why it has no plots."""
    plots, no_plots = _plots(report)
    return page(report, plots, no_plots), no_plots


def read_report(run: RunDirectory) -> Report:
    """Read all files of a run and summarize them.

    Raises:
        RunConflictError: the run has no plan that can be read.
    """
    plan = read_plan(run)
    journals = (run.journal(shard.index) for shard in plan.shards)
    tallies = tuple(tally(journal_lines(journal)) for journal in journals)
    return make_report(
        ReportSources(
            plan=plan,
            run_dir=str(run.path),
            condition=_condition(run),
            statuses=tuple(read_status(run, shard.index, plan) for shard in plan.shards),
            whole=read_run_status(run, plan),
            tallies=tallies,
            estimate=read_estimate(run.estimate, plan),
            now=time.time(),
        )
    )


def _condition(run: RunDirectory) -> Condition:
    view = gather(run)
    submissions = known_submissions(run)
    image = None if submissions is None else submissions.image
    return Condition(
        state=view.state.value,
        ended=view.ended,
        finished=view.finished,
        next_command=view.next_command,
        remedy=view.remedy,
        shards=tuple(shard.state.value for shard in view.shards),
        reasons=tuple(_reason(shard) for shard in view.shards),
        submitted=view.submitted,
        jobs=view.jobs,
        image=None if image is None else str(image),
        slurm=None if submissions is None else to_json(submissions.slurm),
    )


def _reason(shard: ShardView) -> str:
    """Return why a shard is not finished, as in the table of ``aiflux status``."""
    code = shard.exit_code
    reasons = [shard.reason] if shard.reason else []
    if code and "exit code" not in shard.reason:
        reasons.append(f"exit code {code}")
    return ", ".join(reasons)


def _target(given: str | None, run: RunDirectory) -> Path:
    if given is None:
        if not may_write(run.path):
            owner = user_name(run.path.stat().st_uid)
            raise ConfigError(
                f"permissions deny writing to {run.path}, which belongs to {owner}",
                "write the report elsewhere: --output report.html",
            )
        return run.report
    target = expanded(given).absolute()
    if target.is_dir():
        raise ConfigError(f"--output {given!r} is a directory", "name a file, such as report.html")
    if not target.parent.is_dir():
        raise ConfigError(
            f"the directory of --output {given!r} does not exist",
            f"mkdir -p {quote(str(target.parent))}",
        )
    return target


def _plots(report: Report) -> tuple[dict[str, Markup], str | None]:
    """Return the plots, or why there are none."""
    plots = {}
    try:
        if report.throughput.bars:
            plots["throughput"] = throughput_plot(report.throughput)
        if report.latency.count:
            plots["latency"] = latency_plot(report.latency)
    except ConfigError as error:
        return {}, f"{error.message}; {error.remedy}"
    return plots, None
