"""Endpoints: which engine has them, when an answer is complete, and what is read from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aiflux.converters import results_to_csv
from aiflux.core.batch.input_file import estimate_tokens, scan_input
from aiflux.core.batch.request import expected_results
from aiflux.core.batch.results_file import (
    ChoiceText,
    Score,
    answer_text,
    choice_texts,
    choices,
    scores,
)
from aiflux.core.batch.schema import schema_problem
from aiflux.core.config.engine_kinds import KINDS
from aiflux.core.config.settings import RunOptions
from aiflux.engines.http import Answer
from aiflux.engines.kinds import kind_named
from aiflux.engines.outcome import Kind, Outcome, judge_answer
from aiflux.errors import ConfigError, ExitCode, InputError
from aiflux.models.endpoints import ENDPOINTS, newer_version
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import request_line
from tests.unit.working import Working

RESPONSES, RERANK, SCORE = (ENDPOINTS[name].url for name in ("responses", "rerank", "score"))
BODIES: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "hi"}]},
    "completions": {"prompt": "hi"},
    "responses": {"input": "hi"},
    "embeddings": {"input": "hi"},
    "rerank": {"query": "q", "documents": ["a", "b"]},
    "score": {"text_1": "q", "text_2": "a"},
}
ITEM = {"type": "message", "role": "assistant", "status": "completed"}


def text_item(*texts: str) -> dict[str, Any]:
    return {**ITEM, "content": [{"type": "output_text", "text": each} for each in texts]}


def response(*items: dict[str, Any], status: str = "completed", reason: str = "") -> dict[str, Any]:
    details = {"reason": reason} if reason else None
    return {"object": "response", "status": status, "error": None, "output": [*items],
            "incomplete_details": details}  # fmt: skip


def judged(url: str, asked: dict[str, Any], answer: dict[str, Any]) -> Outcome:
    return judge_answer(url, asked, Answer(200, json.dumps(answer).encode()), lambda *_: None)


def inputs(path: Path, *names: str) -> Path:
    lines = [
        request_line(f"r{at}", url=ENDPOINTS[name].url, body={"model": "m:1", **BODIES[name]})
        for at, name in enumerate(names)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENDPOINTS)
def test_an_endpoint_that_an_engine_lacks_is_refused_by_line_before_submission(
    kind: str, name: str, tmp_path: Path
) -> None:
    first = "embeddings" if name == "chat" else "chat"
    path = inputs(tmp_path / "in.jsonl", first, name, name)
    rules = kind_named(kind).input_rules
    whole = scan_input(path, "m:1")
    if kind in ENDPOINTS[name].engines or kind in ("command", "external"):
        found = scan_input(path, "m:1", rules=rules)
        assert found.endpoints[ENDPOINTS[name].url] == 2
        assert whole.of_engine("m:1", rules, rules.ignored_fields) is not None
        return
    with pytest.raises(InputError) as error:
        scan_input(path, "m:1", rules=rules)
    title = kind_named(kind).title
    shown = str(error.value)
    assert f"{title} has no {ENDPOINTS[name].url}; use --engine " in shown
    assert all(f"--engine {each}" in shown or f"or {each}" in shown for each in
               ENDPOINTS[name].engines)  # fmt: skip
    assert "lines 2 and 3" in shown or "line 2" in shown
    assert whole.of_engine("m:1", rules, rules.ignored_fields) is None, "it is checked again"


def test_ollama_has_responses_from_a_version_on() -> None:
    older = ("0.9.3", "0.13.2", "0.13.2-rc1")
    assert [newer_version("ollama", RESPONSES, each) for each in older] == ["0.13.3"] * 3
    newer = ("0.13.3", "0.13.3-rc1", "0.33.1", "1.0", "0.0.0", "unknown")
    assert {newer_version("ollama", RESPONSES, each) for each in newer} == {None}
    assert newer_version("ollama", "/v1/embeddings", "0.9.3") is None


def test_settings_without_effect_on_responses_are_refused_for_ollama() -> None:
    with pytest.raises(ConfigError, match="stop is set, but Ollama ignores it in requests to"):
        kind_named("ollama").refuse_run(RunOptions(stop=("END",)), {RESPONSES: 1})
    kind_named("ollama").refuse_run(RunOptions(stop=("END",)), {"/v1/chat/completions": 1})


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        ("ollama", {"previous_response_id": "r1", "seed": 1, "text": {}},
         ["previous_response_id", "seed"]),
        ("ollama", {"stop": [], "top_logprobs": 0}, []),
        ("ollama", {"max_tokens": 9}, ["max_tokens"]),
        ("llamacpp", {"max_tokens": 9, "response_format": {"type": "json_object"}}, []),
        ("vllm", {"max_tokens": 9, "response_format": {"type": "json_object"}},
         ["max_tokens", "response_format"]),
        ("llamacpp", {"previous_response_id": "r1", "conversation": "c", "seed": 1,
                      "text": {"format": {"type": "json_schema"}}},
         ["conversation", "previous_response_id", "text"]),
        ("llamacpp", {"text": {"format": {"type": "text"}}}, []),
        ("vllm", {"previous_response_id": "r1", "text": {"format": {"type": "json_schema"}}},
         ["previous_response_id"]),
        ("external", {"previous_response_id": "r1", "conversation": "c"}, []),
    ],
)  # fmt: skip
def test_fields_of_responses_that_an_engine_ignores_are_reported(
    kind: str, body: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    line = request_line(url=RESPONSES, body={"model": "m:1", "input": "hi", **body})
    chat = request_line("r2", body={"model": "m:1", "messages": [{}], "seed": 1, "stop": ["x"]})
    path.write_text(f"{line}\n{chat}\n", encoding="utf-8")
    found = scan_input(path, "m:1", rules=kind_named(kind).input_rules)
    assert [*found.ignored] == expected
    assert {each.lines for each in found.ignored.values()} <= {(1,)}


REASONING = {
    "type": "reasoning",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "hm"}],
}
SUMMARY = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc1"}
SEARCH = {"type": "web_search_call", "id": "ws1", "status": "completed"}


@pytest.mark.parametrize(
    ("answer", "expected", "finish"),
    [
        (response(text_item("yes", "!")), ChoiceText("yes!"), "stop"),
        (response(text_item("a"), text_item("b")), ChoiceText("ab"), "stop"),
        (response({**ITEM, "content": "yes"}), ChoiceText("yes"), "stop"),
        (response(REASONING, text_item("yes")), ChoiceText("yes", "hm"), "stop"),
        (response(SUMMARY, text_item("yes")), ChoiceText("yes", "hm"), "stop"),
        (response(REASONING, status="incomplete", reason="max_output_tokens"),
         ChoiceText("", "hm", "reasoning"), "length"),
        (response(text_item("ye"), status="incomplete", reason="max_output_tokens"),
         ChoiceText("ye"), "length"),
        (response(status="incomplete", reason="max_output_tokens"),
         ChoiceText("", "", "length"), "length"),
        (response(status="incomplete", reason="content_filter"),
         ChoiceText("", "", "content_filter"), "content_filter"),
        (response(CALL), ChoiceText("", "", "tool_call"), "tool_calls"),
        (response({**ITEM, "content": [{"type": "refusal", "refusal": "no"}]}),
         ChoiceText("", "", "refusal"), "stop"),
        (response(text_item("")), ChoiceText("", "", "no_text"), "stop"),
        (response(status="queued"), ChoiceText("", "", "no_text"), None),
    ],
)  # fmt: skip
def test_a_response_is_read_like_a_choice(
    answer: dict[str, Any], expected: ChoiceText, finish: str | None
) -> None:
    assert choice_texts(answer) == [expected]
    assert [choice["finish_reason"] for choice in choices(answer)] == [finish]
    outcome = judged(RESPONSES, BODIES["responses"], answer)
    if finish is None:
        assert (outcome.kind, outcome.code, outcome.foreign) == (Kind.RETRY, "empty_answer", False)
    else:
        assert (outcome.kind, outcome.finish_reason) == (Kind.ANSWERED, finish)
        assert outcome.empty == expected.empty


def test_calls_and_log_probabilities_of_a_response_have_the_form_of_chat() -> None:
    item = text_item("yes")
    item["content"][0]["logprobs"] = [{"token": "yes", "logprob": -0.1}]
    (choice,) = choices(response(CALL, SEARCH, item))
    function = {"name": "f", "arguments": "{}"}
    assert choice["message"]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": function}, SEARCH,
    ]  # fmt: skip
    assert choice["logprobs"] == {"content": item["content"][0]["logprobs"]}


@pytest.mark.parametrize("answer", [
    {"output": [None, 1, {"type": None}, {"type": "message", "content": [7, None]}]},
    {"output": [{"type": "reasoning", "content": 5}], "status": 7, "incomplete_details": 3},
    {"output": None, "choices": None}, {"output": []}, {"results": [{}], "data": 3},
])  # fmt: skip
def test_damaged_answers_are_read_without_an_error(answer: dict[str, Any]) -> None:
    assert answer_text(answer) == ""
    for name, each in ENDPOINTS.items():
        assert judged(each.url, BODIES[name], answer).kind is Kind.RETRY


def test_a_failed_response_is_sent_again_and_a_cancelled_one_too() -> None:
    failed = response(status="failed") | {"error": {"code": "server_error", "message": "broke"}}
    outcome = judged(RESPONSES, BODIES["responses"], failed)
    assert (outcome.kind, outcome.code, outcome.message) == (Kind.RETRY, "error_in_answer", "broke")
    cancelled = response(text_item("half"), status="cancelled")
    assert judged(RESPONSES, BODIES["responses"], cancelled).code == "aborted_answer"


def reranked(*indices: int) -> dict[str, Any]:
    return {"results": [{"index": at, "relevance_score": 0.5, "document": {"text": "x"}}
                        for at in indices]}  # fmt: skip


def scored(*values: float) -> dict[str, Any]:
    data = [{"index": at, "object": "score", "score": value} for at, value in enumerate(values)]
    return {"object": "list", "data": data}


EMBEDDED = {"object": "list", "data": [{"index": 0, "embedding": [1.0]}]}


@pytest.mark.parametrize(
    ("name", "changes", "answer", "message"),
    [
        ("rerank", {}, reranked(1, 0), ""),
        ("rerank", {}, reranked(1), "an answer with 1 result instead of 2"),
        ("rerank", {}, reranked(1, 1), "an answer with 1 result instead of 2"),
        ("rerank", {}, reranked(), "an answer without results"),
        ("rerank", {}, {"results": [{"index": 0}, {"index": 1}]}, "an answer without results"),
        ("rerank", {"top_n": 1}, reranked(1), ""),
        (
            "rerank",
            {"top_n": 1},
            reranked(7),
            "an answer with a result at position 7, for a request with 2",
        ),
        (
            "rerank",
            {"documents": "one"},
            reranked(-1),
            "an answer with a result at position -1, for a request with 1",
        ),
        ("rerank", {"top_n": 9}, reranked(1), "an answer with 1 result instead of 2"),
        ("rerank", {"top_n": 0}, reranked(1, 0), ""),
        ("rerank", {"documents": []}, reranked(), ""),
        ("rerank", {"documents": "one"}, reranked(0), ""),
        ("score", {}, scored(0.5), ""),
        ("score", {}, scored(), "an answer without results"),
        ("score", {"text_2": ["a", "b"]}, scored(0.5), "an answer with 1 result instead of 2"),
        ("score", {"text_2": ["a", "b"]}, scored(0.5, 0), ""),
        ("score", {"text_1": ["a", "b"], "text_2": ["a", "b"]}, scored(0.5, 0), ""),
        ("embeddings", {}, EMBEDDED, ""),
        ("embeddings", {"input": [1, 2, 3]}, EMBEDDED, ""),
        ("embeddings", {"input": ["a", "b"]}, EMBEDDED, "an answer with 1 result instead of 2"),
        ("embeddings", {}, {"object": "list", "data": []}, "an answer without results"),
    ],
)
def test_an_answer_needs_a_result_for_each_document_pair_or_text(
    name: str, changes: dict[str, Any], answer: dict[str, Any], message: str
) -> None:
    outcome = judged(ENDPOINTS[name].url, BODIES[name] | changes, answer)
    assert outcome.message == message
    assert outcome.kind is (Kind.RETRY if message else Kind.ANSWERED)
    assert not outcome.foreign


def test_scores_are_read_in_their_order() -> None:
    answer = {"results": [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0}]}
    assert scores(answer) == [Score(1, 0.9), Score(0, 0)]
    assert answer_text(answer) == "[0.9, 0]"
    assert answer_text(reranked(0)) == "[0.5]"
    assert answer_text(scored(0.25)) == "0.25"
    assert answer_text(scored(0.25, 1)) == "[0.25, 1]"
    assert scores(EMBEDDED) == [] == choices(scored(1))


def test_long_documents_are_estimated_one_by_one() -> None:
    one, long = "word " * 30, "word " * 300
    base = estimate_tokens({"query": one, "documents": [one]})
    assert estimate_tokens({"query": one, "documents": [one] * 50}) == base
    assert estimate_tokens({"text_1": one, "text_2": one}) == base
    assert estimate_tokens({"text_1": one, "text_2": [one, long]}) > 3 * base
    limited = {"input": one, "max_output_tokens": 5}
    assert estimate_tokens(limited) < base
    assert estimate_tokens({**limited, "instructions": long}) > 3 * base
    assert expected_results("/v1/chat/completions", BODIES["chat"]) is None


def test_schemas_of_responses_are_checked(tmp_path: Path) -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object", "required": ["x"]}}
    body = {"model": "m:1", "input": 'answer:{"y": 1}', "text": {"format": form}}
    assert schema_problem(body) is None
    wrong = {"text": {"format": {**form, "schema": {"type": "thing"}}}}
    assert "the schema in body.text.format is wrong: at $.type" in str(schema_problem(wrong))
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, validate=True, revalidate_attempts=1,
                          max_failures="100%")  # fmt: skip
        fits = body | {"input": 'answer:{"x": 1}'}
        lines = [request_line(name, url=RESPONSES, body=each)
                 for name, each in (("a", body), ("b", fits))]  # fmt: skip
        working.input.write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert working.run() is ExitCode.OK
    unfit, fit = working.results
    assert unfit["error"]["code"] == "schema"
    assert "does not fit the schema" in unfit["error"]["message"]
    assert fit["output"]["output"][0]["content"][0]["text"] == '{"x": 1}'


def test_tokens_of_every_endpoint_are_counted(tmp_path: Path) -> None:
    names = ("chat", "responses", "rerank", "score", "embeddings")
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url)
        inputs(working.input, *names)
        assert working.run() is ExitCode.OK
    totals = working.status["aiflux"]["totals"]
    assert (totals["prompt_tokens"], totals["completion_tokens"]) == (15, 25)


def test_an_endpoint_that_the_server_lacks_stops_the_run_at_once(tmp_path: Path) -> None:
    """An older server answers 404; one whose model does not support the endpoint, 501."""
    for status in (404, 501):
        folder = tmp_path / str(status)
        folder.mkdir()
        with FaultyEngine() as engine:
            working = Working(folder, engine.url)
            body = {"model": "m:1", "input": str(status)}
            lines = [request_line(f"r{at}", url=RESPONSES, body=body) for at in range(50)]
            working.input.write_text("\n".join(lines) + "\n", encoding="utf-8")
            assert working.run() is ExitCode.ENGINE
        assert f"to {RESPONSES} ({status})" in str(working.error)
        assert "check that this version of the engine" in str(working.error)
        assert len(engine.bodies) < 50


def test_a_response_that_llama_cpp_calls_completed_is_cut_at_its_limit(tmp_path: Path) -> None:
    """It has no incomplete_details; the limit may be that of the run."""
    usage = {"input_tokens": 3, "output_tokens": 5}
    answer = {"object": "response", "status": "completed", "output": [text_item("half")]}
    silent, whole = ({**each, "usage": usage} for each in (answer, response(text_item("whole"))))
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, max_tokens=5)
        lines = [
            request_line(f"r{at}", url=RESPONSES, body={"model": "m:1", **body})
            for at, body in enumerate((
                {"input": f"body:{json.dumps(silent)}"},
                {"input": f"body:{json.dumps(silent)}", "max_output_tokens": 6},
                {"input": f"body:{json.dumps(whole)}"},
            ))
        ]  # fmt: skip
        working.input.write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert working.run() is ExitCode.OK
    cut = [each["metadata"].get("finish_reason_length", False) for each in working.results]
    assert cut == [True, False, False]
    summary = results_to_csv(working.output, tmp_path / "a.csv")
    assert summary.cut == 1
