"""The pool: threads that keep every engine's slots full until every request has its result."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Protocol

from aiflux.core.clock import utc_now
from aiflux.core.journal import JournalWriter, Result
from aiflux.errors import AifluxError, StorageError
from aiflux.worker.checking import Checking
from aiflux.worker.client import Client, ExchangeError
from aiflux.worker.retry import RetryPolicy
from aiflux.worker.scheduler import CRASHES_BEFORE_ALONE, Lane, Scheduler, Task
from aiflux.worker.stats import Stats
from aiflux.worker.verdict import (
    UNTOUCHED,
    Kind,
    Verdict,
    judge_answer,
    judge_bug,
    judge_exchange_error,
)


@dataclass(frozen=True)
class Describe:
    """What stands in every result's metadata beside what the attempt itself tells.

    Attributes:
        model: the model's name as the engine serves it.
        fixed: fields such as ``model_digest``.
    """

    model: str
    fixed: dict[str, Any]


class EngineLink(Protocol):
    """An engine as the pool sees it."""

    index: int
    client: Client
    bundled: bool

    def alive(self) -> bool:
        """Tell whether the engine is up; may take a moment to be sure."""

    def truncated(self, prompt_tokens: int) -> bool:
        """Tell whether the engine cut a prompt that it counted as ``prompt_tokens``."""


class Pool:
    """Sends what the scheduler hands out, and journals what comes of it.

    Args:
        on_down: told that the engine of a lane was found down, in which generation.
        checking: checks answers against the schemas that requests ask for.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        links: Sequence[EngineLink],
        journal: JournalWriter,
        policy: RetryPolicy,
        stats: Stats,
        describe: Describe,
        on_down: Callable[[Lane, int], None],
        timeouts_before_restart: int = 3,
        checking: Checking | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._links = {link.index: link for link in links}
        self._journal = journal
        self._policy = policy
        self._stats = stats
        self._describe = describe
        self._on_down = on_down
        self._timeouts_before_restart = timeouts_before_restart
        self._checking = checking
        self._timeouts = dict.fromkeys(self._links, 0)
        self._threads: list[threading.Thread] = []
        self._bugs: set[tuple[CodeType, int]] = set()
        self._lock = threading.Lock()
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Start as many threads as the engines' limits ask for now."""
        wanted = max(1, sum(lane.limit.value for lane in self._scheduler.lanes if not lane.gone))
        with self._lock:
            while len(self._threads) < wanted:
                name = f"request-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def join(self, tick: Callable[[], None], interval: float = 0.1) -> None:
        """Wait until all threads have ended, calling ``tick`` meanwhile.

        Raises:
            AifluxError: what ended the pool before its time.
        """
        while any(thread.is_alive() for thread in self._threads):
            alive = next(thread for thread in self._threads if thread.is_alive())
            alive.join(interval)
            tick()
        if self.failure is not None:
            raise self.failure

    def fail(self, failure: BaseException) -> None:
        """End the pool with an error."""
        with self._lock:
            if self.failure is None:
                self.failure = failure
        self._scheduler.stop()

    def _work(self) -> None:
        try:
            while True:
                job = self._scheduler.next()
                if job is None:
                    return
                self._attempt(*job)
        except AifluxError as failure:
            self.fail(failure)
        except BaseException as failure:
            self.fail(failure)
            raise

    def _attempt(self, task: Task, lane: Lane) -> None:
        link = self._links[lane.index]
        generation = lane.generation
        began = time.monotonic()
        if not task.began:
            task.began = began
        try:
            answer = link.client.post(task.request.url, task.payload)
            verdict = judge_answer(task.request.url, answer, bundled=link.bundled)
            if self._checking is not None:
                verdict = self._checking.judge(task.request, verdict)
        except ExchangeError as error:
            verdict = judge_exchange_error(error)
        except AifluxError:
            raise
        except Exception as error:  # noqa: BLE001 - no answer, and no request, may end the run
            verdict = self._judge_bug(error)
        seconds = time.monotonic() - began
        self._stats.attempt_ended(seconds, verdict)
        self._adapt(lane, verdict, seconds)
        self._settle(task, lane, link, generation, verdict, seconds)

    def _judge_bug(self, error: Exception) -> Verdict:
        """Show a bug's trace, once for each place in the code."""
        place = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        with self._lock:
            known = place[-1] in self._bugs
            self._bugs.add(place[-1])
        if not known:
            traceback.print_exception(error)
        return judge_bug(error)

    def _adapt(self, lane: Lane, verdict: Verdict, seconds: float) -> None:
        before = lane.limit.value
        if verdict.generated or verdict.overloaded:
            lane.limit.note(verdict.completion_tokens or 1, seconds, verdict.overloaded)
        if lane.limit.value > before:
            self.start()
            self._scheduler.wake()

    def _settle(
        self,
        task: Task,
        lane: Lane,
        link: EngineLink,
        generation: int,
        verdict: Verdict,
        seconds: float,
    ) -> None:
        kind = verdict.kind
        if kind is Kind.ANSWERED or kind is Kind.FAILED:
            self._timeouts[lane.index] = 0
            task.attempts += 1
            self._record(task, lane, verdict, seconds)
        elif kind is Kind.UNFIT:
            self._ask_again(task, lane, verdict, seconds)
        elif kind is Kind.UNATTEMPTED or self._ending(verdict):
            self._scheduler.put_back(task, lane)
        elif kind is Kind.CRASHED or (
            verdict.code == "connection" and self._is_down(lane, link, generation)
        ):
            self._crashed(task, lane, generation, verdict, seconds)
        else:
            self._watch_timeouts(lane, generation, verdict)
            self._retry(task, lane, verdict, seconds)

    def _is_down(self, lane: Lane, link: EngineLink, generation: int) -> bool:
        def is_another() -> bool:
            return not lane.open or lane.generation != generation

        # While this looks whether the engine lives, it may already have been started anew.
        return is_another() or not link.alive() or is_another()

    def _ending(self, verdict: Verdict) -> bool:
        """After a signal a broken connection means that the request was not attempted."""
        return self._scheduler.stopped and verdict.code in ("connection", "refused")

    def _retry(self, task: Task, lane: Lane, verdict: Verdict, seconds: float) -> None:
        task.attempts += 1
        delay = self._policy.next_delay(task.attempts, verdict.retry_after)
        if delay is None:
            self._record(task, lane, verdict, seconds)
        else:
            self._stats.retried()
            self._scheduler.retry(task, lane, delay)

    def _ask_again(self, task: Task, lane: Lane, verdict: Verdict, seconds: float) -> None:
        """The answer does not fit its schema: ask again, a few times."""
        self._timeouts[lane.index] = 0
        task.attempts += 1
        task.unfit += 1
        if self._checking is None or task.unfit > self._checking.attempts:
            self._record(task, lane, verdict, seconds)
        else:
            self._stats.asked_again(verdict)
            self._scheduler.retry(task, lane, 0.0)

    def _crashed(
        self,
        task: Task,
        lane: Lane,
        generation: int,
        verdict: Verdict,
        seconds: float,
    ) -> None:
        """The engine died: that is not the request's fault, unless it dies again and again."""
        self._scheduler.close_lane(lane, generation=generation)
        if verdict.code in UNTOUCHED:
            self._scheduler.put_back(task, lane)
        else:
            task.crashes += 1
            if task.crashes > CRASHES_BEFORE_ALONE:
                task.attempts += 1
                message = f"the engine died {task.crashes} times under this request"
                failed = Verdict(
                    Kind.FAILED, "engine_crashed", f"{message}: {verdict.message}", verdict.status
                )
                self._record(task, lane, failed, seconds)
            else:
                self._scheduler.crashed(task, lane)
        self._on_down(lane, generation)

    def _watch_timeouts(self, lane: Lane, generation: int, verdict: Verdict) -> None:
        """Several timeouts in a row mean that the engine hangs."""
        if verdict.code != "timeout":
            self._timeouts[lane.index] = 0
            return
        self._timeouts[lane.index] += 1
        if self._timeouts[lane.index] >= max(self._timeouts_before_restart, lane.limit.value):
            self._timeouts[lane.index] = 0
            self._scheduler.close_lane(lane, generation=generation)
            self._on_down(lane, generation)

    def _record(self, task: Task, lane: Lane, verdict: Verdict, seconds: float) -> None:
        failed = verdict.kind is not Kind.ANSWERED
        result = Result(
            key=task.key,
            custom_id=task.request.custom_id,
            status=verdict.status,
            metadata=self._metadata(task, lane, verdict, seconds),
            error=verdict.error if failed else None,
            body=verdict.body,
        )
        try:
            self._journal.append(result)
        except StorageError:
            self._scheduler.put_back(task, lane)
            raise
        self._stats.recorded(verdict, task.request.custom_id)
        self._scheduler.done(task, lane)

    def _metadata(self, task: Task, lane: Lane, verdict: Verdict, seconds: float) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "model": task.request.model or self._describe.model,
            "timestamp": utc_now(),
            "processing_time": round(seconds, 4),
            "attempts": task.attempts,
            "engine": lane.index,
            **self._describe.fixed,
        }
        if task.unfit:
            metadata["unfit_answers"] = task.unfit
        if verdict.finish_reason == "length":
            metadata["finish_reason_length"] = True
        if verdict.prompt_tokens and self._links[lane.index].truncated(verdict.prompt_tokens):
            metadata["truncated_prompt"] = True
        return metadata
