"""Several answers to one request, from engines that give them, ignore ``n`` or refuse it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.api.report import read_report
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import is_part, journal_lines
from aiflux.core.runs.plan import read_plan
from aiflux.engines.kinds import kind_named
from aiflux.errors import ExitCode
from aiflux.report.journal_summary import tally
from aiflux.slurm.preflight.local import check_fields
from tests.tools.counting_server import LLAMA, VLLM, CountingServer
from tests.tools.faulty_engine import FaultyEngine, Reply
from tests.unit.helpers import request_line
from tests.unit.working import Working

TOOLS = Path(__file__).parents[2] / "tools"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}}


def texts(result: dict[str, Any]) -> list[str]:
    """Return the answers of a result, which must be numbered in their order."""
    choices = result["output"]["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["message"]["content"] if "message" in choice else choice["text"]
            for choice in choices]  # fmt: skip


def expected(prompt: str, wanted: int, seed: int = 7) -> list[str]:
    return [f"{prompt} {seed + number}" for number in range(wanted)]


def parts_in(journal: Path) -> int:
    return sum(is_part(line) for _, line in journal_lines(journal))


@settings(max_examples=12, deadline=None)
@given(
    wanted=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    choices=st.sampled_from([0, 1, 2, 9]),
    concurrency=st.integers(1, 8),
)
def test_any_server_gives_as_many_answers_as_are_asked_for(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[int], choices: int, concurrency: int
) -> None:
    place = tmp_path_factory.mktemp("samples")
    with FaultyEngine(choices=choices) as engine:
        working = Working(place, engine.url, concurrency=concurrency)
        lines = [
            request_line(f"r{at}", body={"model": "m:1", "seed": 7, "n": number,
                                         "messages": [{"role": "user", "content": f"p{at}"}]})
            for at, number in enumerate(wanted)
        ]  # fmt: skip
        working.input.write_text("\n".join(lines), encoding="utf-8")
        assert working.run() is ExitCode.OK
    for at, (number, result) in enumerate(zip(wanted, working.results, strict=True)):
        assert texts(result) == expected(f"p{at}", number)
        assert result["output"]["usage"]["completion_tokens"] == 5 * number
        asked = result["metadata"].get("samples", 1)
        assert result["output"]["usage"]["prompt_tokens"] == 3 * asked
        assert result["output"]["usage"]["total_tokens"] == 8 * asked
        assert result["metadata"]["attempts"] == 1
    assert working.status["aiflux"]["progress"]["completion_tokens"] == 5 * sum(wanted)


def test_a_server_that_gives_all_answers_is_asked_once_and_its_answer_kept(tmp_path: Path) -> None:
    with FaultyEngine(choices=9) as engine:
        working = Working(tmp_path, engine.url).prompts("a", "b", n=3)
        assert working.run() is ExitCode.OK
        assert engine.seen == {"a": 1, "b": 1}
    assert not parts_in(working.journal)
    assert "samples" not in working.results[0]["metadata"]


@pytest.mark.parametrize("choices", [0, 1])
def test_a_server_that_ignores_or_refuses_n_is_sent_it_once(tmp_path: Path, choices: int) -> None:
    with FaultyEngine(choices=choices) as engine:
        working = Working(tmp_path, engine.url, concurrency=1).prompts("a", "b", n=3)
        assert working.run() is ExitCode.OK
        sent = [body.get("n") for body in engine.bodies]
    assert sent == [3, *[None] * (5 if choices else 6)]


@pytest.mark.parametrize("concurrency", [None, 1])
def test_a_llama_server_at_an_address_is_asked_for_one_answer_at_a_time(
    tmp_path: Path, concurrency: int | None
) -> None:
    """It would count the tokens of one answer only."""
    with CountingServer(LLAMA, 4096) as server:
        working = Working(tmp_path, server.url, concurrency=concurrency, samples=3)
        assert working.prompts("abcd").run() is ExitCode.OK
    assert server.wanted == [None] * 3
    assert working.results[0]["output"]["usage"]["completion_tokens"] == 6
    with CountingServer(VLLM, 4096) as server:
        working = Working(tmp_path, server.url, "b.json", samples=3)
        assert working.run() is ExitCode.OK
    assert server.wanted == [3]


def test_a_command_that_starts_a_llama_server_is_asked_in_the_same_way(tmp_path: Path) -> None:
    program = f"{sys.executable} {TOOLS}/counting_server.py"
    command = f"{program} --form llama --context 4096 --port {{port}}"
    working = Working(
        tmp_path, None, engine_command=command, model="m:1", allow_cpu=True, samples=3
    )
    assert working.prompts("abcd").run() is ExitCode.OK
    assert working.results[0]["output"]["usage"]["completion_tokens"] == 6


def test_the_answers_to_one_request_are_in_flight_side_by_side(tmp_path: Path) -> None:
    with FaultyEngine(choices=0, delay=0.1) as engine:
        working = Working(tmp_path, engine.url, concurrency=4).prompts("a", n=9)
        assert working.run() is ExitCode.OK
        assert engine.most == 4


def test_seeds_differ_and_are_the_same_in_each_run(tmp_path: Path) -> None:
    seeds = []
    for name in ("one", "two"):
        place = tmp_path / name
        place.mkdir()
        with FaultyEngine(choices=0) as engine:
            working = Working(place, engine.url).prompts("a", "b", n=4)
            assert working.run() is ExitCode.OK
            seeds.append(sorted(body["seed"] for body in engine.bodies if "n" not in body))
    assert len(set(seeds[0])) == 8
    assert seeds[0] == seeds[1]
    assert all(0 <= seed < 2**31 for seed in seeds[0])


@pytest.mark.parametrize(("seed", "sent"), [(2**31 - 1, {2**31 - 1, 0}), (-1, {-1}), ("x", {"x"}),
                                            (2**40, {2**40, 2**40 + 1})])  # fmt: skip
def test_a_seed_stays_in_its_range(tmp_path: Path, seed: object, sent: set[object]) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, concurrency=1).prompts("a", n=3, seed=seed)
        assert working.run() is ExitCode.OK
        # The first request asks for all three answers, and the server gives one.
        found = {body["seed"] for body in engine.bodies if "n" not in body}
    expected_seeds = (
        sent if len(sent) == 1 else {0, 1} if seed == 2**31 - 1 else {2**40 + 1, 2**40 + 2}
    )
    assert found == expected_seeds


def test_a_list_of_prompts_has_all_answers_to_each_in_turn(tmp_path: Path) -> None:
    body = {"model": "m:1", "prompt": ["a", "b"], "n": 3, "seed": 7}
    tokens = {"model": "m:1", "prompt": [1, 2, 3], "n": 2, "seed": 7}
    lines = [request_line("r", url="/v1/completions", body=body),
             request_line("t", url="/v1/completions", body=tokens)]  # fmt: skip
    for choices in (0, 1, 2, 9):
        place = tmp_path / str(choices)
        place.mkdir()
        with FaultyEngine(choices=choices) as engine:
            working = Working(place, engine.url)
            working.input.write_text(lines[0], encoding="utf-8")
            assert working.run() is ExitCode.OK
        (result,) = working.results
        assert texts(result) == expected("a", 3) + expected("b", 3)


def failing(at: set[int]) -> Any:
    """Return what fails some requests, by their numbers from 1."""
    count = 0

    def instead(method: str, path: str, headers: Mapping[str, str]) -> Reply | None:
        nonlocal count
        count += method == "POST"
        if method == "POST" and count in at:
            return 422, b'{"error": {"message": "no"}}', {}
        return None

    return instead


def test_one_failed_answer_fails_its_request_and_the_others_are_kept(tmp_path: Path) -> None:
    with FaultyEngine(choices=1, instead=failing({3})) as engine:
        working = Working(tmp_path, engine.url, concurrency=1).prompts("a", "b", n=4, seed=7)
        assert working.run() is ExitCode.FAILURES
        failed, fine = working.results
        assert failed["output"] is None
        assert failed["error"]["message"] == "answer 3 of 4: no"
        assert texts(fine) == expected("b", 4)
        assert engine.seen == {"a": 2, "b": 4}
        assert working.status["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        again = Working(tmp_path, engine.url, retry_failed=True)
        assert again.run() is ExitCode.OK
        assert engine.seen == {"a": 4, "b": 4}, "only the two missing answers are asked for"
    assert texts(again.results[0]) == expected("a", 4)


def test_several_failed_answers_are_one_failed_request(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, concurrency=8, max_failures="1")
        working.prompts("400", "fine", n=6)
        assert working.run() is ExitCode.OK
    assert working.status["request_counts"] == {"total": 2, "completed": 1, "failed": 1}


def test_answers_that_many_requests_were_refused_for_count_as_one_request(tmp_path: Path) -> None:
    """Ten rejections in a row end a run; those of one request's answers are no such row."""
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, concurrency=1, max_failures="1", samples=12)
        working.prompts("404", "fine")
        assert working.run() is ExitCode.OK
    assert working.results[0]["error"]["code"] == "http_404"


