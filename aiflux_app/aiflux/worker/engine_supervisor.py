"""Supervision of engines: each has a thread that starts it, and starts it again when it fails.

It opens the engine's lane to requests when the model answers. An engine that fails three times
without a result in between is given up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from aiflux.engines.base import Engine
from aiflux.errors import AifluxError, EngineError, RejectedError
from aiflux.util.process_limits import start_thread
from aiflux.worker.scheduler import Lane, Scheduler

RESTARTS_WITHOUT_PROGRESS = 3


class EngineSupervisor:
    """Starts an engine and brings it back; one thread for each engine."""

    def __init__(
        self,
        engine: Engine,
        lane: Lane,
        scheduler: Scheduler,
        *,
        say: Callable[[str], None],
        on_ready: Callable[[Engine, Lane], None],
    ) -> None:
        self.engine = engine
        self.lane = lane
        self.failure: BaseException | None = None
        self.restarts = 0
        self._scheduler = scheduler
        self._say = say
        self._on_ready = on_ready
        self._changed = threading.Condition()
        self._down_in = -1
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to start the engine; returns at once."""
        self._thread = start_thread(self._keep, f"engine-{self.engine.index}")

    def close(self) -> None:
        """Stop the engine for good and wait for that."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.engine.close()
        if self._thread is not None:
            self._thread.join()

    def report_down(self, generation: int) -> None:
        """Have the engine restarted, unless it has been since ``generation``.

        Every request in flight reports the same death, some of them while the engine starts again
        or after that: it is the generation that tells that they mean the one before.
        """
        with self._changed:
            self._down_in = max(self._down_in, generation)
            self._changed.notify()

    def _wait_until_down(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._down_in >= self.lane.generation)

    def _keep(self) -> None:
        try:
            self._run()
        except AifluxError as error:
            if not self._closing:
                self.failure = error
                self._say(f"engine {self.engine.index} is gone: {error.message}")
            self._scheduler.close_lane(self.lane, gone=True)
        except BaseException as error:  # noqa: BLE001 - the pool would wait for this engine for ever
            self.failure = error
            self._scheduler.close_lane(self.lane, gone=True)
        finally:
            self.engine.stop()

    def _run(self) -> None:
        fruitless = 0
        completed = -1
        while not self._closing:
            try:
                self.engine.start()
            except RejectedError:
                raise
            except EngineError:
                if completed < 0 or fruitless >= RESTARTS_WITHOUT_PROGRESS:
                    raise
            else:
                self._open()
                self._wait_until_down()
            if self._closing:
                return
            self._scheduler.close_lane(self.lane)
            fruitless = 1 if self.lane.completed > completed >= 0 else fruitless + 1
            completed = self.lane.completed
            if fruitless > RESTARTS_WITHOUT_PROGRESS:
                raise EngineError(
                    f"engine {self.engine.index} died {fruitless} times without a result between",
                    f"see its log: {self.engine.facts.log or self.engine.facts.url}",
                )
            self.restarts += 1
            self._say(f"engine {self.engine.index} is down; starting it again ({fruitless})")

    def _open(self) -> None:
        self._on_ready(self.engine, self.lane)
        self._scheduler.open_lane(self.lane)
