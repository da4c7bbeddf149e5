"""One input line: valid requests, and the errors of invalid ones."""

from __future__ import annotations

import json
from contextlib import suppress
from operator import eq

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiflux.core.batch.request import (
    AcceptsModel,
    LineError,
    parse_request,
    request_entry,
    request_key,
)
from aiflux.engines.kinds import kind_named
from tests.unit.helpers import request_line

ACCEPTS = kind_named("ollama").input_rules.accepts_model


def problem(line: str | bytes, model: str | None = None, accepts: AcceptsModel = ACCEPTS) -> str:
    raw = line.encode() if isinstance(line, str) else line
    with pytest.raises(LineError) as caught:
        parse_request(raw, model, accepts)
    return str(caught.value)


def test_the_example_request_is_parsed() -> None:
    line = (
        b'{"custom_id":"request1","method":"POST","url":"/v1/chat/completions","body":{"model":'
        b'"llama3.2:3b","messages":[{"role":"system","content":"You are a helpful assistant"},'
        b'{"role":"user","content":"Explain quantum computing"}],"temperature":0.7,'
        b'"max_tokens":500}}'
    )
    request = parse_request(line)
    assert request.custom_id == "request1"
    assert request.model == "llama3.2:3b"
    assert request.body["max_tokens"] == 500
    assert request.metadata is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ('{"a', "Unterminated string starting at column 2;"),
        ("[1]", "an array instead of a request object"),
        ("7", "a number instead"),
        ('{"a": NaN}', "NaN is not JSON at column 7"),
        ('{"NaN": [{"\\"1e400": -Infinity}]}', "-Infinity is not JSON at column 22"),
        ('{"a": 1.5, "b": 1e400}', "the number 1e400 is too large at column 17"),
        (f'{{"a": {"9" * 5000}}}', f"the number {'9' * 40}... is too large at column 7"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", "nested more than 200 levels deep at column 206"),
        (
            request_line(body={"messages": [{}], "model": "m\ud83d"}),
            "contains half a surrogate pair",
        ),
        ("[" * 100_000, "nested more than 200 levels deep at column 201"),
        (b'{"custom_id": "\xff"}', "not UTF-8 (byte 0xff at column 16)"),
        (request_line(custom_id=...), "custom_id is missing"),
        (request_line(custom_id=""), "custom_id is empty"),
        (request_line(custom_id=7), "custom_id must be a string, not a number"),
        (request_line(method="GET"), 'method is "GET"'),
        (request_line(url=..., body={"model": "m:1"}), "url is missing"),
        (request_line(url="/v1/chat"), 'url "/v1/chat" is unknown'),
        (request_line(url=["/v1/chat"]), "is unknown"),
        (request_line(body=...), "body is missing"),
        (request_line(body=[]), "body is an array"),
        (request_line(body={"model": "m:1"}), "body.messages is missing"),
        (request_line(url="/v1/embeddings"), "body.input is missing"),
        (request_line(body={"messages": []}), "body.messages is an empty array"),
        (request_line(body={"messages": "Hi"}), "body.messages is a string, not an array"),
        (request_line(url="/v1/completions", body={"prompt": None}), "body.prompt is null"),
        (
            request_line(url="/v1/rerank", body={"query": "a", "documents": []}),
            "body.documents is an empty array; /v1/rerank needs at least one entry in it",
        ),
        (request_line(url=..., body={"messages": []}), "body.messages is an empty array"),
        (request_line(body={"messages": [{}]}), "body.model is missing"),
        (request_line(body={"messages": [{}], "model": 3}), "body.model must be a non-empty"),
        (request_line(metadata=[1]), "metadata must be an object, not an array"),
    ],
)
def test_an_invalid_line_names_the_problem(line: str | bytes, words: str) -> None:
    assert words in problem(line)


BAD_VALUES = ["NaN", "Infinity", "-Infinity", "1e400", "-1.5E+309", "[" * 201 + "]" * 201]


@settings(max_examples=200)
@given(
    st.sampled_from(BAD_VALUES),
    st.lists(st.sampled_from(["list", "object"]), max_size=5),
    st.sampled_from(["body", "metadata"]),
    st.text(max_size=20),
)
def test_a_value_that_cannot_be_forwarded_is_refused_at_any_depth(
    value: str, inside: list[str], field: str, name: str
) -> None:
    """The quick check and the exact one agree; strings that look like such values are accepted."""
    text = value
    for kind in inside:
        text = f"[0, {text}]" if kind == "list" else f"{{{json.dumps(name)}: {text}}}"
    body = {"messages": [{"role": "user", "content": f'"{value}'}], "model": "m:1", "x": "<here>"}
    changes = {"body": body} if field == "body" else {"metadata": {"x": "<here>"}}
    good = request_line("r1", **changes)
    for exact in (True, False):
        request_entry(good.encode(), exact=exact)
        with pytest.raises(LineError, match=r"(NaN|Infinity|number|nested) .*at column [0-9]+$"):
            request_entry(good.replace('"<here>"', text).encode(), exact=exact)