def test_a_request_whose_answers_crash_the_engine_fails_alone(tmp_path: Path) -> None:
    with FaultyEngine(choices=1, delay=0.01) as engine:
        working = Working(tmp_path, engine.url, concurrency=3)
        working.prompts("a", "b", "c", "d", "die", "e", "f", n=3, seed=7)
        with working.reviving(engine):
            code = working.run()
    assert code is ExitCode.FAILURES
    *_, failed, _, last = working.results
    assert failed["error"]["code"] == "engine_crashed"
    assert "of 3: the engine crashed 3 times" in failed["error"]["message"]
    assert texts(last) == expected("f", 3)
    assert working.status["request_counts"] == {"total": 7, "completed": 6, "failed": 1}


@pytest.mark.parametrize("choices", [1, 2])
def test_a_stopped_run_asks_for_the_missing_answers_only(tmp_path: Path, choices: int) -> None:
    with FaultyEngine(choices=choices, delay=0.03) as engine:
        working = Working(tmp_path, engine.url, concurrency=2).prompts("a", "b", n=9, seed=7)
        working.stop_soon(results=3)
        assert working.run() is ExitCode.STOPPED
        kept = parts_in(working.journal)
        before = len(engine.bodies)
        assert kept >= 3
        again = Working(tmp_path, engine.url, concurrency=2)
        assert again.run() is ExitCode.OK
        asked = Counter(json.dumps(body, sort_keys=True) for body in engine.bodies)
    assert before < len(engine.bodies)
    assert [texts(result) for result in again.results] == [expected("a", 9), expected("b", 9)]
    assert set(asked.values()) == {1}, "an answer was asked for again"


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_journal_cut_anywhere_resumes_with_each_answer_once(
    tmp_path_factory: pytest.TempPathFactory, finished: Path, data: st.DataObject
) -> None:
    place = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(finished, place)
    working = Working(place, None)
    size = working.journal.stat().st_size
    working.cut_copy(finished, data.draw(st.integers(0, size), label="cut"))
    kept = [key for key, line in journal_lines(working.journal) if is_part(line)]
    done = {key for key, line in journal_lines(working.journal) if not is_part(line)}
    left = sum(key not in done for key in kept)
    with FaultyEngine(choices=0) as engine:
        again = Working(place, engine.url)
        assert again.run(force_resume=True) is ExitCode.OK
        asked = [body for body in engine.bodies if "n" not in body]
    assert [texts(each) for each in again.results] == [expected(f"p{at}", 4) for at in range(4)]
    assert len(asked) == 4 * (4 - len(done)) - left


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with four answers to each of four requests."""
    place = tmp_path_factory.mktemp("finished")
    with FaultyEngine(choices=0) as engine:
        working = Working(place, engine.url).prompts(*(f"p{at}" for at in range(4)), n=4, seed=7)
        assert working.run() is ExitCode.OK
    assert parts_in(working.journal) == 12, "the last answer to each is in its result"
    return place


def test_no_answer_is_asked_for_again_after_a_kill(tmp_path: Path) -> None:
    """SIGKILL in mid-run: what was not in flight is asked for once."""
    with FaultyEngine(choices=1, delay=0.02) as engine:
        working = Working(tmp_path, engine.url).prompts(*"abc", n=20, seed=7)
        command = [sys.executable, "-m", "aiflux.cli", "run", str(working.input)]
        command += ["--output", str(working.output), "--engine-url", engine.url]
        command += ["--concurrency", "3"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
            while len(engine.bodies) < 25 and run.poll() is None:
                time.sleep(0.005)
            run.send_signal(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
        time.sleep(0.1)  # what was in flight ends
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        asked = Counter(json.dumps(body, sort_keys=True) for body in engine.bodies)
    assert [texts(result) for result in working.results] == [expected(each, 20) for each in "abc"]
    assert sum(count - 1 for count in asked.values()) <= 3, "more than what was in flight"


def test_answers_of_moved_requests_are_kept(tmp_path: Path) -> None:
    """Another number of shards moves the answers to the journals of their requests."""
    with FaultyEngine(choices=0, delay=0.02) as engine:
        working = Working(tmp_path, engine.url, concurrency=2).prompts(*"abcdef", n=4, seed=7)
        working.stop_soon(results=14)
        assert working.run() is ExitCode.STOPPED
        before = sum("n" not in body for body in engine.bodies)
        again = Working(tmp_path, engine.url)
        opened = again.open(shards=3)
        for shard in opened.open_shards:
            assert again.shard(shard) is ExitCode.OK
        after = sum("n" not in body for body in engine.bodies)
    assert before >= 14
    assert after == 24
    assert [texts(result) for result in again.results] == [expected(each, 4) for each in "abcdef"]


def test_each_answer_is_checked_and_asked_for_again_with_another_seed(tmp_path: Path) -> None:
    with FaultyEngine(choices=0) as engine:
        engine.choices = None
        working = Working(tmp_path, engine.url, concurrency=1, validate=True)
        working.prompts("unfit*2 answer:5", n=2, seed=7, response_format=SCHEMA)
        assert working.run() is ExitCode.OK
        seeds = [body["seed"] for body in engine.bodies]
    (result,) = working.results
    assert texts(result) == ["5", "5"]
    assert result["metadata"]["unfit_answers"] == 2
    assert len(engine.bodies) == 4
    assert seeds[:3] == [7, 7, 7], "the request for both answers"
    assert seeds[3] == 8


def test_the_report_counts_each_answer_once(tmp_path: Path) -> None:
    with FaultyEngine(choices=1) as engine:
        working = Working(tmp_path, engine.url).prompts("a", "b", n=3)
        assert working.run() is ExitCode.OK
    found = tally(journal_lines(working.journal))
    assert (found.results, found.completed, found.completion_tokens) == (2, 2, 30)
    assert found.attempts == {1: 2}
    report = read_report(RunDirectory.of_output(working.output))
    assert report.shards[0].completion_tokens == 30


def test_samples_apply_to_requests_without_n(tmp_path: Path) -> None:
    with FaultyEngine(choices=1) as engine:
        working = Working(tmp_path, engine.url, samples=3, model="m:1")
        lines = [
            request_line("a"),
            request_line("b", body={"n": 2, "messages": [{"role": "user", "content": "b"}]}),
            request_line("c", url="/v1/embeddings", body={"input": "c"}),
        ]
        working.input.write_text("\n".join(lines), encoding="utf-8")
        assert working.run() is ExitCode.OK
        assert {"model": "m:1", "input": "c"} in engine.bodies
    assert [len(texts(result)) for result in working.results[:2]] == [3, 2]
    other = Working(tmp_path, engine.url, samples=5, model="m:1")
    assert other.run() is ExitCode.USAGE
    assert other.error is not None
    assert "n 3" in other.error.message
    assert "n 5" in other.error.message


def test_answers_of_a_run_with_more_samples_are_enough(tmp_path: Path) -> None:
    with FaultyEngine(choices=0, delay=0.02) as engine:
        working = Working(tmp_path, engine.url, samples=6, concurrency=1)
        working.prompts("a", "b")
        working.stop_soon(results=4)
        assert working.run() is ExitCode.STOPPED
        again = Working(tmp_path, engine.url, samples=2)
        assert again.run(force_resume=True) is ExitCode.OK
        assert engine.seen["a"] <= 7
    assert [len(texts(result)) for result in again.results] == [2, 2]


def test_more_answers_than_an_engine_could_give_are_refused(tmp_path: Path) -> None:
    working = Working(tmp_path, "http://127.0.0.1:1")
    body = {"model": "m:1", "messages": [{"role": "user", "content": "x"}], "n": 10**9}
    working.input.write_text(request_line(body=body), encoding="utf-8")
    assert working.run() is ExitCode.USAGE
    assert working.error is not None
    assert "line 1: body.n is 1000000000; it can be at most 1000" in str(working.error.problems)


@pytest.mark.parametrize("url", ["/v1/embeddings", "/v1/rerank", "/v1/responses"])
def test_endpoints_with_one_answer_refuse_several(tmp_path: Path, url: str) -> None:
    body = {"model": "m:1", "input": "x", "query": "x", "documents": ["x"]}
    working = Working(tmp_path, "http://127.0.0.1:1")
    working.input.write_text(request_line(url=url, body={**body, "n": 2}), encoding="utf-8")
    assert working.run() is ExitCode.USAGE
    assert working.error is not None
    assert f"line 1: body.n is 2, but {url} gives one answer" in str(working.error.problems)
    working.input.write_text(request_line(url=url, body={**body, "n": 1}), encoding="utf-8")
    asking = Working(tmp_path, "http://127.0.0.1:1", samples=2)
    assert asking.run() is ExitCode.USAGE
    assert asking.error is not None
    assert "samples = 2" in asking.error.message


@pytest.mark.parametrize(
    ("bodies", "options", "lines"),
    [
        ([{"n": 3, "temperature": 0}, {"n": 3}, {"temperature": 0}], {}, "line 1"),
        ([{"n": 3}, {"n": 3, "temperature": 1}], {"temperature": 0.0}, "line 1"),
        ([{"temperature": 0}, {"temperature": 0.1}], {"samples": 2}, "line 1"),
        ([{}, {"n": 1}], {"samples": 2, "temperature": 0.0}, "line 1"),
        ([{"n": 2}, {"temperature": 0}], {"samples": 1}, ""),
    ],
)
def test_equal_answers_are_a_warning_before_the_run(
    tmp_path: Path, bodies: list[dict[str, Any]], options: dict[str, Any], lines: str
) -> None:
    working = Working(tmp_path, "http://127.0.0.1:1", **options)
    messages = [{"role": "user", "content": "x"}]
    rows = [request_line(f"r{at}", body={"model": "m:1", "messages": messages, **body})
            for at, body in enumerate(bodies)]  # fmt: skip
    working.input.write_text("\n".join(rows), encoding="utf-8")
    found = [finding.what for finding in check_fields(working.open().plan)]
    warnings = [text for text in found if "repeats one answer" in text]
    assert len(warnings) == bool(lines)
    assert all(f"({lines})" in text for text in warnings)


def test_the_tokens_of_a_request_include_all_its_answers(tmp_path: Path) -> None:
    tokens = []
    for number in (1, 5):
        place = tmp_path / str(number)
        place.mkdir()
        working = Working(place, "http://127.0.0.1:1", samples=number).prompts("x" * 3000)
        plan = working.open().plan
        tokens.append((plan.input.mean_tokens, plan.input.context_tokens))
        assert read_plan(RunDirectory.of_output(working.output)).options.samples == number
    assert tokens[1][0] == 5 * tokens[0][0]
    assert tokens[1][1] == tokens[0][1], "each answer has a context of its own"


def test_engines_that_are_known_to_ignore_n_are_not_sent_it() -> None:
    known = {name: kind_named(name).generates_n
             for name in ("ollama", "llamacpp", "vllm", "command", "external")}  # fmt: skip
    assert known == {
        "ollama": False, "llamacpp": False, "vllm": True, "command": None, "external": None,
    }  # fmt: skip
