"""Recommend one of several engines from estimates that were made with the same sample."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aiflux.estimates.estimate import SETTLED_DOUBT, Estimate, Range


@dataclass(frozen=True)
class Recommendation:
    """What the pilots of several engines show.

    Attributes:
        best: the engine with the lowest estimated cost.
        overlapping: the engines whose intervals overlap with that of the best.
        requests: size of the sample that would probably decide; None if none would.
        failing: engines that clearly fail more requests than another. They are not compared: a
            failed request takes little time.
    """

    best: str
    overlapping: tuple[str, ...] = ()
    requests: int | None = None
    failing: tuple[str, ...] = ()

    @property
    def decided(self) -> bool:
        """Whether the interval of the best engine's cost is below those of all others."""
        return not self.overlapping

    @property
    def engine(self) -> str | None:
        """The recommended engine, if the pilots decide."""
        return self.best if self.decided else None


def recommend(found: Mapping[str, Estimate]) -> Recommendation:
    """Return the engine that takes the fewest GPU-hours, or the shortest time without GPUs.

    Args:
        found: at least two estimates by engine.
    """
    fewest = min(each.failures.high for each in found.values())
    failing = tuple(name for name, each in found.items() if each.failures.low > fewest)
    left = {name: each for name, each in found.items() if name not in failing}
    with_gpus = counts_gpus(left.values())
    best = min(left, key=lambda name: _cost(left[name], with_gpus).value)
    others = {name: each for name, each in left.items() if name != best}
    highest = _cost(left[best], with_gpus).high
    overlapping = tuple(
        name for name, each in others.items() if _cost(each, with_gpus).low <= highest
    )
    needed = None
    if overlapping:
        needed = _deciding_size(left[best], [*others.values()], with_gpus)
    return Recommendation(best, overlapping, needed, failing)


def counts_gpus(compared: Iterable[Estimate]) -> bool:
    """Return whether engines are compared by GPU-hours, and not by time: each had GPUs."""
    return all(each.gpus for each in compared)


def _cost(found: Estimate, with_gpus: bool, shrink: float = 1.0) -> Range:
    """Return the seconds of all jobs, times their GPUs.

    Args:
        shrink: factor for the part of the interval that is due to the size of the sample.
    """
    work = found.work_seconds
    if shrink != 1.0:
        below = _half(work.value - work.low, work.value, shrink)
        above = _half(work.high - work.value, work.value, shrink)
        work = Range(work.value, max(0.0, work.value - below), work.value + above)
    seconds = work.plus(found.fixed_seconds.times(found.shards))
    return seconds.times(found.gpus if with_gpus else 1)


def _half(half: float, value: float, shrink: float) -> float:
    """Return half of an interval after a larger sample, which does not change all of it."""
    settled = SETTLED_DOUBT * value
    return math.hypot(math.sqrt(max(0.0, half**2 - settled**2)) * shrink, settled)


def _deciding_size(best: Estimate, others: list[Estimate], with_gpus: bool) -> int | None:
    """Return the smallest sample after which the intervals would not overlap, in round figures."""
    seen, requests = best.pilot, best.requests

    def decides(size: int) -> bool:
        rest = (1 - size / requests) / (1 - seen / requests)  # finite population correction
        shrink = math.sqrt(seen / size * rest)
        lowest = min(_cost(each, with_gpus, shrink).low for each in others)
        return _cost(best, with_gpus, shrink).high < lowest

    sizes = range(seen + 1, requests + 1)
    at = bisect_left(sizes, True, key=decides)
    return None if at == len(sizes) else min(_rounded_up(sizes[at]), requests)


def _rounded_up(number: int) -> int:
    step = int(10 ** max(0, len(str(number)) - 2))
    return -(-number // step) * step
