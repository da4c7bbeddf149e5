"""``aiflux doctor``: check this site, and report what will not work and how to fix it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import command
from aiflux.core.config.config import Config
from aiflux.doctor import host
from aiflux.doctor.host import quotas
from aiflux.errors import AifluxError, ExitCode
from aiflux.util.diagnosis import Diagnosis, fail
from aiflux.worker.console import TerminalConsole

Section = tuple[str, Callable[[], Iterable[Diagnosis]]]

_NOTE = "Exit status: 0 nothing failed (there may be warnings); 2 something failed."
_MARKS = {"ok": "ok", "warn": "warn", "fail": "FAIL"}
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@command("doctor", examples=["aiflux doctor --json"], note=_NOTE)
@json_option("Print a list of {name, level, what, fix}")
def doctor(as_json: bool) -> int:
    """Check this machine and its cluster, and report what will not work and how to fix it.

    It changes nothing and submits nothing.
    """
    config, settings = host.load_config(os.environ)
    console = TerminalConsole(highlight=False)
    found: list[Diagnosis] = []
    for title, look in _sections(config, settings):
        lines = _checked(title, look)
        found += lines
        if as_json:
            continue
        if console.is_terminal:
            console.print(_table(title, lines))
            console.print()
        else:
            print(_plain(title, lines))
    if as_json:
        print_json([line.to_json() for line in found])
    else:
        print(_verdict(found))
    failed = any(line.level == "fail" for line in found)
    return int(ExitCode.USAGE if failed else ExitCode.OK)


def _checked(title: str, look: Callable[[], Iterable[Diagnosis]]) -> list[Diagnosis]:
    """Run the checks of a section; an error becomes a line of that section."""
    lines: list[Diagnosis] = []
    try:
        lines += look()
    except AifluxError as error:
        lines.append(fail(title.lower(), error.message, error.remedy or ""))
    return lines


def _sections(config: Config, settings: list[Diagnosis]) -> list[Section]:
    from aiflux.doctor.apptainer import containers, registries
    from aiflux.doctor.slurm import scheduler

    return [
        ("This machine", lambda: [*host.versions(), *settings]),
        ("Slurm", lambda: scheduler(config.get_slurm_config().checked())),
        ("Container", lambda: containers(config, Path.cwd())),
        ("Models and disk", lambda: [*host.models(config), *quotas(_folders(config))]),
        ("Network", lambda: [*host.proxies(os.environ), *registries()]),
    ]


def _folders(config: Config) -> list[Path]:
    return [Path.home(), Path.cwd(), config.models_dir]


def _table(title: str, lines: list[Diagnosis]) -> Table:
    table = Table(
        box=None, pad_edge=False, show_header=False, title=title, title_justify="left",
        title_style="bold", padding=(0, 2, 0, 0),
    )  # fmt: skip
    table.add_column(width=4)
    table.add_column(width=14, overflow="fold")
    table.add_column(overflow="fold")
    for line in lines:
        fix = f"\n[cyan]-> {escape(line.fix)}[/cyan]" if line.fix else ""
        mark = f"[{_COLOURS[line.level]}]{_MARKS[line.level]}[/]"
        table.add_row(mark, escape(line.name), escape(line.what) + fix)
    return table


def _plain(title: str, lines: list[Diagnosis]) -> str:
    rows = [title]
    for line in lines:
        rows.append(f"{_MARKS[line.level]:5}{line.name}: {line.what}")
        rows += [f"     -> {line.fix}"] if line.fix else []
    return "\n".join([*rows, ""])


def _verdict(found: list[Diagnosis]) -> str:
    fails = sum(line.level == "fail" for line in found)
    warnings = sum(line.level == "warn" for line in found)
    if fails:
        return f"{fails} FAIL, {warnings} warn: fix the failures before you start a run"
    return f"no failures; {warnings} warn"
