"""Chains in the commands that take a RUN: status, watch, cancel and report of all their steps."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from aiflux.cli.json_output import print_json
from aiflux.cli.run_argument import frame_of, make_console, show
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.registry import waiting_step, with_job
from aiflux.errors import ExitCode
from aiflux.util.files import absolute, short

_PAUSE = 5.0  # seconds between two looks at a step that waits for its job
LONG_PAUSE = 30.0  # seconds between lines about a step that waits for its job

if TYPE_CHECKING:
    from aiflux.api.chain import ChainView, StepView
    from aiflux.converters.chain.folder import ChainFolder


def chain_named(text: str) -> ChainFolder | None:
    """Return the chain that a RUN argument names; None if it names something else."""
    path = absolute(text.strip() or ".")
    folders = _folders(path)
    if path.suffix not in (".yaml", ".yml") and not any(
        os.path.isfile(folder / "chain.json")  # False where this user may not look
        for folder in folders
    ):
        return None
    from aiflux.api.chain import find_chain  # which loads the readers of tables

    return find_chain(text)


def _folders(path: Path) -> list[Path]:
    """Return the run directories that a path can name: itself, and that of an output."""
    return [path, RunDirectory.of_output(path).path] if path.name else [path]


def waiting_step_named(text: str) -> tuple[ChainFolder, StepView] | None:
    """Return the chain and the step that a RUN argument names, if no job has planned it yet."""
    path = absolute(text.strip() or ".")
    entry = None if os.path.lexists(path) else with_job(text.strip(), os.environ)
    folders = [*_folders(path), *([entry.run_dir] if entry else [])]
    return next(filter(None, map(waiting_step_in, folders)), None)


def waiting_step_in(run_dir: Path) -> tuple[ChainFolder, StepView] | None:
    """Return the chain and the step of a run directory, if it is a step without a plan."""
    directory = run_dir.parent.parent
    if not waiting_step(run_dir) or not os.path.isfile(directory / "chain.json"):
        return None
    from aiflux.api.chain import step_view
    from aiflux.converters.chain.folder import ChainFolder

    RunDirectory(directory).refuse_foreign()
    folder = ChainFolder(directory.with_name(directory.name.removesuffix(".aiflux")))
    record = folder.record()
    for step in () if record is None else record.steps:
        if folder.run(step.name).path == run_dir:
            return folder, step_view(folder, step)
    return None


def await_step(text: str, *, as_json: bool) -> int | None:
    """Wait until the step that a RUN argument names is planned.

    Returns:
        the exit code if it ended without a plan; None if it has one.
    """
    reason = None
    try:
        while (found := waiting_step_named(text)) is not None:
            folder, step = found
            if not step.active:
                chain_status(folder, as_json=as_json)
                return int(ExitCode.OK if step.finished else ExitCode.STOPPED)
            if step.reason != reason:
                reason = step.reason
                words = f"step {step.record.name} is {step.state}: {step.reason}"
                print(time.strftime("%H:%M:%S"), words, file=sys.stderr)
            time.sleep(_PAUSE)
    except KeyboardInterrupt:
        print("the chain continues", file=sys.stderr)
        return int(ExitCode.STOPPED)
    return None


def chain_status(folder: ChainFolder, *, as_json: bool) -> int:
    """Show the state of a chain's steps."""
    from aiflux.api.chain import chain_view

    _show(chain_view(folder), as_json=as_json)
    return 0


def _show(view: ChainView, *, as_json: bool) -> None:
    from aiflux.cli.render.chain import chain_lines

    if as_json:
        print_json(view.to_json())
        return
    console = make_console()
    show(console, chain_lines(view, frame_of(console)))


Follow = Callable[..., object]


def watch_chain(folder: ChainFolder, interval: float, follow: Follow, *, as_json: bool) -> int:
    """Follow the steps of a chain until nothing works on them; return the exit code.

    Args:
        follow: shows a run until it ends, as `aiflux watch` does.
    """
    from aiflux.api.chain import chain_view

    view = chain_view(folder)
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            while view.next_command is None and not view.written:
                _follow(view, interval, follow, live=not as_json)
                time.sleep(interval)
                view = chain_view(folder)
    except KeyboardInterrupt:
        print("the chain continues", file=sys.stderr)
        return int(ExitCode.STOPPED)
    _show(view, as_json=as_json)
    return int(view.exit_code)


def _follow(view: ChainView, interval: float, follow: Follow, *, live: bool) -> None:
    """Follow the run of the first unfinished step, if it is planned."""
    from aiflux.api.chain import chain_view
    from aiflux.cli.render.chain import chain_lines

    step, console = view.unfinished, make_console()
    if step is not None and step.run is None:
        print(time.strftime("%H:%M:%S"), f"step {step.record.name} is {step.state}: {step.reason}")
        time.sleep(LONG_PAUSE)
    elif step is not None and step.run is not None:
        frame = frame_of(console)
        follow(
            step.directory,
            console,
            interval,
            live=live,
            below=lambda _: chain_lines(chain_view(view.folder), frame),
        )


def cancel_chain(folder: ChainFolder, *, as_json: bool) -> int:
    """Cancel the jobs of all steps, later ones first, and the process of a step."""
    from aiflux.api.chain import chain_view

    return _cancel_steps(folder, chain_view(folder).steps, as_json=as_json)


def cancel_step(folder: ChainFolder, step: StepView, *, as_json: bool) -> int:
    """Cancel the jobs of one step."""
    return _cancel_steps(folder, [step], as_json=as_json)


def _cancel_steps(folder: ChainFolder, steps: Sequence[StepView], *, as_json: bool) -> int:
    from aiflux.api.cancellation import stop_process
    from aiflux.api.chain import chain_view
    from aiflux.slurm.commands import cancel_jobs
    from aiflux.slurm.monitor import active_jobs

    view = chain_view(folder)
    jobs: list[str] = []
    processes: list[int] = []
    for step in reversed(steps):
        if not step.active:
            continue
        process = None if step.run is None else stop_process(step.directory)
        if process is not None:
            processes.append(process)
        active = step.jobs if step.run is None else active_jobs(step.directory)
        cancel_jobs(step.directory, active)
        jobs += map(str, active)
    if as_json:
        print_json({**chain_view(folder).to_json(), "cancelled": jobs, "stopping": processes})
        return 0
    if jobs:
        print(f"cancelled {'job' if len(jobs) == 1 else 'jobs'} {', '.join(jobs)}")
    for pid in processes:
        print(f"process {pid} stops: requests in flight get some time to finish")
    if not jobs and not processes:
        print(f"{short(folder.output)} has no pending or running job: it is {view.state}")
    print(f"  continue it: {view.command()}")
    return 0


def chain_report(folder: ChainFolder, target: Path | None, *, as_json: bool) -> int:
    """Write the report of each step, and a page with their main figures and links to them."""
    from aiflux.api.chain import chain_view
    from aiflux.api.report import chain_page, read_report, report_page, write_text
    from aiflux.report.methods import methods

    view = chain_view(folder)
    made = [(step, read_report(step.directory)) for step in view.steps if step.run is not None]
    if as_json:
        reports = {
            step.record.name: {**report.to_json(), "methods": methods(report)}
            for step, report in made
        }
        print_json({**view.to_json(), "reports": reports})
        return 0
    for step, report in made:
        write_text(step.directory.report, report_page(report)[0])
    page = target or folder.report
    write_text(page, chain_page(view, {step.record.name: each for step, each in made}, page))
    print(f"{view.state}: wrote {short(page)}")
    return 0
