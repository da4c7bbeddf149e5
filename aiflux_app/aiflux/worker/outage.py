"""Failures that concern every request: rejections, and outages behind a reachable address.

A wrong key, address or model makes a server reject everything. If such rejections were recorded as
failures, the corrected command would have nothing left to do. So a rejection that may be of this
kind is held back without a result, until another request to the same endpoint is answered (then
the request itself was at fault), or until so many came in a row that it is no coincidence. The same
applies to any other failure that may be due to an outage.

In an outage (a router without servers, an exhausted quota) every request fails, whatever it
contains. The sign is that different requests fail in a row. The proof is a probe: a request that
was answered before no longer is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle

from aiflux.engines.base import Engine
from aiflux.engines.external.engine import redirect_error
from aiflux.engines.outcome import Kind, Outcome
from aiflux.errors import EngineError, RejectedError
from aiflux.util.text import public_url
from aiflux.worker.scheduler import Lane, Scheduler, Task

ENOUGH = 10
_AGAIN = "and run the same command again"
# Symptom and remedy of each status that concerns every request.
_CERTAIN = {
    401: ("refuses the key", f"set AIFLUX_API_KEY to a key that is valid {_AGAIN}"),
    402: ("asks for payment", f"check the account's credit and quota {_AGAIN}"),
    407: (
        "is behind a proxy that requires a login",
        f"check --engine-url: AI-Flux uses no proxy for it; use an address without one {_AGAIN}",
    ),
    429: ("reports a used-up quota", f"check the account's credit and quota {_AGAIN}"),
}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# 403 and 451 may also come from a content filter, 404 from a file that a request names. Servers
# answer 404, 405 or 501 if they, or their model, do not support the endpoint.
DOUBTFUL = frozenset({403, 404, 405, 410, 451, 501})
_WITHOUT_ENDPOINT = frozenset({404, 405, 501})
_OF_THE_MODEL = frozenset({400, 422})
RECOVERIES_WITHOUT_PROGRESS = 3
POLL_SECONDS = 0.05
_FIRST_DELAY = 0.5
_LONGEST_DELAY = 5.0
_MOST_IN_A_ROW = 64 * ENOUGH
# Handled elsewhere: several timeouts restart the engine.
_OTHERS = ("timeout", "memory")


@dataclass(frozen=True)
class Held:
    """A rejected request that is held back."""

    task: Task
    lane: Lane
    verdict: Outcome
    seconds: float
    since: float = field(default_factory=time.monotonic)


class Rejections:
    """The rejected requests that are held back, by endpoint. Thread-safe.

    Args:
        answered_before: requests were answered in an earlier start, so not all are rejected.
        tolerant: every failure is allowed, so a run without any answer is valid.
    """

    def __init__(self, *, answered_before: bool = False, tolerant: bool = False) -> None:
        self._tolerant = tolerant
        self._lenient = answered_before or tolerant
        self._answered: set[str] = set()
        self._waiting: dict[str, list[Held]] = {}
        self._lock = threading.Lock()

    def is_of_the_model(self, url: str, verdict: Outcome, *, offered: bool | None) -> bool:
        """Return whether a failure may be due to a model that the engine does not have.

        Args:
            offered: whether the engine lists the model; None if unknown.
        """
        of_the_model = verdict.kind is Kind.FAILED and verdict.status in _OF_THE_MODEL
        return of_the_model and offered is False and url not in self._answered

    def hold(self, held: Held) -> int:
        """Hold a request back; return how many are held back at its endpoint.

        The requests for several answers to one (``n``) count as one.
        """
        with self._lock:
            waiting = self._waiting.setdefault(held.task.request.url, [])
            waiting.append(held)
            return len({each.task.key for each in waiting})

    def answered(self, url: str, sent: float) -> list[Held]:
        """Note an answer; return the requests held back, which were themselves at fault.

        Args:
            sent: monotonic time at which the answered request was sent; an answer to a request
                that was already in flight does not explain rejections that came later.
        """
        self._answered.add(url)
        if url not in self._waiting:
            return []
        with self._lock:
            waiting = self._waiting.pop(url, [])
            later = [held for held in waiting if held.since >= sent]
            if later:
                self._waiting[url] = later
            return [held for held in waiting if held.since < sent]

    def take(self, url: str) -> list[Held]:
        """Remove and return the requests held back at an endpoint."""
        with self._lock:
            return self._waiting.pop(url, [])

    def last(self, url: str) -> Held | None:
        """Return the latest request held back at an endpoint."""
        with self._lock:
            return next(reversed(self._waiting.get(url, ())), None)

    @property
    def tolerant(self) -> bool:
        """Whether every failure is allowed."""
        return self._tolerant

    def is_answered(self, url: str) -> bool:
        """Return whether a request to an endpoint was answered in this start."""
        return url in self._answered

    @property
    def urls(self) -> list[str]:
        """Endpoints with requests held back."""
        with self._lock:
            return list(self._waiting)

    def conclusion(self, url: str, *, managed: bool) -> RejectedError | None:
        """Return the error for so many rejections; None if other requests were answered.

        Args:
            managed: the engine is ours, so an error that may be temporary will not pass by waiting.
        """
        with self._lock:
            waiting = list(self._waiting.get(url, ()))
        if not waiting or self._lenient or url in self._answered:
            return None
        last = waiting[-1].verdict
        if may_pass(last) and not managed:
            return None
        count = len({held.task.key for held in waiting})
        first = "the only request" if count == 1 else f"the first {count} requests"
        if last.foreign:
            return RejectedError(
                f"the server answered {first} to {url} with something other than an OpenAI API "
                f"response ({last.status}): {last.message}; nothing was recorded",
                "check --engine-command: what it started has no OpenAI API at this path"
                if managed
                else "check --engine-url: a website or the login page of a proxy answers like this",
            )
        if may_pass(last):
            return RejectedError(
                f"the engine answered {first} to {url} with an error ({last.reason}); nothing was "
                "recorded",
                "see its log (aiflux logs --engine), and run the same command again; "
                "--max-failures 100% records such requests as failed",
            )
        check = (
            f"check that this version of the engine and this model support {url}; "
            if last.status in _WITHOUT_ENDPOINT
            else ""
        )
        return RejectedError(
            f"the engine rejected {first} to {url} ({last.status}): {last.message}; nothing was "
            "recorded",
            f"{check}correct the address, the model or these requests and run the same command "
            "again; --max-failures 100% records them as failed",
        )


def certain(engine: str, url: str, verdict: Outcome) -> RejectedError | None:
    """Return the error for an answer that every request would get; None for any other.

    Args:
        engine: address of the engine.
    """
    if verdict.status in _CERTAIN and verdict.kind is Kind.FAILED:
        seen, remedy = _CERTAIN[verdict.status]
        return RejectedError(
            f"the engine {seen} ({verdict.status}): {verdict.message}; this is not recorded as a "
            "failure of requests",
            remedy,
        )
    if verdict.status in _REDIRECTS:
        return redirect_error(public_url(engine), url, verdict.location or "an unnamed address")
    return None


def is_common(verdict: Outcome) -> bool:
    """Return whether an attempt failed for a reason that other requests may share."""
    if verdict.kind is Kind.RETRY:
        return verdict.code not in _OTHERS
    return verdict.kind is Kind.FAILED and (verdict.foreign or verdict.status in DOUBTFUL)


def may_pass(verdict: Outcome) -> bool:
    """Return whether a failure may be temporary if no request was ever answered."""
    return verdict.kind is Kind.RETRY and not verdict.foreign


@dataclass
class _Streak:
    """Requests that failed since the last answer; at ``enough`` of them a probe is due.

    Attributes:
        tasks: by the request's key, and the number of the answer if it asks for several.
    """

    enough: int = ENOUGH
    tasks: dict[tuple[bytes, int | None], Task] = field(default_factory=dict)


class OutageWatch:
    """Counts failures in a row, by engine and endpoint, and keeps requests to probe with.

    Thread-safe.

    Args:
        answered_before: returns a request to an endpoint that an earlier start answered.
    """

    def __init__(self, answered_before: Callable[[str], Task | None] = lambda url: None) -> None:
        self._answered_before = answered_before
        self._answered: dict[str, Task | None] = {}
        self._rows: dict[tuple[int, str], _Streak] = {}
        self._recoveries = 0
        self._lock = threading.Lock()

    def note_answer(self, engine: int, task: Task) -> None:
        """Note an answer, which ends a row of failures."""
        url = task.request.url
        known = self._answered.get(url)
        if known is None or len(task.payload) < len(known.payload):
            self._answered[url] = task
        self._recoveries = 0
        if (engine, url) in self._rows:
            with self._lock:
                self._rows.pop((engine, url), None)

    def note_failure(self, engine: int, task: Task) -> bool:
        """Note a failed attempt; return whether a probe is due."""
        with self._lock:
            row = self._rows.setdefault((engine, task.request.url), _Streak())
            row.tasks[task.key, task.part] = task
            return len({key for key, _ in row.tasks}) >= row.enough

    def note_alive(self, engine: int, url: str) -> None:
        """Note that the engine answers other requests: the failures were no outage."""
        with self._lock:
            row = self._rows.setdefault((engine, url), _Streak())
            row.tasks.clear()
            row.enough = min(2 * row.enough, _MOST_IN_A_ROW)

    def note_recovery(self, engine: int, url: str) -> bool:
        """Forget the failures of an outage; return False if recoveries lead nowhere.

        An attempt in an outage does not count.
        """
        with self._lock:
            row = self._rows.pop((engine, url), _Streak())
            for task in row.tasks.values():
                task.attempts = 0
            self._recoveries += 1
            return self._recoveries <= RECOVERIES_WITHOUT_PROGRESS

    def answered(self, url: str) -> Task | None:
        """Return the smallest request that was answered; None if there is none."""
        if url not in self._answered:
            found = self._answered_before(url)
            with self._lock:
                self._answered.setdefault(url, found)
        return self._answered[url]

    def probes(self, engine: int, url: str) -> list[Task]:
        """Return the requests to probe with: an answered one, or else those that failed."""
        answered = self.answered(url)
        with self._lock:
            row = self._rows.get((engine, url), _Streak())
            return [answered] if answered is not None else list(row.tasks.values())


class OutageProbe:
    """Probes an engine and holds its requests back until it answers one.

    Args:
        exchange: sends a request to the engine of a lane, and judges the answer.
        engine: returns the engine of a lane.
        served: the model's name as the engine serves it.
        record: records the failures held back at an endpoint.
        on_down: called with a lane and its generation when its engine is to be restarted.
        patience: seconds to wait for an answer.
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
        """Return whether a probe was due in this generation: other failures of it do not count."""
        return self._ended.get(lane.index) == generation

    def run(self, lane: Lane, generation: int, url: str) -> None:
        """Probe one endpoint and wait until it answers.

        Raises:
            EngineError: it does not answer in time.
        """
        with self._lock:
            if lane.generation != generation or not lane.open or self.ended(lane, generation):
                return
            self._ended[lane.index] = generation
        self._scheduler.close_lane(lane, generation=generation)
        if self._until_answer(lane, generation, url) and lane.generation == generation:
            self._scheduler.open_lane(lane)

    def _until_answer(self, lane: Lane, generation: int, url: str) -> bool:
        """Return whether the lane may be opened: not if its engine is to be restarted."""
        managed = self._engine(lane).kind.managed
        began, delay = time.monotonic(), 0.0
        for task in cycle(self._probes(lane, url)):
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
                raise self._no_answer(lane, url, verdict)
            self._pause(wait)
        if delay:
            self._say(f"the engine answers again after {time.monotonic() - began:.0f} s")
            self._forgive(lane, url, verdict)
        else:
            self._watch.note_alive(lane.index, url)
            self._record(url)
        return True

    def _probes(self, lane: Lane, url: str) -> list[Task]:
        """Return the requests to probe with; empty if it is not worth waiting."""
        if self._watch.answered(url) is None and self._rejections.tolerant:
            return []
        return self._watch.probes(lane.index, url)

    def _note_outage(self, lane: Lane, verdict: Outcome, left: float) -> None:
        # A model missing from the engine's list is certain: waiting would not help.
        error = self._engine(lane).refusal(self._served)
        if error is not None:
            raise error
        self._say(
            f"the engine answers no request ({verdict.reason}): waiting up to {left:.0f} s "
            "(--engine-wait)"
        )

    def _forgive(self, lane: Lane, url: str, verdict: Outcome) -> None:
        """Send the requests that failed in an outage again, without counting the attempt."""
        if not self._watch.note_recovery(lane.index, url):
            raise self._no_answer(lane, url, verdict)
        for held in self._rejections.take(url):
            held.task.attempts = 0
            self._scheduler.restore(held.task)

    def _no_answer(self, lane: Lane, url: str, verdict: Outcome) -> EngineError:
        any_more, record = " any more", ""
        if self._watch.answered(url) is None:
            any_more, record = "", "; --max-failures 100% records the failures instead"
        return EngineError(
            f"the engine at {public_url(self._engine(lane).client.base_url)} answers no request"
            f"{any_more} ({verdict.reason}); none of these failures was recorded",
            "run the same command again when it answers; --engine-wait sets how long to wait"
            f"{record}",
        )

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._scheduler.stopped:
            time.sleep(min(POLL_SECONDS, seconds))
