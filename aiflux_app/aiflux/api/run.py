"""``aiflux.run`` and ``Run``: start a run from Python, follow it, and read its results."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from aiflux.api.cancellation import refuse_foreground, stop_process
from aiflux.api.local_run import draft_here, local_image, start_in_background
from aiflux.api.progress import progress_display
from aiflux.api.refusal import undone_if_refused
from aiflux.api.report import read_report, report_page, write_text
from aiflux.converters.request_form import RequestDraft, RequestForm
from aiflux.converters.results import BackOptions, results_to_arrow
from aiflux.converters.results.answers import entries, run_entries
from aiflux.core.batch.results_file import Result, output_paths
from aiflux.core.config.config import Config
from aiflux.core.runs.directory import RunDirectory, checked_output
from aiflux.core.runs.input_copy import copy_of_input, keep_input
from aiflux.core.runs.local_process import read_process
from aiflux.core.runs.open import RunDraft
from aiflux.core.runs.output import merge
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.registry import register_plan
from aiflux.core.runs.status_file import finished_counts
from aiflux.engines.kinds import engine_kind, kind_named
from aiflux.errors import ConfigError, InputError, UsageError
from aiflux.estimates.estimate import carry_estimate
from aiflux.image.container import local_choices
from aiflux.slurm.commands import cancel_jobs, located
from aiflux.slurm.monitor import Observer, RunView, active_jobs, gather
from aiflux.slurm.preflight.local import check_fields, finding_text
from aiflux.slurm.runner import SlurmRunner
from aiflux.slurm.submit import refuse_busy
from aiflux.util.extras import need
from aiflux.util.files import expanded, refuse_existing

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

_log = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
_EXIT_SECONDS = 10.0

Requests = Iterable[str | Mapping[str, Any]]
"""Prompts as texts, or requests in the form of a line of the input."""


def run(
    input: str | Path | Requests,
    output: str | Path | None = None,
    *,
    model: str | None = None,
    local: bool = False,
    force: bool = False,
    force_resume: bool = False,
    preflight: bool = True,
    workspace: str | Path | None = None,
    **options: Any,
) -> Run:
    """Check the input, plan a run and start it; or resume it, if it was started before.

    With ``engine_url`` or ``local``, a process in the background on this machine works on the run.
    It continues when this program ends. Otherwise Slurm jobs do. A run that is finished is
    returned as it is.

    Args:
        input: path of the requests (OpenAI Batch JSONL); or prompts and requests themselves, which
            are written to ``OUTPUT.input.jsonl``.
        output: ``*.json`` or ``*.jsonl`` (default: ``<input stem>.results.json`` in the
            workspace). Necessary if ``input`` is not a path.
        model: name of the model, unless each request names one.
        local: start the engine on this machine, in the image or with an installed program.
        force: replace an existing output; restart a finished run.
        force_resume: resume although model or parameters changed.
        preflight: check Slurm, image and disk space before a job is submitted.
        workspace: directory of relative paths, ``aiflux.yaml``, ``.env`` and ``aiflux.sif``
            (default: the current directory).
        options: settings, as in ``SlurmRunner.run``: ``engine_url``, ``engine``, ``shards``,
            ``account``, ``time``, ``temperature``, ...; None means not given.

    Raises:
        ConfigError: an option is unknown or wrong.
        InputError: the input is wrong; lists its lines.
        OutputExistsError: the output is another's.
        RunConflictError: the run directory is another's, or something works on the run already.
        ModelError, ImageError, EngineError: the model, the image or the engine is missing.
        PreflightError: the checks found problems; lists all of them.
        SlurmError: Slurm is missing or refused the job.
        StorageError: a file cannot be written.

    Warnings are logged. The API key of a server is read from ``AIFLUX_API_KEY``.
    """
    runner = SlurmRunner(workspace=workspace)
    given = {**options, "model": model}
    config, _ = runner.configured(**given)
    managed = kind_named(config.engine).managed
    if local and not managed:
        raise UsageError(
            "local and engine_url cannot be combined",
            "local starts an engine; engine_url uses a server that is already running",
        )
    named, target = _places(runner, input, output)
    directory = RunDirectory.of_output(target)
    with undone_if_refused(directory, directory.path, copy_of_input(target)):
        source = named or _written(input, target, force)  # type: ignore[arg-type]
        if local or not managed:
            draft = draft_here(config, source, target, force=force, force_resume=force_resume)
            return _start_here(draft, config, runner.workspace)
        planned = runner.plan(
            source, target, force=force, force_resume=force_resume, preflight=preflight, **given
        )
        opened = planned.opened
        if opened.open_shards:
            runner.submit(planned)
        elif not opened.finished:
            merge(opened.plan, opened.run, _log.info)
        return Run(opened.run.path, opened.plan.output)


def open_run(run: str | Path | Run) -> Run:
    """Return a run that was started before; see ``Run.open``."""
    return Run.open(run)


def _places(
    runner: SlurmRunner, input: str | Path | Requests, output: str | Path | None
) -> tuple[Path | None, Path]:
    """Return the input, or None if requests are given that have no file yet; and the output."""
    if isinstance(input, str | Path):
        return runner.paths(input, output)
    _refuse_other_than_requests(input)
    if output is None:
        raise UsageError(
            "the input is not a path, so there is no default for the output",
            'name it, such as output="results.json"',
        )
    target = checked_output(runner.workspace / expanded(output))
    RunDirectory.of_output(target).refuse_foreign()
    return None, target


def _written(requests: Requests, target: Path, force: bool) -> Path:
    """Write requests that have no file yet; return the file."""

    def refuse_change() -> None:
        if not force:
            refuse_existing(*output_paths(target))
        refuse_busy(RunDirectory.of_output(target))

    return keep_input(_lines(requests), target, refuse_change)


def _refuse_other_than_requests(given: Any) -> None:
    """Raise InputError for anything that yields no requests, as a mapping yields its keys."""
    keyed = isinstance(given, Mapping) or hasattr(given, "columns")
    if keyed or isinstance(given, bytes) or not isinstance(given, Iterable):
        raise InputError(
            f"{type(given).__name__} is neither a path nor a list of prompts or requests",
            "give a list, such as a column of a DataFrame; aiflux.ask takes a whole DataFrame",
        )


def _lines(requests: Requests) -> Iterator[bytes]:
    form = RequestForm()
    for number, each in enumerate(requests, start=1):
        if isinstance(each, str):
            yield form.line(RequestDraft(number, f"row-{number}", each))
            continue
        try:
            text = json.dumps(dict(each), ensure_ascii=False, allow_nan=False)
            yield text.encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"request {number} is neither a text nor a mapping that JSON can hold: {error}",
                "give prompts as str, or requests as dict",
            ) from error


def _start_here(draft: RunDraft, config: Config, folder: Path) -> Run:
    """Start a planned run in the background on this machine, unless it is finished."""
    plan, directory = draft.plan, draft.run
    started = Run(directory.path, plan.output)
    if draft.finished:
        return started
    refuse_busy(directory)
    image = None
    if engine_kind(plan.options).managed:
        image = local_image(plan, config, folder)
    place = None if image is None else image.path
    warnings = [local_choices(config, place), *map(finding_text, check_fields(plan))]
    opened = draft.open()
    warnings.append(register_plan(opened.plan, ()))
    for warning in filter(None, warnings):
        _log.warning(warning)
    carry_estimate(opened.plan, directory)
    start_in_background(opened, config, place, folder)
    return started


@dataclass(frozen=True)
class Run:
    """A run: its state is in files, so any number of programs and threads can use it.

    Attributes:
        path: the run directory.
        output: the file with the results, once the run is finished.
    """

    path: Path
    output: Path

    @classmethod
    def open(cls, run: str | Path | Run) -> Run:
        """Return a run that was started before, from Python or by a command.

        Args:
            run: its output, its run directory, or a Slurm job id.

        Raises:
            UsageError: it names no run.
            RunConflictError: the run may not be read.
        """
        if isinstance(run, Run):
            return run
        directory = located(str(run))
        return cls(directory.path, read_plan(directory).output)

    @property
    def directory(self) -> RunDirectory:
        """The files in the run directory."""
        return RunDirectory(self.path)

    def status(self) -> RunView:
        """Return the state of the run: ``state``, ``total``, ``done``, ``failed``, and more.

        Slurm is asked only about unfinished jobs. If it does not answer, the files decide.

        Raises:
            RunConflictError: the run directory was removed.
        """
        return gather(self.directory)

    def wait(self, timeout: float | None = None, *, progress: bool = True) -> RunView:
        """Wait until the run has ended, and return its last status.

        It has ended when it is finished, and also when it stopped or failed: check ``finished``.
        Ctrl-C ends the waiting, not the run.

        Args:
            timeout: seconds to wait at most; ``ended`` of the status is False if that is too short.
            progress: show the progress in a notebook or on a terminal.
        """
        until = float("inf") if timeout is None else time.monotonic() + timeout
        observer, pause = Observer(self.directory), _FIRST_PAUSE
        with progress_display(enabled=progress) as show:
            while True:
                view = observer.look()
                show(view)
                left = until - time.monotonic()
                if view.ended or left <= 0:
                    break
                time.sleep(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE)
        if view.ended:
            self._await_exit(min(until, time.monotonic() + _EXIT_SECONDS))
        return view

    def _await_exit(self, until: float) -> None:
        """Wait for the end of a process that has written its last status, so that it holds nothing.

        Otherwise a restart at once could be refused.
        """
        process = read_process(self.directory)
        while process is not None and process.lives and time.monotonic() < until:
            time.sleep(_FIRST_PAUSE / 10)

    def cancel(self) -> bool:
        """Ask the jobs or the process of the run to stop; results so far are kept.

        It returns at once; ``wait`` returns when the run has stopped. ``aiflux.run`` with the same
        arguments resumes it. A second ``cancel`` aborts requests in flight.

        Returns:
            False if nothing worked on the run, because it is finished or had stopped.

        Raises:
            UsageError: a process works on it that cannot be stopped from here: on another machine,
                or in the foreground in a container.
            SlurmError: Slurm is missing or refused.
        """
        self.directory.refuse_foreign()
        process = stop_process(self.directory)
        jobs = active_jobs(self.directory)
        cancel_jobs(self.directory, jobs)
        if process is None and not jobs:
            refuse_foreground(self.status())
        return process is not None or bool(jobs)

    def results(self, *, partial: bool = False) -> Iterator[Result]:
        """Return an iterator of the results, in input order, in constant memory.

        If the output is ``.jsonl`` and the input was removed or changed, failed requests come last.

        Args:
            partial: yield the results so far, also while the run continues.

        Raises:
            InputError: the run is not finished.
            OutputExistsError: the output was changed since it was written.
            StoppedError: the input of an unfinished run was removed or changed.
        """
        plan = read_plan(self.directory)
        if finished_counts(plan, self.directory) is not None:
            return entries(self.output)
        if not partial:
            raise self._unfinished()
        return run_entries(plan, self.directory, partial=True)

    def _unfinished(self) -> InputError:
        return InputError(
            f"the run is not finished, so there is no output {self.output}",
            "wait for it with wait(), or read the results so far with results(partial=True)",
        )

    def to_arrow(self, options: BackOptions | None = None) -> pyarrow.Table:
        """Return the results as a table, with the columns of ``aiflux results to-parquet``.

        Args:
            options: source to join, JSON fields to unpack, reasoning; see ``BackOptions``.

        Raises:
            ConfigError: pyarrow is not installed.
            InputError: the run is not finished, or the source does not fit.
        """
        _load("pyarrow", "to_arrow()")
        if finished_counts(read_plan(self.directory), self.directory) is None:
            raise self._unfinished()
        return results_to_arrow(self.output, options)

    def to_pandas(self, options: BackOptions | None = None) -> pandas.DataFrame:
        """Return the results as a DataFrame of pandas; see ``to_arrow``."""
        _load("pandas", "to_pandas()")
        frame: pandas.DataFrame = self.to_arrow(options).to_pandas()
        return frame

    def to_polars(self, options: BackOptions | None = None) -> polars.DataFrame:
        """Return the results as a DataFrame of polars; see ``to_arrow``."""
        frames = _load("polars", "to_polars()")
        frame: polars.DataFrame = frames.from_arrow(self.to_arrow(options))
        return frame

    def report(self) -> Path:
        """Write a page about the run, and return its path; the run may still be in progress.

        Raises:
            StorageError: the page cannot be written.
        """
        text, _ = report_page(read_report(self.directory))
        write_text(self.directory.report, text)
        return self.directory.report


def _load(module: str, purpose: str) -> Any:
    """Return a library for the user's own program.

    Unlike ``need``, it leaves the number of threads of the library's linear algebra as it is.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        if module == "pyarrow":
            return need(module, "parquet", purpose)
        raise ConfigError(
            f"{purpose} needs the Python package {module}, which cannot be imported: {error}",
            f"{quote(sys.executable)} -m pip install {module}",
        ) from error
