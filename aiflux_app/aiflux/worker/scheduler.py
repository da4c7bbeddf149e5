"""The scheduler: the requests of a shard that are still to do, in one queue for all engines.

The dispatcher calls ``next`` for a request and an engine that has room for it, and reports the
outcome with one of ``done``, ``retry``, ``put_back`` or ``crashed``. Waiting requests hold neither
a thread nor a slot.
"""

from __future__ import annotations

import heapq
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Any, Protocol

from aiflux.core.batch.prompt_split import Split
from aiflux.core.batch.request import (
    RESPONSES,
    WITH_CHOICES,
    WITHOUT_TEXT,
    LineError,
    Request,
    parse_request,
    request_key,
)
from aiflux.core.runs.journal import JournalReader, RawResult, ResultIndex, part_key
from aiflux.core.runs.plan import Plan, Shard, changed_input, input_rules
from aiflux.engines.base import EngineKind
from aiflux.engines.kinds import engine_kind
from aiflux.util.lines import read_lines
from aiflux.worker.chunks import Chunks
from aiflux.worker.request_parts import RequestParts
from aiflux.worker.samples import Samples

CRASHES_BEFORE_ALONE = 2
# Half of what the reader of a journal has in memory, which reads results in input order.
_WINDOW_BYTES = 1 << 20
_COMPARED_BYTES = 4096


@dataclass(slots=True)
class Task:
    """A request that is being processed.

    Attributes:
        attempts: HTTP exchanges that count as attempts.
        crashes: engine crashes while it was in flight.
        unfit: answers that did not match its schema.
        parts: its parts, if it is answered in parts.
        part: the number of the part that this task asks for, or ``WHOLE``; None before that is
            decided.
        began: monotonic time of the first attempt.
        sent: monotonic time of the latest attempt.
    """

    request: Request
    key: bytes
    payload: bytes
    attempts: int = 0
    crashes: int = 0
    unfit: int = 0
    began: float = 0.0
    sent: float = 0.0
    parts: RequestParts | None = None
    part: int | None = None


class Limit(Protocol):
    """The number of requests an engine processes at once."""

    value: int

    def note(self, work: int, seconds: float, overloaded: bool) -> None:
        """Note a finished exchange."""

    def note_timeout(self) -> None:
        """Note an exchange that timed out."""


@dataclass(eq=False)
class Lane:
    """An engine as the scheduler sees it.

    Attributes:
        index: number of the engine.
        open: it receives requests.
        gone: it will not come back.
        generation: number of starts; each counts one crash at most.
    """

    index: int
    limit: Limit
    in_flight: int = 0
    open: bool = True
    gone: bool = False
    generation: int = 0
    completed: int = field(default=0)


