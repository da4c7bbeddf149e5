"""Serve an engine: start it, restart it after a crash, and end it once nobody uses it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from aiflux.core.runs.plan import Plan
from aiflux.core.runs.serve_directory import (
    CRASHED,
    ENDED,
    IDLE,
    READY,
    SIGNAL,
    STARTING,
    TIME_LIMIT,
    ServeDirectory,
    ServeState,
)
from aiflux.core.runs.status_file import SlurmJob
from aiflux.engines.base import Engine, EngineSpec, Listener
from aiflux.engines.gpus import group, visible_devices
from aiflux.engines.http import Client
from aiflux.engines.kinds import engine_kind
from aiflux.engines.process import free_port
from aiflux.engines.ranks import node_name
from aiflux.engines.server_load import get, parse_load, parse_tokens
from aiflux.errors import AifluxError, RejectedError, StoppedError
from aiflux.util.files import temporary_folder
from aiflux.util.lease import acquire
from aiflux.worker.concurrency import FixedLimit
from aiflux.worker.engine_supervisor import EngineSupervisor
from aiflux.worker.node import refuse_wrong_image
from aiflux.worker.scheduler import Lane, Scheduler
from aiflux.worker.shard import Context

_DEADLINE_MARGIN = 15.0
_LOOK_INTERVAL = 5.0
_LOOKS = 4  # in the idle time, at least
_POLL = 0.2


def serve(plan: Plan, directory: ServeDirectory, context: Context) -> None:
    """Serve the engine of a plan until it is idle, or the job's time is over.

    Raises:
        EngineError: it did not start, or kept crashing.
        StoppedError: a signal came.
        RunConflictError: another process serves it.
    """
    directory.refuse_foreign()
    name = f"the engine {directory.name}"

    def lost() -> None:
        context.stopper.stop("another process took the engine over")

    with acquire(directory.run.lease(0), name, on_lost=lost):
        _Service(plan, directory, context).run()


class _Service:
    """One start of a served engine."""

    def __init__(self, plan: Plan, directory: ServeDirectory, context: Context) -> None:
        self.plan = plan
        self.directory = directory
        self.context = context
        self.settings = directory.read_settings()
        self.last_call = float("inf")
        if context.deadline is not None:
            self.last_call = context.deadline - _DEADLINE_MARGIN
            context.stopper.ignore_usr1_until(self.last_call)
        job = SlurmJob.of(context.environ)
        self.state = ServeState(
            STARTING,
            job=job.job,
            restarts=job.restarts,
            node=node_name(context.environ),
            model=plan.served_names[0],
        )
        self.lane = Lane(0, FixedLimit(1), open=False)
        self.failure: BaseException | None = None
        self.lock = threading.Lock()
        self.ended = False
        self.used_at = time.monotonic()
        self.looked_at = 0.0
        self.tokens = 0

    def run(self) -> None:
        self._write(self.state)
        self.context.reporter.say(
            "not sealed: the engine is served to other programs, with a key and TLS"
        )
        # Why it ends is written before the engine is stopped, for which a signal may leave no time.
        with ExitStack() as stack, self._ending():
            home = stack.enter_context(temporary_folder())
            engine = self._engine(home)
            supervisor = self._supervisor(engine)
            supervisor.start()
            stack.callback(supervisor.close)
            reason = self._watch(engine, supervisor)
            self.context.reporter.say(f"the engine ends: {reason}")
            self._end(reason)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Write why the engine ended by an error."""
        try:
            yield
        except StoppedError:
            self._end(SIGNAL)
            raise
        except BaseException as error:
            message = error.message if isinstance(error, AifluxError) else repr(error)
            self._end(CRASHED, message)
            raise

    def _watch(self, engine: Engine, supervisor: EngineSupervisor) -> str:
        """Wait for the end; return why it came."""
        stopper = self.context.stopper
        while True:
            if time.time() > self.last_call or (stopper.stopping and stopper.time_is_up):
                return TIME_LIMIT
            if stopper.stopping:
                raise StoppedError(f"stopped ({stopper.reason})", "serve the engine again")
            if self.failure is not None:
                raise self.failure
            if not self.lane.open:
                self.used_at = time.monotonic()
            elif not engine.is_alive():
                self._write(self.state)
                supervisor.report_down(self.lane.generation)
            elif self._is_idle(engine):
                return IDLE
            time.sleep(_POLL)

    def _is_idle(self, engine: Engine) -> bool:
        """Return whether nobody has used the engine for the idle time."""
        now = time.monotonic()
        wait = self.settings.idle_seconds
        if now - self.looked_at < min(_LOOK_INTERVAL, wait / _LOOKS):
            return False
        self.looked_at = now
        text = (get(engine.client, "/metrics") or b"").decode("utf-8", "replace")
        load, tokens = parse_load(text), parse_tokens(text)
        # A server that is too busy to answer is in use.
        if load is None or load.running or load.waiting or tokens != self.tokens:
            self.used_at = now
            self.tokens = tokens
            self.lane.completed += 1  # so a later crash is not one without progress
        return now - self.used_at >= wait

    def _supervisor(self, engine: Engine) -> EngineSupervisor:
        def failed(error: BaseException) -> bool:
            self.failure = error
            return True

        return EngineSupervisor(
            engine,
            self.lane,
            Scheduler(iter(()), [self.lane]),
            say=self.context.reporter.say,
            on_ready=self._ready,
            on_failure=failed,
            stops=self.context.stopper.wait,
        )

    def _ready(self, engine: Engine, lane: Lane) -> None:
        self.plan.refuse_changed_model(self.plan.models[0], engine.model_digest())
        address = urlsplit(engine.client.base_url)
        self.tokens = 0
        self.used_at = time.monotonic()
        line = engine.describe()
        self.context.reporter.say(f"{line}, at {engine.client.base_url}")
        host, port = address.hostname or "", address.port or 0
        self._write(replace(self.state, phase=READY, host=host, port=port, engine=line))

    def _engine(self, home: Path) -> Engine:
        options = self.plan.options
        kind = engine_kind(options)
        devices = visible_devices(self.context.environ)
        if devices and not options.allow_cpu:
            refuse_wrong_image(self.context.environ, devices)
        gpus, *idle = group(devices, options.gpus_per_engine)
        if idle:
            self.context.reporter.say(
                f"not used: {sum(map(len, idle))} of the job's {len(devices)} GPUs "
                "(--gpus-per-engine)"
            )
        own = self.directory.read_key()
        timeout = options.request_timeout

        def make_client(url: str, ca: str | None = None, key: str | None = None) -> Client:
            return Client(url, timeout, connections=4, api_key=key or own, ca=ca)

        spec = EngineSpec(
            index=0,
            plan=self.plan,
            model=self.plan.models[0],
            devices=gpus,
            home=home / "engine-0",
            log=self.directory.run.engine_log(0, 0),
            environ=self.context.environ,
            say=self.context.reporter.say,
            listener=self._listener(),
        )
        return kind.make_engine(spec, make_client)

    def _listener(self) -> Listener:
        files = self.directory
        host = self._host()
        return Listener(host, files.key, files.certificate, files.certificate_key)

    def _host(self) -> str:
        """Return the address to listen on.

        Raises:
            RejectedError: this node has none that the login node reaches.
        """
        if self.settings.addresses is None:
            return "127.0.0.1"
        node = self.state.node
        host = self.settings.addresses.get(node)
        remedy = "serve it on the node's loopback, and use it over ssh: aiflux serve --tunnel"
        if host is None:
            raise RejectedError(
                f"the machine where aiflux serve ran found no address of the node {node}", remedy
            )
        try:
            free_port(host)
        except OSError as error:
            raise RejectedError(
                f"the node {node} has no address {host}, which is where the machine that aiflux "
                f"serve ran on looks for it: {error.strerror}",
                remedy,
            ) from error
        return host

    def _end(self, reason: str, message: str = "") -> None:
        self._write(replace(self.state, phase=ENDED, reason=reason, message=message))

    def _write(self, state: ServeState) -> None:
        """Write a state, unless the last one is written; the engine's thread writes, too."""
        with self.lock:
            if not self.ended:
                self.ended = state.phase == ENDED
                self.directory.write_state(state)
