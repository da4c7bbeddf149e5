"""The keeper of an engine: one death is one start, whoever reports it and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from aiflux.engines.http import Client
from aiflux.worker.concurrency import FixedLimit
from aiflux.worker.engines import Keeper
from aiflux.worker.scheduler import Lane, Scheduler
from tests.tools.faulty_engine import FaultyEngine


class SlowEngine:
    """An engine that needs a moment to start, and counts its starts."""

    index = 0
    bundled = True
    slots = 1

    def __init__(self, url: str) -> None:
        self.facts = {"log": "engine.log"}
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
def kept() -> Iterator[tuple[Keeper, SlowEngine]]:
    with FaultyEngine() as server:
        engine = SlowEngine(server.url)
        lane = Lane(0, FixedLimit(1), open=False)
        scheduler = Scheduler(iter(()), [lane])
        keeper = Keeper(
            engine,  # type: ignore[arg-type]
            lane,
            scheduler,
            say=lambda _: None,
            on_ready=lambda *_: None,
        )
        keeper.start()
        yield keeper, engine
        keeper.close()


def wait_for_generation(keeper: Keeper, generation: int) -> None:
    deadline = time.monotonic() + 5
    while keeper.lane.generation < generation and time.monotonic() < deadline:
        time.sleep(0.01)
    assert keeper.lane.generation == generation


def test_late_reports_of_one_death_cause_one_start(kept: tuple[Keeper, SlowEngine]) -> None:
    keeper, engine = kept
    wait_for_generation(keeper, 1)
    engine.starting.clear()
    keeper.report_down(1)
    assert engine.starting.wait(5)
    for _ in range(20):
        keeper.report_down(1)
    wait_for_generation(keeper, 2)
    keeper.report_down(1)
    time.sleep(0.4)
    assert engine.starts == 2
    assert keeper.restarts == 1
    assert keeper.lane.open


def test_each_death_is_a_start(kept: tuple[Keeper, SlowEngine]) -> None:
    keeper, engine = kept
    for generation in range(1, 4):
        wait_for_generation(keeper, generation)
        keeper.report_down(generation)
    wait_for_generation(keeper, 4)
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
