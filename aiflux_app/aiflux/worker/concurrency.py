"""Limits on the number of requests in flight per engine.

The measure is completed work (output tokens) per second, not latency. Latency limits, such as
Vegas and Gradient2 of Netflix's concurrency-limits (https://github.com/Netflix/concurrency-limits,
``limit/VegasLimit.java``, ``Gradient2Limit.java``), assume that latency is constant until a queue
forms, and similar for all requests. An engine with batching has no such range: each additional
sequence slows down all others, and one answer can take fifty times as long as another. In the
simulation of tests/unit/worker/test_concurrency.py (256 slots, mixed lengths, from 20 to 300 s),
ports of both used: Gradient2 50 % of the slots (8 % without the windows of one second of
``limit/WindowedLimit.java``), still rising slowly, and Vegas 6 % (3 %).

``AdaptiveLimit`` therefore climbs a hill with controlled experiments, as PCC does for congestion
control (Dong et al., "PCC: Re-architecting Congestion Control for Consistent High Performance",
NSDI 2015; the variant with gradients is "PCC Vivace", NSDI 2018): start by multiplying, then
compare trials above and below with the current limit, before and after each trial. A comparison
never uses older data than that, so nothing has to be forgotten. Refusals lower the limit by a
factor, as in ``limit/AIMDLimit.java`` of concurrency-limits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, sqrt

START = 16
CEILING = 1280
"""A quarter more than 1,024, vLLM's default on large GPUs (``--max-num-seqs``)."""
FEW = 4
"""Limit for an engine that processes one request at a time; the extra ones hide our own delays."""

_FEWEST = 16
_CLIMB_GAIN = 1.04
_CLEAR_GAIN = 1.7
_NO_WAIT = 0.15
_HEADROOM = 1.25
_UP, _UP_GAIN = 1.5, 1.02
_DOWN, _DOWN_LOSS, _DOWN_ERROR = 0.8, 0.985, 0.025
_DOWN_MARGIN = 1.125
_REST_UP, _REST_DOWN, _LONGEST_REST = 2, 4, 32
_BACKOFF = 0.8
_CAP = 0.9
_CAP_SECONDS, _LONGEST_CAP = 15.0, 120.0
_AGAIN = 2.0
_QUIET_SECONDS = 1.0
_FULL = 0.9
_SLOW = 2.0
_SAME_TIME = 0.05
_AT_ONCE = 0.02
_EVEN = 0.35
_AS_MUCH = 0.9


class FixedLimit:
    """A constant limit."""

    def __init__(self, value: int) -> None:
        self.value = value

    def note(self, work: int, seconds: float, overloaded: bool) -> None:
        """Record an ended exchange; has no effect."""

    def note_timeout(self) -> None:
        """Record a timeout; has no effect."""


@dataclass
class Window:
    """Sums over the answers of a period with one limit.

    Latency is fitted as ``wait + slope * work``, so that a period with longer answers does not
    look slower than another.
    """

    limit: int
    began: float
    ended: float = 0.0
    answers: int = 0
    work: float = 0.0
    seconds: float = 0.0
    work_squares: float = 0.0
    second_squares: float = 0.0
    products: float = 0.0

    def add(self, work: float, seconds: float, now: float) -> None:
        """Add an answer."""
        self.answers += 1
        self.ended = now
        self.work += work
        self.seconds += seconds
        self.work_squares += work * work
        self.second_squares += seconds * seconds
        self.products += work * seconds

    @property
    def spread(self) -> float:
        """Squared coefficient of variation of the work; 0 if all answers have the same."""
        spread = self.work_squares * self.answers / (self.work * self.work) - 1
        return spread if spread > 1e-4 else 0.0

    @property
    def _slope(self) -> float:
        mean = self.work / self.answers
        covariance = self.products / self.answers - mean * self.seconds / self.answers
        return covariance / (self.spread * mean * mean) if self.spread else 0.0

    def latency(self, work: float) -> float:
        """Return the latency of an answer with this work, in seconds."""
        mean = self.work / self.answers
        return max(1e-6, self.seconds / self.answers + self._slope * (work - mean))

    def waiting(self, work: float) -> float:
        """Return the share of an answer's latency that does not depend on its work."""
        return min(1.0, self.latency(0.0) / self.latency(work)) if self.spread else 1.0

    @property
    def error(self) -> float:
        """Relative standard error of the mean latency, given the work."""
        mean = self.seconds / self.answers
        variance = self.second_squares / self.answers - mean * mean
        explained = self._slope**2 * self.spread * (self.work / self.answers) ** 2
        return sqrt(max(0.0, variance - explained) / max(1, self.answers - 2)) / max(mean, 1e-9)

    def throughput(self, work: float) -> float:
        """Return work per second by Little's law: requests in flight over their latency.

        Precise after a few answers if nothing waits; imprecise with a long queue, whose content
        varies.
        """
        return self.limit * work / self.latency(work)

    @property
    def rate(self) -> float:
        """Completed work per second; more precise if more answers wait for the same slots."""
        return self.work / max(self.ended - self.began, 1e-6)


