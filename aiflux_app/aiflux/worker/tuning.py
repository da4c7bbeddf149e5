"""Find the number of requests in flight and of slots at the start of a run (``--tune``).

The requests are those of the run, and their results are kept as any others. Points are measured and
compared as in ``aiflux benchmark``, with the requests that are sent while a point's number is in
flight.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from aiflux.core.runs.status_file import EngineFacts, TunedPoint, Tuning
from aiflux.engines.sizing import in_flight
from aiflux.estimates.benchmark import (
    RISE,
    Point,
    Series,
    figures_of,
    knee,
    still_rises,
)
from aiflux.estimates.pilot import Observation
from aiflux.util.text import counted

LONGEST = 600.0
"""Seconds after which nothing more is tried."""
_FEWEST = 48
_TURNOVERS = 4
_BRIEFEST = 1.0
_SHORTEST = 1e-3


class Start(Enum):
    """Whether the engines start again with other slots; the value is the reason if they do not."""

    BEGUN = ""
    LATER = "too little of the job's time is left"
    TOO_LONG = "it takes too much of the rest of the run"
    IMPOSSIBLE = "not possible with this engine, model or memory"


def counts_of(slots: int) -> list[int]:
    """Return the requests in flight to try without another start, in ascending order."""
    return sorted({max(1, slots // 4), max(1, slots // 2), in_flight(slots)})


def next_setting(tried: Sequence[Point], slots: int) -> tuple[int, int] | None:
    """Return the slots and requests in flight to try next; None if nothing more is worth it.

    More slots need another start of the engine. They are tried only if the last step gained.

    Args:
        slots: those that the engines have by default.
    """
    counts = counts_of(slots)
    if len(tried) < len(counts):
        return slots, counts[len(tried)]
    more = 2 * (tried[-1].series.slots or slots)
    if not still_rises(tried):
        return None
    return more, in_flight(more)


class Tuner:
    """The limit of all engines of a run: it changes while it tunes, and then no more. Thread-safe.

    Args:
        tuning: what was found so far.
        restart: called with other slots, and the requests per second so far; starts all engines
            again if that is worth it. Without the requests per second, it starts them anyway.
        keep: records what is found.
        say: called with a line of text.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        tuning: Tuning,
        *,
        restart: Callable[[int, float | None], Start],
        keep: Callable[[Tuning], None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.value = tuning.concurrency or 1
        self.tuning = tuning
        self._restart = restart
        self._keep = keep
        self._say = say
        self._clock = clock
        self._lock = threading.Lock()
        self._slots: dict[int, int] = {}
        self._default = 0
        self._measuring = False
        self._wanted: int | None = None
        self._first: float | None = None
        self._started = 0.0
        self._began = 0.0
        self._ended = "the requests ended before"
        self._observations: list[Observation] = []

    def engine_ready(self, index: int, slots: int) -> None:
        """Record that an engine is up; what was measured of the current point is dropped."""
        with self._lock:
            self._slots[index] = slots
            self._started = self._clock()
            tried = self.tuning.tried
            if self.tuning.chosen:
                self._default = self._default or (tried[0].slots if tried else slots)
                fewest = min(self._slots.values())
                self.value = self.tuning.concurrency or 1
                if fewest != self.tuning.slots:
                    self.value = self._count_with(fewest)
                return
            self._measuring = False
            self.value = in_flight(slots)
            if len(self._slots) < self.tuning.engines:
                return
            now = min(self._slots.values())
            self._default = self._default or (tried[0].slots if tried else now)
            self._first = self._clock() if self._first is None else self._first
            wanted, self._wanted = self._wanted, None
            if wanted is not None and now < wanted:
                self._choose(f"no start with {counted(wanted, 'slot')}")
            else:
                self._advance()

    def engine_crashed(self, index: int, slots: int) -> None:
        """Return all engines to fewer slots, if one crashes soon after a start with many.

        It may have too little memory for that many requests. What was measured with so many is
        dropped. With its default, or long after the start, a crash has other reasons.
        """
        with self._lock:
            self._pause(index)
            soon = self._clock() - self._started <= LONGEST
            if soon and slots > self._default > 0:
                tried = tuple(each for each in self.tuning.tried if each.slots < slots)
                self.tuning = replace(self.tuning, tried=tried)
                self._choose(f"the engine crashed with {counted(slots, 'slot')}", crashed=True)

    def engine_lost(self, index: int) -> None:
        """Measure no more in this start, as an engine is given up."""
        with self._lock:
            self._pause(index)
            self._ended = f"engine {index} failed"

    def _pause(self, index: int) -> None:
        """Measure nothing without an engine: the figures of fewer are not comparable."""
        self._measuring = False
        self._slots.pop(index, None)
        if self._slots and not self.tuning.chosen:
            self.value = in_flight(min(self._slots.values()))

    def note(self, work: int, seconds: float, overloaded: bool) -> None:
        """Record an ended exchange; see ``AdaptiveLimit.note``."""
        with self._lock:
            now = self._clock()
            if not self._measuring or now - seconds < self._began:
                return
            began = now - max(seconds, _SHORTEST)
            error = "overloaded" if overloaded else None
            tokens = 0 if overloaded else work
            self._observations.append(
                Observation(self.tuning.model, began, now, 0, tokens, 0, error)
            )
            together = self.value * self.tuning.engines
            enough = max(_FEWEST, _TURNOVERS * together) + together
            if len(self._observations) >= enough and now - self._began >= _BRIEFEST:
                self._measured(together)

    def note_timeout(self) -> None:
        """Record a timeout as a failed request."""
        self.note(0, 0.0, overloaded=True)

    def tick(self) -> None:
        """End the search if it takes too long."""
        with self._lock:
            late = self._first is not None and self._clock() - self._first > LONGEST
            if self._measuring and late:
                self._choose(f"nothing more is tried after {LONGEST / 60:g} minutes")

    def end(self) -> None:
        """Record that the requests, or an engine, ended before a choice."""
        with self._lock:
            if not self.tuning.chosen:
                self._record(replace(self.tuning, note=self._ended))
                self._say(self.tuning.advice)

    def _measured(self, together: int) -> None:
        """Record the point and continue with the next.

        The last requests that were sent are left out: others that were sent with them are still in
        flight, so a part of the work of that time is not known yet.
        """
        self._measuring = False
        ordered = sorted(self._observations, key=lambda item: item.began)[:-together]
        engine = EngineFacts(slots=min(self._slots.values()))
        found = figures_of(ordered, [engine] * self.tuning.engines)
        figures: dict[str, Any] = {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in vars(found).items()
        }
        tried = TunedPoint(**figures, concurrency=self.value)
        self._record(replace(self.tuning, tried=(*self.tuning.tried, tried)))
        self._say(f"tuning: {tried_text(tried)}")
        self._advance()

    def _advance(self) -> None:
        setting = next_setting(self._points, self._default)
        if setting is None:
            self._choose("")
            return
        slots, count = setting
        if slots == min(self._slots.values()):
            self._measure(count)
            return
        if self.tuning.settings.get("slots") is not None:
            self._choose("")  # --slots sets them
            return
        start = self._start_again(slots)
        note = f"no start with {counted(slots, 'slot')}: {start.value}"
        if start is Start.LATER:  # what was measured is kept
            self._say(f"tuning: {note}; the next job continues")
        elif start is not Start.BEGUN:
            self._choose(note)

    def _measure(self, count: int) -> None:
        self.value = count
        self._began = self._clock()
        self._observations = []
        self._measuring = True

    def _start_again(self, slots: int, *, anyway: bool = False) -> Start:
        now = self._slots
        self._slots, self._wanted = {}, slots
        rate = max((each.requests_per_second for each in self.tuning.tried), default=0.0)
        start = self._restart(slots, None if anyway else rate)
        if start is not Start.BEGUN:
            self._slots, self._wanted = now, None
        return start

    def _choose(self, note: str, *, crashed: bool = False) -> None:
        """Use the best that was tried, or the default if too little was tried."""
        self._measuring = False
        now = 0 if crashed else min(self._slots.values())
        slots, count = self._default, in_flight(self._default)
        if len(self.tuning.tried) > 1:
            slots, count = self._best(self._points) or (slots, count)
        self.value = count
        if slots != now and self._start_again(slots, anyway=crashed) is not Start.BEGUN:
            self.value = self._count_with(now)
        self._record(replace(self.tuning, slots=slots, concurrency=count, note=note))
        self._say(self.tuning.advice)

    def _best(self, points: Sequence[Point]) -> tuple[int, int] | None:
        """Return the best slots and requests in flight; None if no point was good."""
        # A difference of a few percent is no reason to have more requests wait.
        best = knee(points, 1 / RISE)
        return None if best is None else (best.series.slots or self._default, best.concurrency)

    def _count_with(self, slots: int) -> int:
        """Return the requests in flight for engines that have other slots than the best."""
        best = self._best([each for each in self._points if each.series.slots == slots])
        return in_flight(slots) if best is None else best[1]

    @property
    def _points(self) -> list[Point]:
        return [
            Point(Series("", self.tuning.model, tried.slots), tried.concurrency, tried)
            for tried in self.tuning.tried
        ]

    def _record(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self._keep(tuning)


def tried_text(tried: TunedPoint) -> str:
    """Return what was tried and its figures."""
    rate = f"{tried.tokens_per_second:.1f} tokens/s"
    if not tried.tokens_per_second:
        rate = f"{tried.requests_per_second:.2f} requests/s"
    failed = f", {tried.failed} failed" if tried.failed else ""
    return (
        f"{counted(tried.concurrency, 'request')} in flight, {counted(tried.slots, 'slot')}: "
        f"{rate}, {tried.p50:.2f} s per request{failed}"
    )
