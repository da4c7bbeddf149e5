"""``aiflux config``: print each setting and where its value came from."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from aiflux.core.config import Config
from aiflux.core.settings import SETTINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    actions.add_parser("show", help="print each value and where it came from")


def execute(arguments: argparse.Namespace) -> int:
    """Show the configuration."""
    config = Config()
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for setting in SETTINGS:
        value = config.values[setting.name]
        shown = "" if value.value in (None, {}, ()) else str(value.value)
        table.add_row(f"{setting.section}.{setting.name}", shown, value.origin)
    table.add_row("models in", str(config.models_dir), "derived")
    table.add_row("images in", str(config.containers_dir), "derived")
    Console(highlight=False, markup=False).print(table)
    return 0
