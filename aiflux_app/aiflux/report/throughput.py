"""Throughput over time, and histograms in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

_MOST_BARS = 120
_FEWEST_BARS = 12
_RESULTS_PER_BAR = 5
_ROUND_SECONDS = (
    *(1, 2, 5, 10, 15, 20, 30),
    *(60, 120, 300, 600, 900, 1200, 1800),
    *(3600, 7200, 14_400, 21_600, 43_200, 86_400),
)
_PAUSE_SHARE = 0.05
_SHORTEST_PAUSE = 60.0


@dataclass(frozen=True)
class Bar:
    """The results in an interval of ``seconds`` from a Unix time."""

    start: float
    seconds: float
    results: int
    failed: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Throughput:
    """The results over time.

    Attributes:
        width: seconds of a bar; the last one before a pause is shorter, or up to half longer, as
            the rate of a very short interval means nothing.
        pauses: Unix times of begin and end of the intervals without results, which have no bars.
        requests_per_second, completion_tokens_per_second: averaged over the bars.
    """

    width: int
    bars: tuple[Bar, ...]
    pauses: tuple[tuple[float, float], ...]
    requests_per_second: float
    completion_tokens_per_second: float


def throughput(timeline: Timeline) -> Throughput:
    """Cut a timeline into bars of a round number of seconds each.

    A run with few results has few bars, so that a bar is an average over several results.
    """
    segments = _segments(timeline)
    step = _step(timeline, sum(last - first + 1 for first, last in segments))
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


def _step(timeline: Timeline, occupied: int) -> int:
    """Return the number of the timeline's intervals in one bar."""
    results = sum(span.results for span in timeline.spans.values())
    bars = min(_MOST_BARS, max(_FEWEST_BARS, results // _RESULTS_PER_BAR))
    least = max(1, -(-occupied // bars))
    width = timeline.width
    even = (seconds // width for seconds in _ROUND_SECONDS if seconds % width == 0)
    return next((step for step in even if step >= least), least)


def _per_second(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds else 0.0


def _segments(timeline: Timeline) -> list[tuple[int, int]]:
    """Return the first and the last interval of each segment between two pauses."""
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


_RATIO = math.log(1.02)
_SMALLEST = 1e-4
_LARGEST = 1e7
_MOST_BINS = 2048


@dataclass
class Histogram:
    """Positive figures in at most 1300 bins, each 2 % wider than the one before.

    Quantiles between 0.0001 and 10,000,000 are accurate to 1 %; minimum, maximum, count and sum
    are exact.
    """

    count: int = 0
    total: float = 0.0
    lowest: float = math.inf
    highest: float = 0.0
    _bins: Counter[int] = field(default_factory=Counter)

    def add(self, value: float) -> None:
        """Add one figure."""
        self.count += 1
        self.total += value
        self.lowest = min(self.lowest, value)
        self.highest = max(self.highest, value)
        self._bins[_bin(value)] += 1

    def merge(self, other: Histogram) -> None:
        """Add all figures of another histogram."""
        self.count += other.count
        self.total += other.total
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)
        self._bins.update(other._bins)

    @property
    def mean(self) -> float:
        """The mean; 0 without figures."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """Return the quantile for ``share`` (0 to 1); 0 without figures."""
        rank = max(1, math.ceil(share * self.count))
        if rank >= self.count:
            return self.highest
        for at, count in sorted(self._bins.items()):
            rank -= count
            if rank <= 0:
                return min(max(math.exp((at + 0.5) * _RATIO), self.lowest), self.highest)
        return 0.0

    def bars(self, most: int) -> Iterator[tuple[float, float, int]]:
        """Yield ``(from, to, count)`` of at most ``most`` bars without a gap, equally wide on a
        logarithmic scale. Few figures give few bars (Rice's rule: twice the cube root).
        """
        if not self._bins:
            return
        first, last = min(self._bins), max(self._bins)
        most = min(most, math.ceil(2 * self.count ** (1 / 3)))
        step = -(-(last - first + 1) // most)
        for start in range(first, last + 1, step):
            count = sum(self._bins[at] for at in range(start, start + step))
            yield math.exp(start * _RATIO), math.exp((start + step) * _RATIO), count


def _bin(value: float) -> int:
    return math.floor(math.log(min(max(value, _SMALLEST), _LARGEST)) / _RATIO)


@dataclass(slots=True)
class Span:
    """The results in one interval."""

    results: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Span) -> None:
        """Add the results of another interval."""
        self.results += other.results
        self.failed += other.failed
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens


@dataclass
class Timeline:
    """Results in equal intervals of one second, or longer: the width doubles whenever there are too
    many intervals. Intervals without results take no memory.

    Attributes:
        width: seconds of an interval.
        spans: by number of the interval since 1970.
        first, last: Unix times.
        most: maximum number of intervals with results.
    """

    width: int = 1
    spans: dict[int, Span] = field(default_factory=dict)
    first: float = math.inf
    last: float = 0.0
    most: int = _MOST_BINS

    def add(self, moment: float, failed: bool, prompt_tokens: int, completion_tokens: int) -> None:
        """Add one result that arrived at a Unix time."""
        self.first = min(self.first, moment)
        self.last = max(self.last, moment)
        span = self._at(int(moment // self.width))
        span.results += 1
        span.failed += failed
        span.prompt_tokens += prompt_tokens
        span.completion_tokens += completion_tokens

    def merge(self, other: Timeline) -> None:
        """Add all results of another timeline."""
        self.first = min(self.first, other.first)
        self.last = max(self.last, other.last)
        while self.width < other.width:
            self._widen()
        for at, span in other.spans.items():
            self._at(at * other.width // self.width).add(span)

    def _at(self, number: int) -> Span:
        span = self.spans.get(number)
        if span is not None:
            return span
        if len(self.spans) < self.most:
            return self.spans.setdefault(number, Span())
        moment = number * self.width
        # The new interval counts, too.
        while len({at // 2 for at in (*self.spans, number)}) > self.most:
            self._widen()
            number = moment // self.width
        self._widen()
        return self.spans.setdefault(moment // self.width, Span())

    def _widen(self) -> None:
        wider: dict[int, Span] = {}
        for at, span in self.spans.items():
            wider.setdefault(at // 2, Span()).add(span)
        self.spans = wider
        self.width *= 2
