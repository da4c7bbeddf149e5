"""``aiflux config``: print each setting and where its value came from, and write a first file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from aiflux.cli.json_output import add_json, print_json
from aiflux.core.config.config import Config
from aiflux.core.config.declaration import Setting
from aiflux.core.config.settings import SECTIONS, SETTINGS
from aiflux.core.config.sources import project_file, user_file
from aiflux.errors import OutputExistsError, UsageError
from aiflux.util.files import expanded
from aiflux.worker.console import TerminalConsole

_PIPED = 4096  # columns; what a program reads is not folded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    show = actions.add_parser("show", help="print each value and where it came from")
    add_json(show, "print JSON")
    init = actions.add_parser("init", help="write a first aiflux.yaml from what Slurm offers here")
    where = init.add_mutually_exclusive_group()
    where.add_argument("--user", action="store_true", help="for all your folders, not this one")
    where.add_argument(
        "--output", metavar="FILE", help="where to write it (default: aiflux.yaml; - prints it)"
    )
    init.add_argument("--force", action="store_true", help="replace a file that is there")


def execute(arguments: argparse.Namespace) -> int:
    """Show the configuration, or write a file of it."""
    if arguments.action == "init":
        return _init(arguments)
    config = Config()
    if arguments.json:
        print_json(_as_json(config))
    else:
        width = None if sys.stdout.isatty() else _PIPED
        TerminalConsole(highlight=False, markup=False, width=width).print(_table(config))
    return 0


def _table(config: Config) -> Table:
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for index in (1, 2):
        table.columns[index].overflow = "fold"
    for section in SECTIONS:
        table.add_row(f"{section}:")
        for setting in SETTINGS:
            if setting.section == section:
                value = config.values[setting.name]
                table.add_row(f"  {setting.name}", _shown(value.value), _short(value.origin))
    table.add_row("so:")
    for name, path in _derived(config).items():
        table.add_row(f"  {name}", _short(str(path)), "from the above")
    return table


def _shown(value: Any) -> str:
    if value in (None, {}, ()):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(_item(f"{key}={item}" if item else key) for key, item in value.items())
    return ", ".join(map(_item, value)) if isinstance(value, tuple) else _short(str(value))


def _item(text: str) -> str:
    """Return one of several texts, in quotes where it could be taken for two or not be seen."""
    plain = text.isprintable() and text == text.strip() and "," not in text
    return text if plain else json.dumps(text, ensure_ascii=False)


def _short(text: str) -> str:
    """Return a path or an origin with the current folder and the home directory shortened."""
    for folder, mark in ((str(Path.cwd()), "."), (str(Path.home()), "~")):
        if folder != "/" and text.startswith(folder + "/"):
            return mark + text[len(folder) :]
    return text


def _derived(config: Config) -> dict[str, Path]:
    return {"models in": config.models_dir, "images in": config.containers_dir}


def _as_json(config: Config) -> dict[str, Any]:
    settings = {item.name: _setting_as_json(config, item) for item in SETTINGS}
    return {
        "settings": settings,
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


def _init(arguments: argparse.Namespace) -> int:
    from aiflux.slurm.cluster import ask_cluster
    from aiflux.slurm.config_template import initial_file, propose
    from aiflux.util.files import atomic_write

    target = _target(arguments)
    if target is not None:
        _refuse(target, force=arguments.force)
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
        print("  Slurm was not there, or did not answer: nothing was chosen")
    print("  see what holds: aiflux config show    whether it will work: aiflux doctor")
    for finding in proposal.findings:
        print(f"warning: {finding.what}\n  -> {finding.fix}", file=sys.stderr)
    return 0


def _target(arguments: argparse.Namespace) -> Path | None:
    """Return the file to write; None prints it."""
    if arguments.output == "-":
        return None
    if arguments.user:
        path = user_file(os.environ)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
    if arguments.output:
        return expanded(arguments.output).absolute()
    return project_file(Path.cwd())


def _refuse(target: Path, *, force: bool) -> None:
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}", "make it, or choose another")
    if target.is_dir():
        raise UsageError(f"{target} is a folder", "name a file: --output FILE")
    if target.exists() and not force:
        raise OutputExistsError(
            f"{target} is there already", "give --force to replace it, or choose another: --output"
        )
