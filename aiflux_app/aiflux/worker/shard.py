"""Processing of a shard: start engines, send requests, journal results, write the output."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from aiflux import __version__
from aiflux.core.batch.input_file import change_of
from aiflux.core.batch.prompt_lengths import TOO_LONG
from aiflux.core.runs.directory import RunDirectory, own_command
from aiflux.core.runs.journal import JournalReader, JournalWriter, scan_journal
from aiflux.core.runs.output import forget_done, merge_when_last
from aiflux.core.runs.plan import (
    Plan,
    Shard,
    changed_input,
    read_known_part,
    read_plan,
    refuse_changed_input,
    same_work,
)
from aiflux.core.runs.splits_file import read_splits
from aiflux.core.runs.status_file import (
    SlurmJob,
    Status,
    StatusDetails,
    Tuning,
    allowed_failures,
    left_out_by_workers,
    read_status,
    read_statuses,
)
from aiflux.engines import server_load
from aiflux.engines.base import Engine, EngineSpec, FetchContext
from aiflux.engines.gpus import gpu_names, group, visible_devices
from aiflux.engines.http import Client
from aiflux.engines.kinds import engine_kind
from aiflux.engines.ranks import Ranks
from aiflux.errors import (
    AifluxError,
    ExitCode,
    RequeueError,
    RunConflictError,
    StoppedError,
    StorageError,
    TooManyFailuresError,
)
from aiflux.util.files import temporary_folder
from aiflux.util.lease import acquire
from aiflux.util.process_limits import exhaustion_stops, raise_file_limit, spare_files
from aiflux.util.text import counted
from aiflux.util.times import utc_text
from aiflux.worker.concurrency import FEW, AdaptiveLimit, FixedLimit, SlotLimit
from aiflux.worker.dispatcher import Pool, RetryPolicy
from aiflux.worker.energy_meter import EnergyMeter
from aiflux.worker.engine_supervisor import EngineSupervisor
from aiflux.worker.length_check import LengthCheck
from aiflux.worker.node import GpuWatch, refuse_wrong_image, unsealed_reason
from aiflux.worker.outage import OutageWatch, Rejections
from aiflux.worker.progress import Reporter
from aiflux.worker.scheduler import Lane, Limit, Scheduler, Source, by_prefix
from aiflux.worker.stats import Ledger, Stats
from aiflux.worker.stop import Stopper
from aiflux.worker.tuning import Start, Tuner
from aiflux.worker.validation import Checking

IMAGE_FACTS = Path("/opt/aiflux/image.json")
_DEADLINE_MARGIN = 15.0
# A start of the engines to try other slots takes at most this share of the rest of the run.
_RESTART_SHARE = 0.05
# Options on which the best number of slots depends, and that are not part of the run's identity.
_TUNED_FOR = ("slots", "context_length", "gpus_per_engine", "nodes_per_engine")
_BEFORE_THE_RUN = "leave out prompts that are too long (--too-long skip) or split them (chunk)"


@dataclass
class Context:
    """What one start of the worker works with.

    Attributes:
        deadline: Unix time at which the job ends; None for no limit.
        api_key: key for an engine at ``--engine-url``.
        ranks: the job's other nodes; None if it has one.
    """

    reporter: Reporter
    stopper: Stopper
    deadline: float | None = None
    api_key: str | None = None
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    ranks: Ranks | None = None


def ensure_models(plan: Plan, run: RunDirectory, context: Context) -> None:
    """Make sure that the plan's models are stored; does nothing if they are.

    Raises:
        ModelError: a model is not available.
        StoppedError: a signal came meanwhile.
    """
    if plan.models_dir is None:
        return
    fetch = FetchContext(
        context.environ, run.logs / "pull.log", context.reporter.say, context.reporter.pull
    )
    for model in plan.models:
        with context.stopper.raising():
            engine_kind(plan.options).fetch_model(plan.models_dir, model, fetch)
    context.reporter.close()


def prepare(plan: Plan, run: RunDirectory, shard_index: int, context: Context) -> None:
    """Make sure that the plan's models are stored; the shard's status gets the error otherwise.

    Raises:
        ModelError: a model is not available.
        StoppedError: a signal came meanwhile.
    """
    try:
        ensure_models(plan, run, context)
    except BaseException as error:
        # Another process that works on the shard writes the status itself.
        with suppress(AifluxError), acquire(run.lease(shard_index), f"the run {plan.output}"):
            _note_failed_start(plan, run, shard_index, context, error)
        raise


def note_unread_plan(
    run: RunDirectory, shard: int, context: Context, error: RunConflictError
) -> None:
    """Record in a shard's status that its plan was refused, if it suffices for a status."""
    with suppress(AifluxError):
        plan = read_known_part(run)
        if plan is not None and 0 <= shard < len(plan.shards):
            with acquire(run.lease(shard), f"the run {plan.output}"):
                _note_failed_start(plan, run, shard, context, error)


