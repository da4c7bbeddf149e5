"""``aiflux image``: build the Apptainer image, and tell what is in one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aiflux.core.config import Config
from aiflux.core.container import find_image
from aiflux.image import BuildOptions, build, info


def execute(arguments: argparse.Namespace) -> int:
    """Carry out the action that was named."""
    return _build(arguments) if arguments.action == "build" else _info(arguments)


def _build(arguments: argparse.Namespace) -> int:
    options = BuildOptions(
        output=Path(arguments.output),
        base=arguments.base,
        ollama_image=arguments.ollama_image,
        ollama_tarball=Path(arguments.ollama_tarball) if arguments.ollama_tarball else None,
        mirror=arguments.mirror,
        suite=arguments.suite,
        force=arguments.force,
    )
    print(build(options, _say))
    return 0


def _info(arguments: argparse.Namespace) -> int:
    found = info(Path(arguments.file) if arguments.file else find_image(Config(), Path.cwd()))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("image", str(found.path))
    for name, value in sorted(found.facts.items()):
        table.add_row(name, value)
    Console(highlight=False, markup=False).print(table)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)
