"""``aiflux examples``: a small project to start from."""

from __future__ import annotations

import argparse
from importlib.resources import files

from aiflux.cli.run_argument import short
from aiflux.errors import ConfigError
from aiflux.util.files import atomic_write, expanded, storage_error

NAMES = ("README.md", "prompts.jsonl", "aiflux.yaml", "answers.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Write a small project to start from: prompts, settings, a script and what to type. "
        "Nothing that is there is overwritten."
    )
    parser.epilog = "example: aiflux examples first-project"
    parser.add_argument(
        "folder", nargs="?", default="aiflux-examples", metavar="DIR", help="default: %(default)s"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Write the files, all of them or none."""
    folder = expanded(arguments.folder).absolute()
    there = [name for name in NAMES if (folder / name).exists()]
    if there:
        raise ConfigError(
            f"{', '.join(there)} in {str(folder)!r} would be overwritten; nothing was written",
            "name another folder: aiflux examples DIR",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    for name in NAMES:
        with atomic_write(folder / name) as file:
            file.write((files("aiflux.cli") / "starter" / name).read_bytes())
        print(f"wrote {short(folder / name)}")
    print(f"begin with {short(folder / 'README.md')}")
    return 0