def _note_failed_start(
    plan: Plan, run: RunDirectory, shard: int, context: Context, error: BaseException
) -> None:
    """Record why a start ended before the work on its shard began."""
    earlier = read_status(run, shard, plan)
    if earlier is not None and earlier.completed:
        return
    facts = replace(_facts(plan, context), sealed=None, unsealed="")
    status = Status(run.status(shard), plan, shard, details=facts)
    if earlier is not None:
        status.completed, status.failed = earlier.counts.completed, earlier.counts.failed
        status.errors = list(earlier.last_errors)
        known = earlier.details
        facts.left_out = known.left_out
        facts.gpu_use, facts.energy, facts.totals = known.gpu_use, known.energy, known.totals
    _note_end(facts, error)
    status.enter("cancelled" if isinstance(error, StoppedError) else "failed")


def _note_end(details: StatusDetails, error: BaseException) -> None:
    """Record the error that ended a start, with its exit code and remedy."""
    details.ended = error.message if isinstance(error, AifluxError) else repr(error)
    details.exit_code = int(error.exit_code if isinstance(error, AifluxError) else ExitCode.BUG)
    details.remedy = error.remedy if isinstance(error, AifluxError) else None


def work(
    plan: Plan, run: RunDirectory, shard_index: int, context: Context, *, pull: bool = False
) -> None:
    """Process one shard completely and write the output when the run is complete.

    Args:
        pull: first pull models that are missing.

    Raises:
        ModelError: a model is not available.
        TooManyFailuresError: the shard is finished, but more requests failed than allowed.
        EngineError: no engine started, or all of them kept crashing.
        StoppedError: stopped before the end.
        RunConflictError: another process works on the shard.
    """
    run.refuse_foreign()
    raise_file_limit()
    shard = plan.shards[shard_index]
    context.reporter.quiet = plan.options.log_level in ("WARNING", "ERROR")

    def lost() -> None:
        context.stopper.stop("another process took the shard over")

    with acquire(run.lease(shard_index), f"the run {plan.output}", on_lost=lost):
        plan = _settled_plan(plan, run)
        refuse_changed_input(plan)
        _ShardWork(plan, run, shard, context).run(pull=pull)


def _settled_plan(plan: Plan, run: RunDirectory) -> Plan:
    """Return the current plan; refuse one that was replaced by another.

    A planner holds the plan's lease and then looks for workers; a worker holds its shard's lease
    and then looks for planners: one of the two sees the other. If the same command ran several
    times at once, another process may have planned the same work after this one planned it and
    before it got its lease. That process finds the lease held and ends, so this one continues.
    """
    if run.plan_lease.exists():
        acquire(run.plan_lease, f"planning {plan.output}", wait=True).release()
    now = read_plan(run)
    if now.created != plan.created and not same_work(now, plan):
        raise RunConflictError(
            f"{plan.output} has been planned again meanwhile", "submit it again: aiflux resume"
        )
    return now


