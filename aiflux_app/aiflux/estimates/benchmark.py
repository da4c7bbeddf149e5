"""Points of a benchmark: their figures, the knee of a sweep, and the settings to recommend."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from aiflux.core.config.engine_kinds import EXTERNAL
from aiflux.core.runs.status_file import EngineFacts, PointFigures
from aiflux.estimates.pilot import Observation, SteadyRates, most_in_flight, pace, steady_rates

RISE = 1.05
"""The requests in flight are doubled while throughput rises by this factor."""
KNEE_SHARE = 0.9
"""The knee is the smallest number in flight with this share of a series' best throughput."""
_FAILED_MORE = 0.05
_FEWEST = 8
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Series:
    """What the points of one sweep have in common.

    Attributes:
        slots, context_length: as given; None leaves the choice to the worker.
    """

    engine: str
    model: str
    slots: int | None = None
    context_length: int | None = None

    @property
    def name(self) -> str:
        """A short name, which is unique in a benchmark."""
        slots = "" if self.slots is None else f"-s{self.slots}"
        context = "" if self.context_length is None else f"-n{self.context_length}"
        engine = "server" if self.engine == EXTERNAL else self.engine
        return f"{engine}{slots}{context}"


@dataclass(frozen=True)
class Compared:
    """A measurement of a point by the engine's own tool.

    Attributes:
        tokens_per_second: answer tokens per second; None if the tool failed.
        error: why it failed.
    """

    tool: str
    command: str
    tokens_per_second: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Point:
    """One combination of settings.

    Attributes:
        concurrency: requests in flight per engine, as set.
        figures: None if it was not measured.
        error: why it was not measured.
        compared: the engine's own tool on the same point.
    """

    series: Series
    concurrency: int
    figures: PointFigures | None = None
    error: str | None = None
    compared: Compared | None = None

    @property
    def name(self) -> str:
        """A short name, which is unique in a benchmark."""
        return point_name(self.series, self.concurrency)

    @property
    def full(self) -> bool:
        """Whether it was measured with the number in flight that it is for."""
        figures = self.figures
        return figures is not None and figures.filled and figures.reached(self.concurrency)


def point_name(series: Series, concurrency: int) -> str:
    """Return the name of a point, which is that of its directory."""
    return f"{series.name}-c{concurrency}"


def figures_of(observations: Sequence[Observation], engines: Sequence[EngineFacts]) -> PointFigures:
    """Return the figures of a point.

    Args:
        observations: at least one, in input order.
        engines: those that processed them.
    """
    good = [item for item in observations if item.error is None]
    levels = pace(good or observations)
    in_flight = pace(observations).in_flight
    seconds = sum(levels.costs)
    reasons = Counter(item.error for item in observations if item.error is not None)
    tokens = sum(item.completion_tokens for item in good)
    rates = SteadyRates(seconds, len(good) / seconds, tokens / seconds)
    if good:
        rates = steady_rates(good, levels.in_flight) or rates
    times = sorted(item.seconds for item in good)
    return PointFigures(
        in_flight=in_flight,
        requests=len(observations),
        failed=len(observations) - len(good),
        seconds=rates.seconds,
        requests_per_second=rates.requests,
        tokens_per_second=rates.tokens,
        prompt_tokens=fmean([item.prompt_tokens for item in good] or [0]),
        answer_tokens=fmean([item.completion_tokens for item in good] or [0]),
        p50=_percentile(times, 50),
        p99=_percentile(times, 99),
        engines=max(1, len(engines)),
        slots=engines[0].slots if engines else None,
        most_in_flight=most_in_flight(observations),
        reason=reasons.most_common(1)[0][0] if reasons else None,
        margin=_margin(good),
    )


