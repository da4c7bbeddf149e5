"""Rejections that may concern every request, held back until that is clear.

A wrong key, address or model makes a server reject everything. If such rejections were recorded as
failures, the corrected command would have nothing left to do. So a rejection that may be of this
kind is held back without a result, until another request to the same endpoint is answered (then
the request itself was at fault), or until so many came in a row that it is no coincidence. The same
applies to any other failure that may be due to an outage.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from aiflux.engines.external.engine import redirect_error
from aiflux.engines.outcome import Kind, Outcome
from aiflux.errors import RejectedError
from aiflux.util.text import public_url
from aiflux.worker.scheduler import Lane, Task

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
# 403 and 451 may also come from a content filter, 404 from a file that a request names.
DOUBTFUL = frozenset({403, 404, 405, 410, 451})
_OF_THE_MODEL = frozenset({400, 422})


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
        """Hold a request back; return how many are held back at its endpoint."""
        with self._lock:
            waiting = self._waiting.setdefault(held.task.request.url, [])
            waiting.append(held)
            return len(waiting)

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

    def conclusion(self, url: str) -> RejectedError | None:
        """Return the error for so many rejections; None if other requests were answered."""
        with self._lock:
            waiting = list(self._waiting.get(url, ()))
        if not waiting or self._lenient or url in self._answered:
            return None
        last = waiting[-1].verdict
        if last.kind is Kind.RETRY and not last.foreign:
            return None
        first = "the only request" if len(waiting) == 1 else f"the first {len(waiting)} requests"
        if last.foreign:
            return RejectedError(
                f"the server answered {first} to {url} with something other than an OpenAI API "
                f"response ({last.status}): {last.message}; nothing was recorded",
                "check --engine-url: a website or the login page of a proxy answers like this",
            )
        return RejectedError(
            f"the engine rejected {first} to {url} ({last.status}): {last.message}; nothing was "
            "recorded",
            "correct the address, the model or these requests and run the same command again; "
            "--max-failures 100% records them as failed",
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
