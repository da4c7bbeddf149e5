"""The supervisor of an engine: each crash causes one start, whoever reports it and when."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aiflux.core.runs.journal import scan_journal
from aiflux.core.runs.status_file import EngineFacts
from aiflux.engines.base import EngineKind
from aiflux.engines.http import Client
from aiflux.engines.kinds import kind_named
from aiflux.errors import EngineError, ExitCode
from aiflux.worker.concurrency import FixedLimit
from aiflux.worker.engine_supervisor import EngineSupervisor
from aiflux.worker.scheduler import Lane, Scheduler
from tests.tools import faulty_engine, make_tiny_gguf
from tests.tools.engine_contract import until
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import write_program
from tests.unit.made_models import put_model
from tests.unit.working import Working


class SlowEngine:
    """An engine that needs a moment to start, and counts its starts.

    Attributes:
        most: slots with which it starts.
    """

    index = 0

    def __init__(self, url: str, kind: EngineKind) -> None:
        self.kind = kind
        self.facts = EngineFacts(url=url, log="engine.log", slots=2)
        self.slots = self.most = 2
        self.client = Client(url, 5.0, connections=4)
        self.starts = 0
        self.starting = threading.Event()

    def start(self) -> None:
        self.starts += 1
        self.starting.set()
        time.sleep(0.2)
        if self.slots > self.most:
            raise EngineError("killed", "")

    def use_slots(self, count: int) -> None:
        self.slots = self.facts.slots = count

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self.client.close()


@contextmanager
def supervising(
    kind: str,
    say: Callable[[str], None],
    on_failure: Callable[[BaseException], bool] = lambda _: False,
    stops: Callable[[float], bool] = lambda _: False,
) -> Iterator[tuple[EngineSupervisor, SlowEngine]]:
    with FaultyEngine() as server:
        engine = SlowEngine(server.url, kind_named(kind))
        lane = Lane(0, FixedLimit(1), open=False)
        scheduler = Scheduler(iter(()), [lane])
        supervisor = EngineSupervisor(
            engine,  # type: ignore[arg-type]
            lane,
            scheduler,
            say=say,
            on_ready=lambda *_: None,
            on_failure=on_failure,
            stops=stops,
        )
        supervisor.start()
        yield supervisor, engine
        supervisor.close()


@pytest.fixture
def supervised() -> Iterator[tuple[EngineSupervisor, SlowEngine]]:
    with supervising("ollama", lambda _: None) as made:
        yield made


def wait_for_generation(supervisor: EngineSupervisor, generation: int) -> None:
    until(lambda: supervisor.lane.generation >= generation, 5)
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


def test_an_engine_that_a_stop_ends_is_not_started_again() -> None:
    """A signal for the whole job reaches the engine first, and the worker a moment later."""
    printed: list[str] = []
    stopping = threading.Event()
    with supervising("llamacpp", printed.append, stops=stopping.wait) as (supervisor, engine):
        wait_for_generation(supervisor, 1)
        supervisor.report_down(1)
        time.sleep(0.1)
        stopping.set()
        until(lambda: supervisor.lane.gone, 5)
        assert engine.starts == 1
    assert printed == []


def test_a_stop_that_ends_a_start_with_other_slots_does_not_count_against_them() -> None:
    printed: list[str] = []
    stopping = threading.Event()
    with supervising("llamacpp", printed.append, stops=stopping.wait) as (supervisor, engine):
        wait_for_generation(supervisor, 1)
        engine.starting.clear()
        supervisor.restart(4)
        assert engine.starting.wait(5)
        time.sleep(0.3)  # the engine has ended, and the worker has not had its signal yet
        stopping.set()
        until(lambda: supervisor.lane.gone, 5)
        assert engine.starts == 2
    assert printed == ["engine 0 starts again with 4 slots"]


def test_slots_that_are_wanted_hold_after_a_crash_while_requests_end() -> None:
    printed: list[str] = []
    with supervising("llamacpp", printed.append) as (supervisor, engine):
        wait_for_generation(supervisor, 1)
        supervisor.lane.in_flight = 1
        engine.most = 4
        supervisor.restart(4)
        time.sleep(0.1)
        supervisor.report_down(1)
        wait_for_generation(supervisor, 2)
        assert engine.slots == 4
    assert printed == ["engine 0 is down; restarting it with 4 slots (1)"]


def test_each_crash_causes_a_start(supervised: tuple[EngineSupervisor, SlowEngine]) -> None:
    supervisor, engine = supervised
    for generation in range(1, 4):
        wait_for_generation(supervisor, generation)
        supervisor.report_down(generation)
    wait_for_generation(supervisor, 4)
    assert engine.starts == 4


@pytest.mark.parametrize(
    ("kind", "again", "end"),
    [
        (
            "llamacpp",
            "engine 0 is down; restarting it (1)",
            "engine 0 crashed 4 times without a new result",
        ),
        (
            "external",
            "the engine at URL is down; waiting for it",
            "the engine at URL was down 4 times without a new result",
        ),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_an_engine_that_stays_down_is_given_up(kind: str, again: str, end: str, last: bool) -> None:
    """The error of the last engine is the run's, which is reported at the end."""
    printed: list[str] = []
    failures: list[BaseException] = []

    def on_failure(error: BaseException) -> bool:
        failures.append(error)
        return last

    with supervising(kind, printed.append, on_failure) as (supervisor, engine):
        for generation in range(1, 5):
            wait_for_generation(supervisor, generation)
            supervisor.report_down(generation)
        until(lambda: failures, 5)
    assert printed[0] == again.replace("URL", engine.facts.url)
    (failure,) = failures
    assert isinstance(failure, EngineError)
    assert failure.message == end.replace("URL", engine.facts.url)
    assert any(failure.message in line for line in printed) != last


