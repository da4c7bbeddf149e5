"""Several answers to one request (``n``): asked for one by one, and put together into one response.

Many engines ignore ``n``, or refuse it in part. The worker then sends a request for each answer,
with a seed of its own. The journal keeps each answer (``sample_result``), so that a resumed run
asks only for those that are missing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aiflux.core.batch.request import answers_wanted, parse_json
from aiflux.core.runs.journal import NewResult, RawResult, sample_result
from aiflux.util.times import unix_seconds

WHOLE = -1
"""Instead of the number of an answer: the request for all of them."""
_SEEDS = 1 << 31  # what every engine accepts


class Samples:
    """The answers to a request that asks for several. Thread-safe.

    Args:
        key: of the request.
        body: as it is sent, with ``n``.

    Attributes:
        wanted: number of answers.
        failed: one of them failed for good, and with it the request.
        refused: the engine refused the request for all of them.
    """

    def __init__(self, key: bytes, custom_id: str, wanted: int, body: Mapping[str, Any]) -> None:
        self.wanted = wanted
        self.failed = False
        self.refused = False
        self._key = key
        self._custom_id = custom_id
        self._body = {name: value for name, value in body.items() if name != "n"}
        self._prompts = _prompts(body)
        self._parts: dict[int, tuple[int, NewResult]] = {}
        self._next = 0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, key: bytes, custom_id: str, url: str, body: Mapping[str, Any]) -> Samples | None:
        """Return the answers to a request; None if it asks for one."""
        wanted = answers_wanted(url, body)
        return cls(key, custom_id, wanted, body) if wanted > 1 else None

    @property
    def begun(self) -> bool:
        """Whether some answers are there, so that only the others are to be asked for."""
        return bool(self._parts)

    @property
    def complete(self) -> bool:
        """Whether all answers are there."""
        return sum(count for count, _ in self._parts.values()) >= self.wanted

    def restore(self, number: int, found: RawResult) -> None:
        """Add an answer of an earlier start."""
        metadata = json.loads(found.metadata)
        del metadata["sample"]
        status = json.loads(found.status)
        body = bytes(found.body)
        part = NewResult(self._key, self._custom_id, status, metadata, None, body)
        self._parts[number] = (max(1, self._answers(body)), part)

    def take(self) -> int | None:
        """Return the number of the next answer to ask for; None if all are there or asked for."""
        with self._lock:
            number = self._missing()
            self._next = number + 1
            return number if number < self.wanted else None

    @property
    def left(self) -> bool:
        """Whether ``take`` will return another number."""
        with self._lock:
            return self._missing() < self.wanted

    def _missing(self) -> int:
        number = self._next
        while number in self._parts:
            number += self._parts[number][0]
        return number

    def payload(self, number: int, again: int = 0) -> bytes:
        """Return the JSON to send for one answer.

        The seed is the request's plus the number of the answer, as in vLLM. Without one, it follows
        from the request: an engine whose default is a fixed seed would repeat one answer.

        Args:
            again: earlier answers that did not fit their schema; the next needs another seed.
        """
        seed = self._body.get("seed")
        if seed is None:
            seed = int.from_bytes(self._key[:4], "big") % _SEEDS
        if type(seed) is int and seed >= 0:  # others mean a random seed, or are the engine's matter
            further = seed + number + again * self.wanted
            seed = further % _SEEDS if seed < _SEEDS else further
        return json.dumps({**self._body, "seed": seed}).encode()

    def add(self, number: int, result: NewResult) -> NewResult | None:
        """Add the result of one request; return what to record in the journal.

        That is the result of the whole request if it is decided, else the single answer. It is None
        for a failure after the first.

        Args:
            number: of the answer, or ``WHOLE``.
        """
        with self._lock:
            if result.error is not None:
                return self._fail(number, result)
            answers = self._answers(result.body) if number == WHOLE else 1
            if number == WHOLE and not 0 < answers < self.wanted:
                return result
            number = max(number, 0)
            self._parts[number] = (answers, result)
            if self.failed or not self.complete:
                return sample_result(number, result)
        return self.together()

    def _fail(self, number: int, result: NewResult) -> NewResult | None:
        if self.failed:
            return None
        self.failed = True
        if number == WHOLE or result.error is None:
            return result
        which = f"answer {number + 1} of {self.wanted}"
        error = {**result.error, "message": f"{which}: {result.error['message']}"}
        return replace(result, error=error)

    def together(self) -> NewResult:
        """Return the result of the request: one response with all answers."""
        parts = [part for _, (_, part) in sorted(self._parts.items())]
        bodies = [parse_json(part.body.decode("utf-8")) for part in parts]
        choices = self._in_order([body["choices"] for body in bodies])
        body = {**bodies[0], "choices": choices}
        usages = [each["usage"] for each in bodies if isinstance(each.get("usage"), dict)]
        if usages:
            body["usage"] = _summed(usages)
        metadata = _metadata([part.metadata for part in parts])
        return replace(parts[0], metadata=metadata, body=json.dumps(body).encode())

    def _answers(self, body: bytes) -> int:
        """Return how many answers to each prompt a response has."""
        return len(parse_json(body.decode("utf-8")).get("choices") or ()) // self._prompts

    def _in_order(self, parts: Sequence[list[Any]]) -> list[Any]:
        """Return the choices as an engine orders them: all answers to one prompt, then the next."""
        each = [max(1, len(part) // self._prompts) for part in parts]
        found = []
        for prompt in range(self._prompts):
            answers = [
                choice
                for part, count in zip(parts, each, strict=True)
                for choice in part[prompt * count : (prompt + 1) * count]
            ]
            found += answers[: self.wanted]
        return [
            {**choice, "index": at} if isinstance(choice, dict) else choice
            for at, choice in enumerate(found)
        ]


def _prompts(body: Mapping[str, Any]) -> int:
    """Return the number of prompts of a request; a list of tokens is one."""
    prompt = body.get("prompt")
    if "messages" in body or not isinstance(prompt, list):
        return 1
    return 1 if all(type(token) is int for token in prompt) else len(prompt)


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
    """Return the metadata of the whole result: the first answer's, with counts and times of all."""
    whole = {**parts[0], "samples": len(parts)}
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
    """Return for how long at least one of the answers was in flight."""
    ends = [(unix_seconds(each["timestamp"]), each["processing_time"]) for each in parts]
    seconds = until = 0.0
    for begin, end in sorted((end - lasted, end) for end, lasted in ends):
        seconds += max(0.0, end - max(begin, until))
        until = max(until, end)
    return seconds
