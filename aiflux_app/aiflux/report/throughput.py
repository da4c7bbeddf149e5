"""What came when, cut into bars for a plot: stretches in which nothing came are left out. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from aiflux.report.histogram import Span, Timeline

_BARS = 120
_PAUSE_SHARE = 0.05
_SHORTEST_PAUSE = 60.0


@dataclass(frozen=True)
class Bar:
    """What came in a stretch of ``seconds`` from a Unix time on."""

    start: float
    seconds: float
    results: int
    failed: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Throughput:
    """What came over time.

    Attributes:
        width: seconds of a bar; the last one before a pause is shorter, or longer by less than
            half: so short a stretch tells no rate.
        pauses: stretches without results that have no bars: Unix times of begin and end.
        requests_per_second, completion_tokens_per_second: averaged over the bars.
    """

    width: int
    bars: tuple[Bar, ...]
    pauses: tuple[tuple[float, float], ...]
    requests_per_second: float
    completion_tokens_per_second: float


def throughput(timeline: Timeline) -> Throughput:
    """Cut a timeline into about ``_BARS`` bars."""
    segments = _segments(timeline)
    occupied = sum(last - first + 1 for first, last in segments)
    step = max(1, -(-occupied // _BARS))
    bars = tuple(bar for segment in segments for bar in _bars(timeline, *segment, step))
    seconds = sum(bar.seconds for bar in bars)
    width = timeline.width
    pauses = tuple(
        (float((end + 1) * width), float(begin * width))
        for (_, end), (begin, _) in pairwise(segments)
    )
    return Throughput(
        width=step * width,
        bars=bars,
        pauses=pauses,
        requests_per_second=_per_second(sum(bar.results for bar in bars), seconds),
        completion_tokens_per_second=_per_second(
            sum(bar.completion_tokens for bar in bars), seconds
        ),
    )


def _per_second(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds else 0.0


def _segments(timeline: Timeline) -> list[tuple[int, int]]:
    """Return the first and the last stretch of each time between two pauses."""
    numbers = sorted(timeline.spans)
    if not numbers:
        return []
    pause = max(_SHORTEST_PAUSE, _PAUSE_SHARE * (timeline.last - timeline.first)) / timeline.width
    begins, ends = [numbers[0]], []
    for earlier, later in pairwise(numbers):
        if later - earlier - 1 > pause:
            ends.append(earlier)
            begins.append(later)
    return list(zip(begins, [*ends, numbers[-1]], strict=True))


def _bars(timeline: Timeline, first: int, last: int, step: int) -> list[Bar]:
    width = timeline.width
    bars = []
    starts = list(range(first, last + 1, step))
    if len(starts) > 1 and 2 * (last + 1 - starts[-1]) < step:
        starts.pop()
    for at, behind in pairwise([*starts, last + 1]):
        whole = Span()
        for number in range(at, behind):
            if number in timeline.spans:
                whole.add(timeline.spans[number])
        bars.append(
            Bar(
                float(at * width),
                float((behind - at) * width),
                whole.results,
                whole.failed,
                whole.prompt_tokens,
                whole.completion_tokens,
            )
        )
    return bars
