"""``aiflux watch``: how a run is, until it has ended."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace

from rich.console import Group
from rich.live import Live

from aiflux.cli.json_output import add_json, print_json
from aiflux.cli.render.run import overview, progress_line, typed
from aiflux.cli.run_argument import add_run, frame_of, located, make_console, short, show
from aiflux.errors import ConfigError, ExitCode
from aiflux.slurm.monitor.collect import Observer, RunView, outcome
from aiflux.worker.console import TerminalConsole

LINE_INTERVAL = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Follow a run until it has ended; the exit code is the run's. Ctrl-C leaves the run alone."
    )
    parser.epilog = "example: aiflux watch results.json"
    add_run(parser)
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between two looks (2)"
    )
    add_json(parser, "print how it ended as one JSON object; what comes before goes to stderr")


def execute(arguments: argparse.Namespace) -> int:
    """Follow a run."""
    if not arguments.interval >= 0.1:
        raise ConfigError(f"--interval {arguments.interval:g} is too short", "give 0.1 or more")
    observer = Observer(located(arguments.run))
    console = make_console()
    live = console.is_terminal and not console.is_dumb_terminal and not arguments.json
    view = observer.look()
    try:
        if live:
            view = _draw(observer, view, console, arguments.interval)
        else:
            with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
                view = _write(observer, view, arguments.interval)
    except KeyboardInterrupt:
        _tell_left(view)
        return int(ExitCode.STOPPED)
    if arguments.json:
        print_json(view.to_json())
    else:
        show(console, overview(view, frame_of(console)))
    return int(outcome(view))


def _draw(observer: Observer, view: RunView, console: TerminalConsole, interval: float) -> RunView:
    """Draw the run on a terminal until it has ended."""
    if view.ended:
        return view
    blocks = frame_of(console).blocks  # not to be told any more once the display is live
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not view.ended:
            frame = replace(frame_of(console, fit=True), blocks=blocks)
            live.update(Group(*overview(view, frame)), refresh=True)
            time.sleep(interval)
            view = observer.look()
    return view


def _write(observer: Observer, view: RunView, interval: float) -> RunView:
    """Write a line every half minute, and when something changes."""
    told, said = float("-inf"), None
    while not view.ended:
        states = (view.state, Counter(shard.state for shard in view.shards))
        if states != said or time.monotonic() - told >= LINE_INTERVAL:
            print(time.strftime("%H:%M:%S"), progress_line(view), flush=True)
            told, said = time.monotonic(), states
        time.sleep(interval)
        view = observer.look()
    return view


def _tell_left(view: RunView) -> None:
    name = typed(short(view.output))
    print(
        f"the run goes on; aiflux watch {name} shows it again, aiflux cancel {name} stops it",
        file=sys.stderr,
    )
