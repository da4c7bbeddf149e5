"""A server that lists its models and answers no request: a router without backends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from aiflux.core.runs.journal import scan_journal
from aiflux.errors import ExitCode
from tests.tools.faulty_engine import FaultyEngine, Reply
from tests.unit.working import Working

REQUESTS = 60
WORDS = "no backend"


def in_json(status: int, value: object) -> Reply:
    return status, json.dumps(value).encode(), {"Content-Type": "application/json"}


def broken() -> Reply:
    raise ConnectionResetError


REPLIES: dict[str, Callable[[], Reply]] = {
    **{
        str(status): lambda status=status: in_json(status, {"error": {"message": WORDS}})  # type: ignore[misc]
        for status in (403, 404, 429, 500, 502, 503, 504)
    },
    "reset": broken,
    "html": lambda: (
        200, f"<html><title>{WORDS}</title></html>".encode(), {"Content-Type": "text/html"}
    ),
    "error": lambda: in_json(200, {"error": {"message": WORDS}}),
    "no choices": lambda: in_json(200, {"choices": []}),
}  # fmt: skip


class Router:
    """Fails for some seconds after some answers, and counts the requests meanwhile."""

    def __init__(self, reply: Callable[[], Reply], answers: int, seconds: float) -> None:
        self.reply = reply
        self.answers = answers
        self.seconds = seconds
        self.since = 0.0
        self.refused = 0

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> Reply | None:
        if method == "GET":
            return None
        self.answers -= 1
        if self.answers >= 0:
            return None
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since > self.seconds:
            return None
        self.refused += 1
        return self.reply()


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine(delay=0.005) as engine:
        yield engine


def failed(working: Working) -> int:
    return int(working.status["request_counts"]["failed"])


@pytest.mark.parametrize(
    ("reply", "concurrency", "max_retries"),
    [*((reply, 8, 3) for reply in REPLIES), ("500", 1, 0), ("html", 1, 0), ("403", 1, 0)],
)
def test_a_temporary_outage_fails_no_request(
    reply: str, concurrency: int, max_retries: int, engine: FaultyEngine, tmp_path: Path
) -> None:
    engine.instead = router = Router(REPLIES[reply], 20, 0.8)
    working = Working(
        tmp_path, engine.url, concurrency=concurrency, max_retries=max_retries, engine_wait=30.0
    ).prompts(*(f"p{i}" for i in range(REQUESTS)))
    assert working.run() is ExitCode.OK, working.error
    assert len(working.results) == REQUESTS
    assert failed(working) == 0
    assert router.refused < 60
    assert any("waiting up to 30 s" in line for line in working.reporter.messages)
    assert any("answers again" in line for line in working.reporter.messages)


@pytest.mark.parametrize("reply", REPLIES)
def test_a_permanent_outage_is_exit_4_and_records_nothing(
    reply: str, engine: FaultyEngine, tmp_path: Path
) -> None:
    engine.instead = Router(REPLIES[reply], 20, 1e9)
    working = Working(tmp_path, engine.url, concurrency=8, engine_wait=0.6)
    working.prompts(*(f"p{i}" for i in range(REQUESTS)))
    for _ in range(2):
        assert working.run() is ExitCode.ENGINE
        assert working.error is not None
        assert "answers no request any more" in working.error.message
        if reply not in ("reset", "no choices"):
            assert WORDS in working.error.message
        assert failed(working) == 0
        assert scan_journal(working.journal).done == 20
    engine.instead = None
    assert working.run() is ExitCode.OK
    assert len(working.results) == REQUESTS


def test_the_last_few_requests_in_an_outage_are_sent_again(
    engine: FaultyEngine, tmp_path: Path
) -> None:
    engine.instead = Router(REPLIES["502"], 17, 0.8)
    working = Working(tmp_path, engine.url, concurrency=8, max_retries=1, engine_wait=30.0)
    assert working.prompts(*(f"p{i}" for i in range(20))).run() is ExitCode.OK, working.error
    assert len(working.results) == 20


def test_nothing_is_recorded_if_no_request_was_ever_answered(
    engine: FaultyEngine, tmp_path: Path
) -> None:
    engine.instead = Router(REPLIES["500"], 0, 0.8)
    working = Working(tmp_path, engine.url, concurrency=8, max_retries=1, engine_wait=0.3)
    assert working.prompts(*(f"p{i}" for i in range(REQUESTS))).run() is ExitCode.ENGINE
    assert scan_journal(working.journal).done == 0
    patient = Working(tmp_path, engine.url, engine_wait=30.0)
    assert patient.run() is ExitCode.OK


@pytest.mark.parametrize("requests", [1, 9])
@pytest.mark.parametrize("reply", REPLIES)
def test_a_run_of_any_size_that_gets_no_answer_at_all_is_exit_4(
    reply: str, requests: int, engine: FaultyEngine, tmp_path: Path
) -> None:
    engine.instead = Router(REPLIES[reply], 0, 1e9)
    working = Working(tmp_path, engine.url, concurrency=4, max_retries=1, engine_wait=0.3)
    assert working.prompts(*(f"p{i}" for i in range(requests))).run() is ExitCode.ENGINE
    assert working.error is not None
    assert "any more" not in working.error.message
    assert "--max-failures 100%" in working.error.remedy or reply in ("html", "403", "404")
    assert scan_journal(working.journal).done == 0
    engine.instead = None
    assert working.run() is ExitCode.OK
    assert len(working.results) == requests


@pytest.mark.parametrize("reply", REPLIES)
def test_failures_of_a_small_run_are_recorded_if_all_may_fail(
    reply: str, engine: FaultyEngine, tmp_path: Path
) -> None:
    engine.instead = Router(REPLIES[reply], 0, 1e9)
    working = Working(
        tmp_path, engine.url, max_retries=0, engine_wait=60.0, max_failures="100%"
    ).prompts("a", "b")
    assert working.run() is ExitCode.OK
    assert failed(working) == 2


@pytest.mark.parametrize("fault", ["500", "503", "html", "error", "403", "404", "400", "422"])
def test_many_bad_requests_in_a_row_are_failures(
    fault: str, engine: FaultyEngine, tmp_path: Path
) -> None:
    working = Working(tmp_path, engine.url, concurrency=4, max_retries=1, engine_wait=60.0)
    good, bad = [f"p{i}" for i in range(10)], [f"{fault} {i}" for i in range(40)]
    assert working.prompts(*good, *bad).run() is ExitCode.FAILURES
    assert sum("error" in entry for entry in working.results) == 40
    # Answers of an earlier start have the same effect.
    more = Working(tmp_path, engine.url, "out.json", concurrency=4, max_retries=0, engine_wait=60.0)
    more.prompts(*good, *bad, *(f"{fault} more {i}" for i in range(20)))
    assert more.run(force=True) is ExitCode.FAILURES
    assert sum("error" in entry for entry in more.results) == 60


def test_one_bad_request_is_a_failure(engine: FaultyEngine, tmp_path: Path) -> None:
    working = Working(tmp_path, engine.url, concurrency=4, engine_wait=60.0)
    assert working.prompts("fine", "500", "also fine", "503").run() is ExitCode.FAILURES
    assert ["error" in entry for entry in working.results] == [False, True, False, True]


def test_bad_requests_and_an_outage(engine: FaultyEngine, tmp_path: Path) -> None:
    engine.instead = Router(REPLIES["503"], 40, 0.8)
    working = Working(tmp_path, engine.url, concurrency=4, max_retries=1, engine_wait=30.0)
    working.prompts(*(f"{'500' if i % 5 == 0 else 'fine'} {i}" for i in range(REQUESTS)))
    assert working.run() is ExitCode.FAILURES
    assert [i for i, entry in enumerate(working.results) if "error" in entry] == list(
        range(0, REQUESTS, 5)
    )


def test_a_stop_ends_the_wait(engine: FaultyEngine, tmp_path: Path) -> None:
    working = Working(tmp_path, engine.url, concurrency=4, engine_wait=60.0)

    def away() -> Reply:
        if time.monotonic() - router.since > 1.0:
            working.stopper.stop("enough")
        return REPLIES["500"]()

    engine.instead = router = Router(away, 20, 1e9)
    began = time.monotonic()
    assert working.prompts(*(f"p{i}" for i in range(REQUESTS))).run() is ExitCode.STOPPED
    assert time.monotonic() - began < 8
    assert scan_journal(working.journal).done == 20