class Scheduler:
    """Hands out requests, the least loaded engine first. Thread-safe.

    Args:
        source: the requests still to do, in input order; read as needed.
        lanes: the engines.
        may_admit: called before a new request is handed out; False ends admission for good.

    Attributes:
        on_change: called when ``next`` or ``is_over`` may return something else than before.
    """

    def __init__(
        self,
        source: Iterator[Task],
        lanes: list[Lane],
        may_admit: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lanes = lanes
        self.on_change: Callable[[], None] = lambda: None
        self._source = source
        self._may_admit = may_admit
        self._clock = clock
        self._lock = threading.Lock()
        self._ready: deque[Task] = deque()
        self._delayed: list[tuple[float, int, Task]] = []
        self._suspects: deque[Task] = deque()
        self._alone: Task | None = None
        self._sequence = 0
        self._exhausted = False
        self._stopped = False
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Number of requests in flight."""
        return self._in_flight

    @property
    def stopped(self) -> bool:
        """Whether admission has ended before all was done."""
        return self._stopped

    def next(self) -> tuple[Task, Lane] | None:
        """Return a request and an engine with room for it; None if there is none now."""
        with self._lock:
            lane = None if self._stopped else self._lane()
            task = None if lane is None else self._take()
            if lane is None or task is None:
                return None
            lane.in_flight += 1
            self._in_flight += 1
            return task, lane

    def is_over(self) -> bool:
        """Return whether ``next`` will never return a request again."""
        with self._lock:
            return self._is_over()

    def wait_seconds(self) -> float | None:
        """Return the seconds until a retry is due; None if none waits."""
        with self._lock:
            if not self._delayed:
                return None
            return max(0.0, self._delayed[0][0] - self._clock()) + 0.001

    def done(self, task: Task, lane: Lane) -> None:
        """The request has its result."""
        with self._lock:
            lane.completed += 1
            self._leave(task, lane)

    def set_aside(self, task: Task, lane: Lane) -> None:
        """The request is not done, but is not to be sent again for now."""
        with self._lock:
            self._leave(task, lane)

    def restore(self, task: Task, *, first: bool = False) -> None:
        """Send a request that was set aside, or the rest of one.

        Args:
            first: before all others.
        """
        with self._lock:
            if first:
                self._ready.appendleft(task)
            else:
                self._ready.append(task)
            self.on_change()

    def retry(self, task: Task, lane: Lane, delay: float) -> None:
        """Try the request again after ``delay`` seconds."""
        with self._lock:
            self._sequence += 1
            heapq.heappush(self._delayed, (self._clock() + delay, self._sequence, task))
            self._leave(task, lane)

    def put_back(self, task: Task, lane: Lane) -> None:
        """The request was not attempted; it goes first again."""
        with self._lock:
            self._ready.appendleft(task)
            self._leave(task, lane)

    def crashed(self, task: Task, lane: Lane) -> None:
        """The engine crashed during the request; after two crashes it is sent alone."""
        with self._lock:
            if task.crashes >= CRASHES_BEFORE_ALONE:
                self._suspects.append(task)
            else:
                self._ready.appendleft(task)
            self._leave(task, lane)

    def close_lane(self, lane: Lane, *, generation: int | None = None, gone: bool = False) -> None:
        """Send the engine no more requests, for now or for good.

        Args:
            generation: the start of the engine that this applies to; a later start is not affected.
        """
        with self._lock:
            if generation is not None and generation != lane.generation:
                return
            lane.open = False
            lane.gone = lane.gone or gone
            self.on_change()

    def open_lane(self, lane: Lane) -> None:
        """The engine is up (again)."""
        with self._lock:
            lane.generation += 1
            lane.open = True
            self.on_change()

    def stop(self) -> None:
        """Hand out no more requests."""
        with self._lock:
            self._stopped = True
            self.on_change()

    def _leave(self, task: Task, lane: Lane) -> None:
        lane.in_flight -= 1
        self._in_flight -= 1
        if self._alone is task:
            self._alone = None
        self.on_change()

    def _is_over(self) -> bool:
        if self._stopped or all(lane.gone for lane in self.lanes):
            return True
        waiting = self._ready or self._delayed or self._suspects
        return self._exhausted and not waiting and self._in_flight == 0

    def _lane(self) -> Lane | None:
        """Return the open engine with the smallest share of its limit in use."""
        best: Lane | None = None
        least = 1.0
        for lane in self.lanes:
            if lane.open:
                load = lane.in_flight / lane.limit.value
                if load < least:
                    best, least = lane, load
        return best

    def _take(self) -> Task | None:
        """Return the next request: retries that are due, new ones, and suspects at the very end."""
        if self._alone is not None:
            return None
        if self._exhausted and not self._has_ready():
            return self._suspect()
        if not self._may_admit():
            self._stopped = True
            return None
        task = self._ready_task() or next(self._source, None)
        self._exhausted = task is None
        return task or self._suspect()

    def _ready_task(self) -> Task | None:
        if self._delayed and self._delayed[0][0] <= self._clock():
            return heapq.heappop(self._delayed)[2]
        return self._ready.popleft() if self._ready else None

    def _has_ready(self) -> bool:
        due = self._delayed and self._delayed[0][0] <= self._clock()
        return bool(self._ready or due)

    def _suspect(self) -> Task | None:
        if self._suspects and self._in_flight == 0 and not self._delayed:
            self._alone = self._suspects.popleft()
        return self._alone


def by_prefix(tasks: Iterator[Task], most_bytes: int = _WINDOW_BYTES) -> Iterator[Task]:
    """Yield tasks so that prompts with a common beginning follow each other.

    An engine computes such a beginning once if its key-value cache still has it. The order is that
    of a sort within a moving window (replacement selection: Knuth, The Art of Computer Programming,
    volume 3, 5.4.1), so the first task need not wait until a window is read.

    Args:
        most_bytes: size of the window, in bytes of payloads.
    """
    window: list[tuple[int, bytes, int, Task]] = []
    size = count = rounds = 0
    last = b""
    while True:
        for task in islice(tasks, 2 if size < most_bytes else 1):
            prompt = _prompt(task.payload)
            count += 1
            # What would precede the latest task waits for the next round.
            heapq.heappush(window, (rounds + (prompt < last), prompt, count, task))
            size += len(task.payload)
        if not window:
            return
        rounds, last, _, task = heapq.heappop(window)
        size -= len(task.payload)
        yield task


def _prompt(payload: bytes) -> bytes:
    """Return the beginning of the prompt in a payload."""
    found = map(payload.find, (b'"messages"', b'"prompt"', b'"input"'))
    start = next((at for at in found if at >= 0), 0)
    return payload[start : start + _COMPARED_BYTES]


class Source:
    """The requests of a shard that are still to do.

    Args:
        index: the results of earlier starts.
        splits: of the requests whose prompts are too long, by the offsets of their lines.

    Attributes:
        left_out: offsets of the lines with requests that are not sent.
        fitting: keys of requests that earlier starts left out, and that fit the context now.
    """

    def __init__(
        self,
        plan: Plan,
        shard: Shard,
        index: ResultIndex,
        reader: JournalReader,
        splits: Mapping[int, Split] = MappingProxyType({}),
    ) -> None:
        self._plan = plan
        self._shard = shard
        self._index = index
        self._reader = reader
        self.splits = splits
        self.left_out: Collection[int] = ()
        self.fitting: set[bytes] = set()
        self._kind = engine_kind(plan.options)
        self._rules = input_rules(self._kind, plan.options)
        self._adapters = {each.name: at for at, each in enumerate(plan.adapters)}

    def count_done(self) -> tuple[int, int, int]:
        """Return how many requests succeeded and failed before, and were left out of the failed."""
        if not self._index.done:
            return 0, 0, 0
        completed = failed = left_out = 0
        for _, _, raw in self._lines():
            key = request_key(raw)
            verdict = self._earlier(key)
            completed += verdict is True
            if verdict is False:
                failed += 1
                found = self._reader.get(key)
                left_out += found is not None and found.left_out
        return completed, failed, left_out

    def tasks(self, model: str) -> Iterator[Task]:
        """Yield the requests of one model that have no result yet, in input order."""
        for number, offset, raw in self._lines():
            key = request_key(raw)
            if self._earlier(key) is None and offset not in self.left_out:
                for task in self._task(number, offset, raw, key, model):
                    self._restore(task)
                    yield task

    def is_done(self, key: bytes) -> bool:
        """Return whether a request has a result of an earlier start."""
        return self._earlier(key) is not None

    def left_out_before(self, model: str) -> Iterator[tuple[int, bytes]]:
        """Yield the line and key of each request of a model that earlier starts left out.

        Only of those that stay left out; the others are still to do.
        """
        for number, offset, raw in self._lines() if self._plan.keeps_left_out else ():
            key = request_key(raw)
            result = self._reader.get(key) if self._earlier(key) is False else None
            if (
                result is not None
                and result.left_out
                and self._is_of(model, self._parse(number, raw))
            ):
                yield offset, key

    def answered(self, model: str, url: str) -> Task | None:
        """Return a request to an endpoint that succeeded in an earlier start, if any."""
        if not self._index.done:
            return None
        for number, offset, raw in self._lines():
            key = request_key(raw)
            found = self._index.find(key)  # other threads use the reader
            if found is not None and not found[2]:
                for task in self._task(number, offset, raw, key, model):
                    if task.request.url == url:
                        return task
        return None

    def _task(self, number: int, offset: int, raw: bytes, key: bytes, model: str) -> Iterator[Task]:
        """Yield a request if it is for the model."""
        plan = self._plan
        served = plan.served(model)
        request = self._parse(number, raw)
        if self._is_of(model, request):
            parameters = plan.options.parameters_of(served)
            body = build_body(request, served, parameters, self._kind, self._adapters)
            name, url = request.custom_id, request.url
            chunks = Chunks.of(key, name, url, body, self.splits.get(offset))
            parts = chunks or Samples.of(key, name, url, body)
            # Of a prompt that is too long, a part shows whether the engine answers at all.
            payload = json.dumps(body).encode() if chunks is None else chunks.payload(0)
            yield Task(request, key, payload, parts=parts)

    def _is_of(self, model: str, request: Request) -> bool:
        one = len(self._plan.models) == 1
        return one or self._kind.same_model(request.model or model, model)

    def _restore(self, task: Task) -> None:
        """Add the parts of earlier starts to a request that is answered in parts."""
        parts = task.parts
        if parts is None or not self._index.done:
            return
        for number in range(parts.form.wanted):
            found = self._reader.get(part_key(task.key, parts.form.name(number)))
            if found is not None:
                parts.restore(number, found)

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        return read_lines(self._plan.input_path, self._shard.start, self._shard.end)

    def _parse(self, number: int, raw: bytes) -> Request:
        model = self._plan.options.model
        try:
            request = parse_request(raw, model, self._rules.accepts)
            if self._rules.replaces(model, request.model):
                body = {name: value for name, value in request.body.items() if name != "model"}
                return request._replace(body=body)
            return request
        except LineError as error:
            change = f"changed while it was processed: line {number} of shard {self._shard.index}"
            raise changed_input(self._plan, f"{change}: {error}") from None

    def _earlier(self, key: bytes) -> bool | None:
        """Return whether the request succeeded before; None if it is still to do."""
        place = self._index.find(key)
        if place is None:
            return None
        if place[2] and self._failed_before_plan(key):
            return None
        return not place[2]

    def _failed_before_plan(self, key: bytes) -> bool:
        """Return whether a request failed before this plan, which sends it again.

        Those that were left out may fit now: the plan decides, or else a worker (see ``fitting``).
        """
        plan, result = self._plan, self._reader.get(key)
        if result is None or not (plan.options.retry_failed or result.left_out):
            return False
        if result.left_out and plan.keeps_left_out and not _context_grew(plan, result):
            return key in self.fitting
        return str(json.loads(result.metadata)["timestamp"]) < self._plan.created


def _context_grew(plan: Plan, result: RawResult) -> bool:
    """Return whether --context-length is longer than when a request was left out."""
    before, now = _CONTEXT.search(result.error), plan.options.context_length
    return before is not None and now is not None and now > int(before[1])


_CONTEXT = re.compile(rb"and the context (\d+)\"")  # see too_long_result

# Names of parameters that differ in /v1/responses.
_IN_RESPONSES = {"max_tokens": "max_output_tokens"}


def build_body(
    request: Request,
    model: str,
    parameters: dict[str, Any],
    kind: EngineKind,
    adapters: Mapping[str, int],
) -> dict[str, Any]:
    """Return the body to send.

    Args:
        model: as the engine serves it; used if the body names none.
        parameters: used where the body lacks them; not for embeddings and scores, which have none.
        kind: kind of the engine, which may adapt the body.
        adapters: the position of each adapter, by its name.
    """
    body = request.body
    edits: dict[str, Any] = {}
    if body.get("model") is None:
        edits["model"] = model
    if body.get("stream"):
        edits["stream"] = False
    if request.url == RESPONSES:
        parameters = {_IN_RESPONSES.get(name, name): value for name, value in parameters.items()}
        if body.get("background"):
            edits["background"] = False  # its answer would not contain the text
    if request.url not in WITHOUT_TEXT:
        edits.update({name: value for name, value in parameters.items() if name not in body})
        if request.url not in WITH_CHOICES:
            edits.pop("n", None)
        if body.get("max_completion_tokens") is not None:
            edits.pop("max_tokens", None)
    adapter = adapters.get(request.model or "")
    if adapter is None:
        edits.update(kind.adapt_body(request.url, body, model))
    if adapters:
        selected = kind.select_adapter(adapter, len(adapters))
        own = body if adapter is None else {}  # a body may have scales of its own
        edits.update({name: value for name, value in selected.items() if name not in own})
    if edits:
        body = {**body, **edits}
        if "stream" in edits:
            body.pop("stream_options", None)
    return body
