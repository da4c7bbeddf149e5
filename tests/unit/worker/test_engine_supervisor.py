"""The supervisor of an engine: each crash causes one start, whoever reports it and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from aiflux.core.runs.status_file import EngineFacts
from aiflux.engines.http import Client
from aiflux.worker.concurrency import FixedLimit
from aiflux.worker.engine_supervisor import EngineSupervisor
from aiflux.worker.scheduler import Lane, Scheduler
from tests.tools.faulty_engine import FaultyEngine


class SlowEngine:
    """An engine that needs a moment to start, and counts its starts."""

    index = 0

    def __init__(self, url: str) -> None:
        self.facts = EngineFacts(log="engine.log")
        self.client = Client(url, 5.0, connections=4)
        self.starts = 0
        self.starting = threading.Event()

    def start(self) -> None:
        self.starts += 1
        self.starting.set()
        time.sleep(0.2)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self.client.close()


@pytest.fixture
def supervised() -> Iterator[tuple[EngineSupervisor, SlowEngine]]:
    with FaultyEngine() as server:
        engine = SlowEngine(server.url)
        lane = Lane(0, FixedLimit(1), open=False)
        scheduler = Scheduler(iter(()), [lane])
        supervisor = EngineSupervisor(
            engine,  # type: ignore[arg-type]
            lane,
            scheduler,
            say=lambda _: None,
            on_ready=lambda *_: None,
        )
        supervisor.start()
        yield supervisor, engine
        supervisor.close()


def wait_for_generation(supervisor: EngineSupervisor, generation: int) -> None:
    deadline = time.monotonic() + 5
    while supervisor.lane.generation < generation and time.monotonic() < deadline:
        time.sleep(0.01)
    assert supervisor.lane.generation == generation


def test_late_reports_of_one_crash_cause_one_start(
    supervised: tuple[EngineSupervisor, SlowEngine],
) -> None:
    supervisor, engine = supervised
    wait_for_generation(supervisor, 1)
    engine.starting.clear()
    supervisor.report_down(1)
    assert engine.starting.wait(5)
    for _ in range(20):
        supervisor.report_down(1)
    wait_for_generation(supervisor, 2)
    supervisor.report_down(1)
    time.sleep(0.4)
    assert engine.starts == 2
    assert supervisor.restarts == 1
    assert supervisor.lane.open


def test_each_crash_causes_a_start(supervised: tuple[EngineSupervisor, SlowEngine]) -> None:
    supervisor, engine = supervised
    for generation in range(1, 4):
        wait_for_generation(supervisor, generation)
        supervisor.report_down(generation)
    wait_for_generation(supervisor, 4)
    assert engine.starts == 4


def test_a_report_of_an_earlier_start_does_not_close_the_lane() -> None:
    lane = Lane(0, FixedLimit(1), open=False)
    scheduler = Scheduler(iter(()), [lane])
    scheduler.open_lane(lane)
    scheduler.open_lane(lane)
    scheduler.close_lane(lane, generation=1)
    assert lane.open
    scheduler.close_lane(lane, generation=2)
    assert not lane.open
