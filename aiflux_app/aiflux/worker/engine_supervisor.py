"""Supervise engines: each has a thread that starts it, and restarts it if it fails.

The thread opens the engine's lane for requests once the model answers. It gives up an engine that
fails three times without a result in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from aiflux.engines.base import Engine
from aiflux.errors import AifluxError, EngineError, RejectedError
from aiflux.util.process_limits import start_thread
from aiflux.util.text import counted
from aiflux.worker.scheduler import Lane, Scheduler

RESTARTS_WITHOUT_PROGRESS = 3
_STOP_SECONDS = 1.0
_DRAIN_POLL = 0.05


def _never(_: float) -> bool:
    return False


def _ignore(_: Engine) -> None:
    pass


class EngineSupervisor:
    """Starts and restarts an engine, with one thread per engine.

    Args:
        on_failure: called with the error when the engine is given up; returns whether it is the
            run's own error, which is reported at the end.
        on_crash: called before the engine is restarted after a crash; may call ``restart``.
        stops: waits for so many seconds; returns whether the worker is to stop, so that an engine
            that is down is not restarted.
    """

    def __init__(
        self,
        engine: Engine,
        lane: Lane,
        scheduler: Scheduler,
        *,
        say: Callable[[str], None],
        on_ready: Callable[[Engine, Lane], None],
        on_failure: Callable[[BaseException], bool],
        on_crash: Callable[[Engine], None] = _ignore,
        stops: Callable[[float], bool] = _never,
    ) -> None:
        self.engine = engine
        self.lane = lane
        self.restarts = 0
        self._scheduler = scheduler
        self._say = say
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._on_crash = on_crash
        self._stops = stops
        self._changed = threading.Condition()
        self._down_in = -1
        self._wanted: int | None = None
        self._fallback: int | None = None
        self.start_seconds = 0.0
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the engine in the background."""
        self._thread = start_thread(self._keep, f"engine-{self.engine.index}")

    def close(self) -> None:
        """Stop the engine permanently and wait for its end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.engine.close()
        if self._thread is not None:
            self._thread.join()

    def report_down(self, generation: int) -> None:
        """Restart the engine, unless it has been restarted since ``generation``.

        All requests in flight report the same crash, some of them during or after the restart. The
        generation shows that they mean the earlier start.
        """
        with self._changed:
            self._down_in = max(self._down_in, generation)
            self._changed.notify()

    def restart(self, slots: int) -> None:
        """Start the engine again with other slots, once the requests in flight have ended.

        If it does not start with them, it gets its earlier number again.
        """
        with self._changed:
            self._wanted = slots
            self._changed.notify()

    @property
    def _down(self) -> bool:
        return self._closing or self._down_in >= self.lane.generation

    def _wait_until_down(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._down or self._wanted is not None)

    def _changes_slots(self) -> bool:
        """Drain the engine and change its slots, if that is wanted; return whether it was."""
        with self._changed:
            while self._wanted is not None and self.lane.in_flight and not self._down:
                self._changed.wait(_DRAIN_POLL)
            if self._down:
                return False
        before = self.engine.facts.slots
        slots = self._use_wanted()
        if slots is None:
            return False
        self._fallback = before
        self._say(f"engine {self.engine.index} starts again with {counted(slots, 'slot')}")
        self.engine.stop()
        return True

    def _use_wanted(self) -> int | None:
        """Change the slots from the next start on; return them, or None if no other are wanted."""
        with self._changed:
            slots, self._wanted = self._wanted, None
        if slots is not None:
            self.engine.use_slots(slots)
        return slots

    def _falls_back(self, error: EngineError) -> bool:
        """Return to the slots of before a change with which the engine does not start."""
        if self._fallback is None:
            return False
        slots, self._fallback = self._fallback, None
        self._say(f"{self._about(error.message)}; it gets {counted(slots, 'slot')} again")
        self.engine.use_slots(slots)
        return True

    def _keep(self) -> None:
        try:
            self._run()
        except AifluxError as error:
            if not self._closing and not self._on_failure(error):
                self._say(self._about(error.message))
            self._scheduler.close_lane(self.lane, gone=True)
        except BaseException as error:  # noqa: BLE001 - the pool would otherwise wait forever
            self._on_failure(error)
            self._scheduler.close_lane(self.lane, gone=True)
        finally:
            self.engine.stop()

    def _run(self) -> None:
        fruitless = 0
        completed = -1
        while not self._closing:
            began = time.monotonic()
            try:
                self.engine.start()
            except EngineError as error:
                if self._fallback is not None and self._ends():
                    return  # that it did not start does not count against its slots
                if self._falls_back(error):
                    continue
                # The start of an external engine has waited as long as the user asked for.
                may_help = self.engine.kind.managed and fruitless < RESTARTS_WITHOUT_PROGRESS
                if isinstance(error, RejectedError) or completed < 0 or not may_help:
                    raise
            else:
                self._fallback = None
                self.start_seconds = time.monotonic() - began
                self._open()
                self._wait_until_down()
            if self._closing:
                return
            self._scheduler.close_lane(self.lane)
            if self._changes_slots():
                continue
            if self._ends():
                return
            fruitless = 1 if self.lane.completed > completed >= 0 else fruitless + 1
            completed = self.lane.completed
            if fruitless > RESTARTS_WITHOUT_PROGRESS:
                raise self._no_progress(fruitless)
            self.restarts += 1
            self._on_crash(self.engine)
            slots = self._use_wanted()
            if self.engine.kind.managed:
                how = "" if slots is None else f" with {counted(slots, 'slot')}"
                self._say(f"engine {self.engine.index} is down; restarting it{how} ({fruitless})")
            else:
                self._say(f"the engine at {self.engine.facts.url} is down; waiting for it")

    def _ends(self) -> bool:
        """Return whether the worker stops, so that an engine that is down is not started again.

        A signal for the whole job ends the engine, and is handled here a moment later.
        """
        if self._closing:
            return True
        stops = self.engine.kind.managed and self._stops(_STOP_SECONDS)
        if stops:
            self._scheduler.close_lane(self.lane, gone=True)
        return stops

    def _about(self, message: str) -> str:
        """Return why the engine is used no more."""
        name = f"engine {self.engine.index}"
        return message if message.startswith(name) else f"{name} failed: {message}"

    def _no_progress(self, times: int) -> EngineError:
        facts = self.engine.facts
        if self.engine.kind.managed:
            return EngineError(
                f"engine {self.engine.index} crashed {counted(times, 'time')} without a new result",
                f"see its log: {facts.log}",
            )
        return EngineError(
            f"the engine at {facts.url} was down {counted(times, 'time')} without a new result",
            "check the server, then run the same command again",
        )

    def _open(self) -> None:
        self._on_ready(self.engine, self.lane)
        self._scheduler.open_lane(self.lane)
