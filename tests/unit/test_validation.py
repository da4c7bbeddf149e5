"""--validate: answers are held to the schema that their request asks for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.answerschema import SchemaError, compile_schema
from aiflux.core.request import parse_request
from aiflux.errors import ExitCode
from aiflux.worker.checking import Checking
from aiflux.worker.verdict import Kind, Verdict
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import request_line
from tests.unit.working import Working

LABEL = {"type": "object", "properties": {"label": {"enum": ["a", "b"]}}, "required": ["label"]}


def asking(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def hold(working: Working, number: int, schema: Any) -> None:
    """Let one of the requests (counted from 0) ask for a schema."""
    lines = working.input.read_text(encoding="utf-8").splitlines()
    request = json.loads(lines[number])
    request["body"]["response_format"] = asking(schema)
    lines[number] = json.dumps(request)
    working.input.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def verdict_on(text: str, wanted: Any, checking: Checking | None = None) -> Verdict:
    body = {"model": "m:1", "messages": [], "response_format": wanted}
    request = parse_request(request_line(body=body).encode())
    answer = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    verdict = Verdict(Kind.ANSWERED, status=200, body=json.dumps(answer).encode())
    return (checking or Checking(2)).judge(request, verdict)


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
def test_an_answer_is_held_to_its_schema(text: str, kind: Kind, words: str) -> None:
    verdict = verdict_on(text, asking(LABEL))
    assert verdict.kind is kind
    assert words in verdict.message
    assert verdict.code == ("schema" if words else "")


def test_json_object_asks_for_any_object() -> None:
    assert verdict_on("{}", {"type": "json_object"}).kind is Kind.ANSWERED
    assert verdict_on("[]", {"type": "json_object"}).kind is Kind.UNFIT
    assert verdict_on("words", {"type": "text"}).kind is Kind.ANSWERED
    assert verdict_on("words", None).kind is Kind.ANSWERED


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, 7, None, {"$ref": "https://example.org/x.json"}]
)
def test_a_schema_that_is_none_is_the_requests_fault(schema: Any) -> None:
    verdict = verdict_on("{}", asking(schema))
    assert verdict.kind is Kind.FAILED
    assert "response_format is wrong" in verdict.message


def test_nothing_outside_a_schema_is_fetched() -> None:
    with pytest.raises(SchemaError, match=r"refers to 'other\.json'"):
        compile_schema({"properties": {"x": [{"$ref": "other.json"}]}})
    check = compile_schema({"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"})
    assert check(3) is None
    assert "'x' is not of type 'integer'" in str(check("x"))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"x": {"$ref": "#/$defs/n"}}}, "refers to '#/$defs/n', which is not there"),
        ({"$ref": "#/$defs/n/anyOf/2", "$defs": {"n": {"anyOf": [{}]}}}, "which is not there"),
        ({"$ref": "#nowhere"}, "cannot be applied"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"anyOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"$ref": "#"}}}, "leads back to itself"),
    ],
)
def test_a_reference_that_leads_nowhere_is_told(schema: Any, words: str) -> None:
    with pytest.raises(SchemaError) as error:
        compile_schema(schema)
    assert words in str(error.value)


def test_references_that_lead_somewhere() -> None:
    tree = {"type": "object", "properties": {"a/b": {"items": {"$ref": "#"}, "anyOf": [{}]}}}
    assert compile_schema(tree)({"a/b": [{"a/b": []}]}) is None
    assert compile_schema({"$ref": "#/properties/a~1b/anyOf/0", **tree})({}) is None
    own = {"$id": "http://example.org/x", "$defs": {"y": {"type": "string"}}}
    assert compile_schema({"$defs": {"z": {**own, "$ref": "#/$defs/y"}}})(1) is None


def test_a_reference_in_circles_fails_its_request_and_not_the_run(tmp_path: Path) -> None:
    circle = {"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, validate=True)
        working.prompts('answer:{"x": 1}', "free")
        hold(working, 0, circle)
        assert working.run() is ExitCode.FAILURES
    failed, free = working.results
    assert "leads back to itself" in failed["error"]["message"]
    assert free["output"] is not None


def test_schemas_are_kept_and_forgotten() -> None:
    checking = Checking(0)
    for number in range(600):
        wanted = asking({"const": number})
        assert verdict_on(str(number), wanted, checking).kind is Kind.ANSWERED
        assert verdict_on("x", wanted, checking).kind is Kind.UNFIT


def test_unfit_answers_are_asked_for_again_and_then_fail(tmp_path: Path) -> None:
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


def test_an_answer_that_fits_at_last_counts(tmp_path: Path) -> None:
    """The attempts for a schema are a budget of their own."""
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, validate=True, max_retries=0)
        working.prompts('unfit*2 answer:{"label": "b"}', response_format=asking(LABEL))
        assert working.run() is ExitCode.OK
    (result,) = working.results
    assert result["output"]["choices"][0]["message"]["content"] == '{"label": "b"}'
    assert result["metadata"]["unfit_answers"] == 2
    assert result["metadata"]["attempts"] == 3


def test_nobody_checks_without_being_asked(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url)
        assert working.prompts("x", response_format=asking(LABEL)).run() is ExitCode.OK
        assert engine.seen["x"] == 1


def test_without_jsonschema_the_run_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, validate=True).prompts("x")
        assert working.run() is ExitCode.USAGE
    assert working.error is not None
    assert working.error.remedy == "python -m pip install 'aiflux[schema]'"
