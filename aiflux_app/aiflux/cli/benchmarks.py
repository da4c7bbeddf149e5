"""Measure the points of a benchmark: each is a pilot, which the worker processes as any run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from aiflux.api.local_run import local_image
from aiflux.cli.pilots import (
    Asked,
    PlannedPilot,
    draw,
    ended,
    failure_of,
    job_views,
    named_engine,
    plan_pilots,
    run_pilot,
    submit_missing,
)
from aiflux.core.config.config import Config
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import read_status
from aiflux.engines.gpus import visible_devices
from aiflux.engines.kinds import engine_kind
from aiflux.errors import AifluxError, StoppedError, UsageError
from aiflux.estimates.benchmark import Point, Series, figures_of, point_name, still_rises
from aiflux.estimates.estimate import LOCAL, SLURM
from aiflux.estimates.pilot import Pilot, observe
from aiflux.estimates.workload import Mix, request_lines
from aiflux.util.files import atomic_write, read_file, storage_error
from aiflux.util.signals import handlers_kept

MOST_IN_FLIGHT = 512
"""Where doubling the requests in flight ends."""
IN_SLURM = (1, 4, 16, 64)
"""The requests in flight of a sweep in Slurm, whose jobs are submitted together."""
REQUESTS = 32
_PER_LANE = 4


@dataclass(frozen=True)
class Sweep:
    """What a user wants to measure.

    Attributes:
        folder: the directory of all files.
        engines: the settings of each engine, as given.
        prompts: a mix, or the user's own requests.
        concurrency: requests in flight; None doubles them until throughput stops rising.
        slots, contexts: values to combine; (None,) for what is configured.
        requests: at each point, or more if many are in flight.
    """

    folder: Path
    engines: Sequence[Mapping[str, Any]]
    prompts: Mix | Path
    concurrency: tuple[int, ...] | None = None
    slots: tuple[int | None, ...] = (None,)
    contexts: tuple[int | None, ...] = (None,)
    requests: int = REQUESTS
    seed: int = 1
    local: bool = False
    wait: bool = False
    again: bool = False
    preflight: bool = True
    as_json: bool = False

    def requests_at(self, concurrency: int) -> int:
        """Return the number of requests of a point: enough to keep that many in flight."""
        return max(self.requests, _PER_LANE * concurrency * self._engines)

    @cached_property
    def _engines(self) -> int:
        """The largest number of engines in a job, or on this machine."""
        return max(_engine_count(settings, local=self.local) for settings in self.engines)


def _engine_count(settings: Mapping[str, Any], *, local: bool) -> int:
    """Return how many engines the worker will start: one for each group of GPUs."""
    config = Config(arguments=settings)
    options = config.run_options(tune=False)
    if not engine_kind(options).managed or options.nodes_per_engine > 1:
        return 1
    if local:
        gpus = len(visible_devices())
    else:
        from aiflux.slurm.preflight.nodes import requested_gpus

        gpus = sum(requested_gpus(config.get_slurm_config()).values())
    return max(1, gpus // options.gpus_per_engine)


@dataclass(frozen=True)
class _Track:
    """The points of one series, as they are asked for."""

    sweep: Sweep
    settings: Mapping[str, Any]
    series: Series

    def asked(self, concurrency: int) -> Asked:
        """Return a point as the pilot that measures it."""
        sweep, series = self.sweep, self.series
        settings = {**self.settings, "concurrency": concurrency}
        if series.slots is not None:
            settings["slots"] = series.slots
        if series.context_length is not None:
            settings["context_length"] = series.context_length
        return Asked(
            Config(arguments=settings),
            self._input(concurrency),
            sweep.folder / "point.json",
            sweep.requests_at(concurrency),
            given=settings,
            engine=point_name(series, concurrency),
            local=sweep.local,
            wait=sweep.wait,
            again=sweep.again,
            preflight=sweep.preflight,
            as_json=sweep.as_json,
            noun="point",
        )

    def _input(self, concurrency: int) -> Path:
        """Return the requests of a point; write those of a mix.

        They differ between the numbers in flight, so that a server's cache does not know them, and
        are the same for all engines.
        """
        sweep, mix = self.sweep, self.sweep.prompts
        if isinstance(mix, Path):
            return mix
        path = sweep.folder / f"{mix.name}-{sweep.seed}-c{concurrency}.jsonl"
        lines = request_lines(mix, sweep.requests_at(concurrency), f"{sweep.seed} {concurrency}")
        content = "".join(f"{line}\n" for line in lines).encode()
        if read_file(path) != content:
            with atomic_write(path, 0o600) as file:
                file.write(content)
        return path

    def plan(self, concurrency: int) -> PlannedPilot:
        """Check and plan a point.

        Raises:
            AifluxError: the run would be refused.
        """
        (one,) = plan_pilots([self.asked(concurrency)])
        pilot = Pilot(self.sweep.folder / point_name(self.series, concurrency))
        with named_engine(one.asked):
            pilot.run.refuse_foreign()
        return replace(one, pilot=pilot)

    def point(self, concurrency: int) -> Point:
        """Return a point without figures."""
        return Point(self.series, concurrency)


def tracks(sweep: Sweep) -> list[_Track]:
    """Return the series of a sweep.

    Raises:
        UsageError: there is no model, or a running server cannot have its settings.
    """
    found = []
    for settings in sweep.engines:
        options = Config(arguments=settings).run_options(tune=False)
        if options.model is None and isinstance(sweep.prompts, Mix):
            raise UsageError(
                "aiflux benchmark needs a model: the prompts of a mix name none", "add --model NAME"
            )
        if not engine_kind(options).managed:
            _refuse_settings_of_server(sweep)
        for slots in sweep.slots:
            for context in sweep.contexts:
                series = Series(options.engine, options.model or "", slots, context)
                found.append(_Track(sweep, settings, series))
    return found


def _refuse_settings_of_server(sweep: Sweep) -> None:
    """Refuse settings that a running server already has.

    Raises:
        UsageError: one is given.
    """
    for option, values in (("--slots", sweep.slots), ("--context-length", sweep.contexts)):
        if values != (None,):
            raise UsageError(
                f"{option} cannot be set at a running server", "set it where the server is started"
            )


class Measuring:
    """The points that were measured so far, also after an interrupt."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.points: list[Point] = []
        self.failures: list[AifluxError] = []
        self.waiting: list[str] = []
        self.where = ""
        self.stopped: StoppedError | None = None

    def begin(self, keep: Callable[[], None]) -> None:
        """Create the directory, and plan the first points: nothing is measured if one is wrong.

        Args:
            keep: writes the record of a new benchmark.

        Raises:
            AifluxError: a point would be refused.
            StorageError: the directory cannot be created.
        """
        folder = self.sweep.folder
        tracks(self.sweep)
        made = not folder.exists()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, folder) from error
        try:
            keep()
            self._plan_first()
        except AifluxError:
            if made:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _plan_first(self) -> None:
        sweep = self.sweep
        counts = sweep.concurrency or (1,)
        planned = [track.plan(count) for track in tracks(sweep) for count in counts]
        self.where = planned[0].asked.where
        if self.where == LOCAL:
            for one in planned:
                with named_engine(one.asked):
                    local_image(one.whole, one.asked.config, Path.cwd())

    def settings_of(self, point: Point) -> Mapping[str, Any]:
        """Return the settings of the engine of a point, as given."""
        return next(each.settings for each in tracks(self.sweep) if each.series == point.series)

    def measure(self) -> None:
        """Measure all points, or those until ``stopped``."""
        try:
            if self.where == SLURM:
                self._in_slurm()
            else:
                for track in tracks(self.sweep):
                    self._in_turn(track)
        except StoppedError as error:
            self.stopped = error

    def _in_turn(self, track: _Track) -> None:
        """Measure a series here, or at a server."""
        series: list[Point] = []
        for concurrency in _counts(self.sweep):
            point = self._measured(track, concurrency)
            series.append(point)
            self.points.append(point)
            if point.error is not None:
                break  # more in flight would not help
            if self.sweep.concurrency is None and not still_rises(series):
                break

    def _measured(self, track: _Track, concurrency: int) -> Point:
        one = track.plan(concurrency)
        draw([one])
        point = track.point(concurrency)
        if not one.pilot.done():
            print(f"point {point.name}", file=sys.stderr)
            try:
                with redirect_stdout(sys.stderr), handlers_kept():
                    code = run_pilot(one)
                    if not one.pilot.done():
                        raise ended(one, code)
            except StoppedError:
                raise
            except AifluxError as error:
                self.failures.append(error)
                return replace(point, error=str(error))
        return _with_figures(point, one)

    def _in_slurm(self) -> None:
        """Submit the points that were not measured; with --wait, until all have ended."""
        sweep = self.sweep
        counts = sweep.concurrency or IN_SLURM
        asked = [(track, count, track.plan(count)) for track in tracks(sweep) for count in counts]
        draw([one for _, _, one in asked])
        todo = [one for _, _, one in asked if not one.pilot.done()]
        submit_missing(todo)
        try:
            views = job_views(todo) if todo else []
        except KeyboardInterrupt:
            self.stopped = StoppedError("stopped waiting; the jobs continue")
            views = job_views([replace(one, asked=replace(one.asked, wait=False)) for one in todo])
        of_pilot = {one.pilot: view for one, view in zip(todo, views, strict=True)}
        for track, count, one in asked:
            point = track.point(count)
            if one.pilot.done():
                self.points.append(_with_figures(point, one))
            elif of_pilot[one.pilot].ended:
                failure = failure_of(one, of_pilot[one.pilot], "--again")
                self.failures.append(failure)
                self.points.append(replace(point, error=str(failure)))
            else:
                view = of_pilot[one.pilot]
                jobs = ", ".join(view.jobs)
                self.waiting.append(f"{point.name} is {view.state.value} (job {jobs})")


def _counts(sweep: Sweep) -> Iterator[int]:
    if sweep.concurrency is not None:
        yield from sweep.concurrency
        return
    count = 1
    while count <= MOST_IN_FLIGHT:
        yield count
        count *= 2


def _with_figures(point: Point, one: PlannedPilot) -> Point:
    """Return a point with the figures of its pilot, which is done.

    Raises:
        StoppedError: its results cannot be read.
    """
    observations = observe(read_plan(one.pilot.run), one.pilot.run)
    status = read_status(one.pilot.run, 0)
    if not observations or status is None:
        raise StoppedError(
            f"the point in {one.pilot.folder} left no results", "measure it again: --again"
        )
    return replace(point, figures=figures_of(observations, status.details.engines))