class _ShardWork:
    """One start's work on one shard."""

    def __init__(self, plan: Plan, run: RunDirectory, shard: Shard, context: Context) -> None:
        self.plan = plan
        self.run_directory = run
        self.checking = Checking.of(plan.options)
        self.shard = shard
        self.context = context
        if context.deadline is not None:
            self.last_call = context.deadline - plan.options.drain_seconds - _DEADLINE_MARGIN
            context.stopper.ignore_usr1_until(self.last_call)
        else:
            self.last_call = float("inf")
        path = run.journal(shard.index)
        index = scan_journal(path)
        self.reader = JournalReader(path, index)
        splits = read_splits(plan, run, shard)
        self.source = Source(plan, shard, index, self.reader, splits)
        completed, failed, left_out = self.source.count_done()
        self.stats = Stats(shard.requests, completed, failed, left_out)
        facts = _facts(plan, context)
        self.status = Status(run.status(shard.index), plan, shard.index, details=facts)
        earlier = read_status(run, shard.index, plan)
        self.ledger = Ledger.of(plan, earlier, context.environ)
        self.ledger.unsealed = facts.unsealed
        if earlier is not None:
            facts.gpu_use, facts.energy = earlier.details.gpu_use, earlier.details.energy
            facts.tunings = earlier.details.tunings
        self.lengths = LengthCheck(plan, shard, self.source, self.stats, context.reporter.say)
        self._sync_status()
        if self.stats.done < shard.requests:
            forget_done(plan, run, shard.index)
        self.status.enter("validating")
        sent = completed + failed - left_out
        if sent:
            verb = "is" if sent == 1 else "are"
            known = f"{sent} of {counted(shard.requests, 'request')} {verb} done already"
            context.reporter.say(f"resuming: {known}")

    def run(self, *, pull: bool = False) -> None:
        try:
            with exhaustion_stops():
                if self.stats.done < self.shard.requests:
                    if pull:
                        ensure_models(self.plan, self.run_directory, self.context)
                    self._process()
                self._finish()
        except StoppedError as error:
            continues = self._ask_for_requeue() and not isinstance(error, StorageError)
            if continues and self.context.environ.get("SLURM_JOB_ID"):
                self._end("cancelled", RequeueError(error.message))
                raise RequeueError(error.message) from error
            self._end("cancelled", error)
            raise
        except TooManyFailuresError:
            raise
        except BaseException as error:
            self._end("failed", error)
            raise
        finally:
            self.reader.close()
            self.context.reporter.close()

    def _process(self) -> None:
        self.status.enter("in_progress")
        stopper = self.context.stopper
        with ExitStack() as stack:
            journal = JournalWriter(
                self.run_directory.journal(self.shard.index),
                self.plan.options.save_frequency,
                on_failure=lambda error: stopper.stop(error.message),
            )
            stack.callback(journal.close)
            if self.checking is not None:
                stack.callback(self.checking.close)
            stack.enter_context(self._gpu_watch())
            home = stack.enter_context(temporary_folder())
            for model in self.plan.models:
                if not self.may_admit():
                    break
                _ModelWork(self, model, journal, home).run()
        self._sync_status()
        self.context.reporter.show(self.stats, final=True)
        if self.stats.done < self.shard.requests:
            change = None if stopper.stopping else change_of(self.plan.input)
            if change is not None:  # the lines ended before the planned number of requests
                raise changed_input(self.plan, change)
            raise self._stopped()

    def note_stop(self) -> None:
        """Record a stop before the engines end, which can take longer than Slurm allows.

        Slurm kills a cancelled job ``KillWait`` (30 s by default) after its first signal.
        """
        if self.context.stopper.stopping and self.stats.done < self.shard.requests:
            self._end("cancelled", self._stopped())

    def _stopped(self) -> StoppedError:
        reason = self.context.stopper.reason or "the job's time is nearly over"
        return StoppedError(
            f"stopped ({reason}) with {self.stats.done} of "
            f"{counted(self.shard.requests, 'request')} done",
            "run the same command again to resume",
        )

    def _finish(self) -> None:
        self._sync_status()
        plan, run = self.plan, self.run_directory
        left_out = left_out_by_workers(plan, [self.status.details])
        own = self.stats.failed > plan.allowed_failures + left_out
        self.status.details.exit_code = int(ExitCode.FAILURES if own else ExitCode.OK)
        merged = merge_when_last(
            self.plan,
            self.run_directory,
            self.shard.index,
            self.status,
            self.context.reporter.say,
        )
        failed = self.stats.failed if merged is None else merged.failed
        allowed = (
            plan.allowed_failures + left_out if merged is None else allowed_failures(plan, run)
        )
        if failed > allowed:
            last = self.stats.errors[-1] if self.stats.errors else None
            shown = f"; the last: {last.param}: {last.message}" if last else ""
            long = any(each.code == TOO_LONG for each in self.stats.errors)
            remedy = f"{_BEFORE_THE_RUN}; " if long else ""
            by_user = plan.options.allowed_failures(plan.requests)
            raise TooManyFailuresError(
                f"{failed - (allowed - by_user)} of "
                f"{counted(self.plan.requests, 'request')} failed "
                f"({by_user} allowed by --max-failures){shown}",
                f"{remedy}the output has the error of each; to send them again: the same "
                f"`{own_command(self.plan.output)}` command with --retry-failed",
            )

    def _ask_for_requeue(self) -> bool:
        """Tell the batch script to requeue the job, if another start would make progress.

        Returns:
            whether the job is to be requeued.
        """
        options = self.plan.options
        if not (self.context.stopper.time_is_up or self.past_deadline()):
            return False
        if not self.stats.progressed:
            self.context.reporter.say(
                "no request finished in this start, so another of the same length would not get "
                "any further: request more time (aiflux resume --time ...)"
            )
        elif self.ledger.requeues >= options.max_requeues:
            self.context.reporter.say(
                "the job has already been requeued "
                f"{counted(self.ledger.requeues, 'time')} (--max-requeues)"
            )
        else:
            self.ledger.requeues += 1
            self.run_directory.requeue_mark(self.shard.index).touch()
            return True
        return False

    def tick(self) -> None:
        """Update what users see, and stop when the job's time is nearly over."""
        if time.time() > self.last_call:
            self.context.stopper.stop("the job's time is nearly over", time_is_up=True)
        self._sync_status()
        self.status.write()
        self.context.reporter.show(self.stats)

    def past_deadline(self) -> bool:
        """Return whether a request that is sent now could not end before the job does."""
        if self.context.deadline is None:
            return False
        expected = self.stats.expected_duration() + _DEADLINE_MARGIN
        return time.time() + expected > self.context.deadline

    def may_admit(self) -> bool:
        """Return whether a request may still be sent."""
        return not self.context.stopper.stopping and not self.past_deadline()

    def tuning(self, model: str, engines: int) -> Tuning:
        """Return what this run found for a model on such GPUs, in an earlier start or a shard."""
        options, details = self.plan.options, self.status.details
        settings = {name: getattr(options, name) for name in _TUNED_FOR}
        own = Tuning(model, details.gpus, engines, settings)
        others = read_statuses(self.run_directory).values()
        of_plan = [one.details for one in others if one.details.plan == self.plan.id]
        found = [each for one in of_plan for each in one.tunings if each.chosen]
        same = (each for each in [*found, *details.tunings] if each.measures_as(own))
        return next(same, own)

    def keep_tuning(self, tuning: Tuning) -> None:
        """Record what was found for a model."""
        details = self.status.details
        others = [each for each in details.tunings if each.model != tuning.model]
        details.tunings = (*others, tuning)

    def remaining_seconds(self, rate: float) -> float:
        """Return how long the rest of the shard takes; 0 if unknown.

        Args:
            rate: requests per second, for the time before the first answer of this start.
        """
        known = self.stats.remaining_seconds()
        if known is None and rate > 0:
            return (self.shard.requests - self.stats.done) / rate
        return known or 0.0

    def _gpu_watch(self) -> GpuWatch:
        own = engine_kind(self.plan.options).managed
        devices = visible_devices(self.context.environ) if own else ()
        details = self.status.details
        environ = self.context.environ
        meter = EnergyMeter(devices, details.energy, partial(setattr, details, "energy"), environ)
        note = partial(setattr, details, "gpu_use")
        return GpuWatch(devices, details.gpu_use, note, environ=environ, meter=meter)

    def _sync_status(self) -> None:
        self.status.completed = self.stats.completed
        self.status.failed = self.stats.failed
        self.status.errors = list(self.stats.errors)
        details = self.status.details
        details.progress = self.stats.snapshot()
        details.totals = self.ledger.totals(details.progress)
        details.requeues = self.ledger.requeues
        details.left_out = self.stats.left_out

    def _end(self, state: str, error: BaseException) -> None:
        self._sync_status()
        _note_end(self.status.details, error)
        try:
            self.status.enter(state)
        except AifluxError as failure:
            self.context.reporter.say(f"the status could not be written: {failure.message}")


