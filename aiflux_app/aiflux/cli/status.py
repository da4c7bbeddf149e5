"""``aiflux status``: how a run is, once."""

from __future__ import annotations

import argparse
import json

from aiflux.cli.located import located
from aiflux.cli.runs import add_run, frame_of, make_console, show
from aiflux.cli.views import overview
from aiflux.slurm.overview import gather


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = "Show how a run is: its shards, its progress, its last errors."
    parser.epilog = "example: aiflux status results.json"
    add_run(parser)
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")


def execute(arguments: argparse.Namespace) -> int:
    """Show a run once; the exit code does not tell how the run is."""
    view = gather(located(arguments.run))
    if arguments.json:
        print(json.dumps(view.to_json(), indent=2))
        return 0
    console = make_console()
    show(console, overview(view, frame_of(console)))
    return 0
