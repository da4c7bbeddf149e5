"""--validate: answers are checked against the schema of their request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiflux.cli.main import main
from aiflux.core.batch.request import Request, parse_request
from aiflux.core.batch.schema import SchemaError, compile_schema, time_limit
from aiflux.core.runs.journal import JournalReader, JournalWriter, scan_journal
from aiflux.engines.external.engine import ExternalEngine
from aiflux.engines.external.kind import KIND
from aiflux.engines.http import Answer, Client
from aiflux.engines.outcome import Kind, Outcome, judge_answer
from aiflux.errors import ExitCode, InputError
from aiflux.models.endpoints import ENDPOINTS
from aiflux.util.extras import remedy
from aiflux.worker.concurrency import FixedLimit
from aiflux.worker.dispatcher import Pool, RetryPolicy
from aiflux.worker.scheduler import Lane, Scheduler, Source
from aiflux.worker.schema_process import SchemaProcess
from aiflux.worker.stats import Stats
from aiflux.worker.validation import Checking
from tests.tools.engine_contract import until
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import request_line
from tests.unit.working import Working

LABEL = {"type": "object", "properties": {"label": {"enum": ["a", "b"]}}, "required": ["label"]}


def asking(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def hold(working: Working, number: int, schema: Any) -> None:
    """Set the schema of one of the requests (counted from 0)."""
    lines = working.input.read_text(encoding="utf-8").splitlines()
    request = json.loads(lines[number])
    request["body"]["response_format"] = asking(schema)
    lines[number] = json.dumps(request)
    working.input.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


CHECKING = Checking(2)


@pytest.fixture(scope="module", autouse=True)
def closed_checks() -> Iterator[None]:
    yield
    CHECKING.close()


def verdict_on(text: str, asked: Any, checking: Checking = CHECKING) -> Outcome:
    body = {"model": "m:1", "messages": [{}], "response_format": asked}
    request = parse_request(request_line(body=body).encode())
    answer = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    verdict = Outcome(Kind.ANSWERED, status=200, body=json.dumps(answer).encode())
    return checking.judge(request, verdict)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ('{"label": "a"}', Kind.ANSWERED, ""),
        ('{"label": "c"}', Kind.UNFIT, "does not fit the schema at $.label: 'c' is not one of"),
        ("{}", Kind.UNFIT, "'label' is a required property"),
        ("sure!", Kind.UNFIT, "is not JSON"),
        ('{"label": NaN}', Kind.UNFIT, "is not JSON"),
    ],
)
def test_an_answer_is_checked_against_its_schema(text: str, kind: Kind, words: str) -> None:
    verdict = verdict_on(text, asking(LABEL))
    assert verdict.kind is kind
    assert words in verdict.message
    assert verdict.code == ("schema" if words else "")


def test_json_object_allows_any_object() -> None:
    assert verdict_on("{}", {"type": "json_object"}).kind is Kind.ANSWERED
    assert verdict_on("[]", {"type": "json_object"}).kind is Kind.UNFIT
    assert verdict_on("words", {"type": "text"}).kind is Kind.ANSWERED
    assert verdict_on("words", None).kind is Kind.ANSWERED


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, 7, None, {"$ref": "https://example.org/x.json"}]
)
def test_an_invalid_schema_fails_its_request(schema: Any) -> None:
    verdict = verdict_on("{}", asking(schema))
    assert verdict.kind is Kind.FAILED
    assert "response_format is invalid" in verdict.message


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (5, "json_schema is not an object"),
        ("x", "json_schema is not an object"),
        ([1], "json_schema is not an object"),
        ({"name": "x"}, "json_schema.schema is missing"),
        ({"schema": {"$schema": 5, "type": "object"}}, "$.$schema: it is not a string"),
        ({"schema": {"$schema": ["a"]}}, "$.$schema: it is not a string"),
        ({"schema": {"type": "nonsense"}}, "'nonsense' is not valid"),
    ],
)
def test_the_worker_and_the_check_find_an_invalid_schema(
    asked: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"type": "json_schema", "json_schema": asked}
    verdict = verdict_on("{}", asked)
    assert verdict.kind is Kind.FAILED
    assert words in verdict.message
    body = {"model": "m:1", "messages": [{}], "response_format": asked}
    path = tmp_path / "in.jsonl"
    path.write_text(f"{request_line('a')}\n{request_line('b', body=body)}\n", encoding="utf-8")
    assert main(["check", str(path)]) == ExitCode.USAGE
    errors = capsys.readouterr().err
    assert "1 line is wrong" in errors
    assert "line 2: the schema in body.response_format is wrong: " in errors
    assert words in errors


def test_invalid_schemas_are_refused_before_a_run_that_checks_answers(tmp_path: Path) -> None:
    asked = {"type": "json_schema", "json_schema": 5}
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, validate=True)
        assert working.prompts("x", response_format=asked).run() is ExitCode.USAGE
        assert not engine.bodies
        lax = Working(tmp_path, engine.url)
        assert lax.prompts("x", response_format=asked).run() is ExitCode.OK
        assert engine.bodies[0]["response_format"] == asked


keys = st.sampled_from(
    ["type", "json_schema", "schema", "$schema", "$ref", "$id", "$defs", "$dynamicRef", "enum",
     "properties", "items", "required", "pattern", "multipleOf", "choices", "message", "content",
     "text", "finish_reason", "usage", "completion_tokens", "data", "error", "model"]
) | st.text(max_size=3)  # fmt: skip
words = st.sampled_from(
    ["json_schema", "json_object", "object", "string", "#", "#/$defs/a", "(", "stop", "length",
     "http://json-schema.org/draft-04/schema#", "https://json-schema.org/draft/2020-12/schema"]
) | st.text(max_size=5)  # fmt: skip
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.just(10**400)
any_json = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=15,
)
formats = any_json | any_json.map(asking) | st.fixed_dictionaries(
    {"type": st.just("json_schema"), "json_schema": any_json}
)  # fmt: skip
texts = words | any_json.map(json.dumps)
choices = st.fixed_dictionaries(
    {}, optional={"message": st.fixed_dictionaries({"content": texts | any_json}) | any_json,
                  "text": any_json, "finish_reason": any_json},
)  # fmt: skip
bodies = any_json | st.fixed_dictionaries(
    {"choices": st.lists(choices, max_size=3)}, optional={"usage": any_json, "error": any_json}
)


@settings(max_examples=150)
@given(
    asked=formats,
    body=bodies,
    url=st.sampled_from([each.url for each in ENDPOINTS.values()]),
)
def test_any_answer_to_any_request_is_judged(asked: Any, body: Any, url: str) -> None:
    content = {"model": "m:1", "messages": [{}], "prompt": "", "input": "", "documents": [""],
               "query": "", "text_1": "", "text_2": [""], "response_format": asked}  # fmt: skip
    request = parse_request(request_line(url=url, body=content).encode())
    answer = Answer(200, json.dumps(body).encode())
    verdict = CHECKING.judge(request, judge_answer(url, request.body, answer, KIND.crash_code))
    assert verdict.kind in Kind
    assert verdict.code or verdict.kind is Kind.ANSWERED


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(formats, bodies), min_size=1, max_size=8))
def test_no_request_and_no_answer_ends_a_run(
    pairs: list[tuple[Any, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with FaultyEngine() as engine:
        working = Working(
            folder, engine.url, validate=True, max_retries=1, revalidate_attempts=1
        )  # fmt: skip
        lines = []
        for number, (asked, body) in enumerate(pairs):
            messages = [{"role": "user", "content": f"body:{json.dumps(body)}"}]
            content = {"model": "m:1", "messages": messages, "response_format": asked}
            lines.append(request_line(str(number), body=content))
        lines.append(request_line("fine"))  # otherwise none of the answers may be an OpenAI API's
        working.input.write_text("\n".join(lines), encoding="utf-8")
        code = working.run()
    if code is ExitCode.USAGE:
        assert isinstance(working.error, InputError)
        assert all("response_format is wrong" in problem for problem in working.error.problems)
    else:
        assert code in (ExitCode.OK, ExitCode.FAILURES)
        assert len(working.results) == len(pairs) + 1


class BuggyChecking(Checking):
    """Raises an unexpected exception for one kind of request."""

    def judge(self, request: Request, verdict: Outcome) -> Outcome:
        if "bug" in request.custom_id:
            raise ZeroDivisionError("a bug")
        return verdict


def test_a_bug_fails_its_request_and_prints_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("bug", "fine", "bug")
        opened = working.open()
        shard = opened.plan.shards[0]
        path = opened.run.journal(0)
        source = Source(opened.plan, shard, scan_journal(path), JournalReader(path))
        lane, stats = Lane(0, FixedLimit(2)), Stats(3)
        link = ExternalEngine(KIND, engine.url, lambda url: Client(url, 5.0, 4), 1.0, print)
        journal = JournalWriter(path, on_failure=lambda error: None)
        pool = Pool(
            Scheduler(source.tasks("m:1"), [lane]), [link], journal, RetryPolicy(1, 0.01), stats,
            "m:1", on_down=lambda lane, generation: None, checking=BuggyChecking(1),
        )  # fmt: skip
        pool.start()
        pool.join(lambda: None)
        journal.close()
        link.close()
    assert (stats.completed, stats.failed) == (1, 2)
    assert stats.errors[0].code == "internal_error"
    assert "ZeroDivisionError" in stats.errors[0].message
    assert capsys.readouterr().err.count("Traceback") == 1


def test_nothing_outside_a_schema_is_fetched() -> None:
    with pytest.raises(SchemaError, match=r"refers to 'other\.json'"):
        compile_schema({"properties": {"x": [{"$ref": "other.json"}]}})
    check = compile_schema({"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"})
    assert check(3) is None
    assert "'x' is not of type 'integer'" in str(check("x"))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (
            {"properties": {"x": {"$ref": "#/$defs/n"}}},
            "refers to '#/$defs/n', which does not exist",
        ),
        ({"$ref": "#/$defs/n/anyOf/2", "$defs": {"n": {"anyOf": [{}]}}}, "which does not exist"),
        ({"$ref": "#nowhere"}, "cannot be applied"),
        ({"$ref": "#"}, "is circular"),
        ({"anyOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"$ref": "#"}}}, "is circular"),
    ],
)
def test_an_invalid_reference_is_reported(schema: Any, words: str) -> None:
    with pytest.raises(SchemaError) as error:
        compile_schema(schema)
    assert words in str(error.value)


def test_valid_references() -> None:
    tree = {"type": "object", "properties": {"a/b": {"items": {"$ref": "#"}, "anyOf": [{}]}}}
    assert compile_schema(tree)({"a/b": [{"a/b": []}]}) is None
    assert compile_schema({"$ref": "#/properties/a~1b/anyOf/0", **tree})({}) is None
    own = {"$id": "http://example.org/x", "$defs": {"y": {"type": "string"}}}
    assert compile_schema({"$defs": {"z": {**own, "$ref": "#/$defs/y"}}})(1) is None


def test_a_circular_reference_fails_its_request_and_not_the_run(tmp_path: Path) -> None:
    circle = {"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, validate=True)
        working.prompts('answer:{"x": 1}', "free")
        hold(working, 0, circle)
        assert working.run() is ExitCode.FAILURES
    failed, free = working.results
    assert "is circular" in failed["error"]["message"]
    assert free["output"] is not None


def test_the_cache_of_schemas_is_limited() -> None:
    for number in range(300):
        asked = asking({"const": number})
        assert verdict_on(str(number), asked).kind is Kind.ANSWERED
        assert verdict_on("x", asked).kind is Kind.UNFIT


def test_requests_with_unfit_answers_are_sent_again_and_then_fail(tmp_path: Path) -> None:
    """The engine echoes ``echo PROMPT``: never JSON."""
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, validate=True, revalidate_attempts=2)
        working.prompts("free", "strict")
        hold(working, 1, LABEL)
        assert working.run() is ExitCode.FAILURES
        assert engine.seen == {"free": 1, "strict": 3}
    free, failed = working.results
    assert free["output"] is not None
    assert "unfit_answers" not in free["metadata"]
    assert failed["error"]["code"] == "schema"
    assert failed["error"]["status"] == 200
    assert failed["metadata"]["attempts"] == failed["metadata"]["unfit_answers"] == 3
    progress = working.status["aiflux"]["progress"]
    assert progress["unfit_answers"] == 3
    assert progress["completion_tokens"] == 4 * 5
    assert working.status["errors"]["data"][0]["code"] == "schema"


def test_an_answer_that_fits_after_retries_counts(tmp_path: Path) -> None:
    """Attempts for a schema are counted separately."""
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, validate=True, max_retries=0)
        working.prompts('unfit*2 answer:{"label": "b"}', response_format=asking(LABEL))
        assert working.run() is ExitCode.OK
    (result,) = working.results
    assert result["output"]["choices"][0]["message"]["content"] == '{"label": "b"}'
    assert result["metadata"]["unfit_answers"] == 2
    assert result["metadata"]["attempts"] == 3


def test_answers_are_checked_only_with_the_option(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url)
        assert working.prompts("x", response_format=asking(LABEL)).run() is ExitCode.OK
        assert engine.seen["x"] == 1


def test_without_jsonschema_the_run_reports_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, validate=True).prompts("x")
        assert working.run() is ExitCode.USAGE
    assert working.error is not None
    assert working.error.remedy == remedy("schema", has_pip=True)


EVIL = {"type": "string", "pattern": "^(a+)+$"}
NEVER = json.dumps("a" * 60 + "!")


def nested_choices(levels: int) -> dict[str, Any]:
    """Return a schema that takes 2**levels steps to apply to anything."""
    parts = {
        f"d{level}": {"anyOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**parts, f"d{levels}": {"type": "integer", "not": {}}}}


def children(parent: int) -> set[int]:
    """Return the child processes that check answers."""
    found = set()
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    for pid in " ".join(each.read_text() for each in tasks).split():
        with suppress(OSError):
            if b"schema_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(int(pid))
    return found


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        (EVIL, NEVER),
        ({"patternProperties": {"^(a|a)*$": {}}}, json.dumps({"a" * 60 + "!": 1})),
        ({"uniqueItems": True}, json.dumps([{}, *([n] for n in range(20_000))])),
    ],
)
def test_a_check_that_does_not_end_fails_its_request_only(
    schema: dict[str, Any], answer: str
) -> None:
    checking = Checking(2, seconds=1.0)
    with closing(checking), ThreadPoolExecutor(10) as threads:
        judged = [threads.submit(verdict_on, answer, asking(schema), checking)]
        judged += [
            threads.submit(verdict_on, '{"label": "a"}', asking(LABEL), checking)
            for _ in range(100)
        ]
        failed, *fine = (each.result() for each in judged)
    assert failed.kind is Kind.FAILED
    assert failed.code == "schema_check_failed"
    assert "took more than 1 s" in failed.message
    assert {each.kind for each in fine} == {Kind.ANSWERED}


def test_an_answer_of_many_megabytes_is_checked() -> None:
    answer = json.dumps({"label": "a", "more": "x" * (20 << 20)})
    assert verdict_on(answer, asking(LABEL)).kind is Kind.ANSWERED


def test_a_check_that_kills_its_process_fails_its_request_only() -> None:
    before = children(os.getpid())
    process = SchemaProcess(120.0)
    with closing(process), ThreadPoolExecutor(1) as threads:
        assert process.check("{}", "1") == ("fits", "")
        finding = threads.submit(process.check, json.dumps(EVIL), NEVER)
        killed: set[int] = set()
        while len(killed) < 2:
            until(lambda: children(os.getpid()) - before - killed, 30)
            (pid,) = children(os.getpid()) - before - killed
            # By then it is in the middle of the pattern, however slow the machine is.
            until(lambda pid=pid: cpu_seconds(pid) > 1, 30)  # type: ignore[misc]
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        assert finding.result() == ("failed", "ended its process (signal 9)")
        assert process.check("{}", "1") == ("fits", "")


def test_schemas_of_too_many_combinations_are_refused_by_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = request_line(
        body={"model": "m", "messages": [{}], "response_format": asking(nested_choices(40))}
    )
    (tmp_path / "in.jsonl").write_text(line)
    assert main(["check", str(tmp_path / "in.jsonl")]) == ExitCode.USAGE
    assert "too many combinations" in capsys.readouterr().err
    assert compile_schema(nested_choices(5))(1)


@pytest.mark.timeout(60)
def test_a_time_limit_holds_while_generators_are_abandoned() -> None:
    source = """
