"""The dispatcher: keeps the slots of all engines busy, with retries and backoff.

One thread runs an event loop. It sends requests on open connections, and receives and records
answers, as long as nothing makes it wait. Everything that may wait is left to helper threads: the
first request on a connection, answers of an unusual form, failures, and checks against a schema.
A thread for each request in flight would take several times the CPU time, as threads of Python
take turns.
"""

from __future__ import annotations

import os
import select
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType, MappingProxyType
from typing import Any

from tenacity import RetryCallState, Retrying, stop_after_attempt, wait_random_exponential

from aiflux.core.batch.request import RESPONSES, load_json
from aiflux.core.batch.schema import requested_format
from aiflux.core.runs.journal import CUT, EMPTY, JournalWriter, NewResult
from aiflux.engines.base import Engine
from aiflux.engines.http import Answer, Client, ExchangeError, PendingExchange
from aiflux.engines.outcome import (
    ABORTED_ANSWER,
    UNREADY_STATUSES,
    UNTOUCHED,
    Kind,
    Outcome,
    as_down,
    judge_answer,
    judge_bug,
    judge_exchange_error,
)
from aiflux.errors import AifluxError, RejectedError, StoppedError, StorageError
from aiflux.util.process_limits import SPARE_BYTES, THREAD_BYTES, exhausted, start_thread
from aiflux.util.times import utc_now
from aiflux.worker.outage import (
    ENOUGH,
    POLL_SECONDS,
    Held,
    OutageProbe,
    OutageWatch,
    Rejections,
    certain,
    is_common,
    may_pass,
)
from aiflux.worker.request_parts import WHOLE, RequestParts
from aiflux.worker.scheduler import CRASHES_BEFORE_ALONE, Lane, Scheduler, Task
from aiflux.worker.stats import Stats
from aiflux.worker.validation import Checking

# Statuses with which servers refuse ``n``; older builds of llama-server answer with 500.
_REFUSES_N = frozenset({400, 422, 500, 501})


class Helpers:
    """Threads for work that may wait: one more is started if all others are busy.

    Args:
        guard: runs the work, and handles its exceptions.
        on_idle: called when all work is done.
    """

    def __init__(
        self, guard: Callable[[Callable[[], None]], None], on_idle: Callable[[], None]
    ) -> None:
        self.threads: list[threading.Thread] = []
        self._guard = guard
        self._on_idle = on_idle
        self._work: deque[Callable[[], None]] = deque()
        self._idle = 0
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, work: Callable[[], None]) -> None:
        """Do some work in a thread.

        Raises:
            StoppedError: no thread can be started. The work is done later, unless there is none.
        """
        with self._changed:
            self._work.append(work)
            if self._idle >= len(self._work):
                self._changed.notify()
                return
            name = f"request-{len(self.threads)}"
            spare = SPARE_BYTES if self.threads else THREAD_BYTES
        try:
            self.threads.append(start_thread(self._run, name, spare=spare))
        except StoppedError:
            if not self.threads:  # else ``busy`` would wait for it
                self._work.clear()
            raise

    def busy(self) -> bool:
        """Return whether any work is not done yet."""
        with self._changed:
            return bool(self._work) or self._idle < len(self.threads)

    def close(self) -> None:
        """Let the threads end when all work is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                if not self._work:
                    self._on_idle()
                self._changed.wait_for(lambda: self._work or self._closed)
                self._idle -= 1
                if not self._work:
                    return
                work = self._work.popleft()
            self._guard(work)


class Wakeup:
    """Ends the waiting of an event loop from any thread."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._loop = 0
        self._lock = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[int]:
        """Yield a descriptor that is readable after a call; for the thread that waits."""
        with self._lock:
            self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._loop = threading.get_ident()
        try:
            yield self._descriptor
        finally:
            with self._lock:
                os.close(self._descriptor)
                self._descriptor, self._loop = -1, 0

    def __call__(self) -> None:
        """Wake the loop; does nothing in the thread of the loop, which is not waiting."""
        if threading.get_ident() != self._loop:
            with self._lock:
                if self._descriptor >= 0:
                    os.eventfd_write(self._descriptor, 1)


