"""Simulate the continuous batching of an engine with a fixed number of slots.

A step decodes one token of every active sequence and costs ``base + each * active`` seconds.
Requests that arrived before a step starts take the free slots in order of arrival; the others
queue. The same code drives the simulated engine and the lower bound that it is compared with.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SEED = 20
SHORTEST, LONGEST = 4, 200


def mixed_lengths(count: int) -> list[int]:
    """Return ``count`` answer lengths in tokens: many short ones, some fifty times as long."""
    source = random.Random(SEED)
    return [min(LONGEST, max(SHORTEST, int(source.lognormvariate(3.5, 0.8)))) for _ in range(count)]


@dataclass(frozen=True)
class Cost:
    """Cost of a step in seconds."""

    base: float = 0.008
    each: float = 0.00005

    def step(self, active: int) -> float:
        """Return the seconds of a step with ``active`` sequences."""
        return self.base + self.each * active


@dataclass
class Decoder:
    """The slots of an engine, and its queue.

    Attributes:
        now: start of the current step, in seconds of the caller's clock.
        busy: slot-seconds spent decoding.
        first: arrival of the first request; None before.
        last: end of the last answer.
        busy_by_second: ``busy`` of the steps started in each second since the first arrival.
    """

    slots: int
    cost: Cost
    now: float = 0.0
    busy: float = 0.0
    first: float | None = None
    last: float = 0.0
    done: int = 0
    steps: int = 0
    busy_by_second: list[float] = field(default_factory=list)
    _queue: deque[tuple[float, int, Any]] = field(default_factory=deque)
    _active: list[tuple[int, int, Any]] = field(default_factory=list)
    _admitted: int = 0

    def submit(self, tag: Any, tokens: int, at: float) -> None:
        """Queue a request of ``tokens`` tokens that arrived at ``at``."""
        if self.first is None:
            self.first = at
        self._queue.append((at, max(1, tokens), tag))

    def begin(self) -> float | None:
        """Fill the free slots and start a step; return its end, or None if idle."""
        if not self._active and self._queue:
            self.now = max(self.now, self._queue[0][0])
        while self._queue and len(self._active) < self.slots and self._queue[0][0] <= self.now:
            _, tokens, tag = self._queue.popleft()
            heapq.heappush(self._active, (self.steps + tokens, self._admitted, tag))
            self._admitted += 1
        return self.now + self.cost.step(len(self._active)) if self._active else None

    def end(self) -> list[Any]:
        """End the step; return the tags of the finished requests."""
        active = len(self._active)
        seconds = self.cost.step(active)
        self.busy += active * seconds
        second = int(self.now - (self.first or 0.0))
        self.busy_by_second += [0.0] * (second + 1 - len(self.busy_by_second))
        self.busy_by_second[second] += active * seconds
        self.now += seconds
        self.steps += 1
        tags = []
        while self._active and self._active[0][0] <= self.steps:
            tags.append(heapq.heappop(self._active)[2])
        if tags:
            self.done += len(tags)
            self.last = self.now
        return tags

    @property
    def makespan(self) -> float:
        """Seconds from the first arrival to the last answer."""
        return 0.0 if self.first is None or not self.done else self.last - self.first

    @property
    def occupancy(self) -> float:
        """Share of the slots' time spent decoding, from first arrival to last answer."""
        return self.busy / (self.slots * self.makespan) if self.makespan else 0.0


def floor(lengths: Iterable[int], slots: int, cost: Cost) -> Decoder:
    """Return the decoder after the best possible run, with all requests present at the start."""
    decoder = Decoder(slots, cost)
    for number, tokens in enumerate(lengths):
        decoder.submit(number, tokens, 0.0)
    while decoder.begin() is not None:
        decoder.end()
    return decoder