class _ModelWork:
    """One model's requests: its engines, a scheduler and a pool."""

    def __init__(self, shard: _ShardWork, model: str, journal: JournalWriter, home: Path) -> None:
        self.shard = shard
        self.plan = shard.plan
        self.context = shard.context
        self.model = model
        engines = self._engines(home)
        self.lanes = [Lane(engine.index, FixedLimit(1), open=False) for engine in engines]
        tasks = shard.source.tasks(model)
        if engine_kind(self.plan.options).shares_prefixes:
            tasks = by_prefix(tasks)
        self.scheduler = Scheduler(tasks, self.lanes, may_admit=self.shard.may_admit)
        self.tuner = self._tuner(engines) if self.plan.options.tune else None
        self.load_watches: list[server_load.LoadWatch] = []
        self._failures: list[BaseException] = []
        self._lock = threading.Lock()
        self._journal = journal
        self.pool = Pool(
            self.scheduler,
            engines,
            journal,
            RetryPolicy(self.plan.options.max_retries, self.plan.options.retry_delay),
            shard.stats,
            self.plan.served(model),
            on_down=lambda lane, generation: self.supervisors[lane.index].report_down(generation),
            checking=shard.checking,
            rejections=Rejections(
                answered_before=shard.stats.completed > 0,
                tolerant=self.plan.allowed_failures >= self.plan.requests,
            ),
            outages=OutageWatch(partial(shard.source.answered, model)),
            patience=self.plan.options.engine_wait,
            most=spare_files(),
            adapter_digests=self.plan.adapter_digests,
            say=self.context.reporter.say,
        )
        self.supervisors = [
            EngineSupervisor(
                engine,
                lane,
                self.scheduler,
                say=self.context.reporter.say,
                on_ready=self._ready,
                on_failure=partial(self._failed, lane.index),
                on_crash=self._crashed,
                stops=self.context.stopper.wait,
            )
            for engine, lane in zip(engines, self.lanes, strict=True)
        ]

    def run(self) -> None:
        try:
            self.pool.start()
            for each in self.supervisors:
                each.start()
            self.pool.join(self._tick)
            self.shard.note_stop()
        finally:
            if self.tuner is not None and not self.context.stopper.stopping:
                self.tuner.end()
            for watch in self.load_watches:
                watch.close()
            for each in self.supervisors:
                each.close()
        if len(self._failures) == len(self.supervisors) and not self.context.stopper.stopping:
            raise self._failures[-1]

    def _failed(self, index: int, error: BaseException) -> bool:
        """Note why an engine was given up; return whether it was the last, so that the run ends."""
        if self.tuner is not None:
            self.tuner.engine_lost(index)
        with self._lock:
            self._failures.append(error)
            return len(self._failures) == len(self.supervisors)

    def _crashed(self, engine: Engine) -> None:
        if self.tuner is not None:
            self.tuner.engine_crashed(engine.index, engine.facts.slots or 1)

    def _tick(self) -> None:
        self.shard.tick()
        if self.tuner is not None:
            self.tuner.tick()
        stopper = self.context.stopper
        if not stopper.stopping:
            return
        if not self.scheduler.stopped:
            left = self.scheduler.in_flight
            verb = "gets" if left == 1 else "get"
            seconds = f"{self.plan.options.drain_seconds:g} s"
            drain = f"{counted(left, 'request')} in flight {verb} {seconds}"
            self.context.reporter.say(f"stopping ({stopper.reason}){f': {drain}' if left else ''}")
            self.scheduler.stop()
        drained = time.monotonic() - stopper.since > self.plan.options.drain_seconds
        if drained or stopper.at_once:
            for each in self.supervisors:
                each.engine.client.abort()
            if self.shard.checking is not None:
                self.shard.checking.abort()

    def _ready(self, engine: Engine, lane: Lane) -> None:
        if self.tuner is not None:
            lane.limit = self.tuner
            self.tuner.engine_ready(lane.index, engine.facts.slots or 1)
        elif self.plan.options.concurrency is not None:
            lane.limit = FixedLimit(self.plan.options.concurrency)
        elif not isinstance(lane.limit, AdaptiveLimit):  # keep the limit it found
            lane.limit = self._limit_of(engine)
        digest = engine.model_digest()
        self.plan.refuse_changed_model(self.model, digest)
        self.shard.lengths.check(self.model, engine, self._journal)
        facts = self.shard.status.details
        facts.engines = tuple(each.engine.facts for each in self.supervisors)
        if digest is not None:
            facts.model_digests = {**facts.model_digests, self.model: digest}
        self.pool.start()
        self.context.reporter.say(
            f"{engine.describe()}, {counted(lane.limit.value, 'request')} in flight"
            if engine.facts.slots is not None
            else engine.describe()
        )

    def _tuner(self, engines: Sequence[Engine]) -> Tuner:
        """Return the limit that tunes; engines start with the slots that were chosen before."""
        tuning = self.shard.tuning(self.model, len(engines))
        if tuning.slots is not None:
            for engine in engines:
                engine.use_slots(tuning.slots)
            self.context.reporter.say(f"from an earlier start or shard: {tuning.advice}")
            self.shard.keep_tuning(tuning)
        return Tuner(
            tuning,
            restart=self._restart,
            keep=self.shard.keep_tuning,
            say=self.context.reporter.say,
        )

    def _restart(self, slots: int, rate: float | None) -> Start:
        """Start all engines again with other slots, if that takes little of the run's time."""
        if rate is None:
            return self._start_again(slots)
        if not all(each.engine.can_have(slots) for each in self.supervisors):
            return Start.IMPOSSIBLE
        seconds = max(each.start_seconds for each in self.supervisors)
        if seconds > _RESTART_SHARE * self.shard.remaining_seconds(rate):
            return Start.TOO_LONG
        if seconds > _RESTART_SHARE * (self.shard.last_call - time.time()):
            return Start.LATER
        return self._start_again(slots)

    def _start_again(self, slots: int) -> Start:
        for each in self.supervisors:
            each.restart(slots)
        return Start.BEGUN

    def _limit_of(self, engine: Engine) -> Limit:
        """Return the limit of an engine: by its slots, or adaptive where they are unknown."""
        most = engine.max_in_flight()
        if most is not None:
            return SlotLimit(most, partial(self._slots_found, engine))
        limit = AdaptiveLimit()

        def note(running: int, waiting: int) -> None:
            limit.note_load(running, waiting)
            self.pool.start()

        def fetch(path: str) -> bytes | None:
            return server_load.get(engine.client, path)  # each start has another client

        watch = server_load.LoadWatch(fetch, note)
        self.load_watches.append(watch)
        watch.start()
        return limit

    def _slots_found(self, engine: Engine, single: bool) -> None:
        """Report that an engine works on one request at a time, or no longer does."""
        engine.facts.one_at_a_time = single
        self.context.reporter.say(
            f"engine {engine.index} works on one request at a time although it was started with "
            f"{engine.facts.slots} slots: only {FEW} requests are kept in flight"
            if single
            else f"engine {engine.index} works on several requests at a time again"
        )

    def _engines(self, home: Path) -> list[Engine]:
        options = self.plan.options
        kind = engine_kind(options)
        devices = visible_devices(self.context.environ) if kind.managed else ()
        if devices and not options.allow_cpu:
            refuse_wrong_image(self.context.environ, devices)
        several = options.nodes_per_engine > 1
        groups = (devices,) if several else group(devices, options.gpus_per_engine)
        return [
            kind.make_engine(self._spec(index, gpus, home, len(groups)), self._make_client)
            for index, gpus in enumerate(groups)
        ]

    def _spec(self, index: int, devices: tuple[str, ...], home: Path, engines: int) -> EngineSpec:
        return EngineSpec(
            index=index,
            plan=self.plan,
            model=self.model,
            devices=devices,
            home=home / f"engine-{index}",
            log=self.shard.run_directory.engine_log(self.shard.shard.index, index),
            environ=self.context.environ,
            say=self.context.reporter.say,
            ranks=self.context.ranks,
            engines=engines,
        )

    def _make_client(self, url: str, ca: str | None = None, key: str | None = None) -> Client:
        timeout = self.plan.options.request_timeout
        return Client(url, timeout, connections=4096, api_key=key or self.context.api_key, ca=ca)


def _facts(plan: Plan, context: Context) -> StatusDetails:
    """Return what the status file shows about where and how this start runs."""
    environ = context.environ
    unsealed = unsealed_reason(environ, engine_here=engine_kind(plan.options).managed)
    return StatusDetails(
        version=__version__,
        started=utc_text(time.time()),
        host=socket.gethostname(),
        pid=os.getpid(),
        slurm=SlurmJob.of(environ),
        image=_image_facts(environ),
        sealed=not unsealed,
        unsealed=unsealed,
        gpus=gpu_names(environ),
        models=plan.models,
    )


def _image_facts(environ: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        facts = json.loads(IMAGE_FACTS.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(facts, dict)
    return {**facts, "id": environ.get("AIFLUX_IMAGE_ID") or None} if known else None
