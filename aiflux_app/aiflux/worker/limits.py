"""How many requests an engine is given at once."""

from __future__ import annotations

import time
from collections.abc import Callable

START = 4
_GROWTH = 1.5
_GAIN = 1.05
_BACKOFF = 0.7
_LATENCY_FACTOR = 4.0


class FixedLimit:
    """The same limit throughout."""

    def __init__(self, value: int) -> None:
        self.value = value

    def note(self, work: int, seconds: float, overloaded: bool) -> None:
        """Take note of an ended exchange; changes nothing."""


class AdaptiveLimit:
    """Finds the concurrency of a foreign engine by itself.

    In windows of at least twice the limit's answers it compares the throughput with that of the
    step before: while a higher limit brings at least 5 % more, it rises by half; when it does not,
    it goes back one step and stays there. 429 and 503 lower it at once, as does a latency that has
    grown fourfold over the lowest one seen without the throughput having grown.

    Args:
        ceiling: never more than this.
        clock: monotonic seconds.
    """

    def __init__(self, ceiling: int = 256, clock: Callable[[], float] = time.monotonic) -> None:
        self.value = min(START, ceiling)
        self._ceiling = ceiling
        self._clock = clock
        self._best = 0.0
        self._previous = self.value
        self._settled = False
        self._lowest_latency = float("inf")
        self._quiet_until = 0.0
        self._reset()

    def note(self, work: int, seconds: float, overloaded: bool) -> None:
        """Take note of an ended exchange.

        Args:
            work: tokens it brought, or 1 where the engine does not count them.
            seconds: how long it took.
            overloaded: the engine answered 429 or 503.
        """
        if overloaded:
            self._back_off()
            return
        self._work += work
        self._answers += 1
        self._latency += seconds
        if self._answers >= max(2 * self.value, 8):
            self._judge()

    def _reset(self) -> None:
        self._work = 0
        self._answers = 0
        self._latency = 0.0
        self._since = self._clock()

    def _back_off(self) -> None:
        now = self._clock()
        if now < self._quiet_until:
            return  # one burst of refusals counts once
        self._quiet_until = now + 1.0
        self.value = max(1, int(self.value * _BACKOFF))
        self._ceiling = max(self.value, int(self._ceiling * 0.9))
        self._settled = True
        self._best = 0.0
        self._reset()

    def _judge(self) -> None:
        elapsed = max(self._clock() - self._since, 1e-6)
        throughput = self._work / elapsed
        latency = self._latency / self._answers
        self._lowest_latency = min(self._lowest_latency, latency)
        if not self._settled:
            if throughput > self._best * _GAIN and self.value < self._ceiling:
                self._best = throughput
                self._previous = self.value
                self.value = min(self._ceiling, max(self.value + 1, int(self.value * _GROWTH)))
            else:
                self._settled = True
                if throughput <= self._best * _GAIN:
                    self.value = self._previous
        elif latency > self._lowest_latency * _LATENCY_FACTOR and throughput < self._best / _GAIN:
            self.value = max(1, self.value - max(1, self.value // 8))
        self._best = max(self._best, throughput)
        self._reset()