def answers():
    try:
        yield 1
    finally:
        str()

def check():
    pass

def search():
    while True:
        next(answers())
        check()
"""
    library: dict[str, Any] = {"__name__": "library.part"}
    exec(source, library)  # noqa: S102
    for _ in range(50):
        with pytest.raises(SchemaError, match="too many combinations"), time_limit(0.01, "library"):
            library["search"]()


def test_a_stop_does_not_wait_for_checks(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        Working(tmp_path, engine.url).prompts(
            *[f"answer:{NEVER}"] * 20, response_format=asking(EVIL)
        )
        options = ["--output", "out.json", "--engine-url", engine.url, "--drain-seconds", "0.5"]
        command = [sys.executable, "-m", "aiflux.cli", "run", "--validate", "--input", "in.jsonl"]
        with subprocess.Popen(
            [*command, *options], cwd=tmp_path, stderr=subprocess.PIPE, text=True
        ) as run:
            until(lambda: children(run.pid) and len(engine.bodies) > 1, 30)
            time.sleep(1)
            checkers = children(run.pid)
            run.send_signal(signal.SIGTERM)
            errors = run.communicate(timeout=10)[1]
    assert run.returncode == ExitCode.STOPPED, errors
    assert "stopped (signal SIGTERM) with 0 of 20" in errors
    assert checkers
    assert not any(Path(f"/proc/{pid}").exists() for pid in checkers)


def test_a_process_that_checks_does_not_outlive_its_worker() -> None:
    command = [sys.executable, "-m", "aiflux.worker.schema_process", "0.5"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as busy:
        assert busy.stdin is not None
        busy.stdin.write(json.dumps([json.dumps(EVIL), NEVER]).encode() + b"\n")
        busy.stdin.close()
        assert busy.wait(10) == -signal.SIGALRM
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as idle:
        assert idle.stdin is not None
        idle.stdin.close()
        assert idle.wait(10) == 0
