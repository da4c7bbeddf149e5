"""Servers at ``--engine-url`` that are not ready, reject everything, or serve another model."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from aiflux.core.runs.journal import scan_journal
from aiflux.errors import ExitCode
from tests.tools.faulty_engine import FaultyEngine, Instead, Reply
from tests.unit.helpers import request_line
from tests.unit.working import Working

LOADING = b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'


def error(status: int, message: str, **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message}}).encode()
    return status, body, {"Content-Type": "application/json", **headers}


def rejecting(status: int, message: str = "no", path: str = "/v1/", **headers: str) -> Instead:
    """Return a server that answers every POST below a path with an error."""

    def instead(method: str, called: str, _: Mapping[str, str]) -> Reply | None:
        wanted = method == "POST" and called.startswith(path)
        return error(status, message, **headers) if wanted else None

    return instead


class Loading:
    """Like llama-server: every path answers 503 until the model is loaded."""

    def __init__(self) -> None:
        self.loading = False
        self.calls: Counter[str] = Counter()

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> Reply | None:
        if not self.loading:
            return None
        self.calls[method] += 1
        return 503, LOADING, {"Content-Type": "application/json"}


def recorded(working: Working) -> int:
    return scan_journal(working.journal).done if working.journal.exists() else 0


# --- not ready -----------------------------------------------------------------------------------


def test_the_worker_waits_for_an_engine_that_loads(tmp_path: Path) -> None:
    loading = Loading()
    loading.loading = True
    with FaultyEngine(instead=loading) as engine:
        working = Working(tmp_path, engine.url).prompts(*(f"p{i}" for i in range(20)))
        threading.Timer(0.5, setattr, (loading, "loading", False)).start()
        assert working.run() is ExitCode.OK
    assert loading.calls["POST"] == 0
    assert {entry["metadata"]["attempts"] for entry in working.results} == {1}
    assert any("is not ready (503): Loading model" in line for line in working.reporter.messages)


def test_a_llama_server_gets_as_many_requests_as_it_has_threads(tmp_path: Path) -> None:
    """With its default, the threads are two more than the slots."""

    def props(_: str, path: str, __: Mapping[str, str]) -> Reply | None:
        return (200, b'{"total_slots": 64}', {}) if path == "/props" else None

    with FaultyEngine(instead=props) as engine:
        working = Working(tmp_path, engine.url).prompts("a")
        assert working.run() is ExitCode.OK
    (line,) = [each for each in working.reporter.messages if "is ready" in each]
    assert line.endswith("is ready with 64 slots, 66 requests in flight")


def test_an_engine_that_loads_for_too_long_is_exit_4_with_its_message(tmp_path: Path) -> None:
    loading = Loading()
    loading.loading = True
    with FaultyEngine(instead=loading) as engine:
        working = Working(tmp_path, engine.url, engine_wait=0.3).prompts("a")
        assert working.run() is ExitCode.ENGINE
    assert working.error is not None
    assert "Loading model" in working.error.message
    assert recorded(working) == 0


@pytest.mark.parametrize("concurrency", [16, None])
def test_loading_during_a_run_does_not_count_as_an_attempt(
    tmp_path: Path, concurrency: int | None
) -> None:
    loading = Loading()
    with FaultyEngine(delay=0.01, instead=loading) as engine:
        working = Working(tmp_path, engine.url, max_retries=0, concurrency=concurrency)
        working.prompts(*(f"p{i}" for i in range(200)))

        def restart() -> None:
            while len(engine.bodies) < 30:
                time.sleep(0.005)
            loading.loading = True
            time.sleep(0.5)
            loading.loading = False

        thread = threading.Thread(target=restart)
        thread.start()
        code = working.run()
        thread.join()
    assert code is ExitCode.OK, working.status["errors"]
    assert loading.calls["POST"] <= 32, "the queue was held"
    assert len(working.results) == 200
    assert {entry["metadata"]["attempts"] for entry in working.results} == {1}


def test_an_overloaded_engine_is_not_mistaken_for_one_that_loads(tmp_path: Path) -> None:
    """Its list of models answers: the attempt counts, and the lane stays open."""
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, max_retries=1).prompts("503", "fine", "503*1")
        assert working.run() is ExitCode.FAILURES
    assert engine.seen["503"] == 2
    assert not any("is down" in line for line in working.reporter.messages)


def test_a_server_that_stays_away_is_waited_for_once(tmp_path: Path) -> None:
    with FaultyEngine(delay=0.01) as engine:
        working = Working(tmp_path, engine.url, concurrency=2, engine_wait=1.0)
        working.prompts(*(f"p{i}" for i in range(20)), "die", *(f"q{i}" for i in range(20)))
        assert working.run() is ExitCode.ENGINE
    assert "does not accept connections (Connection refused)" in str(working.error)
    lines = [line for line in working.reporter.messages if "Connection refused" in line]
    assert len(lines) == 1, "while it waits; the error repeats it"
    assert 20 <= scan_journal(working.journal).done < 41


def test_the_worker_waits_for_a_gateway_without_its_model_server(tmp_path: Path) -> None:
    gone = threading.Event()

    def instead(method: str, path: str, _: Mapping[str, str]) -> Reply | None:
        return (502, b"<html>Bad Gateway</html>", {}) if gone.is_set() else None

    with FaultyEngine(delay=0.01, instead=instead) as engine:
        working = Working(tmp_path, engine.url, max_retries=0, concurrency=4)
        working.prompts(*(f"p{i}" for i in range(60)))

        def restart() -> None:
            while len(engine.bodies) < 10:
                time.sleep(0.005)
            gone.set()
            time.sleep(0.4)
            gone.clear()

        thread = threading.Thread(target=restart)
        thread.start()
        assert working.run() is ExitCode.OK
        thread.join()
    assert {entry["metadata"]["attempts"] for entry in working.results} == {1}


@pytest.mark.parametrize("status", [404, 405, 429, 501])
def test_a_server_without_a_list_of_models_is_ready(tmp_path: Path, status: int) -> None:
    def instead(method: str, path: str, _: Mapping[str, str]) -> Reply | None:
        return error(status, "no list") if method == "GET" else None

    with FaultyEngine(instead=instead) as engine:
        working = Working(tmp_path, engine.url).prompts("a")
        assert working.run() is ExitCode.OK


# --- rejects everything --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 407, 410, 451, 301, 307, 308])
@pytest.mark.parametrize("count", [1, 300])
def test_rejections_of_every_request_are_exit_4_and_not_recorded(
    tmp_path: Path, status: int, count: int
) -> None:
    instead = rejecting(status, "go away", Location="https://login.example/start?session=s3cret")
    with FaultyEngine(instead=instead) as engine:
        working = Working(tmp_path, engine.url).prompts(*(f"p{i}" for i in range(count)))
        assert working.run() is ExitCode.ENGINE
        assert working.error is not None
        text = str(working.error)
        assert recorded(working) == 0
        assert not working.output.exists()
        if status < 400:
            assert "https://login.example/start" in text
            assert "s3cret" not in text
        else:
            assert "go away" in text
        engine.instead = None
        corrected = Working(tmp_path, engine.url)
        assert corrected.run() is ExitCode.OK
    assert len(corrected.results) == count


@pytest.mark.parametrize(
    ("status", "code", "reported", "remedy"),
    [
        (401, "invalid_api_key", "refuses the key (401)", "AIFLUX_API_KEY"),
        (402, "payment_required", "asks for payment (402)", "credit and quota"),
        (403, "forbidden", "rejected the only request to /v1/chat/completions (403)", "address"),
        (407, "proxy", "behind a proxy that requires a login (407)", "--engine-url"),
        (429, "insufficient_quota", "reports a used-up quota (429)", "credit and quota"),
        (451, "legal", "rejected the only request to /v1/chat/completions (451)", "address"),
    ],
)
def test_each_rejection_has_its_own_message(
    tmp_path: Path, status: int, code: str, reported: str, remedy: str
) -> None:
    body = json.dumps({"error": {"message": "its words", "code": code}}).encode()
    with FaultyEngine(instead=lambda method, *_: (status, body, {}) if method == "POST" else None) \
            as engine:  # fmt: skip
        working = Working(tmp_path, engine.url).prompts("a")
        assert working.run() is ExitCode.ENGINE
    assert working.error is not None
    assert f"{reported}: its words" in working.error.message
    assert remedy in str(working.error.remedy)
    assert ("refuses the key" in working.error.message) is (status == 401)
    assert recorded(working) == 0


def test_a_redirect_shows_the_address_to_use(tmp_path: Path) -> None:
    def instead(method: str, path: str, _: Mapping[str, str]) -> Reply | None:
        return 308, b"", {"Location": f"https://new.example:8443/llm{path}"}

    with FaultyEngine(instead=instead) as engine:
        working = Working(tmp_path, engine.url).prompts("a", "b")
        assert working.run() is ExitCode.ENGINE
    assert working.error is not None
    assert working.error.remedy == "use that address: --engine-url https://new.example:8443/llm"


def test_a_rejected_request_among_answers_fails(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        prompts = [f"404 {i}" if i % 3 else f"fine {i}" for i in range(60)]
        working = Working(tmp_path, engine.url, concurrency=4).prompts(*prompts)
        assert working.run() is ExitCode.FAILURES
    failed = [entry for entry in working.results if "error" in entry]
    assert len(failed) == 40
    # After the last rejections there may be no answer; then an earlier request is sent again.
    probes = sum(engine.seen.values()) - 60
    assert probes <= 1
    assert {count for text, count in engine.seen.items() if text.startswith("404")} == {1}


def test_more_rejections_in_a_row_than_enough_are_recorded_after_an_answer(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        prompts = ["fine", *(f"404 {i}" for i in range(30))]
        working = Working(tmp_path, engine.url, concurrency=1).prompts(*prompts)
        assert working.run() is ExitCode.FAILURES
    assert sum("error" in entry for entry in working.results) == 30


def test_all_requests_left_by_an_earlier_start_may_be_rejected(tmp_path: Path) -> None:
    """The others were answered in that start; the run must end."""
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, concurrency=1).prompts("a", "b", "403 x", "403 y")
        working.stop_soon(results=2)
        code = working.run()
        again = Working(tmp_path, engine.url)
        assert again.run() is ExitCode.FAILURES or code is ExitCode.FAILURES
    assert [("error" in entry) for entry in again.results] == [False, False, True, True]


def test_all_failures_allowed_records_rejections(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, max_failures="100%").prompts("404 a", "404 b")
        assert working.run() is ExitCode.OK
    assert [entry["error"]["status"] for entry in working.results] == [404, 404]


def test_a_key_that_expires_stops_the_run_and_keeps_results(tmp_path: Path) -> None:
    expired = threading.Event()

    def instead(method: str, path: str, _: Mapping[str, str]) -> Reply | None:
        return error(401, "token expired") if expired.is_set() else None

    with FaultyEngine(delay=0.01, instead=instead) as engine:
        working = Working(tmp_path, engine.url, concurrency=4)
        working.prompts(*(f"p{i}" for i in range(100)))

        def expire() -> None:
            while len(engine.bodies) < 20:
                time.sleep(0.005)
            expired.set()

        thread = threading.Thread(target=expire)
        thread.start()
        assert working.run() is ExitCode.ENGINE
        thread.join()
        done = recorded(working)
        assert 10 < done < 100
        assert working.status["request_counts"]["failed"] == 0
        expired.clear()
        again = Working(tmp_path, engine.url)
        assert again.run() is ExitCode.OK
    assert len(engine.bodies) == 100 + len(engine.bodies) - sum(engine.seen.values())
    assert set(engine.seen.values()) == {1}


def test_a_model_that_disappears_during_a_run_fails_no_request(tmp_path: Path) -> None:
    gone = threading.Event()

    def instead(method: str, path: str, _: Mapping[str, str]) -> Reply | None:
        return error(404, "no such model") if gone.is_set() and method == "POST" else None

    with FaultyEngine(delay=0.01, instead=instead, models=("m:1", "other")) as engine:
        working = Working(tmp_path, engine.url, concurrency=4)
        working.prompts(*(f"p{i}" for i in range(100)))

        def unload() -> None:
            while len(engine.bodies) < 20:
                time.sleep(0.005)
            engine.models = ("other",)
            gone.set()

        thread = threading.Thread(target=unload)
        thread.start()
        assert working.run() is ExitCode.ENGINE
        thread.join()
    assert working.status["request_counts"]["failed"] == 0
    assert working.error is not None
    assert "does not offer the model 'm:1'" in working.error.message


def test_a_missing_endpoint_is_reported_by_name(tmp_path: Path) -> None:
    instead = rejecting(404, "File Not Found", path="/v1/embeddings")
    with FaultyEngine(instead=instead) as engine:
        working = Working(tmp_path, engine.url, concurrency=2)
        lines = [request_line(f"c{i}") for i in range(8)]
        body = {"model": "m:1", "input": "x"}
        lines += [request_line(f"e{i}", url="/v1/embeddings", body=body) for i in range(40)]
        working.input.write_text("\n".join(lines), encoding="utf-8")
        assert working.run() is ExitCode.ENGINE
    assert working.error is not None
    assert "requests to /v1/embeddings (404): File Not Found" in working.error.message
    assert recorded(working) == 8
    assert working.status["request_counts"]["failed"] == 0


@pytest.mark.parametrize(
    ("kind", "body", "shown"),
    [
        ("text/html; charset=utf-8", b"<html><head><title>\n Sign in </title>", "titled 'Sign in'"),
        ("text/html", b"<!DOCTYPE html><p>It works!</p>", "(text/html)"),
        ("text/plain", b"pong", "'pong' (text/plain)"),
        ("application/json", b'{"status": "ok"}', "without content"),
        ("application/json", b"[]", "not a JSON object"),
        ("", b"", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("count", [1, 100])
def test_a_server_without_an_openai_api_is_exit_4_and_records_nothing(
    tmp_path: Path, kind: str, body: bytes, shown: str, count: int
) -> None:
    page = (200, body, {"Content-Type": kind} if kind else {})
    with FaultyEngine(instead=lambda *_: page) as engine:
        working = Working(tmp_path, engine.url, max_retries=1).prompts(*(["p"] * count))
        assert working.run() is ExitCode.ENGINE
        assert working.error is not None
        assert "something other than an OpenAI API" in working.error.message
        assert shown in working.error.message
        assert "--engine-url" in str(working.error.remedy)
        assert recorded(working) == 0
        engine.instead = None
        corrected = Working(tmp_path, engine.url)
        assert corrected.run() is ExitCode.OK
    assert len(corrected.results) == count


def test_a_success_without_content_is_no_answer(tmp_path: Path) -> None:
    with FaultyEngine(instead=lambda *_: (204, b"", {})) as engine:
        working = Working(tmp_path, engine.url, max_retries=0).prompts("a", "b")
        assert working.run() is ExitCode.ENGINE
    assert working.error is not None
    assert "something other than an OpenAI API response (204)" in working.error.message
    assert recorded(working) == 0


def test_a_web_page_among_answers_fails_its_request(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, max_retries=0, concurrency=4)
        working.prompts(*(f"{'html' if i % 3 else 'fine'} {i}" for i in range(60)))
        assert working.run() is ExitCode.FAILURES
    assert sum("error" in entry for entry in working.results) == 40


# --- another model -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 422])
def test_an_unknown_model_is_reported_with_the_available_names(tmp_path: Path, status: int) -> None:
    models = ("llama3.2:3b", "qwen3:8b")
    with FaultyEngine(models=models, instead=rejecting(status, "unknown model")) as engine:
        working = Working(tmp_path, engine.url)
        working.prompts(*(f"p{i}" for i in range(50)), model="lama3.2:3b")
        assert working.run() is ExitCode.ENGINE
    assert working.error is not None
    assert "does not offer the model 'lama3.2:3b'" in working.error.message
    assert "did you mean 'llama3.2:3b'?" in str(working.error.remedy)
    assert "qwen3:8b" in str(working.error.remedy)
    assert recorded(working) == 0


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("status", [400, 404])
def test_a_slow_list_of_models_still_explains_the_rejections(
    tmp_path: Path, status: int, answers: bool
) -> None:
    """Ten rejections come before the query of the list, which the first one started, ends."""
    looks = Counter[str]()
    reject = rejecting(status, "unknown model")

    def instead(method: str, path: str, headers: Mapping[str, str]) -> Reply | None:
        looks[method] += 1
        if method == "GET" and looks[method] > 1:
            time.sleep(0.4)
            return None if answers else (200, b"", {"Content-Length": "9"})
        return reject(method, path, headers)

    with FaultyEngine(models=("llama3.2:3b",), instead=instead) as engine:
        working = Working(tmp_path, engine.url, concurrency=16)
        working.prompts(*(f"p{i}" for i in range(50)), model="lama3.2:3b")
        assert working.run() is ExitCode.ENGINE
    assert working.error is not None
    assert "does not offer the model 'lama3.2:3b'" in working.error.message
    assert recorded(working) == 0


def test_a_bad_request_for_a_listed_model_fails(tmp_path: Path) -> None:
    with FaultyEngine(models=("m:1",)) as engine:
        working = Working(tmp_path, engine.url).prompts("400", "400")
        assert working.run() is ExitCode.FAILURES
    assert [entry["error"]["status"] for entry in working.results] == [400, 400]


def test_a_server_that_answers_for_any_model_is_detected(tmp_path: Path) -> None:
    with FaultyEngine(models=("tiny.gguf",), answers_as="tiny.gguf") as engine:
        working = Working(tmp_path, engine.url).prompts("a", "b", "c")
        assert working.run() is ExitCode.ENGINE
        assert recorded(working) == 0
    assert working.error is not None
    assert "answers as 'tiny.gguf', but 'm:1' was requested" in working.error.message
    assert "use one of: tiny.gguf" in str(working.error.remedy)


@pytest.mark.parametrize(
    ("asked", "listed", "answered"),
    [
        ("b", ("a", "b"), "a"),  # vLLM reports the first of several served names
        ("gpt-4o", ("gpt-4o-2024-08-06",), "gpt-4o-2024-08-06"),
        ("org/model", ("model",), "model"),
        ("openai/gpt-4o", ("openai/*",), "gpt-4o"),
        ("tgi", (), "meta-llama/Llama-3.1-8B"),
    ],
)
def test_metadata_names_the_model_that_ran(
    tmp_path: Path, asked: str, listed: tuple[str, ...], answered: str
) -> None:
    with FaultyEngine(models=listed, answers_as=answered) as engine:
        working = Working(tmp_path, engine.url).prompts("x", "y", model=asked)
        assert working.run() is ExitCode.OK
    for entry in working.results:
        assert entry["metadata"]["model"] == answered
        assert entry["metadata"]["requested_model"] == asked
    assert sum("answers as" in line for line in working.reporter.messages) == 1


@pytest.mark.parametrize(
    ("listed", "warned"), [(("tiny", "large"), True), (("m:1",), False), ((), False)]
)
def test_a_server_that_answers_in_the_name_of_a_model_it_does_not_list_gets_a_warning(
    tmp_path: Path, listed: tuple[str, ...], warned: bool
) -> None:
    with FaultyEngine(models=listed) as engine:
        working = Working(tmp_path, engine.url).prompts("x", "y")
        assert working.run() is ExitCode.OK
    warnings = [line for line in working.reporter.messages if "does not list the model" in line]
    assert len(warnings) == warned
    if warned:
        assert "'m:1'" in warnings[0]
        assert "it lists tiny and large" in warnings[0]


@pytest.mark.parametrize("answered", ["Llama3.2", "llama3.2:latest"])
def test_names_that_differ_only_in_form_are_the_same(tmp_path: Path, answered: str) -> None:
    with FaultyEngine(models=("llama3.2:latest",), answers_as=answered) as engine:
        working = Working(tmp_path, engine.url).prompts("x", model="llama3.2")
        assert working.run() is ExitCode.OK
    assert working.results[0]["metadata"]["model"] == "llama3.2"
    assert "requested_model" not in working.results[0]["metadata"]


def test_the_second_of_two_models_may_be_missing(tmp_path: Path) -> None:
    with FaultyEngine(models=("m:1",), answers_as="m:1") as engine:
        working = Working(tmp_path, engine.url)
        asked = [{"content": "x"}]  # FaultyEngine echoes the last message.
        lines = [
            request_line(f"r{i}", body={"model": f"m:{i % 2 + 1}", "messages": asked})
            for i in range(20)
        ]
        working.input.write_text("\n".join(lines), encoding="utf-8")
        assert working.run() is ExitCode.ENGINE
        assert recorded(working) == 10, "the first model's answers are kept"
    assert working.error is not None
    assert "'m:2' was requested" in working.error.message
