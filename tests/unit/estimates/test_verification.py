"""What counts as the same answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aiflux.errors import UsageError
from aiflux.estimates.verification import (
    Agreement,
    ModelResults,
    Versions,
    answer_of,
    first_difference,
    mixed_words,
    refuse_mixed,
)
from tests.unit.made_runs import MadeRun


def chat(text: str, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "x-1", "created": 7, "choices": [{**choice, **more}], "usage": {"a": 1}}


def difference(one: Any, other: Any) -> str | None:
    before, now = (answer_of(json.dumps(each).encode()) for each in (one, other))
    found = first_difference("r1", before, now)
    return None if found is None else found.place


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        (chat("a"), {**chat("a"), "id": "y", "created": 8, "usage": {}}, None),
        (chat("a"), chat("a", logprobs={"content": [1.0]}), None),
        (chat("abc"), chat("abd"), "[0].message.content, character 3"),
        (chat("abc"), chat("ab"), "[0].message.content, character 3"),
        (chat("a"), chat("a", finish_reason="length"), "[0].finish_reason, character 1"),
        (chat("a", tool_calls=[CALL]), chat("a", tool_calls=[{**CALL, "id": "call_2"}]), None),
        (chat("a"), chat("a", tool_calls=[CALL]), "[0].tool_calls[0].function.arguments"),
        ({"data": [{"embedding": [0.1, 2]}]}, {"data": [{"embedding": [0.1, 2.5]}]},
         "[0].embedding[1]"),
        ({"data": [{"embedding": [1, 2]}]}, {"data": [{"embedding": [1]}]}, "[0].embedding[1]"),
        ({"output": [{"id": "m1", "text": "a"}]}, {"output": [{"id": "m2", "text": "a"}]}, None),
        ({"choices": []}, {"choices": [{"text": "a"}]}, ""),
        ({"choices": [{"text": "1"}]}, {"choices": [{"text": 1}]}, "[0].text"),
        ({"choices": [{"text": None}]}, {"choices": [{"text": False}]}, "[0].text"),
    ],
)  # fmt: skip
def test_the_first_difference_of_two_answers(one: Any, other: Any, place: str | None) -> None:
    found = difference(one, other)
    if place == "":
        assert found is not None
    else:
        assert found == place


def test_a_share_is_known_only_of_pairs() -> None:
    assert Agreement().share is None
    assert Agreement().plus(True).plus(False).plus(True).share == pytest.approx(2 / 3, abs=1e-6)


def test_unknown_versions_are_neither_the_same_nor_others() -> None:
    assert Versions("engine", (), ("1",)).same is None
    assert Versions("engine", ("1",), ("1",)).same is True
    assert Versions("engine", ("1", "2"), ("1",)).same is False


def test_versions_of_a_model_are_mixed_results(tmp_path: Path) -> None:
    plan = MadeRun(tmp_path).plan
    versions = ModelResults("llama3.2:3b", 9, ("sha256:" + "a" * 64, "sha256:" + "b" * 64))
    assert mixed_words(plan, [replace(versions, digests=versions.digests[:1])]) == ""
    words = mixed_words(plan, [versions])
    assert words.startswith("results of different versions of llama3.2:3b (sha256:aaaa")
    with pytest.raises(UsageError, match="cannot be verified: results of different versions"):
        refuse_mixed(plan, [versions])
