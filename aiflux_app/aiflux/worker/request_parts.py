"""A request that is answered in parts: each is asked for by itself, then they become one response.

The parts are several answers (``samples``) or the answers to parts of a long prompt (``chunks``).
The journal keeps each of them (``part_result``), so that a resumed run asks only for those that are
missing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from aiflux.core.batch.request import parse_json
from aiflux.core.runs.journal import NewResult, RawResult, part_result
from aiflux.util.times import unix_seconds

WHOLE = -1
"""Instead of the number of a part: the request for all of them."""


class UnjoinableError(Exception):
    """The parts do not make one response; the text says why."""


class Form(Protocol):
    """How the parts of a request are asked for, and what they become.

    Attributes:
        wanted: number of parts.
        noun: what a part is called in messages.
        counted_as: name of their number in the result's metadata.
        divides: the engine is never asked for all of them at once.
    """

    wanted: int
    noun: str
    counted_as: str
    divides: bool

    def name(self, number: int) -> str:
        """Return the name of a part in the journal: what it is, in addition to its request."""

    def payload(self, number: int, again: int) -> bytes:
        """Return the JSON to send for a part.

        Args:
            again: earlier answers that did not fit their schema.
        """

    def count(self, body: bytes) -> int:
        """Return how many parts a response has."""

    def join(self, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return one response, without its usage.

        Raises:
            UnjoinableError: it cannot be made.
        """

    def describe(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return what the metadata of the whole result has from that of the parts."""


class RequestParts:
    """The answers to the parts of a request. Thread-safe.

    Args:
        key: of the request.

    Attributes:
        failed: one of them failed for good, and with it the request.
        refused: the engine refused the request for all of them.
    """

    def __init__(self, key: bytes, custom_id: str, form: Form) -> None:
        self.form = form
        self.failed = False
        self.refused = False
        self._key = key
        self._custom_id = custom_id
        self._parts: dict[int, tuple[int, NewResult]] = {}
        self._next = 0
        self._lock = threading.Lock()

    @property
    def begun(self) -> bool:
        """Whether some parts are there, so that only the others are to be asked for."""
        return self.form.divides or bool(self._parts)

    @property
    def complete(self) -> bool:
        """Whether all parts are there."""
        return sum(count for count, _ in self._parts.values()) >= self.form.wanted

    def restore(self, number: int, found: RawResult) -> None:
        """Add a part of an earlier start."""
        metadata = json.loads(found.metadata)
        del metadata["part"]
        status = json.loads(found.status)
        body = bytes(found.body)
        part = NewResult(self._key, self._custom_id, status, metadata, None, body)
        self._parts[number] = (max(1, self.form.count(body)), part)

    def take(self) -> int | None:
        """Return the number of the next part to ask for; None if all are there or asked for."""
        with self._lock:
            number = self._missing()
            self._next = number + 1
            return number if number < self.form.wanted else None

    @property
    def left(self) -> bool:
        """Whether ``take`` will return another number."""
        with self._lock:
            return self._missing() < self.form.wanted

    def _missing(self) -> int:
        number = self._next
        while number in self._parts:
            number += self._parts[number][0]
        return number

    def payload(self, number: int, again: int = 0) -> bytes:
        """Return the JSON to send for a part; see ``Form.payload``."""
        return self.form.payload(number, again)

    def add(self, number: int, result: NewResult) -> NewResult | None:
        """Add the result of one request; return what to record in the journal.

        That is the result of the whole request if it is decided, else the single part. It is None
        for a failure after the first.

        Args:
            number: of the part, or ``WHOLE``.
        """
        with self._lock:
            if result.error is not None:
                return self._fail(number, result)
            count = self.form.count(result.body) if number == WHOLE else 1
            if number == WHOLE and not 0 < count < self.form.wanted:
                return result
            number = max(number, 0)
            self._parts[number] = (count, result)
            if self.failed or not self.complete:
                return part_result(self.form.name(number), result)
        return self.together()

    def _fail(self, number: int, result: NewResult) -> NewResult | None:
        if self.failed:
            return None
        self.failed = True
        if number == WHOLE or result.error is None:
            return result
        which = f"{self.form.noun} {number + 1} of {self.form.wanted}"
        error = {**result.error, "message": f"{which}: {result.error['message']}"}
        return replace(result, error=error)

    def together(self) -> NewResult:
        """Return the result of the request: one response from all parts."""
        parts = [part for _, (_, part) in sorted(self._parts.items())]
        bodies = [parse_json(part.body.decode("utf-8")) for part in parts]
        metadata = _metadata([part.metadata for part in parts])
        metadata[self.form.counted_as] = len(parts)
        metadata |= self.form.describe([part.metadata for part in parts])
        metadata = {name: value for name, value in metadata.items() if value is not None}
        try:
            body = self.form.join(bodies)
        except UnjoinableError as error:
            self.failed = True
            problem = {"code": UNJOINABLE, "message": str(error), "status": parts[0].status}
            return replace(parts[0], metadata=metadata, error=problem, body=b"null")
        usages = [each["usage"] for each in bodies if isinstance(each.get("usage"), dict)]
        if usages:
            body["usage"] = _summed(usages)
        return replace(parts[0], metadata=metadata, body=json.dumps(body).encode())


UNJOINABLE = "parts_not_joined"
"""Code of the error of a request whose parts do not make one response."""


def _summed(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums of all numbers in the usage of several responses."""
    total = dict(usages[0])
    for usage in usages[1:]:
        for name, value in usage.items():
            known = total.get(name)
            if isinstance(value, dict):
                total[name] = _summed([known, value]) if isinstance(known, dict) else value
            elif isinstance(value, int | float):
                total[name] = value + (known if isinstance(known, int | float) else 0)
            else:
                total.setdefault(name, value)
    return total


def _metadata(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the metadata of the whole result: the first part's, with counts and times of all."""
    whole = dict(parts[0])
    for name in ("timestamp", "attempts"):
        whole[name] = max(each[name] for each in parts)
    whole["processing_time"] = round(_seconds_in_flight(parts), 4)
    unfit = sum(each.get("unfit_answers", 0) for each in parts)
    if unfit:
        whole["unfit_answers"] = unfit
    if any("truncated_prompt" in each for each in parts):
        whole["truncated_prompt"] = True
    return whole


def _seconds_in_flight(parts: Sequence[dict[str, Any]]) -> float:
    """Return for how long at least one of the parts was in flight."""
    ends = [(unix_seconds(each["timestamp"]), each["processing_time"]) for each in parts]
    seconds = until = 0.0
    for begin, end in sorted((end - lasted, end) for end, lasted in ends):
        seconds += max(0.0, end - max(begin, until))
        until = max(until, end)
    return seconds