def gain(before: Window, after: Window, work: float) -> tuple[float, float]:
    """Return the ratio of two throughputs, and its relative standard error.

    The two measures of throughput are weighted by the inverse of their variances.

    Args:
        work: work of a typical answer.
    """
    if not (before.spread and after.spread):
        return after.rate / before.rate, sqrt(1 / before.answers + 1 / after.answers)
    by_rate = by_latency = 0.0
    spread = max(before.spread, after.spread, 0.01)
    for window in (before, after):
        turnovers, waiting = window.answers / window.limit, window.waiting(work)
        by_rate += 2 * max(1 - waiting, 0.05) / turnovers**2 * spread / window.limit
        by_latency += waiting / turnovers * spread / window.limit
    weight = by_rate / (by_rate + by_latency)
    ratio = weight * log(after.throughput(work) / before.throughput(work))
    ratio += (1 - weight) * log(after.rate / before.rate)
    return exp(ratio), sqrt(by_rate * by_latency / (by_rate + by_latency)) + 0.002


class _Meter:
    """Collects windows; subclasses decide when to change the limit."""

    def __init__(self, value: int, clock: Callable[[], float]) -> None:
        self.value = value
        self._clock = clock
        self._lock = threading.Lock()
        self._mean = 0.0
        self._seen = 0
        self._start_window(skip=0)

    def _start_window(self, skip: int) -> None:
        """Start measuring the limit that is set now.

        Only answers to requests sent from now on count, except the first ``skip``: after one
        turnover, short and long answers arrive in their usual proportion again.
        """
        self._since = self._clock()
        self._skip = skip
        self._window = Window(self.value, self._since)

    def _next_window(self) -> None:
        self._window = Window(self.value, self._clock())

    def _add(self, work: float, seconds: float) -> Window | None:
        now = self._clock()
        self._seen += 1
        self._mean += (work - self._mean) / min(self._seen, 2 * max(self.value, _FEWEST))
        if now - seconds < self._since:
            return None
        if self._skip:
            self._skip -= 1
            self._window.began = now
            return None
        self._window.add(work, seconds, now)
        return self._window


