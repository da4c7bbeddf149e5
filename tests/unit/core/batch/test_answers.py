"""The text of an answer in every form that engines use, and the reasons for empty answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.cli.main import main
from aiflux.core.batch.results_file import EMPTY_REASONS, ChoiceText, answered_words, choice_texts
from aiflux.errors import ExitCode
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.working import Working

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
# message, finish_reason -> text, reasoning, why it is empty
ANSWERS: list[tuple[dict[str, Any], str | None, ChoiceText]] = [
    ({"content": "yes"}, "stop", ChoiceText("yes")),
    ({"content": "yes", "reasoning_content": "hm"}, "stop", ChoiceText("yes", "hm")),
    ({"content": "", "reasoning": "hm"}, "length", ChoiceText("", "hm", "reasoning")),
    ({"content": None, "reasoning_content": "hm"}, "length", ChoiceText("", "hm", "reasoning")),
    ({"content": "\n\n", "reasoning": "hm"}, "stop", ChoiceText("\n\n", "hm", "only_reasoning")),
    ({"content": ""}, "length", ChoiceText("", "", "length")),
    ({"content": ""}, "stop", ChoiceText("", "", "no_text")),
    ({"content": None, "tool_calls": [CALL]}, "tool_calls", ChoiceText("", "", "tool_call")),
    ({"content": None, "function_call": {}, "tool_calls": [CALL]}, "stop",
     ChoiceText("", "", "tool_call")),
    ({"content": "calling", "tool_calls": [CALL]}, "tool_calls", ChoiceText("calling")),
    ({"content": None, "refusal": "I cannot."}, "stop", ChoiceText("", "", "refusal")),
    ({"content": ""}, "content_filter", ChoiceText("", "", "content_filter")),
    ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "stop",
     ChoiceText("ab")),
    ({"content": [{"type": "refusal", "refusal": "no"}]}, "stop", ChoiceText("", "", "refusal")),
    ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                  {"type": "text", "text": "yes"}]}, "stop", ChoiceText("yes", "hm")),
]  # fmt: skip
REASONS = [expected.empty for _, _, expected in ANSWERS if expected.empty is not None]


def body(message: dict[str, Any], finish: str | None) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


@pytest.mark.parametrize(("message", "finish", "expected"), ANSWERS)
def test_the_text_of_a_choice_is_found_in_every_form(
    message: dict[str, Any], finish: str | None, expected: ChoiceText
) -> None:
    assert choice_texts(body(message, finish)) == [expected]


def test_completions_have_text_and_embeddings_vectors() -> None:
    cut = {"choices": [{"text": "", "finish_reason": "length"}]}
    assert choice_texts(cut) == [ChoiceText("", "", "length")]
    assert choice_texts({"object": "list", "data": [{"embedding": [1.0]}]}) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda part: (
        st.lists(part, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "type", "thinking", "refusal"]), part)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(
    ["content", "reasoning", "reasoning_content", "tool_calls", "refusal", "function_call"]
), JSON), JSON)  # fmt: skip
def test_any_form_of_a_message_is_read(message: dict[str, Any], finish: Any) -> None:
    (expected,) = choice_texts(body(message, finish))
    assert (expected.empty is None) == bool(expected.text.strip())
    assert expected.empty is None or expected.empty in EMPTY_REASONS


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_run_says_how_many_answers_are_empty_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = [f"body:{json.dumps(body(message, finish))}" for message, finish, _ in ANSWERS]
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, output=f"out.{form}").prompts(*prompts, "400")
        working.options["max_failures"] = "1"
        assert working.run() is ExitCode.OK
    counts = {reason: REASONS.count(reason) for reason in REASONS}
    words = answered_words(len(ANSWERS), counts)
    assert words.startswith("15 answered, 8 of them empty (2 ended in reasoning: raise max_tokens;")
    assert words in working.reporter.messages
    assert working.status["aiflux"]["totals"]["empty_answers"] == counts
    if form == "json":
        found = [entry["metadata"].get("empty_answer") for entry in working.results]
        assert found == [expected.empty for _, _, expected in ANSWERS] + [None]

    name = working.output.name
    assert main(["status", name]) == 0
    assert words in capsys.readouterr().out
    assert main(["status", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["empty_answers"] == counts
    assert main(["report", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["empty_answers"] == counts
    assert main(["report", name, "--output", "-"]) == 0
    assert (
        "2 empty answers</strong> ended in reasoning: raise max_tokens." in capsys.readouterr().out
    )
    assert main(["results", "show", name]) == 0
    assert "(with a tool" in capsys.readouterr().out

    assert main(["results", "to-csv", name, "--reasoning", "--output", "a.csv"]) == 0
    assert f"16 rows -> a.csv: {words}, 1 failed" in capsys.readouterr().out
    with open("a.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["custom_id", "answer", "reasoning", "error"]
    expected = [(row["answer"], row["reasoning"]) for row in rows[:-1]]
    assert expected == [(choice.text, choice.reasoning) for _, _, choice in ANSWERS]
    assert main(["results", "to-jsonl", name, "--json", "--output", "a.jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["empty"] == counts


@pytest.mark.parametrize(
    ("finish", "count", "words"),
    [
        ("length", "cut_at_limit", "1 of the answers cut at the token limit"),
        ("content_filter", "cut_by_filter", "1 of the answers stopped by a content filter"),
    ],
)
def test_answers_that_are_not_whole_are_counted(
    finish: str, count: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with FaultyEngine() as engine:
        half = f"body:{json.dumps(body({'content': 'Half of'}, finish))}"
        working = Working(tmp_path, engine.url).prompts(half, "whole")
        assert working.run() is ExitCode.OK
    half_one, whole = (entry["metadata"] for entry in working.results)
    assert half_one[f"finish_reason_{finish}"] is True
    assert not any(name.startswith("finish_reason") for name in whole)
    assert main(["report", "out.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"][count] == 1
    assert main(["report", "out.json", "--output", "-"]) == 0
    assert "1 answer</strong>" in capsys.readouterr().out
    assert main(["results", "to-csv", "out.json", "--output", "a.csv"]) == 0
    assert words in capsys.readouterr().out


def test_empty_answers_of_earlier_starts_are_counted(tmp_path: Path) -> None:
    empty = f"body:{json.dumps(body({'content': ''}, 'stop'))}"
    with FaultyEngine(delay=0.02) as engine:
        working = Working(tmp_path, engine.url, concurrency=1).prompts(*[empty] * 12)
        working.stop_soon(results=3)
        assert working.run() is ExitCode.STOPPED
        first = working.status["aiflux"]["totals"]["empty_answers"]["no_text"]
        assert 0 < first < 12
        again = Working(tmp_path, engine.url, concurrency=1)
        assert again.run() is ExitCode.OK
    assert again.status["aiflux"]["totals"]["empty_answers"] == {"no_text": 12}
    assert "12 answered, 12 of them empty (12 without any text)" in again.reporter.messages
