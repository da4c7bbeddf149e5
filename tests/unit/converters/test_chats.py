"""Conversations and unusual tables: what converters recognize and warn about."""

from __future__ import annotations

import base64
import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.cli.main import main
from aiflux.converters import (
    csv_to_jsonl,
    json_to_jsonl,
    parquet_to_jsonl,
    results_to_csv,
    results_to_jsonl,
    results_to_parquet,
)
from aiflux.converters.cells import as_messages
from aiflux.converters.results import BackOptions
from aiflux.errors import InputError
from tests.unit.converters.test_converters import prompts, refused, requests_in, write
from tests.unit.converters.test_results import answered, read_csv

TURNS = [("system", "be brief"), ("human", "Hi?"), ("gpt", "Hello."), ("human", "Why?")]
SHARED = [{"from": speaker, "value": text} for speaker, text in TURNS]
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
MESSAGES = [{"role": ROLES[speaker], "content": text} for speaker, text in TURNS]


def messages_in(path: Path) -> list[Any]:
    return [request["body"]["messages"] for request in requests_in(path)]


@pytest.mark.parametrize("field", [None, "conversations"])
def test_sharegpt_is_a_conversation(tmp_path: Path, field: str | None) -> None:
    entries = [{"id": "a", "conversations": SHARED}, {"id": "b", "conversations": SHARED[:2]}]
    source = write(tmp_path / "in.json", json.dumps(entries))
    json_to_jsonl(source, tmp_path / "o.jsonl", field=field, id_field="id")
    assert messages_in(tmp_path / "o.jsonl") == [MESSAGES, MESSAGES[:2]]


def test_an_unknown_speaker_is_rejected(tmp_path: Path) -> None:
    entry = {"conversations": [{"from": "parrot", "value": "Hi"}]}
    source = write(tmp_path / "in.jsonl", json.dumps(entry))
    with pytest.raises(InputError) as error:
        json_to_jsonl(source, tmp_path / "o.jsonl")
    assert "ShareGPT form" in refused(error)


@given(st.lists(st.sampled_from(SHARED), max_size=6))
def test_turns_keep_their_order(turns: list[dict[str, str]]) -> None:
    found = as_messages(turns)
    assert found == [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


def test_conversations_that_end_with_an_answer_are_counted(tmp_path: Path) -> None:
    lines = [{"messages": MESSAGES[: 3 + number % 2]} for number in range(14)]
    source = write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, lines)))
    summary = json_to_jsonl(source, tmp_path / "o.jsonl")
    assert summary.requests == 14
    assert summary.notes == (
        "7 requests that end with an assistant's turn, which the model continues or answers; "
        "to generate it again: --drop-last-assistant (line 1, 3, 5, 7, 9, ...)",
    )


@pytest.mark.parametrize("turns", [SHARED, MESSAGES])
def test_a_parquet_chat_column_is_sent_unchanged(
    tmp_path: Path, turns: list[dict[str, str]]
) -> None:
    table = pa.table({"chat": [turns, turns[:2]], "id": ["a", "b"]})
    pq.write_table(table, tmp_path / "in.parquet")
    parquet_to_jsonl(tmp_path / "in.parquet", tmp_path / "o.jsonl", template="{chat}")
    assert messages_in(tmp_path / "o.jsonl") == [MESSAGES, MESSAGES[:2]]
    parquet_to_jsonl(tmp_path / "in.parquet", tmp_path / "p.jsonl", template="Sum up: {chat}")
    prompt = messages_in(tmp_path / "p.jsonl")[0][0]["content"]
    assert json.loads(prompt.removeprefix("Sum up: ")) == turns
    with pytest.raises(InputError) as error:
        parquet_to_jsonl(
            tmp_path / "in.parquet", tmp_path / "p.jsonl", template="{chat}", system="be kind"
        )
    assert "already has a system message" in refused(error)


def test_fields_of_other_messages_are_not_sent_as_null(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi", "name": None}, *[{**MESSAGES[3], "name": "Ann"}]]
    pq.write_table(pa.table({"chat": [turns]}), tmp_path / "in.parquet")
    parquet_to_jsonl(tmp_path / "in.parquet", tmp_path / "o.jsonl", template="{chat}")
    assert messages_in(tmp_path / "o.jsonl") == [[{"role": "user", "content": "Hi"}, turns[1]]]


def as_r_writes(rows: list[list[str]], separator: str) -> str:
    """Return what ``write.table(frame, sep = separator)`` writes: all strings quoted."""
    header, *cells = rows
    lines = [separator.join(f'"{name}"' for name in header)]
    for number, row in enumerate(cells, start=1):
        lines.append(separator.join(f'"{cell}"' for cell in [str(number), *row]))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("quote", ['"', ""])
@pytest.mark.parametrize("separator", [" ", "\t", ";"])
def test_row_names_of_r_become_a_column(tmp_path: Path, separator: str, quote: str) -> None:
    frame = [["text", "score"], ["a,b", "1"], ["c,d", "2"]]
    content = as_r_writes(frame, separator).replace('"', quote)
    source = write(tmp_path / "in.csv", content)
    given = {"delimiter": "space"} if separator == " " else {}
    summary = csv_to_jsonl(
        source, tmp_path / "o.jsonl", template="{text}", id_column="row.names", **given
    )
    assert prompts(tmp_path / "o.jsonl") == {"1": "a,b", "2": "c,d"}
    assert "as in R; it is called 'row.names'" in summary.notes[1]


def test_a_trailing_delimiter_does_not_mean_row_names(tmp_path: Path) -> None:
    for content in ("a,b\n1,2,\n2,4,\n", "a,b\nx, y,2\nz, z,3\n"):
        source = write(tmp_path / "in.csv", content)
        with pytest.raises(InputError, match="2 of 2 rows"):
            csv_to_jsonl(source, tmp_path / "o.jsonl", template="{a}")


def test_requests_with_nothing_filled_in_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "id,text\n1,a\n2,\n3,  \n4,b\n")
    summary = csv_to_jsonl(source, tmp_path / "o.jsonl", template="Rate: {text}")
    note = "2 requests with nothing filled in: the template's fields are empty (line 3, 4)"
    assert summary.notes[1:] == (note,)
    source = write(tmp_path / "in.jsonl", '{"text": "a"}\n{"text": null}\n')
    for options in ({"template": "Rate: {text}"}, {"field": "text"}):
        summary = json_to_jsonl(source, tmp_path / "o.jsonl", **options)
        assert summary.notes[0].startswith("1 request with nothing filled in")


