"""Requests of a shard that are still to do, with the body for the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from aiflux.core.batch.request import (
    WITHOUT_TEXT,
    LineError,
    Request,
    parse_request,
    request_key,
)
from aiflux.core.runs.journal import JournalReader, ResultIndex
from aiflux.core.runs.plan import Plan, Shard, changed_input
from aiflux.engines.base import EngineKind
from aiflux.engines.kinds import engine_kind
from aiflux.util.lines import read_lines
from aiflux.worker.scheduler import Task


class Source:
    """The requests of a shard that are still to do.

    Args:
        index: the results of earlier starts.
    """

    def __init__(self, plan: Plan, shard: Shard, index: ResultIndex, reader: JournalReader) -> None:
        self._plan = plan
        self._shard = shard
        self._index = index
        self._reader = reader
        self._kind = engine_kind(plan.options)
        self._accepts = self._kind.input_rules.accepts_model

    def count_done(self) -> tuple[int, int]:
        """Return how many requests succeeded and failed in earlier starts."""
        if not self._index.done:
            return 0, 0
        completed = failed = 0
        for _, _, raw in self._lines():
            verdict = self._earlier(request_key(raw))
            completed += verdict is True
            failed += verdict is False
        return completed, failed

    def tasks(self, model: str) -> Iterator[Task]:
        """Yield the requests of one model that have no result yet, in input order."""
        for number, _, raw in self._lines():
            key = request_key(raw)
            if self._earlier(key) is None:
                yield from self._task(number, raw, key, model)

    def answered(self, model: str, url: str) -> Task | None:
        """Return a request to an endpoint that succeeded in an earlier start, if any."""
        if not self._index.done:
            return None
        for number, _, raw in self._lines():
            key = request_key(raw)
            if self._earlier(key) is True:
                for task in self._task(number, raw, key, model):
                    if task.request.url == url:
                        return task
        return None

    def _task(self, number: int, raw: bytes, key: bytes, model: str) -> Iterator[Task]:
        """Yield a request if it is for the model."""
        plan = self._plan
        served = plan.served(model)
        request = self._parse(number, raw)
        if len(plan.models) == 1 or self._kind.same_model(request.model or model, model):
            parameters = plan.options.parameters_of(served)
            yield Task(request, key, build_payload(request, served, parameters, self._kind))

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        return read_lines(self._plan.input_path, self._shard.start, self._shard.end)

    def _parse(self, number: int, raw: bytes) -> Request:
        try:
            return parse_request(raw, self._plan.options.model, self._accepts)
        except LineError as error:
            change = f"changed while it was processed: line {number} of shard {self._shard.index}"
            raise changed_input(self._plan, f"{change}: {error}") from None

    def _earlier(self, key: bytes) -> bool | None:
        """Return whether the request succeeded before; None if it is still to do."""
        place = self._index.find(key)
        if place is None:
            return None
        if place[2] and self._plan.options.retry_failed and self._failed_before_plan(key):
            return None
        return not place[2]

    def _failed_before_plan(self, key: bytes) -> bool:
        result = self._reader.get(key)
        if result is None:
            return False
        return str(json.loads(result.metadata)["timestamp"]) < self._plan.created


def build_payload(
    request: Request, model: str, parameters: dict[str, Any], kind: EngineKind
) -> bytes:
    """Return the JSON to send.

    Args:
        model: as the engine serves it; used if the body names none.
        parameters: used where the body lacks them; not for embeddings, which have none.
        kind: kind of the engine, which may adapt the body.
    """
    body = request.body
    edits: dict[str, Any] = {}
    if body.get("model") is None:
        edits["model"] = model
    if body.get("stream"):
        edits["stream"] = False
    if request.url not in WITHOUT_TEXT:
        edits.update({name: value for name, value in parameters.items() if name not in body})
        if body.get("max_completion_tokens") is not None:
            edits.pop("max_tokens", None)
    edits.update(kind.adapt_body(request.url, body, model))
    if edits:
        body = {**body, **edits}
        if "stream" in edits:
            body.pop("stream_options", None)
    return json.dumps(body).encode()