class AdaptiveLimit(_Meter):
    """Finds the concurrency of an external engine. Thread-safe.

    - **Climb**: double the limit, or multiply it by four while throughput rises in proportion,
      until it stops rising. Then keep the best limit, plus a quarter to keep a queue at the engine.
    - **Rest**, and occasionally try a limit that is half as large again, or a fifth smaller. A
      trial counts if it compares the same with the measurements before and after it. If it yields
      more work, another climb starts; if it yields no less, it is kept with a margin. Trials
      without a result become rarer.
    - **Refusals** (429, 503) and many timeouts lower the limit at once. It climbs again after 15 s.
      If that is refused soon, it waits twice as long.

    Args:
        ceiling: maximum limit.
        clock: monotonic seconds.
    """

    def __init__(self, ceiling: int = CEILING, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(min(START, ceiling), clock)
        self._ceiling = ceiling
        self._capped = False
        self._cap = ceiling
        self._cap_until = clock()
        self._cap_seconds = _CAP_SECONDS
        self._quiet_until = clock()
        self._timeouts = 0
        self._idle_reports = 0
        self._step: Callable[[Window], None] = self._climb
        self._best: Window | None = None
        self._sure = False
        self._before = self._trial = self._window
        self._up = True
        self._down = _DOWN
        self._forget_rests()

    def note(self, work: int, seconds: float, overloaded: bool) -> None:
        """Record an ended exchange.

        Args:
            work: number of tokens, or 1 if the engine does not count them.
            seconds: duration of the exchange.
            overloaded: whether the engine answered 429 or 503.
        """
        with self._lock:
            if overloaded:
                self._back_off()
                return
            if self._capped and self._clock() >= self._cap_until:
                self._capped = False
                self._begin_climb(None, self.value)
            window = self._add(work, seconds)
            if window is not None and self._enough(window):
                self._next_window()
                self._step(window)

    def note_timeout(self) -> None:
        """Record a timeout; many of them mean that too many requests wait."""
        with self._lock:
            self._timeouts += 1
            if self._timeouts >= max(3, self.value // 8):
                self._back_off()

    def note_load(self, running: int, waiting: int) -> None:
        """Record the engine's report of its queue.

        It only accelerates the search: if nothing waits, more requests are sent at once; if many
        wait, the climb ends. These figures include other users' requests, so a long queue is no
        reason to send less than before.
        """
        with self._lock:
            full = running >= _FULL * self.value
            self._idle_reports = self._idle_reports + 1 if full and not waiting else 0
            climbing = self._step == self._climb
            if self._idle_reports and (climbing or self._idle_reports > 2):
                self._begin_climb(None, 2 * self.value)
            elif climbing and waiting > running // 4 + 2:
                self._settle(int(self.value * running / (running + waiting) * _HEADROOM) + 2)

    def _set(self, value: float, skip: bool = True) -> bool:
        """Set the limit within its bounds; return whether it changed."""
        before = self.value
        top = self._cap if self._capped else self._ceiling
        self.value = max(1, min(int(value), top))
        self._timeouts = 0
        self._sure = False
        self._start_window(self.value if skip else 0)
        return self.value != before

    def _enough(self, window: Window) -> bool:
        if self._step != self._climb:
            return window.answers >= max(4 * _FEWEST, 2 * self.value)
        if self._sure or not window.spread:
            return window.answers >= max(_FEWEST, self.value)
        few = max(_FEWEST, self.value // 4)
        return window.answers >= few and (
            window.answers >= max(_FEWEST, self.value) or window.error < 0.01
        )

    def _begin_climb(self, best: Window | None, value: int) -> None:
        self._step = self._climb
        self._best = best
        self._forget_rests()
        self._set(value, skip=False)

    def _climb(self, window: Window) -> None:
        best = self._best
        no_wait = window.spread > 0 and window.waiting(self._mean) < _NO_WAIT
        rise = self._rise(window)
        if best is not None and rise > _CLIMB_GAIN and not no_wait and not self._sure:
            # A forming queue looks like a gain, so measure again once it has formed.
            self._sure = True
            self._skip = max(0, self.value - window.answers)
            return
        if best is None or rise > _CLIMB_GAIN:
            self._best = best = window
            clear = no_wait and rise > _CLEAR_GAIN
            if self._set((4 if clear else 2) * self.value, skip=False):
                return
        self._settle(min(self.value, int(best.limit * _HEADROOM) + 2))

    def _rise(self, window: Window) -> float:
        if self._best is None:
            return 1.0
        if self._sure:
            return gain(self._best, window, self._mean)[0]
        return window.throughput(self._mean) / self._best.throughput(self._mean)

    def _settle(self, value: float) -> None:
        self._step = self._rest
        self._forget_rests()
        self._set(value)

    def _forget_rests(self) -> None:
        self._pauses = {True: _REST_UP, False: _REST_DOWN}
        self._left = dict(self._pauses)

    def _rest(self, window: Window) -> None:
        self._before = window
        for up in (True, False):
            self._left[up] -= 1
        for up in (True, False):
            if self._left[up] <= 0 and self._step == self._rest:
                self._begin_trial(up)

    def _begin_trial(self, up: bool) -> None:
        base = self.value
        self._up = up
        if self._set(max(base + 1, base * _UP) if up else base * self._down):
            self._step = self._try
        else:
            self._left[up] = self._pauses[up]

    def _try(self, window: Window) -> None:
        """Return to the limit before the trial to measure it again."""
        self._trial = window
        self._step = self._check
        if not self._better(self._before):
            self._fail()
        self._set(self._before.limit)

    def _check(self, window: Window) -> None:
        """Accept the trial if it compares the same with the measurements before and after it."""
        base, self._before = self._before.limit, window
        if not self._better(window):
            self._fail()
        elif self._up:
            self._begin_climb(self._trial, 2 * self._trial.limit)
        else:
            self._settle(min(self._trial.limit * _DOWN_MARGIN + 1, base - 1))
            self._left[False] = 1
            self._down = max(0.5, self._down**2)

    def _better(self, reference: Window) -> bool:
        ratio, error = gain(reference, self._trial, self._mean)
        if self._up:
            return ratio > _UP_GAIN + 2 * error
        return ratio > _DOWN_LOSS and error < _DOWN_ERROR

    def _fail(self) -> None:
        self._step = self._rest
        if not self._up:
            self._down = _DOWN
        pause = min(_LONGEST_REST, 2 * self._pauses[self._up])
        self._pauses[self._up] = self._left[self._up] = pause

    def _back_off(self) -> None:
        now = self._clock()
        if now < self._quiet_until:
            return  # a burst of refusals counts once
        self._quiet_until = now + _QUIET_SECONDS
        self._cap = max(1, int(self.value * _CAP))
        if not self._capped and now > self._cap_until:
            again = now < self._cap_until + _AGAIN * self._cap_seconds
            seconds = 2 * self._cap_seconds if again else _CAP_SECONDS
            self._cap_seconds = min(seconds, _LONGEST_CAP)
        self._capped = True
        self._cap_until = now + self._cap_seconds
        if self._step == self._climb and self._best is not None:
            self._settle(max(self._best.limit, self.value // 2))
        elif self._step == self._try and self._up:
            self._settle(self._before.limit)
        else:
            self._settle(self.value * _BACKOFF)


class SlotLimit(_Meter):
    """The limit of an engine with known slots, lowered if they are not real. Thread-safe.

    An engine that processes one request at a time, whatever its settings, answers in order of
    arrival, and the time between two answers is that of the second. Parallel slots only look like
    this by chance, or if all answers have equal length. This is no proof, but a reason for an
    experiment: if few requests in flight yield as much work per second as many, more requests would
    only wait and time out. The experiment is repeated at increasing intervals.

    Args:
        value: the limit as long as the slots are real.
        found: called with True if the engine processes one request at a time, and with False if it
            no longer does.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        value: int,
        found: Callable[[bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(value, clock)
        self._full = value
        self._found = found
        self._single = False
        self._trying: Window | None = None
        self._answers_left = 0
        self._pause = 8 * value
        self._last_end = self._last_sent = clock()
        self._in_order = 0
        self._gaps: deque[float] = deque(maxlen=_FEWEST)
        self._paces: deque[float] = deque(maxlen=_FEWEST)

    def note(self, work: int, seconds: float, overloaded: bool) -> None:
        """Record an ended exchange; see ``AdaptiveLimit.note``."""
        with self._lock:
            if overloaded or self._full <= FEW:
                return
            self._watch(work, seconds)
            window = self._add(work, seconds)
            if window is None or window.answers < 2 * _FEWEST:
                return
            self._next_window()
            if self._trying is not None:
                self._conclude(self._trying, window)
            elif self._answers_left > 0:
                return
            elif self._single and self.value < self._full:
                self._change(self._full)
            elif self._single or (window.seconds > _SLOW * window.answers and self._looks_single()):
                self._trying = window
                self._change(FEW)

    def note_timeout(self) -> None:
        """Record a timeout; has no effect."""

    def _conclude(self, before: Window, window: Window) -> None:
        self._trying = None
        self._answers_left = self._pause
        self._pause *= 2
        single = window.rate >= _AS_MUCH * before.rate
        if not single:
            self._change(self._full)
        if single != self._single:
            self._single = single
            self._found(single)

    def _change(self, value: int) -> None:
        self.value = value
        self._start_window(skip=value)
        self._gaps.clear()
        self._paces.clear()

    def _watch(self, work: int, seconds: float) -> None:
        """Record whether answers arrive one by one, in the order of their requests."""
        now = self._clock()
        sent = now - seconds
        self._answers_left -= 1
        self._gaps.append(now - self._last_end)
        self._paces.append((now - self._last_end) / work)
        self._last_end = now
        self._in_order = self._in_order + 1 if sent > self._last_sent - _SAME_TIME else 0
        self._last_sent = max(sent, self._last_sent)

    def _looks_single(self) -> bool:
        if min(self._gaps) <= _AT_ONCE * sum(self._gaps) / len(self._gaps):
            return False  # two answers at once were processed in parallel
        mean = sum(self._paces) / len(self._paces)
        variance = sum((pace - mean) ** 2 for pace in self._paces) / len(self._paces)
        even = variance < (_EVEN * mean) ** 2
        return even or self._in_order >= self._full + _FEWEST
