"""``aiflux config``: print each setting and where its value came from, and write a first file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import FILE, group, option
from aiflux.core.config.config import Config
from aiflux.core.config.declaration import Setting
from aiflux.core.config.settings import SECTIONS, SETTINGS, RunOptions, SlurmConfig
from aiflux.core.config.sources import project_file, user_file
from aiflux.core.runs.directory import refuse_precious
from aiflux.errors import ImageError, OutputExistsError, UsageError
from aiflux.image.container import find_image
from aiflux.util.files import absolute
from aiflux.worker.console import TerminalConsole

if TYPE_CHECKING:
    from aiflux.slurm.cluster import Facts
    from aiflux.slurm.config_template import Proposal
    from aiflux.slurm.limits import SiteLimit
    from aiflux.slurm.preflight.local import Finding

_PIPED = 4096  # columns: lines for other programs are not wrapped


@group("config", examples=["aiflux config show", "aiflux config init"])
def config() -> None:
    """Show the settings and their origins, or write a first configuration file."""


@config.command("show", examples=["aiflux config show", "aiflux config show --json"])
@json_option("Print all settings as JSON")
def show(as_json: bool) -> int:
    """Show every setting: first those that differ from the defaults, with their origins.

    The limits of the site are shown, too: the most that a run can request.
    """
    values = Config()
    if as_json:
        print_json(_as_json(values))
    else:
        width = None if sys.stdout.isatty() else _PIPED
        TerminalConsole(highlight=False, markup=False, width=width).print(_table(values))
    return 0


@config.command("init", examples=["aiflux config init --user"], exclusive=[("user", "output")])
@option("--user", is_flag=True, help="Write the file that holds for all your directories")
@option(
    "-o",
    "--output",
    metavar="FILE",
    type=FILE,
    help="File to write, - for stdout (default: aiflux.yaml)",
)
@option("--force", is_flag=True, help="Overwrite an existing file")
def init(user: bool, output: str | None, force: bool) -> int:
    """Write a first aiflux.yaml that suits this cluster."""
    from aiflux.slurm.cluster import ask_cluster
    from aiflux.slurm.config_template import initial_file, propose
    from aiflux.util.files import atomic_write

    target = _target(output, user=user)
    if target is not None:
        _refuse(target, force=force)
    if sys.stderr.isatty():
        print("asking Slurm ...", file=sys.stderr)
    facts = ask_cluster()
    proposal = propose(facts)
    text = initial_file(facts, proposal)
    if target is None:
        print(text, end="")
        return 0
    with atomic_write(target) as file:
        file.write(text.encode())
    print(f"wrote {target}")
    if facts.settings:
        chosen = (f"{name}: {value}" for name, value in proposal.values.items())
        print("  " + ", ".join(chosen))
    else:
        print("  Slurm is not available or did not respond: every setting has its default")
    print("  show the settings: aiflux config show    check the site: aiflux doctor")
    for finding in (*proposal.findings, *_about_image(facts, proposal)):
        print(f"warning: {finding.what}\n  -> {finding.fix}", file=sys.stderr)
    return 0


def _about_image(facts: Facts, proposal: Proposal) -> Iterable[Finding]:
    """Return the problems of a job with the image, if there is one already."""
    from aiflux.slurm.preflight.cluster import check_job_image

    config = Config()
    try:
        image = find_image(config, Path.cwd(), engine=config.engine)
    except ImageError:
        return ()  # doctor and run report it; there is none before the first `make image`
    slurm = SlurmConfig(**proposal.values).checked()
    return check_job_image(image, facts, slurm, RunOptions(engine=config.engine))


def _table(config: Config) -> Table:
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for index in (1, 2):
        table.columns[index].overflow = "fold"
    changed = [item for item in SETTINGS if config.values[item.name].origin != "default"]
    _add_rows(table, "changed:" if changed else "changed: nothing", config, changed)
    for section in SECTIONS:
        rest = [each for each in SETTINGS if each.section == section and each not in changed]
        _add_rows(table, f"{section}, defaults:", config, rest)
    limits = _limits()
    if limits:
        table.add_row("limits of the site, for every run:")
    for name, limit in limits.items():
        table.add_row(f"  {name}", _shown(limit.value), _short(limit.origin))
    table.add_row("resulting directories:")
    for name, path in _derived(config).items():
        table.add_row(f"  {name}", _short(str(path)))
    return table


def _add_rows(table: Table, title: str, config: Config, settings: list[Setting]) -> None:
    table.add_row(title)
    for setting in settings:
        value = config.values[setting.name]
        if setting.offered or value.origin != "default":
            origin = "" if value.origin == "default" else _short(value.origin)
            table.add_row(f"  {setting.name}", _shown(value.value), origin)


def _shown(value: Any) -> str:
    if value in (None, {}, ()):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(_item(f"{key}={item}" if item else key) for key, item in value.items())
    return ", ".join(map(_item, value)) if isinstance(value, tuple) else _short(str(value))


def _item(text: str) -> str:
    """Return one text of a list, in quotes if it is ambiguous or invisible."""
    plain = text.isprintable() and text == text.strip() and "," not in text
    return text if plain else json.dumps(text, ensure_ascii=False)


def _short(text: str) -> str:
    """Return a path or an origin with the current and the home directory shortened."""
    for folder, mark in ((str(Path.cwd()), "."), (str(Path.home()), "~")):
        if folder != "/" and text.startswith(folder + "/"):
            return mark + text[len(folder) :]
    return text


def _derived(config: Config) -> dict[str, Path]:
    return {"models": config.models_dir, "images": config.containers_dir}


def _limits() -> dict[str, SiteLimit]:
    """Return the limits of the site; their module is slow to import."""
    from aiflux.slurm.limits import site_limits

    return site_limits(os.environ)


def _as_json(config: Config) -> dict[str, Any]:
    settings = {item.name: _setting_as_json(config, item) for item in SETTINGS}
    return {
        "settings": settings,
        "limits": {
            name: {"value": limit.value, "from": limit.origin} for name, limit in _limits().items()
        },
        "models_dir": str(config.models_dir),
        "containers_dir": str(config.containers_dir),
    }


def _setting_as_json(config: Config, setting: Setting) -> dict[str, Any]:
    value = config.values[setting.name]
    return {
        "section": setting.section,
        "value": str(value.value) if isinstance(value.value, Path) else value.value,
        "from": value.origin,
        "option": setting.option,
        "environment": setting.env,
    }


def _target(output: str | None, *, user: bool) -> Path | None:
    """Return the file to write; None prints it."""
    if output == "-":
        return None
    if user:
        path = user_file(os.environ)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
    if output:
        return absolute(output)
    return project_file(Path.cwd())


def _refuse(target: Path, *, force: bool) -> None:
    if not target.parent.is_dir():
        raise UsageError(
            f"no such directory: {target.parent}", "create it, or choose another: --output"
        )
    if target.is_dir():
        raise UsageError(f"{target} is a directory", "name a file: --output FILE")
    refuse_precious(target)
    if target.exists() and not force:
        raise OutputExistsError(
            f"{target} already exists",
            "use --force to overwrite it, or choose another: --output",
        )
