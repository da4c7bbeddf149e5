"""``aiflux report``: a run as one HTML page, or as JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote

from aiflux.api.report import read_report, report_page, write_text
from aiflux.cli.chains import chain_named, chain_report
from aiflux.cli.json_output import json_option
from aiflux.cli.parser import FILE, command, option
from aiflux.cli.run_argument import run_argument
from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import ConfigError
from aiflux.report.data import Report
from aiflux.report.methods import methods
from aiflux.slurm.commands import located
from aiflux.util.files import expanded, may_write, short, user_name
from aiflux.util.streams import STDOUT
from aiflux.util.text import json_text, whole


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
    chain = chain_named(run)
    if chain is not None:
        own = None if output is None else _target(output, chain.directory)
        return chain_report(chain, own, as_json=as_json)
    directory = located(run)
    place = output or (STDOUT if as_json else None)
    target = None if place == STDOUT else _target(output, directory)
    made = read_report(directory)
    text, no_plots = _json(made) if as_json else report_page(made)
    if target is None:
        print(text, end="")
    else:
        write_text(target, text)
        print(f"{made.condition.state}: wrote {short(target)}")
    if no_plots is not None:
        print(f"  without plots: {no_plots}", file=sys.stdout if target else sys.stderr)
    return 0


def _json(report: Report) -> tuple[str, None]:
    content = {**report.to_json(), "methods": methods(report)}
    return f"{json_text(whole(content), indent=2, only_ascii=True)}\n", None


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
