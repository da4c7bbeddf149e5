"""Outages behind an address that still answers: a router whose servers are away, a used-up quota.

Every request then fails, for a reason that is not its own. The sign is that different requests fail
in a row. The proof is a probe: a request that was answered before, and is not any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle

from aiflux.engines.base import Engine
from aiflux.engines.outcome import Kind, Outcome
from aiflux.errors import EngineError
from aiflux.util.text import public_url
from aiflux.worker.rejections import DOUBTFUL, ENOUGH, Rejections, certain
from aiflux.worker.scheduler import Lane, Scheduler, Task

RECOVERIES_WITHOUT_PROGRESS = 3
POLL_SECONDS = 0.05
_FIRST_DELAY = 0.5
_LONGEST_DELAY = 5.0
_MOST_IN_A_ROW = 64 * ENOUGH
# These have rules of their own: several timeouts restart the engine.
_OTHERS = ("timeout", "memory")


def is_common(verdict: Outcome) -> bool:
    """Tell whether an attempt failed for a reason that other requests may share."""
    if verdict.kind is Kind.RETRY:
        return verdict.code not in _OTHERS
    return verdict.kind is Kind.FAILED and (verdict.foreign or verdict.status in DOUBTFUL)


def may_pass(verdict: Outcome) -> bool:
    """Tell whether such a failure may pass by itself, where nothing was ever answered."""
    return verdict.kind is Kind.RETRY and not verdict.foreign


@dataclass
class _Streak:
    """Requests that failed since the last answer, by key; at ``enough`` of them a probe is due."""

    enough: int = ENOUGH
    tasks: dict[bytes, Task] = field(default_factory=dict)


class OutageWatch:
    """Counts failures in a row, by engine and endpoint, and keeps requests to probe with.

    Thread-safe.

    Args:
        answered_before: returns a request to an endpoint that an earlier start has an answer to.
    """

    def __init__(self, answered_before: Callable[[str], Task | None] = lambda url: None) -> None:
        self._answered_before = answered_before
        self._answered: dict[str, Task | None] = {}
        self._rows: dict[tuple[int, str], _Streak] = {}
        self._recoveries = 0
        self._lock = threading.Lock()

    def note_answer(self, engine: int, task: Task) -> None:
        """Take note of an answer, which ends the row."""
        url = task.request.url
        known = self._answered.get(url)
        if known is None or len(task.payload) < len(known.payload):
            self._answered[url] = task
        self._recoveries = 0
        if (engine, url) in self._rows:
            with self._lock:
                self._rows.pop((engine, url), None)

    def note_failure(self, engine: int, task: Task) -> bool:
        """Take note of a failed attempt; return whether a probe is due."""
        with self._lock:
            row = self._rows.setdefault((engine, task.request.url), _Streak())
            row.tasks[task.key] = task
            return len(row.tasks) >= row.enough

    def note_alive(self, engine: int, url: str) -> None:
        """Take note that the engine answers others: the row was no outage."""
        with self._lock:
            row = self._rows.setdefault((engine, url), _Streak())
            row.tasks.clear()
            row.enough = min(2 * row.enough, _MOST_IN_A_ROW)

    def note_recovery(self, engine: int, url: str) -> bool:
        """Forget what the outage did to requests; return False where such recoveries lead nowhere.

        An attempt in an outage does not count.
        """
        with self._lock:
            row = self._rows.pop((engine, url), _Streak())
            for task in row.tasks.values():
                task.attempts = 0
            self._recoveries += 1
            return self._recoveries <= RECOVERIES_WITHOUT_PROGRESS

    def answered(self, url: str) -> Task | None:
        """Return the smallest request that was answered; None where none was."""
        if url not in self._answered:
            found = self._answered_before(url)
            with self._lock:
                self._answered.setdefault(url, found)
        return self._answered[url]

    def probes(self, engine: int, url: str) -> list[Task]:
        """Return what to probe with in turn: an answered request, or else those of the row."""
        answered = self.answered(url)
        with self._lock:
            row = self._rows.get((engine, url), _Streak())
            return [answered] if answered is not None else list(row.tasks.values())


class OutageProbe:
    """Asks an engine whether it answers anything, and holds its requests back while it does not.

    Args:
        exchange: sends a request to the engine of a lane, and judges what comes.
        engine: returns the engine of a lane.
        served: the model's name as the engine serves it.
        record: records the failures that wait at an endpoint.
        on_down: told that an engine is to be started again, in which generation it was.
        patience: seconds that it is given to answer again.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        watch: OutageWatch,
        rejections: Rejections,
        *,
        exchange: Callable[[Task, Lane], Outcome],
        engine: Callable[[Lane], Engine],
        served: str,
        record: Callable[[str], None],
        on_down: Callable[[Lane, int], None],
        patience: float,
        say: Callable[[str], None],
    ) -> None:
        self._scheduler = scheduler
        self._watch = watch
        self._rejections = rejections
        self._exchange = exchange
        self._engine = engine
        self._served = served
        self._record = record
        self._on_down = on_down
        self._patience = patience
        self._say = say
        self._ended: dict[int, int] = {}
        self._lock = threading.Lock()

    def ended(self, lane: Lane, generation: int) -> bool:
        """Tell whether a probe was due in this generation: its other failures do not count."""
        return self._ended.get(lane.index) == generation

    def run(self, lane: Lane, generation: int, url: str) -> None:
        """Probe at one endpoint; where no answer comes, wait until one does.

        Raises:
            EngineError: none does in time.
        """
        with self._lock:
            if lane.generation != generation or not lane.open or self.ended(lane, generation):
                return
            self._ended[lane.index] = generation
        self._scheduler.close_lane(lane, generation=generation)
        if self._until_answer(lane, generation, url) and lane.generation == generation:
            self._scheduler.open_lane(lane)

    def _until_answer(self, lane: Lane, generation: int, url: str) -> bool:
        """Return whether the lane may be opened: not where its engine is to be started again."""
        managed = self._engine(lane).kind.managed
        began, delay = time.monotonic(), 0.0
        for task in cycle(self._probes(lane, url, managed=managed)):
            verdict = self._exchange(task, lane)
            error = certain(self._engine(lane).client.base_url, url, verdict)
            if error is not None:
                raise error
            if verdict.generated or (verdict.kind is Kind.FAILED and not is_common(verdict)):
                break
            if self._scheduler.stopped or lane.generation != generation:
                return False
            if managed or verdict.kind is Kind.CRASHED:
                self._forgive(lane, url, verdict)
                self._on_down(lane, generation)
                return False
            left = self._patience - (time.monotonic() - began)
            if not delay:
                self._note_outage(lane, verdict, left)
            delay = min(2 * delay or _FIRST_DELAY, _LONGEST_DELAY)
            wait = max(delay, verdict.retry_after or 0.0)
            if wait > left:
                raise self._no_answer(lane, verdict)
            self._pause(wait)
        if delay:
            self._say(f"the engine answers again after {time.monotonic() - began:.0f} s")
            self._forgive(lane, url, verdict)
        else:
            self._watch.note_alive(lane.index, url)
            self._record(url)
        return True

    def _probes(self, lane: Lane, url: str, *, managed: bool) -> list[Task]:
        """Return what to probe with; nothing where what never answered is not to be waited for."""
        if self._watch.answered(url) is None and (managed or self._rejections.tolerant):
            return []
        return self._watch.probes(lane.index, url)

    def _note_outage(self, lane: Lane, verdict: Outcome, left: float) -> None:
        # What its list of models says is certain: it is not waited for.
        error = self._engine(lane).refusal(self._served)
        if error is not None:
            raise error
        self._say(
            f"the engine answers no request ({verdict.reason}): it is given {left:.0f} s "
            "(--engine-wait)"
        )

    def _forgive(self, lane: Lane, url: str, verdict: Outcome) -> None:
        """Have what failed in an outage sent again, as if it had not been."""
        if not self._watch.note_recovery(lane.index, url):
            raise self._no_answer(lane, verdict)
        for held in self._rejections.take(url):
            held.task.attempts = 0
            self._scheduler.restore(held.task)

    def _no_answer(self, lane: Lane, verdict: Outcome) -> EngineError:
        return EngineError(
            f"the engine at {public_url(self._engine(lane).client.base_url)} answers no request "
            f"any more ({verdict.reason}); none of these failures was recorded",
            "run the same command again when it does; --engine-wait gives it more time",
        )

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._scheduler.stopped:
            time.sleep(min(POLL_SECONDS, seconds))