def test_a_row_with_an_empty_cell_does_not_count_as_changed(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "text,label\na,x\n,y\n")
    csv_to_jsonl(source, tmp_path / "q.jsonl", template="Rate: {text}")
    output = answered(tmp_path / "q.jsonl", tmp_path / "out.json")
    assert results_to_csv(output, tmp_path / "b.csv", BackOptions(source=source)).changed == 0


def test_binary_source_columns_are_returned(tmp_path: Path) -> None:
    """Parquet keeps the bytes; text formats have UTF-8, else Base64."""
    noise = bytes(range(256))
    table = pa.table({"text": ["a", "b", "c"], "raw": [noise, b"plain", None]})
    source = tmp_path / "in.parquet"
    pq.write_table(table, source)
    parquet_to_jsonl(source, tmp_path / "q.jsonl", template="{text}")
    output = answered(tmp_path / "q.jsonl", tmp_path / "out.json")
    back = BackOptions(source=source)
    results_to_csv(output, tmp_path / "b.csv", back)
    written = [base64.b64encode(noise).decode(), "plain", ""]
    assert [row[2] for row in read_csv(tmp_path / "b.csv")[1:]] == written
    results_to_jsonl(output, tmp_path / "b.jsonl", back)
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    assert [json.loads(line)["raw"] for line in lines] == [*written[:2], None]
    results_to_parquet(output, tmp_path / "b.parquet", back)
    assert pq.read_table(tmp_path / "b.parquet")["raw"].to_pylist() == [noise, b"plain", None]


def test_a_response_with_an_http_error_counts_as_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenAI's batch results have the reason in the body and no ``error`` next to it."""
    body = {"error": {"message": "context too long", "type": "invalid_request_error"}}
    response = {"status_code": 400, "request_id": "r", "body": body}
    line = {"id": "b", "custom_id": "a", "response": response, "error": None}
    output = write(tmp_path / "out.jsonl", json.dumps(line) + "\n")
    assert main(["results", "show", str(output), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["answer"] is None
    assert (shown["error"]["code"], shown["error"]["message"]) == ("http_400", "context too long")
    assert results_to_csv(output, tmp_path / "b.csv").failed == 1


def test_damaged_parquet_is_refused_or_read(tmp_path: Path) -> None:
    chance = random.Random(5)
    pq.write_table(pa.table({"chat": [MESSAGES] * 20}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for _ in range(60):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path = write(tmp_path / "in.parquet", bytes(content[: chance.choice([None, 300])]))
        with suppress(InputError):
            parquet_to_jsonl(path, tmp_path / "o.jsonl", template="{chat}")


def test_the_last_answer_is_dropped(tmp_path: Path) -> None:
    chats = [
        {"conversations": SHARED, "system": "be kind"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "c"}]},
    ]
    source = write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, chats)))
    summary = json_to_jsonl(source, tmp_path / "o.jsonl", drop_last_assistant=True)
    first, second, third = messages_in(tmp_path / "o.jsonl")
    assert first[-1]["role"] != "assistant"
    assert [each["content"] for each in (*second, *third)] == ["a", "c"]
    assert summary.notes == ()
    only = [{"messages": [{"role": "assistant", "content": "b"}]}]
    source = write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, only)))
    with pytest.raises(InputError, match="1 of 1 lines") as error:
        json_to_jsonl(source, tmp_path / "p.jsonl", drop_last_assistant=True)
    assert "only turns of the assistant" in refused(error)


def test_the_system_prompt_next_to_a_conversation_is_sent(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}]
    chats = [{"conversations": turns, "system": "be kind"}, {"conversations": turns, "system": ""}]
    source = write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, chats)))
    json_to_jsonl(source, tmp_path / "o.jsonl")
    user = {"role": "user", "content": "hi"}
    system = {"role": "system", "content": "be kind"}
    assert messages_in(tmp_path / "o.jsonl") == [[system, user], [user]]