def _margin(good: Sequence[Observation]) -> float | None:
    """Return half of the 95 % interval of the throughput, as a share of it.

    With a constant number in flight, throughput is that number times the ratio of all tokens to
    all times (Little's law). The interval is that of a ratio of means of independent requests:
    Cochran, Sampling Techniques, 6.4. What changes for all requests at once, such as other load of
    the machine, is not in it.
    """
    works = [item.completion_tokens for item in good]
    if not any(works):
        works = [1] * len(good)
    if len(good) < _FEWEST:
        return None
    ratio = sum(works) / sum(item.seconds for item in good)
    squares = sum(
        (work - ratio * item.seconds) ** 2 for work, item in zip(works, good, strict=True)
    )
    error = math.sqrt(squares / (len(good) - 1) / len(good))
    return _NORMAL_95 * error / fmean(works)


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """Return the smallest value that at least this share of all values does not exceed."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1] if ordered else 0.0


def still_rises(points: Sequence[Point]) -> bool:
    """Return whether the last point of a sweep is clearly better than all before.

    A point that had too few requests for the number in flight shows nothing.
    """
    figures = [point.figures for point in points]
    last = figures[-1]
    if last is None or not last.answered or not points[-1].full:
        return False
    best = max((each.throughput for each in figures[:-1] if each is not None), default=0.0)
    return last.throughput >= RISE * best


def knee(points: Sequence[Point], share: float = KNEE_SHARE) -> Point | None:
    """Return the point of one series with the fewest requests in flight at nearly full throughput.

    None if no point answered with that many in flight.

    Args:
        share: of the best throughput.
    """
    good = _sound(points)
    best = max(map(_throughput, good), default=0.0)
    near = [point for point in good if _throughput(point) >= share * best]
    return min(near, key=lambda point: point.concurrency, default=None)


def other_knees(points: Sequence[Point]) -> list[Point]:
    """Return the points of one series that may be its knee, too, by the intervals of throughput."""
    found, good = knee(points), sorted(_sound(points), key=lambda point: point.concurrency)
    if found is None:
        return []
    best = max(good, key=_throughput)
    low, high = (KNEE_SHARE * _throughput(best) * (1 + sign * _margin_of(best)) for sign in (-1, 1))
    at = good.index(found)
    less = [p for p in good[:at] if _throughput(p) * (1 + _margin_of(p)) >= low]
    unsure = found != best and _throughput(found) * (1 - _margin_of(found)) < high
    return [*less, *(good[at + 1 : at + 2] if unsure else [])]


def _margin_of(point: Point) -> float:
    return 0.0 if point.figures is None else point.figures.margin or 0.0


def _sound(points: Sequence[Point]) -> list[Point]:
    """Return the points that were full, without those that fail clearly more than another.

    A failed request takes little time, so their throughput is not comparable.
    """
    shares = {
        point: point.figures.failed / point.figures.requests
        for point in points
        if point.figures is not None and point.figures.answered
        if point.full
    }
    fewest = min(shares.values(), default=0.0)
    return [point for point, share in shares.items() if share <= fewest + _FAILED_MORE]


def _throughput(point: Point) -> float:
    return 0.0 if point.figures is None else point.figures.throughput


def by_series(points: Sequence[Point]) -> dict[Series, list[Point]]:
    """Return the points of each series."""
    found: dict[Series, list[Point]] = {}
    for point in points:
        found.setdefault(point.series, []).append(point)
    return found


def knees(points: Sequence[Point]) -> list[Point]:
    """Return the knee of each series that has one."""
    found = (knee(each) for each in by_series(points).values())
    return [point for point in found if point is not None]


def equally_good(points: Sequence[Point]) -> list[Point]:
    """Return the knees whose throughput is that of the best, or less than 5 % below it."""
    good = _sound(knees(points))
    best = max(map(_throughput, good), default=0.0)
    return [point for point in good if RISE * _throughput(point) > best]


def recommended(points: Sequence[Point]) -> Point | None:
    """Return the first of the best knees: a difference of a few percent is no reason."""
    return next(iter(equally_good(points)), None)


@dataclass(frozen=True)
class Workload:
    """The requests of a benchmark.

    Attributes:
        mix: name of the prompt mix; None for the user's own requests.
        input: the user's own requests.
        source: where the lengths of the mix are published.
        requests: number at each point, or more where many are in flight.
    """

    mix: str | None
    input: str | None
    source: str | None
    requests: int
    seed: int


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: the record that ``benchmark.json`` holds and ``--json`` prints.

    Attributes:
        where: ``slurm``, ``local``, or the server's address.
        knees: names of the points at the knee of each series.
        recommended: name of the best of them.
        settings: of the recommended point, as in ``aiflux.yaml``.
        complete: whether every point was measured or failed; otherwise the same command continues.
    """

    version: str
    created: str
    where: str
    workload: Workload
    points: tuple[Point, ...]
    knees: tuple[str, ...]
    recommended: str | None
    settings: dict[str, Any]
    complete: bool