@pytest.fixture
def failing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Working]:
    """Return a run with an engine of ours that has a fault after some answers; see the tool."""

    def make(fault: str, answers: int, requests: int, **options: object) -> Working:
        starts = str(tmp_path / "starts")
        tool = [sys.executable, faulty_engine.__file__, fault, str(answers), starts]
        text = f'#!/bin/sh\nexec {shlex.join(tool)} "$@"\n'
        program = write_program(tmp_path / "llama-server", text)
        monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(program))
        models = tmp_path / "models"
        put_model(models, "tiny:latest", make_tiny_gguf.tiny())
        prompts = (f"p{i}" for i in range(requests))
        return Working(
            tmp_path, None, models_dir=models, engine="llamacpp", model="tiny:latest",
            concurrency=4, allow_cpu=True, **options,
        ).prompts(*prompts, model="tiny:latest")  # fmt: skip

    return make


@pytest.mark.parametrize("fault", ["500", "hang"])
def test_a_server_that_runs_but_answers_nothing_is_restarted(
    fault: str, failing_run: Callable[..., Working], tmp_path: Path
) -> None:
    """Its process lives, so only requests show that it does not work."""
    # On a busy machine, an answer can take half a second too.
    working = failing_run(fault, 20, 60, request_timeout=0.5 if fault == "hang" else 30)
    assert working.run() is ExitCode.OK, working.error
    assert (tmp_path / "starts").read_text().count("started") == 2
    assert len(working.results) == 60
    assert not any("error" in entry for entry in working.results)
    assert "engine 0 is down; restarting it (1)" in working.reporter.messages
    if fault == "500":  # an attempt in an outage does not count
        attempts = [entry["metadata"]["attempts"] for entry in working.results]
        # The last answer of before can arrive after the first failures of those sent with it.
        assert set(attempts) <= {1, 2}
        assert attempts.count(2) < 4


@pytest.mark.parametrize("requests", [1, 30])
def test_an_engine_of_ours_that_fails_every_request_is_exit_4(
    requests: int, failing_run: Callable[..., Working]
) -> None:
    working = failing_run("500", 0, requests, max_retries=1)
    assert working.run() is ExitCode.ENGINE
    assert working.error is not None
    assert "http_500: CUDA error" in working.error.message
    assert "nothing was recorded" in working.error.message
    assert "aiflux logs --engine" in str(working.error.remedy)
    assert scan_journal(working.journal).done == 0
    assert working.run() is ExitCode.OK
    assert len(working.results) == requests


def test_failures_of_an_engine_of_ours_are_recorded_if_all_may_fail(
    failing_run: Callable[..., Working],
) -> None:
    working = failing_run("500", 0, 12, max_retries=0, max_failures="100%")
    assert working.run() is ExitCode.OK
    assert working.status["request_counts"]["failed"] == 12


def test_a_report_of_an_earlier_start_does_not_close_the_lane() -> None:
    lane = Lane(0, FixedLimit(1), open=False)
    scheduler = Scheduler(iter(()), [lane])
    scheduler.open_lane(lane)
    scheduler.open_lane(lane)
    scheduler.close_lane(lane, generation=1)
    assert lane.open
    scheduler.close_lane(lane, generation=2)
    assert not lane.open
