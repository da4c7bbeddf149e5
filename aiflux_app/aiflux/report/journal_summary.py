"""Summarise a journal in one pass and in bounded memory: counts, latencies, throughput over time.

1,000,000 results take some seconds.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from aiflux.core.batch.request import load_json
from aiflux.core.batch.results_file import token_counts
from aiflux.core.runs.journal import CUT, EMPTY, is_part, split_line
from aiflux.estimates.verification import asked_model
from aiflux.util.times import unix_seconds

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
EXAMPLES = 3
MANY_ATTEMPTS = 20
_LONGEST_MESSAGE = 300
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d+)')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d+)')


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


@dataclass(frozen=True)
class Example:
    """One request that failed."""

    custom_id: str
    status: int | None
    message: str


@dataclass
class Failures:
    """Requests that failed in one way."""

    count: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass
class EngineTally:
    """The results of one engine."""

    results: int = 0
    failed: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Tally:
    """The sums over the results of a shard or a run.

    Attributes:
        results: recorded results, also several for one request.
        superseded: results that a later one replaced.
        seconds: total time of the attempts that gave the results; ``latency``: of each answer.
        attempts: results by number of attempts; ``MANY_ATTEMPTS`` stands for more, too.
        failures: requests that failed, by code; the last result of a request counts.
        left_out: requests that were not sent because their prompts are too long; ``unsent``: all
            such results.
        cut: answers that ended at their token limit; ``filtered``: that a content filter stopped.
        truncated: answers to prompts that the engine truncated.
        unfit: answers that did not fit their schema.
        empty: answers without a text, by their reason (``EMPTY_REASONS``).
        models: results by requested model; ``digests``: its digests according to the engines.
        engines: by the number of the engine.
    """

    results: int = 0
    superseded: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: int = 0
    filtered: int = 0
    truncated: int = 0
    unfit: int = 0
    empty: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    latency: Histogram = field(default_factory=Histogram)
    timeline: Timeline = field(default_factory=Timeline)
    attempts: Counter[int] = field(default_factory=Counter)
    failures: dict[str, Failures] = field(default_factory=dict)
    left_out: int = 0
    unsent: int = 0
    models: Counter[str] = field(default_factory=Counter)
    digests: dict[str, set[str]] = field(default_factory=dict)
    engines: dict[int, EngineTally] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Requests whose last result is a failure."""
        return sum(kind.count for kind in self.failures.values())

    @property
    def completed(self) -> int:
        """Requests whose last result is an answer."""
        return self.results - self.superseded - self.failed - self.left_out

    def merge(self, other: Tally) -> None:
        """Add another shard's results, except for its engines."""
        for name in (
            "results",
            "superseded",
            "left_out",
            "unsent",
            "prompt_tokens",
            "completion_tokens",
            "cut",
            "filtered",
            "truncated",
            "unfit",
            "seconds",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latency.merge(other.latency)
        self.timeline.merge(other.timeline)
        self.empty.update(other.empty)
        self.attempts.update(other.attempts)
        self.models.update(other.models)
        for model, digests in other.digests.items():
            self.digests.setdefault(model, set()).update(digests)
        for code, kind in other.failures.items():
            own = self.failures.setdefault(code, Failures())
            own.count += kind.count
            own.examples = (own.examples + kind.examples)[:EXAMPLES]


def tally(lines: Iterable[tuple[bytes, bytes]]) -> Tally:
    """Summarise the results of one journal.

    Memory grows only with the requests that failed, by 150 bytes each.

    Args:
        lines: key and line of each result, in the order in which they were written.
    """
    reader = _JournalReader()
    for key, line in lines:
        if not is_part(line):
            reader.read(key, line)
    return reader.tally


class _JournalReader:
    def __init__(self) -> None:
        self.tally = Tally()
        self._failed: dict[bytes, str | None] = {}  # None: it was left out
        self._minute = ("", 0.0)

    def read(self, key: bytes, line: bytes) -> None:
        result = split_line(line)
        metadata = load_json(result.metadata)
        failed = result.failed and not result.left_out
        prompt, completion = _usage(result.body)
        seconds = float(metadata["processing_time"])
        sums = self.tally
        sums.results += 1
        sums.prompt_tokens += prompt
        sums.completion_tokens += completion
        sums.seconds += seconds
        if not result.failed:
            sums.latency.add(seconds)
        sums.timeline.add(self._moment(metadata["timestamp"]), failed, prompt, completion)
        self._note(metadata, failed, seconds, prompt, completion)
        if self._failed and key in self._failed:
            earlier = self._failed.pop(key)
            sums.superseded += 1
            if earlier is None:
                sums.left_out -= 1
            else:
                sums.failures[earlier].count -= 1
        if result.left_out:
            sums.left_out += 1
            sums.unsent += 1
            self._failed[key] = None
        elif failed:
            self._fail(key, result.custom_id, result.error)

    def _note(
        self, metadata: dict[str, Any], failed: bool, seconds: float, prompt: int, completion: int
    ) -> None:
        sums = self.tally
        sums.attempts[min(int(metadata.get("attempts", 1)), MANY_ATTEMPTS)] += 1
        model = asked_model(metadata)
        sums.models[model] += 1
        if "model_digest" in metadata:
            sums.digests.setdefault(model, set()).add(str(metadata["model_digest"]))
        sums.cut += CUT["length"] in metadata
        sums.filtered += CUT["content_filter"] in metadata
        sums.truncated += "truncated_prompt" in metadata
        sums.unfit += int(metadata.get("unfit_answers", 0))
        if EMPTY in metadata and not failed:
            sums.empty[str(metadata[EMPTY])] += 1
        number = int(metadata.get("engine", 0))
        engine = sums.engines.get(number)
        if engine is None:
            engine = sums.engines.setdefault(number, EngineTally())
        engine.results += 1
        engine.failed += failed
        engine.seconds += seconds
        engine.prompt_tokens += prompt
        engine.completion_tokens += completion

    def _fail(self, key: bytes, custom_id: bytes, error: bytes) -> None:
        content = load_json(error)
        code = str(content.get("code"))
        kind = self.tally.failures.setdefault(code, Failures())
        kind.count += 1
        if len(kind.examples) < EXAMPLES:
            message = str(content.get("message"))[:_LONGEST_MESSAGE]
            name = str(load_json(custom_id))
            kind.examples.append(Example(name, content.get("status"), message))
        self._failed[key] = code

    def _moment(self, text: str) -> float:
        """Return Unix time; the last minute is cached, as the next result is probably from it."""
        minute, known = self._minute
        if text[:17] != minute:
            known = unix_seconds(text[:17] + "00Z")
            self._minute = (text[:17], known)
        return known + float(text[17:-1])


def _usage(body: bytes) -> tuple[int, int]:
    """Return the numbers of prompt and answer tokens in an answer; 0 if it has none.

    A string contains no unescaped quote, and ``usage`` is near the end of an answer: the body is
    decoded only if the last ``"usage"`` is not an object.
    """
    at = body.rfind(b'"usage"')
    if at < 0:
        return 0, 0
    if _USAGE.match(body, at):
        prompt, completion = _PROMPT.search(body, at), _COMPLETION.search(body, at)
        return int(prompt[1]) if prompt else 0, int(completion[1]) if completion else 0
    content = load_json(body)
    return token_counts(content.get("usage") if isinstance(content, dict) else None)
