"""Extrapolate from a sample to all requests: sums and shares with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

_Z = 1.959964
_BETTER = 0.9
_QUARTERS = 4
_FEWEST_FOR_QUARTERS = 40


@dataclass(frozen=True)
class Range:
    """An estimated figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """Return the figure multiplied."""
        return Range(self.value * factor, self.low * factor, self.high * factor)

    def plus(self, other: Range) -> Range:
        """Return the sum; its bounds are the sums of the bounds."""
        return Range(self.value + other.value, self.low + other.low, self.high + other.high)


def total(values: Sequence[float], sizes: Sequence[int], requests: int, size: int) -> Range:
    """Extrapolate the sum over all requests from a sample.

    The estimate is the sample mean times the number of requests. If the values clearly correlate
    with the line sizes, it is their ratio times the total size (W. G. Cochran, Sampling Techniques,
    chapter 6). The interval is Student's, with the finite population correction: it has no width
    once all requests were observed. The sample is spread evenly over the input, so the interval is
    rather too wide than too narrow.

    Args:
        values, sizes: values and line sizes of the sample.
        requests, size: number of all requests, and the total size of their lines.
    """
    seen = len(values)
    value, spread = requests * fmean(values), _deviation(values)
    ratio = sum(values) / sum(sizes)
    rest = _deviation([one - ratio * other for one, other in zip(values, sizes, strict=True)])
    if seen > 2 and rest < _BETTER * spread:
        value, spread = ratio * size, rest
    finite = math.sqrt(max(0.0, 1 - seen / requests))
    half = _student(seen - 1) * requests * spread / math.sqrt(seen) * finite
    return Range(value, max(sum(values), value - half), value + half)


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else abs(values[0])


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's distribution, using the Cornish-Fisher expansion."""
    if freedom < 3:
        return (12.706, 12.706, 4.303)[freedom]
    z, n = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def share_of(some: int, seen: int, requests: int) -> Range:
    """Extrapolate how many requests share a property of ``some`` of the ``seen`` ones (Wilson)."""
    share = some / seen
    if seen >= requests:
        return Range(some, some, some)
    scale = 1 + _Z**2 / seen
    middle = (share + _Z**2 / (2 * seen)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / seen + _Z**2 / (4 * seen**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Range(share * requests, (low if some else 0.0) * requests, high * requests)


def unevenness(costs: Sequence[float]) -> float:
    """Return how much more than the average the most expensive quarter of the input costs.

    Returns 1 if the difference may be due to chance.
    """
    if len(costs) < _FEWEST_FOR_QUARTERS:
        return 1.0
    mean = fmean(costs)
    edges = [len(costs) * number // _QUARTERS for number in range(_QUARTERS + 1)]
    parts = [costs[low:high] for low, high in pairwise(edges)]
    dearest = max(parts, key=fmean)
    doubt = 2.5 * stdev(dearest) / math.sqrt(len(dearest))
    return fmean(dearest) / mean if fmean(dearest) - doubt > mean else 1.0
