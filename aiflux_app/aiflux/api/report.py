"""Read all files of a run for its report, and write the page."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from aiflux.api.chain import ChainView
from aiflux.api.energy import slurm_energy
from aiflux.core.config.config import Config
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import journal_lines
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import read_run_status, read_status
from aiflux.errors import ConfigError
from aiflux.estimates.energy import Rates
from aiflux.estimates.estimate import read_estimate
from aiflux.report.build import ReportSources, make_report
from aiflux.report.chain_page import StepFigures, page_of_chain
from aiflux.report.data import Condition, Report
from aiflux.report.journal_summary import tally
from aiflux.report.page import page
from aiflux.report.plots import latency_plot, throughput_plot
from aiflux.slurm.jobs import known_submissions
from aiflux.slurm.monitor import ShardView, gather
from aiflux.util.files import atomic_write
from aiflux.util.records import to_json
from aiflux.util.text import terminal_text


def read_report(run: RunDirectory, rates: Rates | None = None) -> Report:
    """Read all files of a run and summarize them.

    Args:
        rates: of the site; None takes those of the settings.

    Raises:
        RunConflictError: the run has no plan that can be read.
    """
    plan = read_plan(run)
    journals = (run.journal(shard.index) for shard in plan.shards)
    damaged: list[int] = []
    tallies = tuple(tally(journal_lines(journal, damaged.append)) for journal in journals)
    condition = _condition(run)
    return make_report(
        ReportSources(
            plan=plan,
            run_dir=str(run.path),
            condition=condition,
            statuses=tuple(read_status(run, shard.index, plan) for shard in plan.shards),
            whole=read_run_status(run, plan),
            tallies=tallies,
            estimate=read_estimate(run.estimate, plan),
            now=time.time(),
            rates=rates or Rates.of(Config()),
            damaged=len(damaged),
            slurm_energy=slurm_energy(run) if condition.ended else None,
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


def report_page(report: Report) -> tuple[str, str | None]:
    """Return a report as an HTML page, and why it has no plots, if it has none."""
    plots, no_plots = _plots(report)
    return page(report, plots, no_plots), no_plots


def chain_page(view: ChainView, reports: Mapping[str, Report], target: Path) -> str:
    """Return the page of a chain, which links to the reports of its steps.

    Args:
        reports: of the steps, by name.
        target: where the page will be.
    """
    steps = [
        StepFigures(
            step.record.name,
            step.state,
            step.record.stopped,
            step.record.unusable,
            step.record.unusable_text,
            quote(os.path.relpath(step.directory.report, target.parent)),
            reports.get(step.record.name),
        )
        for step in view.steps
    ]
    command = view.command(anywhere=True) if view.stopped else None
    return page_of_chain(str(view.folder.output), view.state, steps, command)


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


def write_text(target: Path, text: str) -> None:
    """Write a report for its user only, with control characters replaced.

    Raises:
        StorageError: writing failed.
    """
    with atomic_write(target, 0o600) as file:
        file.write(terminal_text(text).encode())
