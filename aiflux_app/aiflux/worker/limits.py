"""How many requests an engine is given at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

START = 8
CEILING = 320
_GAIN = 1.05
_BACKOFF = 0.7
_LATENCY_FACTOR = 4.0
_FEWEST_ANSWERS = 8
_REST = 60.0


class FixedLimit:
    """The same limit throughout."""

    def __init__(self, value: int) -> None:
        self.value = value

    def note(self, work: int, seconds: float, overloaded: bool) -> None:
        """Take note of an ended exchange; changes nothing."""


class AdaptiveLimit:
    """Finds the concurrency of a foreign engine by itself. Thread-safe.

    It judges a limit by its throughput, by Little's law: requests in flight times work per second
    of latency, over the answers to requests that were sent under that limit. Long and short answers
    hardly disturb this figure, as a long one brings as much more work as it takes time. While a
    limit brings at least 5 % more than the one before, it is doubled; when it does so twice not,
    the last one that did is kept, and a quarter more to wait at the engine's door. It is tried
    again every minute. 429 and 503 lower it at once, as does a fourfold latency.

    Args:
        ceiling: never more than this.
        clock: monotonic seconds.
    """

    def __init__(self, ceiling: int = CEILING, clock: Callable[[], float] = time.monotonic) -> None:
        self.value = min(START, ceiling)
        self._ceiling = ceiling
        self._clock = clock
        self._lock = threading.Lock()
        self._best = 0.0
        self._kept = self.value
        self._fruitless = 0
        self._settled: float | None = None
        self._quiet_until = 0.0
        self._set(self.value)

    def note(self, work: int, seconds: float, overloaded: bool) -> None:
        """Take note of an ended exchange.

        Args:
            work: tokens it brought, or 1 where the engine does not count them.
            seconds: how long it took.
            overloaded: the engine answered 429 or 503.
        """
        with self._lock:
            now = self._clock()
            if overloaded:
                self._back_off(now)
            elif now - seconds >= self._since:
                self._work += work
                self._seconds += seconds
                self._answers += 1
                if self._answers >= max(self.value, _FEWEST_ANSWERS):
                    self._judge(now)

    def _set(self, value: int) -> None:
        self.value = value
        self._since = self._clock()
        self._forget()

    def _forget(self) -> None:
        self._work = 0
        self._answers = 0
        self._seconds = 0.0

    def _back_off(self, now: float) -> None:
        if now < self._quiet_until:
            return  # one burst of refusals counts once
        self._quiet_until = now + 1.0
        self._ceiling = max(1, int(self._ceiling * 0.9))
        self._best = 0.0
        self._settle(int(self.value * _BACKOFF), now)

    def _settle(self, value: int, now: float) -> None:
        self._settled = now
        self._set(max(1, min(value, self._ceiling)))

    def _judge(self, now: float) -> None:
        throughput = self.value * self._work / max(self._seconds, 1e-6)
        self._forget()
        if self._settled is not None:
            self._watch(throughput, now, now - self._settled)
        elif throughput > self._best * _GAIN:
            self._best = throughput
            self._kept = self.value + max(2, self.value // 4)
            self._climb(now)
        elif self._fruitless:
            self._settle(self._kept, now)
        else:
            self._fruitless = 1

    def _climb(self, now: float) -> None:
        self._fruitless = 0
        if self.value < self._ceiling:
            self._set(min(self._ceiling, 2 * self.value))
        else:
            self._settle(self.value, now)

    def _watch(self, throughput: float, now: float, settled_for: float) -> None:
        """Come down where the engine has become slow; else look now and then for more."""
        if throughput * _LATENCY_FACTOR < self._best:
            self._set(max(1, self.value - max(1, self.value // 8)))
        elif settled_for > _REST:
            self._settled = None
            self._best = throughput
            self._kept = self.value
            self._climb(now)
