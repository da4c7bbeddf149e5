"""Opening a run: check the input, make the plan, and settle what is there from before."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from aiflux.core.files import storage_error
from aiflux.core.input import scan_input
from aiflux.core.options import RunOptions
from aiflux.core.plan import Plan, make_plan, read_plan, write_plan
from aiflux.core.results import output_paths
from aiflux.core.rundir import RunDirectory, checked_output
from aiflux.core.status import finished_counts, was_finalising
from aiflux.errors import ConfigError, OutputExistsError, RunConflictError


@dataclass(frozen=True)
class OpenedRun:
    """A run that is ready to be submitted or worked on.

    Attributes:
        finished: the run was done before; there is nothing to do.
        resumed: results of earlier starts are there.
        counts: total, completed and failed of a finished run.
    """

    plan: Plan
    run: RunDirectory
    finished: bool
    resumed: bool
    counts: dict[str, int]


def open_run(
    input_path: Path,
    output: Path,
    options: RunOptions,
    models_dir: Path | None,
    *,
    force: bool = False,
    force_resume: bool = False,
    write: bool = True,
) -> OpenedRun:
    """Check everything, then write the plan into the run directory.

    Args:
        models_dir: where models lie; unused with an engine that is up already.
        force: an output that is there may be replaced; a finished run starts anew.
        force_resume: go on although model or parameters changed; results then mix.
        write: False plans without touching the disk (a dry run).

    Raises:
        InputError: the input is wrong; lists its lines.
        ConfigError: the output's path or the model's name is wrong.
        OutputExistsError: the output is there and ``force`` is not given.
        RunConflictError: the run directory belongs to another input, model or parameters.
        StorageError: the run directory cannot be written.
    """
    output = checked_output(output)
    input_path = input_path.expanduser().absolute()
    if input_path in output_paths(output):
        raise ConfigError("input and output are the same file", "name another output")
    run = RunDirectory.of_output(output)
    summary = scan_input(input_path, options.model)
    plan = make_plan(summary, output, options, models_dir)
    resumed = _settle_earlier(run, plan, force_resume)
    counts = finished_counts(plan, run) if resumed else None
    if counts is not None and not force and not options.retry_failed:
        return OpenedRun(plan, run, True, True, counts)
    unfinished = resumed and was_finalising(plan, run)
    if counts is None and not force and not unfinished:
        _refuse_existing(output)
    if write:
        if unfinished:
            _discard(output)
        if counts is not None and not options.retry_failed:
            _start_anew(run)
            resumed = False
        write_plan(plan, run)
    return OpenedRun(plan, run, False, resumed, {})


def _settle_earlier(run: RunDirectory, plan: Plan, force_resume: bool) -> bool:
    """Return whether results of earlier starts are there; refuse a run that is another's."""
    if not run.plan.exists():
        if not run.unused():
            raise RunConflictError(
                f"{run.path} is there but holds no plan", "remove it, or choose another output"
            )
        return False
    earlier = read_plan(run)
    if earlier.input_path != plan.input_path:
        raise RunConflictError(
            f"{run.path} belongs to the input {earlier.input_path}, not {plan.input_path}",
            f"choose another output, or remove that run: rm -r {str(run.path)!r}",
        )
    if not any(path.stat().st_size for path in (run.path / "journal").glob("*.jsonl")):
        return False
    if earlier.identity != plan.identity and not force_resume:
        raise RunConflictError(
            f"{run.path} was begun with {_show(earlier)}; this run asks for {_show(plan)}",
            "choose another output; or give --force-resume to keep the results so far and mix",
        )
    return True


def _show(plan: Plan) -> str:
    parameters = "".join(f", {name} {value}" for name, value in plan.options.parameters.items())
    return "model " + ", ".join(plan.identity["models"]) + parameters


def _refuse_existing(output: Path) -> None:
    for path in output_paths(output):
        if path.exists():
            raise OutputExistsError(
                f"the output {path} is there already and would be overwritten",
                "give --force to replace it, or choose another output",
            )


def _discard(output: Path) -> None:
    """Remove what a start wrote that was killed before it could say that it was done."""
    try:
        for path in output_paths(output):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, output) from error


def _start_anew(run: RunDirectory) -> None:
    try:
        for name in ("journal", "status"):
            shutil.rmtree(run.path / name, ignore_errors=False)
    except OSError as error:
        raise storage_error(error, run.path) from error
