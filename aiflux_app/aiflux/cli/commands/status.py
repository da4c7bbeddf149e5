"""``aiflux status`` and ``aiflux watch``: show the status of a run, once or until it ends."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, replace

from rich.console import Group
from rich.live import Live
from rich.text import Text

from aiflux.api.energy import run_energy
from aiflux.cli.chains import (
    await_step,
    chain_named,
    chain_status,
    waiting_step_named,
    watch_chain,
)
from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import Number, command, option
from aiflux.cli.render.estimate import comparison
from aiflux.cli.render.run import overview, typed
from aiflux.cli.run_argument import frame_of, make_console, run_argument, show
from aiflux.core.runs.directory import RunDirectory, user_output
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import read_run_status, read_status
from aiflux.errors import ConfigError, ExitCode
from aiflux.estimates.estimate import ComparedFigure, compare, read_estimate
from aiflux.slurm.commands import located
from aiflux.slurm.monitor import Observer, RunView, gather, outcome
from aiflux.util.files import short
from aiflux.worker.console import TerminalConsole

LINE_INTERVAL = 30.0


@command("status", examples=["aiflux status results.json"])
@run_argument
@json_option("Print everything as JSON")
def status(run: str, as_json: bool) -> int:
    """Show a run's status: its shards, its progress and its latest errors.

    The exit code does not depend on the status.
    """
    chain = chain_named(run)
    if chain is not None:
        return chain_status(chain, as_json=as_json)
    waiting = waiting_step_named(run)
    if waiting is not None:
        return chain_status(waiting[0], as_json=as_json)
    directory = located(run)
    view = gather(directory)
    rows = _compared(directory) if view.finished else ()
    if as_json:
        estimated = [asdict(row) for row in rows] or None
        plan = read_plan(directory)
        energy = run_energy(directory, plan, view.completed, ended=view.ended).to_json()
        print_json({**view.to_json(), "estimate": estimated, "energy": energy})
        return 0
    console = make_console()
    lines = overview(view, frame_of(console))
    show(console, [*lines, *comparison(rows)] if rows else lines)
    return 0


def _compared(run: RunDirectory) -> tuple[ComparedFigure, ...]:
    """Compare the estimate of a finished run with what it took; empty if either is missing."""
    plan = read_plan(run)
    estimated = read_estimate(run.estimate, plan)
    statuses = [read_status(run, shard.index) for shard in plan.shards]
    known = [status for status in statuses if status is not None]
    whole = read_run_status(run)
    if estimated is None or whole is None or len(known) < len(statuses):
        return ()
    return compare(estimated, known, whole)


@command("watch", examples=["aiflux watch results.json"])
@run_argument
@option(
    "--interval", type=Number(), default=2.0, metavar="SECONDS", help="Time between updates (2)"
)
@json_option("Print the final status as JSON; progress goes to stderr")
def watch(run: str, interval: float, as_json: bool) -> int:
    """Follow a run until it ends, and exit with its exit code. Ctrl-C does not stop the run."""
    if not interval >= 0.1:
        raise ConfigError(f"--interval {interval:g} is too short", "give 0.1 or more")
    chain = chain_named(run)
    if chain is not None:
        return watch_chain(chain, interval, follow, as_json=as_json)
    unplanned = await_step(run, as_json=as_json)
    if unplanned is not None:
        return unplanned
    console = make_console()
    directory = located(run)
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            view = follow(directory, console, interval, live=not as_json)
    except KeyboardInterrupt:
        _print_left(directory)
        return int(ExitCode.STOPPED)
    if as_json:
        print_json(view.to_json())
    else:
        show(console, overview(view, frame_of(console)))
    return int(outcome(view))


Below = Callable[[int], Sequence[Text]]
"""Returns lines of a width for the space below the status."""


def follow(
    run: RunDirectory,
    console: TerminalConsole,
    interval: float = 2.0,
    *,
    live: bool = True,
    below: Below = lambda _: (),
) -> RunView:
    """Show a run until it ends: drawn on a terminal, elsewhere as lines. Ctrl-C leaves the run.

    Args:
        interval: seconds between updates.
        live: False writes lines, whatever the console is.
        below: further lines to draw.

    Raises:
        KeyboardInterrupt: the user stops watching.
    """
    observer = Observer(run)
    view = observer.look()
    if live and console.is_terminal and not console.is_dumb_terminal:
        return _draw(observer, view, console, interval, below)
    return _write(observer, view, interval)


def _draw(
    observer: Observer, view: RunView, console: TerminalConsole, interval: float, below: Below
) -> RunView:
    """Draw the run on a terminal until it ends."""
    if view.ended:
        return view
    blocks = frame_of(console).blocks  # unknown once the display is live
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            while not view.ended:
                more = below(console.width)
                frame = replace(frame_of(console, fit=True), blocks=blocks)
                if frame.height is not None:
                    frame = replace(frame, height=max(1, frame.height - len(more)))
                live.update(Group(*overview(view, frame), *more), refresh=True)
                time.sleep(interval)
                view = observer.look()
        except KeyboardInterrupt:
            live.transient = False  # the last frame stays on the screen
            raise
    return view


def _write(observer: Observer, view: RunView, interval: float) -> RunView:
    """Print a line every 30 seconds, and whenever a state changes."""
    printed, last = float("-inf"), None
    while not view.ended:
        states = (view.state, Counter(shard.state for shard in view.shards))
        if states != last or time.monotonic() - printed >= LINE_INTERVAL:
            print(time.strftime("%H:%M:%S"), view, flush=True)
            printed, last = time.monotonic(), states
        time.sleep(interval)
        view = observer.look()
    return view


def _print_left(run: RunDirectory) -> None:
    name = typed(short(user_output(read_plan(run).output)))
    print(
        f"the run continues; show it again: aiflux watch {name}; stop it: aiflux cancel {name}",
        file=sys.stderr,
    )