def test_numbers_keep_their_digits_and_the_last_of_two_keys_counts() -> None:
    line = request_line(body=...).removesuffix("}")
    digits = "1" * 4000
    line += f', "body": {{"model": "m:1", "messages": [{{}}], "seed": {digits}, "t": 0, "t": 1}}}}'
    body = parse_request(line.encode()).body
    assert body["seed"] == int(digits)
    assert body["t"] == 1


def test_all_problems_of_a_line_are_reported() -> None:
    text = problem('{"url": "/x", "body": 3}')
    for words in ("custom_id is missing", '"/x" is unknown', "is a number"):
        assert words in text


def test_a_body_must_name_the_model_of_the_run() -> None:
    line = request_line()
    assert 'body.model is "m:1" but the run\'s model is "other:2"' in problem(line, "other:2")
    assert parse_request(line.encode(), "m:1").model == "m:1"


def test_a_missing_tag_means_latest() -> None:
    line = request_line(body={"model": "m", "messages": [{}]}).encode()
    assert parse_request(line, "m:latest", ACCEPTS).model == "m"


def test_names_are_compared_as_the_engine_does() -> None:
    line = request_line(body={"model": "m", "messages": [{}]})
    assert "use --replace-model" in problem(line, "m:latest", eq)
    assert parse_request(line.encode(), "m:latest", ACCEPTS)


def test_a_body_can_name_the_digest_of_the_run_s_model() -> None:
    digest = "@sha256:" + "0" * 64
    line = request_line(body={"model": f"m{digest}", "messages": [{}]})
    for model in (f"m{digest}", f"m:latest{digest[:20]}", None):
        assert parse_request(line.encode(), model, ACCEPTS).model == f"m{digest}"
    for model in ("m", "m@sha256:" + "1" * 12):
        assert f'but the run\'s model is "{model}"' in problem(line, model)


def test_a_body_without_a_model_uses_the_run_s() -> None:
    line = request_line(body={"messages": [{}]}).encode()
    assert parse_request(line, "m:1").model is None


def test_the_key_depends_on_every_byte() -> None:
    line = request_line().encode()
    assert request_key(line) == request_key(line)
    assert request_key(line) != request_key(line + b" ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)  # fmt: skip


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_a_problem(raw: bytes) -> None:
    with suppress(LineError):
        parse_request(raw)


@given(json_values)
def test_any_json_is_a_request_or_a_problem(value: object) -> None:
    with pytest.raises(LineError):
        parse_request(json.dumps(value).encode())


@settings(max_examples=50)
@given(
    custom_id=st.text(min_size=1),
    extra=st.dictionaries(st.text(), json_values),
    ascii_only=st.booleans(),
)
def test_a_body_is_not_changed(custom_id: str, extra: object, ascii_only: bool) -> None:
    body = {**extra, "model": "m:1", "messages": [extra]}  # type: ignore[dict-item]
    entry = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    raw = json.dumps(entry, ensure_ascii=ascii_only).encode("utf-8")
    assert parse_request(raw).body == body


_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8)
)
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner)
)


@example(custom_id="r1", body={"model": -(2**63) - 1}, tail="", ascii_only=False)
@given(
    custom_id=_VALUES | st.just("r1"),
    body=_VALUES | st.dictionaries(st.sampled_from(["model", "messages", "x"]), _VALUES),
    tail=st.sampled_from(["", " ", "x", "}", "\x00"]),
    ascii_only=st.booleans(),
)
def test_the_quick_check_agrees_with_the_exact_one(
    custom_id: object, body: object, tail: str, ascii_only: bool
) -> None:
    entry = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    raw = (json.dumps(entry, ensure_ascii=ascii_only) + tail).encode("utf-8", "surrogatepass")
    assert judged(raw, exact=False) == judged(raw, exact=True)


def judged(raw: bytes, *, exact: bool) -> tuple[str, ...]:
    try:
        entry = request_entry(raw, "m:1", exact=exact)
    except LineError as error:
        return error.problems
    return (entry["custom_id"], entry["url"], *entry["body"])