@dataclass(slots=True)
class Attempt:
    """One exchange for one request.

    Attributes:
        client, generation: of the engine and its lane when the exchange began; a restart of the
            engine changes them.
        seconds: how long the exchange took.
    """

    task: Task
    lane: Lane
    link: Engine
    client: Client
    generation: int
    began: float = 0.0
    seconds: float = 0.0


def _outcome(attempt: Attempt, exchange: Callable[[], Answer]) -> Outcome:
    task, crash_code = attempt.task, attempt.link.kind.crash_code
    url = task.request.url
    try:
        answer = exchange()
    except ExchangeError as error:
        return judge_exchange_error(error)
    # The run can add a limit of tokens to a body.
    body = load_json(task.payload) if url == RESPONSES else task.request.body
    verdict = judge_answer(url, body, answer, crash_code)
    if not verdict.generated:
        # Answers are stored byte for byte; in errors the key is masked.
        verdict = judge_answer(url, body, attempt.client.hidden(answer), crash_code)
    return verdict


class Pool:
    """Sends the requests that the scheduler hands out and journals the results.

    Args:
        served: the model's name as the engines serve it.
        on_down: called with a lane and its generation when its engine is found to be down.
        checking: checks answers against the schemas in the requests.
        rejections: holds back rejections that may concern every request.
        outages: detects that no request is answered any more.
        patience: seconds to wait for an engine to answer requests again.
        most: limit on the requests in flight, from the limit on open files.
        adapter_digests: of the adapters by their names.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        engines: Sequence[Engine],
        journal: JournalWriter,
        policy: RetryPolicy,
        stats: Stats,
        served: str,
        on_down: Callable[[Lane, int], None],
        timeouts_before_restart: int = 3,
        checking: Checking | None = None,
        rejections: Rejections | None = None,
        outages: OutageWatch | None = None,
        patience: float = 0.0,
        most: int = 1 << 20,
        adapter_digests: Mapping[str, str] = MappingProxyType({}),
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._scheduler = scheduler
        self._links = {engine.index: engine for engine in engines}
        self._managed = any(engine.kind.managed for engine in engines)
        self._journal = journal
        self._policy = policy
        self._stats = stats
        self._served = served
        self._on_down = on_down
        self._timeouts_before_restart = timeouts_before_restart
        self._checking = checking
        self._rejections = rejections or Rejections()
        self._outages = outages or OutageWatch()
        self._probe = OutageProbe(
            scheduler, self._outages, self._rejections,
            exchange=self._probe_with,
            engine=lambda lane: self._links[lane.index],
            served=served,
            record=self._record_held,
            on_down=on_down,
            patience=patience,
            say=say,
        )  # fmt: skip
        self._timeouts = dict.fromkeys(self._links, 0)
        self._most = most
        self._adapter_digests = adapter_digests
        self._say = say
        self._why = "open files (ulimit -n)"
        self._limited = False
        self._threads: list[threading.Thread] = []
        self._flying: dict[int, tuple[Attempt, PendingExchange]] = {}
        self._wakeup = Wakeup()
        self._helpers = Helpers(self._guard, on_idle=self._wakeup)
        scheduler.on_change = self._wakeup
        self._bugs: set[tuple[CodeType, int]] = set()
        self._one_each: set[str] = set()  # endpoints of servers that turned out to ignore n
        self._lock = threading.Lock()
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Send as many requests as the engines' current limits allow."""
        wanted = sum(lane.limit.value for lane in self._scheduler.lanes if not lane.gone)
        if wanted > self._most:
            self._report_limit()
        with self._lock:
            if not self._threads:
                self._helpers = Helpers(self._guard, on_idle=self._wakeup)
                self._threads = [start_thread(self._work, "requests")]
        self._wakeup()

    def _report_limit(self) -> None:
        if not self._limited:
            self._limited = True
            self._say(f"requests in flight: at most {self._most}, by the limit on {self._why}")

    def join(self, tick: Callable[[], None], interval: float = 0.1) -> None:
        """Wait until all threads have ended; call ``tick`` meanwhile.

        Raises:
            AifluxError: the error that ended the pool early.
        """
        self._wait(tick, interval)
        while self._rejections.urls and not self._is_over():
            decide = partial(self._guard, self._decide_all)
            self._threads = [start_thread(decide, "rejections")]
            self._wait(tick, interval)
            # Requests that failed in an outage are sent again.
            self._threads = []
            if not self._is_over():
                self.start()
            self._wait(tick, interval)

    def _wait(self, tick: Callable[[], None], interval: float) -> None:
        while alive := [each for each in self._all_threads() if each.is_alive()]:
            alive[0].join(interval)
            tick()
        if self.failure is not None:
            raise self.failure

    def _all_threads(self) -> list[threading.Thread]:
        return [*self._threads, *self._helpers.threads]

    def _is_over(self) -> bool:
        return self._scheduler.stopped or all(lane.gone for lane in self._scheduler.lanes)

    def fail(self, failure: BaseException) -> None:
        """End the pool with an error."""
        with self._lock:
            if self.failure is None:
                self.failure = failure
        self._scheduler.stop()

    def _work(self) -> None:
        try:
            self._guard(self._loop)
        finally:
            self._helpers.close()

    def _loop(self) -> None:
        """Send requests and receive answers until all are done."""
        ready = select.poll()  # unlike epoll, it needs no file, of which few may be allowed
        with self._wakeup.open() as woken:
            ready.register(woken, select.POLLIN)
            while True:
                self._guard(partial(self._send, ready))
                if self._is_done():
                    return
                seconds = self._scheduler.wait_seconds()
                for descriptor, _ in ready.poll(None if seconds is None else 1000 * seconds):
                    if descriptor == woken:
                        os.eventfd_read(woken)
                    else:
                        self._guard(partial(self._receive, ready, descriptor))
                        # The engine need not wait until all other answers are recorded.
                        self._guard(partial(self._send, ready))

    def _is_done(self) -> bool:
        # A helper may put requests back, so whether it is busy comes first.
        return not self._flying and not self._helpers.busy() and self._scheduler.is_over()

    def _send(self, ready: select.poll) -> None:
        """Send the requests for which there is room."""
        while self._scheduler.in_flight < self._most:
            job = self._scheduler.next()
            if job is None:
                return
            task, lane = job
            found = task if task.parts is None else self._part(task, task.parts, lane)
            if found is not None:
                self._begin(found, lane, ready)

    def _begin(self, task: Task, lane: Lane, ready: select.poll) -> None:
        attempt = self._attempt(task, lane)
        exchange = attempt.client.begin(task.request.url, task.payload)
        if exchange is None:
            self._help(partial(self._make, task, lane))
        elif exchange.stuck:
            self._help(partial(self._finish, attempt, exchange))
        else:
            self._flying[exchange.fileno()] = attempt, exchange
            ready.register(exchange.fileno(), select.POLLIN)

    def _receive(self, ready: select.poll, descriptor: int) -> None:
        """Receive what has arrived of an answer, and record the answer once it is complete."""
        attempt, exchange = self._flying[descriptor]
        if not exchange.receive():
            return
        ready.unregister(descriptor)
        del self._flying[descriptor]
        if not exchange.complete:
            self._help(partial(self._finish, attempt, exchange))
            return
        verdict = self._judge(attempt, partial(attempt.client.finish, exchange))
        wanted = None if self._checking is None else requested_format(attempt.task.request.body)
        if verdict.kind is Kind.ANSWERED and wanted is None:
            self._end(attempt, verdict)
        else:
            self._help(partial(self._end, attempt, verdict))

    def _help(self, work: Callable[[], None]) -> None:
        """Let a thread do what may wait. Without another thread, it waits for one of the others."""
        try:
            self._helpers.submit(work)
        except StoppedError:
            if not self._helpers.threads:
                raise
            self._most = len(self._helpers.threads) + len(self._flying)
            self._why = "threads (ulimit -u, ulimit -v)"
            self._report_limit()

    def _part(self, task: Task, parts: RequestParts, lane: Lane) -> Task | None:
        """Return what to send for a request that is answered in parts; None for nothing.

        The rest of the request is handed out again, so that its parts are in flight side by side.
        """
        if parts.failed:
            self._scheduler.set_aside(task, lane)
            return None
        if task.part is not None:  # it is sent again
            return task
        one_each = self._links[lane.index].generates_n is False
        one_each = one_each or task.request.url in self._one_each
        if not (one_each or parts.begun or parts.refused):
            task.part = WHOLE
            return task
        number = parts.take()
        if number is None:  # an earlier start asked for all of them, and for more
            self._record_together(task, parts.together(), Outcome(Kind.ANSWERED))
            self._scheduler.done(task, lane)
            return None
        if parts.left:
            self._scheduler.restore(task, first=True)
        return Task(task.request, task.key, parts.payload(number), parts=parts, part=number)

    def _guard(self, work: Callable[[], None]) -> None:
        """Run a thread's work; an exception in it ends the pool."""
        try:
            work()
        except (AifluxError, MemoryError) as failure:
            self.fail(failure)
        except BaseException as failure:
            self.fail(failure)
            # `join` raises it with its remedy; traces of threads are only for bugs.
            if not isinstance(failure, Exception) or exhausted(failure) is None:
                raise

    def _attempt(self, task: Task, lane: Lane) -> Attempt:
        began = time.monotonic()
        task.sent = began
        if not task.began:
            task.began = began
        link = self._links[lane.index]
        return Attempt(task, lane, link, link.client, lane.generation, began)

    def _make(self, task: Task, lane: Lane) -> None:
        """Make an attempt on a connection of its own."""
        attempt = self._attempt(task, lane)
        post = partial(attempt.client.post, task.request.url, task.payload)
        self._end(attempt, self._judge(attempt, post))

    def _finish(self, attempt: Attempt, exchange: PendingExchange) -> None:
        """Wait for the answer of an attempt."""
        self._end(attempt, self._judge(attempt, partial(attempt.client.finish, exchange)))

    def _judge(self, attempt: Attempt, exchange: Callable[[], Answer]) -> Outcome:
        """Return the outcome of an exchange, and note how long it took."""
        try:
            outcome = self._guarded(partial(_outcome, attempt, exchange))
        finally:
            attempt.seconds = time.monotonic() - attempt.began
        return outcome

    def _guarded(self, judge: Callable[[], Outcome]) -> Outcome:
        """Return an outcome; a bug fails the request, not the run."""
        try:
            return judge()
        except AifluxError:
            raise
        except Exception as error:
            stop = None if isinstance(error, MemoryError) else exhausted(error)
            if stop is not None:
                raise stop from error
            return self._judge_bug(error)

    def _end(self, attempt: Attempt, verdict: Outcome) -> None:
        """Act on the outcome of an attempt; waits, unless the request has a valid answer."""
        task, lane, link, generation = attempt.task, attempt.lane, attempt.link, attempt.generation
        seconds = attempt.seconds  # excludes the time of the schema check
        if self._checking is not None:
            verdict = self._guarded(partial(self._checking.judge, task.request, verdict))
        if verdict.status in UNREADY_STATUSES and self._is_down(lane, link.is_ready, generation):
            verdict = as_down(verdict)
        self._stats.attempt_ended(seconds, verdict)
        self._adapt(lane, verdict, seconds)
        self._settle(task, lane, link, generation, verdict, seconds)

    def _judge_bug(self, error: Exception) -> Outcome:
        """Print a bug's traceback, once for each place in the code."""
        place = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        with self._lock:
            known = place[-1] in self._bugs
            self._bugs.add(place[-1])
        if not known:
            traceback.print_exception(error)
        return judge_bug(error)

    def _probe_with(self, task: Task, lane: Lane) -> Outcome:
        link = self._links[lane.index]
        attempt = Attempt(task, lane, link, link.client, lane.generation)
        return _outcome(attempt, partial(attempt.client.post, task.request.url, task.payload))

    def _adapt(self, lane: Lane, verdict: Outcome, seconds: float) -> None:
        before = lane.limit.value
        if verdict.generated or verdict.overloaded:
            lane.limit.note(verdict.work, seconds, verdict.overloaded)
        elif verdict.code == "timeout":
            lane.limit.note_timeout()
        if lane.limit.value > before:
            self.start()

    def _settle(
        self,
        task: Task,
        lane: Lane,
        link: Engine,
        generation: int,
        verdict: Outcome,
        seconds: float,
    ) -> None:
        kind = verdict.kind
        common = is_common(verdict)
        if verdict.generated:
            self._outages.note_answer(lane.index, task)
        if common and self._probe.ended(lane, generation):
            # It failed in an outage that another request has noticed.
            self._scheduler.put_back(task, lane)
        elif kind is Kind.ANSWERED or kind is Kind.FAILED:
            self._timeouts[lane.index] = 0
            task.attempts += 1
            self._conclude(task, lane, link, verdict, seconds)
        elif kind is Kind.UNFIT:
            self._ask_again(task, lane, verdict, seconds)
        elif kind is Kind.UNATTEMPTED or self._ending(verdict):
            self._scheduler.put_back(task, lane)
        elif kind is Kind.CRASHED or (
            verdict.code == "connection" and self._is_down(lane, link.is_alive, generation)
        ):
            self._crashed(task, lane, generation, verdict, seconds)
        else:
            self._watch_timeouts(lane, generation, verdict)
            self._retry(task, lane, link, verdict, seconds)
        if common and lane.generation == generation:
            due = self._outages.note_failure(lane.index, task)
            if due and self._is_outage(task.request.url, verdict):
                self._probe.run(lane, generation, task.request.url)

    def _is_outage(self, url: str, verdict: Outcome) -> bool:
        """Return whether failures in a row may be due to an outage, which a probe decides.

        An engine of ours that never answered a request has no outage: waiting would not help.
        """
        temporary = may_pass(verdict) and not self._managed
        return temporary or self._outages.answered(url) is not None

    def _conclude(
        self, task: Task, lane: Lane, link: Engine, verdict: Outcome, seconds: float
    ) -> None:
        """Record a result, unless it is a rejection that concerns or may concern every request."""
        url, model = task.request.url, task.request.model or self._served
        error = certain(link.client.base_url, url, verdict)
        if error is not None:
            self._scheduler.put_back(task, lane)
            raise error
        if self._may_refuse_n(task, link, verdict):
            self._ask_one_by_one(task, lane)
            return
        if is_common(verdict) or self._rejections.is_of_the_model(
            url, verdict, offered=link.offers(model)
        ):
            waiting = self._rejections.hold(Held(task, lane, verdict, seconds))
            self._scheduler.set_aside(task, lane)
            if waiting == 1 or waiting >= ENOUGH:
                self._raise_conclusion(url, enough=waiting >= ENOUGH)
            if waiting >= ENOUGH and not self._is_outage(url, verdict):
                self._record_held(url)
            return
        self._record(task, lane, verdict, seconds)
        if verdict.kind is Kind.ANSWERED:
            for held in self._rejections.answered(url, task.sent):
                self._store(held.task, held.lane, held.verdict, held.seconds)

    def _may_refuse_n(self, task: Task, link: Engine, verdict: Outcome) -> bool:
        """Return whether a server may have failed a request because it asks for several answers."""
        return task.part == WHOLE and link.generates_n is None and verdict.status in _REFUSES_N

    def _ask_one_by_one(self, task: Task, lane: Lane) -> None:
        if task.parts is not None:
            task.parts.refused = True
        self._ask_for_rest(task)
        self._scheduler.set_aside(task, lane)

    def _raise_conclusion(self, url: str, *, enough: bool) -> None:
        """Raise an error if the rejections at an endpoint concern every request.

        Args:
            enough: enough were rejected in a row to rule out a coincidence.
        """
        last = self._rejections.last(url)
        if last is None or self._rejections.is_answered(url):
            return
        # The engine's own list is certain, so it is asked before the count decides: the query that
        # the first rejection started may still be running in another thread.
        if last.verdict.foreign or last.verdict.kind is Kind.FAILED:
            link = self._links[last.lane.index]
            self._raise_refusal(link, last.task.request.model or self._served)
        error = self._rejections.conclusion(url, managed=self._managed) if enough else None
        if error is not None:
            raise error

    def _decide_all(self) -> None:
        """At the end, record the failures that are held back, unless an outage caused them."""
        for url in self._rejections.urls:
            self._raise_conclusion(url, enough=True)
            last = self._rejections.last(url)
            if last is None:
                continue
            if not self._is_outage(url, last.verdict):
                self._record_held(url)
            elif last.lane.open:
                self._probe.run(last.lane, last.lane.generation, url)
            else:  # its engine is being started again
                time.sleep(POLL_SECONDS)

    def _record_held(self, url: str) -> None:
        for held in self._rejections.take(url):
            self._store(held.task, held.lane, held.verdict, held.seconds)

    def _raise_refusal(self, link: Engine, model: str) -> None:
        error = link.refusal(model)
        if error is not None:
            raise error

    def _is_down(self, lane: Lane, alive: Callable[[], bool], generation: int) -> bool:
        def is_another() -> bool:
            stopped = not lane.open or lane.generation != generation
            return stopped and not self._probe.ended(lane, generation)

        # The engine may have been restarted while this check was running.
        return is_another() or not alive() or is_another()

    def _ending(self, verdict: Outcome) -> bool:
        """After a signal a broken connection or answer means that the request was not attempted."""
        broken = ("connection", "refused", ABORTED_ANSWER)
        return self._scheduler.stopped and verdict.code in broken

    def _retry(
        self, task: Task, lane: Lane, link: Engine, verdict: Outcome, seconds: float
    ) -> None:
        task.attempts += 1
        delay = self._policy.next_delay(task.attempts, verdict.retry_after)
        if delay is None:
            self._conclude(task, lane, link, verdict, seconds)
        else:
            self._stats.retried()
            self._scheduler.retry(task, lane, delay)

    def _ask_again(self, task: Task, lane: Lane, verdict: Outcome, seconds: float) -> None:
        """Send a request again whose answer does not match its schema, up to a few times."""
        self._timeouts[lane.index] = 0
        task.attempts += 1
        task.unfit += 1
        if self._checking is None or task.unfit > self._checking.attempts:
            self._record(task, lane, verdict, seconds)
        else:
            self._stats.asked_again(verdict)
            if task.parts is not None and task.part not in (None, WHOLE):
                task.payload = task.parts.payload(task.part, task.unfit)
            self._scheduler.retry(task, lane, 0.0)

    def _crashed(
        self,
        task: Task,
        lane: Lane,
        generation: int,
        verdict: Outcome,
        seconds: float,
    ) -> None:
        """The engine crashed: that counts against the request only if it happens repeatedly."""
        self._scheduler.close_lane(lane, generation=generation)
        if verdict.code in UNTOUCHED:
            self._scheduler.put_back(task, lane)
        else:
            task.crashes += 1
            if task.crashes > CRASHES_BEFORE_ALONE:
                task.attempts += 1
                message = f"the engine crashed {task.crashes} times while it processed this request"
                failed = Outcome(
                    Kind.FAILED, "engine_crashed", f"{message}: {verdict.message}", verdict.status
                )
                self._record(task, lane, failed, seconds)
            else:
                self._scheduler.crashed(task, lane)
        self._on_down(lane, generation)

    def _watch_timeouts(self, lane: Lane, generation: int, verdict: Outcome) -> None:
        """Several timeouts in a row mean that the engine hangs."""
        if verdict.code != "timeout":
            self._timeouts[lane.index] = 0
            return
        self._timeouts[lane.index] += 1
        if self._timeouts[lane.index] >= max(self._timeouts_before_restart, lane.limit.value):
            self._timeouts[lane.index] = 0
            self._scheduler.close_lane(lane, generation=generation)
            self._on_down(lane, generation)

    def _record(self, task: Task, lane: Lane, verdict: Outcome, seconds: float) -> None:
        try:
            self._store(task, lane, verdict, seconds)
        except (StorageError, RejectedError):
            self._scheduler.put_back(task, lane)
            raise
        self._scheduler.done(task, lane)

    def _store(self, task: Task, lane: Lane, verdict: Outcome, seconds: float) -> None:
        failed = verdict.kind is not Kind.ANSWERED
        result = NewResult(
            key=task.key,
            custom_id=task.request.custom_id,
            status=verdict.status,
            metadata=self._metadata(task, lane, verdict, seconds),
            error=verdict.error if failed else None,
            body=verdict.body,
        )
        if task.parts is not None:
            self._store_part(task, task.parts, verdict, result)
            return
        self._journal.append(result)
        self._stats.recorded(verdict, task.request.custom_id)

    def _store_part(
        self, task: Task, parts: RequestParts, verdict: Outcome, result: NewResult
    ) -> None:
        """Record one of several parts, or the result of their request if it is decided."""
        number = WHOLE if task.part is None else task.part
        found = parts.add(number, result)
        if found is not None and found.key == task.key:
            self._record_together(task, found, verdict)
        else:
            if found is not None:
                self._journal.append(found)
            self._stats.part_recorded(verdict)
            if number == WHOLE:
                self._ask_for_rest(task)
        # It refused the request for all answers, or gave fewer of them.
        ignored = number == WHOLE and parts.begun
        if result.error is None and (parts.refused or ignored):
            self._one_each.add(task.request.url)

    def _record_together(self, task: Task, result: NewResult, last: Outcome) -> None:
        """Record the result of a request that was answered in parts.

        Args:
            last: the outcome of its last part.
        """
        self._journal.append(result)
        whole = replace(last, empty=result.metadata.get(EMPTY))
        if result.error is not None and last.kind is Kind.ANSWERED:
            code, message = result.error["code"], result.error["message"]
            whole = replace(last, kind=Kind.FAILED, code=code, message=message)
        self._stats.recorded(whole, task.request.custom_id)

    def _ask_for_rest(self, task: Task) -> None:
        """Ask for the missing parts one by one."""
        rest = Task(task.request, task.key, task.payload, parts=task.parts)
        self._scheduler.restore(rest, first=True)

    def _metadata(self, task: Task, lane: Lane, verdict: Outcome, seconds: float) -> dict[str, Any]:
        asked = task.request.model or self._served
        model = self._links[lane.index].ran(asked, verdict.model)
        metadata: dict[str, Any] = {
            "model": model,
            "timestamp": utc_now(),
            "processing_time": round(seconds, 4),
            "attempts": task.attempts,
            "engine": lane.index,
        }
        digest = self._links[lane.index].model_digest()
        if digest is not None:
            metadata["model_digest"] = digest
        if asked in self._adapter_digests:
            metadata["adapter_digest"] = self._adapter_digests[asked]
        if model != asked:
            metadata["requested_model"] = asked
        if task.unfit:
            metadata["unfit_answers"] = task.unfit
        if verdict.empty is not None:
            metadata[EMPTY] = verdict.empty
        if verdict.finish_reason in CUT:
            metadata[CUT[verdict.finish_reason]] = True
        if verdict.prompt_tokens and self._links[lane.index].was_truncated(verdict.prompt_tokens):
            metadata["truncated_prompt"] = True
        return metadata


MAX_DELAY = 60.0
MAX_RETRY_AFTER = 600.0


class RetryPolicy:
    """Decides whether and when a request is sent again.

    The pool does the waiting itself, because a waiting request must not hold a slot; so tenacity's
    stop and wait strategies are called directly, without its loop.

    Args:
        max_retries: attempts after the first.
        delay: upper bound of the first wait, in seconds; doubles with every attempt, up to 60.
    """

    def __init__(self, max_retries: int, delay: float) -> None:
        self._stop = stop_after_attempt(max_retries + 1)
        self._wait = wait_random_exponential(multiplier=delay, max=MAX_DELAY)
        self._retrying = Retrying(stop=self._stop, wait=self._wait)

    def next_delay(self, attempts: int, retry_after: float | None) -> float | None:
        """Return the seconds to wait before the next attempt; None for no further attempt.

        Args:
            attempts: attempts made so far.
            retry_after: the server's Retry-After in seconds, a lower bound of the wait.
        """
        state = RetryCallState(self._retrying, None, (), {})
        state.attempt_number = attempts
        if self._stop(state):
            return None
        return max(float(self._wait(state)), min(retry_after or 0.0, MAX_RETRY_AFTER))
