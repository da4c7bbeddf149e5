"""Requests for responses, reranking and scores from tables, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aiflux.cli.main import main
from aiflux.converters import csv_to_jsonl, directory_to_jsonl, json_to_jsonl, parquet_to_jsonl
from aiflux.core.batch.request import parse_request
from aiflux.errors import InputError, UsageError
from tests.tools.faulty_engine import FaultyEngine

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ]},
    {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
]  # fmt: skip


def bodies(path: Path) -> list[dict[str, Any]]:
    """Return the bodies of the requests of a file, each of which is valid."""
    lines = path.read_bytes().splitlines()
    return [parse_request(line, "m:1").body for line in lines]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_prompt_becomes_a_response_with_all_shared_fields(tmp_path: Path) -> None:
    source = written(tmp_path / "in.csv", "text,label\nhello,x\n")
    schema = {"type": "object", "title": "label", "properties": {"label": {"type": "string"}}}
    csv_to_jsonl(source, tmp_path / "a.jsonl", template="Label: {text}", endpoint="responses",
                 system="Be brief.", max_tokens=9, temperature=0.5, schema=schema,
                 params={"text": {"verbosity": "low"}})  # fmt: skip
    form = {"type": "json_schema", "name": "label", "schema": schema, "strict": True}
    assert bodies(tmp_path / "a.jsonl") == [
        {"instructions": "Be brief.", "input": "Label: hello", "max_output_tokens": 9,
         "temperature": 0.5, "text": {"verbosity": "low", "format": form}},
    ]  # fmt: skip


def test_a_conversation_with_tools_and_an_image_becomes_items(tmp_path: Path) -> None:
    source = written(tmp_path / "in.json", json.dumps([{"messages": CHAT}, "", "hi"]))
    json_to_jsonl(source, tmp_path / "a.jsonl", endpoint="responses")
    first, empty, plain = bodies(tmp_path / "a.jsonl")
    picture = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "auto"}
    assert first == {
        "instructions": "Be brief.",
        "input": [
            {"type": "message", "role": "user",
             "content": [{"type": "input_text", "text": "What is it?"}, picture]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "a cat"},
            {"type": "message", "role": "assistant", "content": "A cat."},
            {"type": "message", "role": "user", "content": "Sure?"},
        ],
    }  # fmt: skip
    assert (empty, plain) == ({"input": ""}, {"input": "hi"})


def test_examples_and_turns_become_items(tmp_path: Path) -> None:
    source = written(tmp_path / "in.csv", "text\nhello\n")
    csv_to_jsonl(source, tmp_path / "a.jsonl", template="{text}", endpoint="responses",
                 examples=[{"text": "bye", "answer": "x"}])  # fmt: skip
    (body,) = bodies(tmp_path / "a.jsonl")
    assert [item["content"] for item in body["input"]] == ["bye", "x", "hello"]


@pytest.mark.parametrize(
    ("cell", "documents"),
    [
        ('"[""a"", ""b""]"', ["a", "b"]),
        ("one", ["one"]),
        ("[not json", ["[not json"]),
        ('"[""a"", null, 3]"', ["a", "", "3"]),
    ],
)
def test_documents_of_a_csv_are_texts_or_a_json_list(
    tmp_path: Path, cell: str, documents: list[str]
) -> None:
    source = written(tmp_path / "in.csv", f"q,docs\nx,{cell}\n")
    for endpoint in ("rerank", "score"):
        csv_to_jsonl(source, tmp_path / f"{endpoint}.jsonl", template="Q: {q}", endpoint=endpoint,
                     documents=["docs"])  # fmt: skip
    assert bodies(tmp_path / "rerank.jsonl") == [{"query": "Q: x", "documents": documents}]
    second = documents[0] if len(documents) == 1 else documents
    assert bodies(tmp_path / "score.jsonl") == [{"text_1": "Q: x", "text_2": second}]


def test_documents_are_in_several_columns_or_fields_or_lists(tmp_path: Path) -> None:
    source = written(tmp_path / "in.csv", 'q,a,b\nx,[1],two\nx,,two\n')  # fmt: skip
    csv_to_jsonl(source, tmp_path / "a.jsonl", template="{q}", endpoint="rerank",
                 documents=("a", "b"), params={"top_n": 1})  # fmt: skip
    assert bodies(tmp_path / "a.jsonl") == [
        {"top_n": 1, "query": "x", "documents": ["[1]", "two"]},
        {"top_n": 1, "query": "x", "documents": ["", "two"]},
    ]
    table = pa.table({"q": ["x"], "docs": [["a", "b"]]})
    pq.write_table(table, tmp_path / "in.parquet")
    parquet_to_jsonl(tmp_path / "in.parquet", tmp_path / "b.jsonl", template="{q}",
                     endpoint="rerank", documents="docs")  # fmt: skip
    nested = {"q": "x", "found": {"docs": ["a", {"text": "b"}]}}
    source = written(tmp_path / "in.json", json.dumps([nested]))
    json_to_jsonl(source, tmp_path / "c.jsonl", template="{q}", endpoint="rerank",
                  documents=["found.docs"])  # fmt: skip
    assert bodies(tmp_path / "b.jsonl")[0]["documents"] == ["a", "b"]
    assert bodies(tmp_path / "c.jsonl")[0]["documents"] == ["a", {"text": "b"}]


def test_wrong_documents_are_refused_with_the_remedy(tmp_path: Path) -> None:
    source = written(tmp_path / "in.csv", "q,docs\nx,\n")
    target = tmp_path / "a.jsonl"

    def convert(**options: Any) -> None:
        csv_to_jsonl(source, target, template="{q}", **options)

    with pytest.raises(UsageError, match="rerank needs the columns with the documents"):
        convert(endpoint="rerank")
    with pytest.raises(UsageError, match="--documents applies to rerank and score, not chat"):
        convert(documents=["docs"])
    with pytest.raises(UsageError, match="do not apply to score"):
        convert(endpoint="score", documents=["docs"], max_tokens=5)
    with pytest.raises(UsageError, match="--system requires the chat endpoint, not rerank"):
        convert(endpoint="rerank", documents=["docs"], system="x")
    with pytest.raises(UsageError, match="--param sets query"):
        convert(endpoint="rerank", documents=["docs"], params={"query": "x"})
    with pytest.raises(InputError, match="--documents names 'dcs', but"):
        convert(endpoint="rerank", documents=["dcs"])
    with pytest.raises(InputError) as error:
        convert(endpoint="rerank", documents=["docs"])
    assert "no documents in 'docs'" in str(error.value)
    folder = tmp_path / "files"
    folder.mkdir()
    written(folder / "a.txt", "A text.")
    directory_to_jsonl(folder, target, template="animals", endpoint="score", documents=["text"])
    assert bodies(target) == [{"text_1": "animals", "text_2": "A text."}]
    assert not any(path.suffix == ".tmp" for path in tmp_path.iterdir())


def test_ask_adds_scores_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "in.csv", 'q,a,b\nx,one,"two, or"\n400,one,two\n')
    common = ["--template", "{q}", "--model", "m:1", "--max-failures", "1"]
    asked = [*common, "--endpoint", "rerank", "--documents", "a", "--documents", "b"]
    with FaultyEngine() as engine:
        url = ["--engine-url", engine.url]
        assert main(["ask", "in.csv", *asked, *url, "--output", "out.csv"]) == 0
        assert main(["ask", "in.csv", *common, *url, "--endpoint", "responses", "--system", "Be.",
                     "--output", "texts.csv"]) == 0  # fmt: skip
    header, first, second = (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()
    assert header == "q,a,b,document,answer,error"
    assert first == 'x,one,"two, or","[0, 1]","[0, -1]",'
    assert second.startswith("400,one,two,,,http_400")
    assert 'x,one,"two, or",echo x' in (tmp_path / "texts.csv").read_text(encoding="utf-8")
