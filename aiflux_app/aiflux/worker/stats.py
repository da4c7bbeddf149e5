"""Counts and rates of a running shard, and totals over all its starts. Thread-safe."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aiflux.core.runs.plan import Plan
from aiflux.core.runs.status_file import FailedRequest, Progress, StatusFile, Totals
from aiflux.engines.gpus import visible_devices
from aiflux.engines.kinds import engine_kind
from aiflux.engines.outcome import Kind, Outcome

_DURATIONS = 256
_SHOWN_ERRORS = 10
_WINDOW = 30.0


class Stats:
    """Results of a shard's requests so far.

    Args:
        total: number of requests in the shard.
        completed, failed: number of results from earlier starts.
        left_out: of the failed ones, those that are not sent because their prompts are too long.
    """

    def __init__(
        self,
        total: int,
        completed: int = 0,
        failed: int = 0,
        left_out: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.completed = completed
        self.failed = failed
        self.left_out = left_out
        self.retries = 0
        self.crashes = 0
        self.unfit = 0
        self.parts = 0
        self.empty: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.errors: deque[FailedRequest] = deque(maxlen=_SHOWN_ERRORS)
        self._clock = clock
        self._began = clock()
        self._new = 0
        self._durations: deque[float] = deque(maxlen=_DURATIONS)
        self._marks: deque[tuple[float, int, int]] = deque([(self._began, 0, 0)])
        self._lock = threading.Lock()

    def attempt_ended(self, seconds: float, verdict: Outcome) -> None:
        """Record an ended exchange."""
        with self._lock:
            if verdict.generated:
                self._durations.append(seconds)
            elif verdict.kind is Kind.CRASHED:
                self.crashes += 1

    def retried(self) -> None:
        """Record a retry."""
        with self._lock:
            self.retries += 1

    def asked_again(self, verdict: Outcome) -> None:
        """Record an answer that does not fit its schema and is requested again."""
        with self._lock:
            self.unfit += 1
            self.prompt_tokens += verdict.prompt_tokens
            self.completion_tokens += verdict.completion_tokens

    def part_recorded(self, verdict: Outcome) -> None:
        """Record one of several parts of a request."""
        with self._lock:
            self.parts += 1
            self.prompt_tokens += verdict.prompt_tokens
            self.completion_tokens += verdict.completion_tokens

    def recorded(self, verdict: Outcome, custom_id: str) -> None:
        """Record a result."""
        with self._lock:
            self._new += 1
            self.prompt_tokens += verdict.prompt_tokens
            self.completion_tokens += verdict.completion_tokens
            if verdict.kind is Kind.ANSWERED:
                self.completed += 1
                if verdict.empty is not None:
                    self.empty[verdict.empty] += 1
            else:
                self.failed += 1
                self.unfit += verdict.kind is Kind.UNFIT
                self.errors.append(FailedRequest(verdict.code, verdict.message, custom_id))

    def not_sent(self) -> None:
        """Record the result of a request that is left out because its prompt is too long."""
        with self._lock:
            self.failed += 1
            self.left_out += 1

    def to_send(self) -> None:
        """Record that a request which was left out before is sent."""
        with self._lock:
            self.failed -= 1
            self.left_out -= 1

    @property
    def done(self) -> int:
        """Number of requests with a result."""
        return self.completed + self.failed

    @property
    def progressed(self) -> bool:
        """Whether this start has a result, or one of several parts of a request."""
        return bool(self._new or self.parts)

    def expected_duration(self) -> float:
        """Return the 90 % quantile of request durations in seconds; 0 before the first answer."""
        with self._lock:
            durations = sorted(self._durations)
        return durations[int(len(durations) * 0.9)] if durations else 0.0

    def rates(self) -> tuple[float, float]:
        """Return requests/s and output tokens/s over the last half minute."""
        with self._lock:
            now = self._clock()
            if now - self._marks[-1][0] >= 1.0:
                self._marks.append((now, self._new, self.completion_tokens))
            while len(self._marks) > 2 and now - self._marks[1][0] > _WINDOW:
                self._marks.popleft()
            since, requests, tokens = self._marks[0]
            elapsed = max(now - since, 1e-3)
            return (self._new - requests) / elapsed, (self.completion_tokens - tokens) / elapsed

    def remaining_seconds(self) -> float | None:
        """Return the estimated remaining seconds, or None if unknown."""
        rate = self.rates()[0]
        return (self.total - self.done) / rate if rate > 0 and self._new else None

    def snapshot(self) -> Progress:
        """Return the figures of this start for the status file."""
        requests, tokens = self.rates()
        remaining = self.remaining_seconds()
        return Progress(
            elapsed_seconds=round(self._clock() - self._began, 3),
            results_of_this_start=self._new,
            retries=self.retries,
            engine_crashes_seen=self.crashes,
            unfit_answers=self.unfit,
            empty_answers=dict(self.empty),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            requests_per_second=round(requests, 3),
            tokens_per_second=round(tokens, 3),
            remaining_seconds=None if remaining is None else round(remaining),
        )


@dataclass
class Ledger:
    """Sums over earlier starts.

    Attributes:
        gpus: number of GPUs of this start.
        before: sums over the earlier starts.
        requeues: number of times that this job requeued itself.
        unsealed: why this start has a network; "" if it has none.
    """

    gpus: int = 0
    before: Totals = field(default_factory=Totals)
    requeues: int = 0
    unsealed: str = ""

    @classmethod
    def of(cls, plan: Plan, earlier: StatusFile | None, environ: Mapping[str, str]) -> Ledger:
        """Continue from the status of an earlier start of the same plan."""
        own = engine_kind(plan.options).managed
        # Each node has as many as this one (see ``engines.ranks``).
        gpus = plan.options.nodes_per_engine * len(visible_devices(environ)) if own else 0
        if earlier is None:
            return cls(gpus)
        details = earlier.details
        same_job = details.slurm.job == environ.get("SLURM_JOB_ID", "")
        return cls(gpus, details.totals, details.requeues if same_job else 0)

    def totals(self, progress: Progress) -> Totals:
        """Return the sums including this start."""
        elapsed = progress.elapsed_seconds
        return self.before.plus(
            Totals(
                seconds=elapsed,
                gpu_seconds=elapsed * self.gpus,
                prompt_tokens=progress.prompt_tokens,
                completion_tokens=progress.completion_tokens,
                starts=1,
                sealed_starts=int(not self.unsealed),
                unsealed_starts=int(bool(self.unsealed)),
                unsealed=self.unsealed,
                results=progress.results_of_this_start,
                empty_answers=progress.empty_answers,
            )
        )
