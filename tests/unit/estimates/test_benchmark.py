"""The figures of a benchmark's points, its knees and what it recommends."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from aiflux.core.runs.status_file import EngineFacts, PointFigures
from aiflux.estimates.benchmark import (
    Point,
    Series,
    equally_good,
    figures_of,
    knee,
    knees,
    other_knees,
    recommended,
    still_rises,
)
from aiflux.estimates.pilot import Observation

SERIES = Series("llamacpp", "m:1")


def observed(count: int, in_flight: int, lanes: int, seed: int | None = None) -> list[Observation]:
    """Return the requests of an engine that processes ``lanes`` at once, 10 tokens/s each.

    The client keeps ``in_flight`` of them there; the others wait in the engine.

    Args:
        seed: of answers of various lengths; None for 10 tokens each.
    """
    source = Random(seed)
    free = [0.0] * lanes
    sent = [0.0] * in_flight
    found = []
    for _ in range(count):
        tokens = 10 if seed is None else source.randint(1, 19)
        began = heapq.heappop(sent)
        ended = max(began, heapq.heappop(free)) + tokens / 10
        heapq.heappush(free, ended)
        heapq.heappush(sent, ended)
        found.append(Observation("m:1", began, ended, 20, tokens, 100))
    return found


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize(("in_flight", "lanes"), [(1, 8), (4, 8), (8, 8), (16, 8), (64, 8)])
def test_throughput_is_that_of_the_engine_however_many_requests_wait(
    in_flight: int, lanes: int, seed: int | None
) -> None:
    figures = figures_of(observed(16 * max(in_flight, 8), in_flight, lanes, seed), ())
    busy = min(in_flight, lanes)
    assert figures.in_flight == in_flight
    assert figures.tokens_per_second == pytest.approx(10 * busy, rel=0.02 if seed is None else 0.08)
    assert figures.requests_per_second == pytest.approx(busy, rel=0.02 if seed is None else 0.15)


def test_the_figures_of_a_point() -> None:
    engines = (EngineFacts(slots=8), EngineFacts(slots=8))
    figures = figures_of(observed(100, 8, 8), engines)
    assert (figures.requests, figures.failed) == (100, 0)
    assert (figures.prompt_tokens, figures.answer_tokens) == (20, 10)
    assert figures.p50 == figures.p99 == pytest.approx(1.0)
    assert (figures.engines, figures.slots) == (2, 8)


def test_one_slow_request_in_a_hundred_is_not_in_the_percentiles_but_the_second_is() -> None:
    found = observed(100, 1, 1)
    slow = [replace(item, ended=item.began + 50) for item in found]
    assert figures_of([*found[:99], slow[99]], ()).p99 == pytest.approx(1.0)
    assert figures_of([*found[:98], *slow[98:]], ()).p99 == pytest.approx(50.0)


def test_failed_requests_are_counted_and_nothing_else() -> None:
    found = observed(64, 4, 4)
    failed = [replace(item, ended=item.began + 0.001, error="http_400: no", completion_tokens=0)
              for item in found[:16]]  # fmt: skip
    figures = figures_of([*failed, *found[16:]], ())
    assert (figures.requests, figures.failed) == (64, 16)
    assert figures.answer_tokens == 10
    assert figures.p50 == pytest.approx(1.0)
    assert figures.tokens_per_second == pytest.approx(40, rel=0.05)


def test_a_point_whose_requests_all_fail_has_no_throughput() -> None:
    failed = [replace(item, error="http_400: no") for item in observed(8, 2, 2)]
    figures = figures_of(failed, ())
    assert (figures.failed, figures.throughput, figures.p50) == (8, 0, 0)
    assert knee([Point(SERIES, 2, figures)]) is None
    assert not still_rises([Point(SERIES, 2, figures)])


def test_too_few_requests_for_a_turnover_still_give_a_figure() -> None:
    figures = figures_of(observed(3, 3, 3), ())
    assert figures.tokens_per_second == pytest.approx(30, rel=0.05)
    assert not figures.filled


def test_a_point_that_was_never_full_is_not_recommended() -> None:
    """An own file of few requests, or a client that cannot keep so many in flight."""
    few = Point(SERIES, 64, figures_of(observed(32, 32, 32), ()))
    slow = Point(SERIES, 8, figures_of(observed(256, 4, 8), ()))
    one_of_two = figures_of(observed(64, 4, 8), (EngineFacts(), EngineFacts()))
    for point in (few, slow, Point(SERIES, 4, one_of_two)):
        assert not point.full
        assert knee([*points(1, 2), point]) == points(1, 2)[1]
        assert recommended([point]) is None
        assert not still_rises([point])


def test_slow_failures_are_in_flight_too() -> None:
    found = observed(64, 4, 4)
    figures = figures_of([replace(item, error="timeout: no") for item in found[::2]], ())
    assert figures.in_flight == figures_of(found[::2], ()).in_flight
    half = [replace(item, error="timeout: no") if at % 2 else item
            for at, item in enumerate(found)]  # fmt: skip
    assert Point(SERIES, 4, figures_of(half, ())).full


def points(*rates: float, series: Series = SERIES, failed: Sequence[int] = ()) -> list[Point]:
    """Return a sweep of 1, 2, 4 ... in flight with these answer tokens per second."""
    found = []
    for number, rate in enumerate(rates):
        lost = failed[number] if failed else 0
        figures = PointFigures(2**number, 1000, lost, 1.0, rate / 10, rate, 20, 10, 1.0, 2.0)
        found.append(Point(series, 2**number, figures))
    return found


def test_the_sweep_goes_on_while_throughput_rises_by_a_twentieth() -> None:
    assert still_rises(points(100))
    assert still_rises(points(100, 105))
    assert not still_rises(points(100, 104))
    assert not still_rises(points(100, 200, 190))
    assert not still_rises([*points(100), Point(SERIES, 2, error="no memory")])


def test_the_knee_is_the_first_point_with_nine_tenths_of_the_best() -> None:
    for rates, expected in (
        ((100, 200, 400, 450, 430), 8),
        ((100, 200, 400, 410, 430), 4),
        ((100,), 1),
        ((100, 20, 10), 1),
    ):
        found = knee(points(*rates))
        assert found is not None
        assert found.concurrency == expected, rates


def test_a_point_that_fails_more_requests_is_no_knee() -> None:
    found = knee(points(100, 200, 900, failed=[0, 10, 500]))
    assert found is not None
    assert found.concurrency == 2


def test_the_best_knee_of_all_series_is_recommended() -> None:
    other = replace(SERIES, slots=8)
    third = replace(SERIES, engine="vllm")
    all_ = [
        *points(100, 150), *points(100, 300, 310, series=other),
        *points(900, 900, series=third, failed=[400, 400]),
    ]  # fmt: skip
    assert [point.name for point in knees(all_)] == ["llamacpp-c2", "llamacpp-s8-c2", "vllm-c1"]
    best = recommended(all_)
    assert best is not None
    assert best.name == "llamacpp-s8-c2"
    assert recommended([Point(SERIES, 1, error="no memory")]) is None


def test_of_knees_that_are_about_equally_good_the_first_is_recommended() -> None:
    second, third = replace(SERIES, slots=8), replace(SERIES, slots=16)
    all_ = [*points(100), *points(104, series=second), *points(90, series=third)]
    assert [point.series for point in equally_good(all_)] == [SERIES, second]
    best = recommended(all_)
    assert best is not None
    assert best.series == SERIES


def test_the_interval_contains_the_true_throughput_nineteen_times_in_twenty() -> None:
    """Here, four requests in flight generate 10 tokens/s each, with noise."""
    source = Random(5)
    inside = 0
    for _ in range(300):
        found, ends = [], [0.0] * 4
        for _ in range(64):
            lane = ends.index(min(ends))
            tokens = source.randint(5, 50)
            seconds = tokens / 10 * source.uniform(0.5, 1.5)
            found.append(Observation("m", ends[lane], ends[lane] + seconds, 10, tokens, 100))
            ends[lane] += seconds
        figures = figures_of(found, [])
        assert figures.margin is not None
        mean = (
            4 * sum(each.completion_tokens for each in found) / sum(each.seconds for each in found)
        )
        inside += abs(mean - 40) <= figures.margin * mean
    assert 0.92 <= inside / 300 <= 0.98


def test_too_few_requests_have_no_interval() -> None:
    found = [Observation("m", at, at + 1.0, 10, 5, 100) for at in range(3)]
    assert figures_of(found, []).margin is None


@pytest.mark.parametrize(
    ("margin", "others"),
    [(0.0, []), (0.005, []), (0.02, [8]), (0.1, [2, 8])],
)
def test_points_that_may_be_the_knee_too(margin: float, others: list[int]) -> None:
    sweep = [
        replace(point, figures=replace(point.figures, margin=margin))
        for point in points(50, 85, 92, 100)
        if point.figures is not None
    ]
    found = knee(sweep)
    assert found is not None
    assert found.concurrency == 4
    assert [point.concurrency for point in other_knees(sweep)] == others
