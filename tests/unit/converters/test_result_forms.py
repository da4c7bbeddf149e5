"""Results as workbooks and databases, compared with other readers of these."""

from __future__ import annotations

import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import duckdb
import numpy
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from python_calamine import CalamineWorkbook

from aiflux.converters import (
    csv_to_jsonl,
    parquet_to_jsonl,
    results_to_csv,
    results_to_duckdb,
    results_to_jsonl,
    results_to_npy,
    results_to_parquet,
    results_to_xlsx,
)
from aiflux.converters.results import BackOptions
from aiflux.converters.results.database import write_database
from aiflux.errors import ExitCode, InputError, UsageError
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.converters.test_results import answered, output_of, read_csv
from tests.unit.helpers import request_line
from tests.unit.working import Working

BACK = BackOptions(custom_ids=False, errors=False)


def back(folder: Path, table: pa.Table, *answers: str) -> tuple[Path, BackOptions]:
    """Return the output of a run over a Parquet table with a column ``text``."""
    source = folder / "in.parquet"
    pq.write_table(table, source)
    parquet_to_jsonl(source, folder / "q.jsonl", template="{text}")
    output = answered(folder / "q.jsonl", folder / "out.json", *answers)
    return output, BackOptions(source=source, custom_ids=False, errors=False)


def test_a_workbook_has_the_types_of_the_values(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5)
    columns: dict[str, Any] = {
        "text": ["007", "=1+1"],
        "n": [1, 2**60],
        "x": [1.5, float("inf")],
        "ok": [True, None],
        "day": [date(2026, 1, 2), date(1800, 1, 1)],
        "at": [moment, None],
        "price": [Decimal("1.10"), None],
        "tags": [["a"], []],
    }
    output, options = back(tmp_path, pa.table(columns), "https://a.example", "+1 \0")
    results_to_xlsx(output, tmp_path / "b.xlsx", options)
    rows = [[*row] for row in openpyxl.load_workbook(tmp_path / "b.xlsx").active.values]
    assert rows == [
        ["text", "n", "x", "ok", "day", "at", "price", "tags", "answer"],
        ["007", 1, 1.5, True, datetime(2026, 1, 2), moment, 1.1, '["a"]', "https://a.example"],
        ["=1+1", str(2**60), "inf", None, "1800-01-01", None, None, "[]", "+1 \ufffd"],
    ]
    book = CalamineWorkbook.from_path(str(tmp_path / "b.xlsx"))
    assert book.get_sheet_by_index(0).to_python()[1][:3] == ["007", 1.0, 1.5]
    first = (tmp_path / "b.xlsx").read_bytes()
    results_to_xlsx(output, tmp_path / "b.xlsx", options)
    assert (tmp_path / "b.xlsx").read_bytes() == first


def test_a_text_that_a_cell_has_no_room_for(tmp_path: Path) -> None:
    summary = results_to_xlsx(output_of(tmp_path, "x" * 40_000), tmp_path / "b.xlsx", BACK)
    (row,) = openpyxl.load_workbook(tmp_path / "b.xlsx").active.iter_rows(min_row=2)
    assert len(row[-1].value) == 32_767
    assert "1 cell cut at 32,767 characters" in summary.notes[0]


def test_a_table_that_is_too_wide_for_a_sheet(tmp_path: Path) -> None:
    fields = ", ".join(f'"f{number}": 1' for number in range(16_384))
    output = output_of(tmp_path, f"{{{fields}}}")
    with pytest.raises(InputError, match="16,387 columns, and an Excel sheet at most 16,384"):
        results_to_xlsx(output, tmp_path / "b.xlsx", BackOptions(json_fields=()))
    assert not (tmp_path / "b.xlsx").exists()


def test_a_database_has_the_types_of_the_source(tmp_path: Path) -> None:
    columns = {
        "text": ["a", "b"],
        "n": pa.array([1, None], pa.int16()),
        "at": pa.array([1, 2], pa.timestamp("us", "UTC")),
        "price": pa.array(["1.10", "2.00"]).cast(pa.decimal128(9, 2)),
        "tags": [["a"], None],
    }
    folder = tmp_path / "it's"
    folder.mkdir()
    output, options = back(folder, pa.table(columns), "A", "B")
    results_to_duckdb(output, folder / "b.duckdb", options)
    with duckdb.connect(str(folder / "b.duckdb"), read_only=True) as connection:
        kinds = dict(
            connection.execute(
                "SELECT column_name, data_type FROM information_schema.columns"
            ).fetchall()
        )
        rows = connection.execute(
            'SELECT n, price, tags, answer, epoch_us("at") FROM answers'
        ).fetchall()
    assert kinds == {
        "text": "VARCHAR", "n": "SMALLINT", "at": "TIMESTAMP WITH TIME ZONE",
        "price": "DECIMAL(9,2)", "tags": "VARCHAR[]", "answer": "VARCHAR",
    }  # fmt: skip
    assert rows == [(1, Decimal("1.10"), ["a"], "A", 1), (None, Decimal("2.00"), None, "B", 2)]
    assert sorted(path.name for path in folder.iterdir()) == [
        "b.duckdb", "in.parquet", "out.json", "q.jsonl",
    ]  # fmt: skip


def embedded(folder: Path, *vectors: list[float] | None) -> Path:
    """Return an output with embeddings; None means failure."""
    rows = "".join(f"t{number}\n" for number in range(len(vectors)))
    (folder / "in.csv").write_text(f"text\n{rows}")
    csv_to_jsonl(folder / "in.csv", folder / "q.jsonl", template="{text}", endpoint="embeddings")
    entries = []
    for line, vector in zip((folder / "q.jsonl").read_text().splitlines(), vectors, strict=True):
        data = [{"object": "embedding", "index": 0, "embedding": vector}]
        error = {"code": "http_400", "message": "no", "status": 400}
        done = {"output": {"object": "list", "data": data}}
        outcome = {"output": None, "error": error} if vector is None else done
        entries.append(json.dumps({"input": json.loads(line), **outcome, "metadata": {}}))
    (folder / "out.json").write_text("[\n" + ",\n".join(entries) + "\n]\n")
    return folder / "out.json"


@pytest.mark.parametrize("source", [False, True])
def test_embeddings_in_parquet_are_lists_of_one_size(tmp_path: Path, source: bool) -> None:
    output = embedded(tmp_path, [0.5, -1.0], [1e-3, 2.0])
    back = BackOptions(source=tmp_path / "in.csv" if source else None)
    results_to_parquet(output, tmp_path / "b.parquet", back)
    column = pq.read_table(tmp_path / "b.parquet").column("answer")
    assert str(column.type) == "fixed_size_list<element: float>[2]"
    assert column[0].as_py() == [0.5, -1.0]
    numpy.testing.assert_array_equal(column[1].as_py(), numpy.float32([1e-3, 2.0]))


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("failed", [False, True])
def test_embeddings_of_some_rows_can_be_read_by_every_pyarrow(
    tmp_path: Path, source: bool, failed: bool
) -> None:
    output = embedded(tmp_path, [0.5, -1.0], [2.0, 4.0], *([None] if failed else []))
    if source and not failed:
        with open(tmp_path / "in.csv", "a", encoding="utf-8") as file:
            file.write("a row without a request\n")
    back = BackOptions(source=tmp_path / "in.csv" if source else None)
    results_to_parquet(output, tmp_path / "b.parquet", back)
    column = pq.read_table(tmp_path / "b.parquet").column("answer")
    missing = [None] if failed or source else []
    assert column.to_pylist() == [[0.5, -1.0], [2.0, 4.0], *missing]
    assert str(column.type).startswith("list<" if missing else "fixed_size_list<")


def test_embeddings_as_an_array(tmp_path: Path) -> None:
    output = embedded(tmp_path, [0.5, -1.0, 3.0], None, [1e-3, 2.0, 1e38])
    results_to_npy(output, tmp_path / "b.npy")
    found = numpy.load(tmp_path / "b.npy")
    expected = numpy.array([[0.5, -1, 3], [numpy.nan] * 3, [1e-3, 2, 1e38]], "f4")
    assert (found.dtype, found.shape) == (numpy.dtype("f4"), (3, 3))
    numpy.testing.assert_array_equal(found, expected)
    assert numpy.load(tmp_path / "b.npy", mmap_mode="r").shape == (3, 3)


def test_answers_that_are_no_embeddings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no embeddings"):
        results_to_npy(output_of(tmp_path, "A"), tmp_path / "b.npy")
    output = embedded(tmp_path, [1.0, 2.0], [3.0])
    with pytest.raises(InputError, match="the answer of row 2 has 1 number, and the first 2"):
        results_to_npy(output, tmp_path / "b.npy")
    with pytest.raises(InputError, match="cannot be stored in Parquet"):
        results_to_parquet(output, tmp_path / "b.parquet")
    assert not (tmp_path / "b.npy").exists()


@pytest.mark.parametrize("value", [None, "a", True, 10**400, [1.0]])
def test_values_of_an_embedding_that_are_no_numbers(tmp_path: Path, value: Any) -> None:
    output = embedded(tmp_path, [1.0, 2.0], [3.0, value])
    with pytest.raises(InputError, match="the answer of row 2 is no list of numbers"):
        results_to_npy(output, tmp_path / "b.npy")
    assert not (tmp_path / "b.npy").exists()


def test_an_embedding_without_numbers_is_a_text(tmp_path: Path) -> None:
    output = embedded(tmp_path, [])
    with pytest.raises(InputError, match="has no embeddings"):
        results_to_npy(output, tmp_path / "b.npy")
    results_to_parquet(output, tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "b.parquet").column("answer").to_pylist() == ["[]"]


def several(folder: Path) -> Path:
    """Return an output whose first answer has two choices."""
    output = output_of(folder, "A", "B", None)
    entries = json.loads(output.read_text())
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    entries[0]["output"]["choices"].append(
        {
            "index": 1,
            "message": {"content": '{"k": 2}', "tool_calls": [call], "reasoning": "why"},
            "logprobs": {"content": [{"token": "a", "logprob": -0.5}]},
        }
    )
    output.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
    return output


def test_choices_as_rows(tmp_path: Path) -> None:
    back = BackOptions(
        choices="rows", json_fields=("k",), reasoning=True, tool_calls=True, logprobs=True
    )
    summary = results_to_parquet(several(tmp_path), tmp_path / "b.parquet", back)
    table = pq.read_table(tmp_path / "b.parquet")
    assert table.column_names == [
        "custom_id", "choice", "answer", "reasoning", "tool_calls", "logprobs", "error", "k",
    ]  # fmt: skip
    assert table.select(["custom_id", "choice", "answer", "reasoning"]).to_pylist() == [
        {"custom_id": "n0", "choice": 0, "answer": "A", "reasoning": None},
        {"custom_id": "n0", "choice": 1, "answer": '{"k": 2}', "reasoning": "why"},
        {"custom_id": "n1", "choice": 0, "answer": "B", "reasoning": None},
        {"custom_id": "n2", "choice": None, "answer": None, "reasoning": None},
    ]
    assert json.loads(table.column("tool_calls")[1].as_py())[0]["function"]["name"] == "f"
    assert json.loads(table.column("logprobs")[1].as_py())["content"][0]["logprob"] == -0.5
    assert table.column("tool_calls").null_count == 3
    assert (summary.rows, summary.answered, summary.failed, summary.several) == (4, 2, 1, 0)


def test_choices_as_columns(tmp_path: Path) -> None:
    results_to_csv(several(tmp_path), tmp_path / "b.csv", BackOptions(choices="columns"))
    assert read_csv(tmp_path / "b.csv") == [
        ["custom_id", "answer", "answer_2", "error"],
        ["n0", "A", '{"k": 2}', ""],
        ["n1", "B", "", ""],
        ["n2", "", "", "http_400: no"],
    ]


def test_only_the_first_choice_by_default(tmp_path: Path) -> None:
    summary = results_to_csv(several(tmp_path), tmp_path / "b.csv")
    assert [row[1] for row in read_csv(tmp_path / "b.csv")] == ["answer", "A", "B", ""]
    assert summary.several == 1


RERANK = {"query": "q", "documents": ["a", "b"]}


def scored_run(folder: Path, *requests: tuple[str, dict[str, Any]]) -> Path:
    """Return the output of a run whose last request fails."""
    lines = [
        request_line(f"r{at}", url=url, body={"model": "m:1", **body})
        for at, (url, body) in enumerate(requests)
    ]
    with FaultyEngine() as engine:
        working = Working(folder, engine.url, max_failures="1")
        working.input.write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert working.run() is ExitCode.OK
    return working.output


def test_the_scores_of_a_rerank_are_lists(tmp_path: Path) -> None:
    bad = {**RERANK, "query": "400"}
    output = scored_run(tmp_path, *[("/v1/rerank", body) for body in (RERANK, bad)])
    results_to_parquet(output, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.field("answer").type == pa.list_(pa.float64())
    assert table.schema.field("document").type == pa.list_(pa.int64())
    assert table.column_names == ["custom_id", "document", "answer", "error"]
    assert table.to_pylist()[0] == {"custom_id": "r0", "document": [0, 1], "answer": [0.0, -1.0],
                                    "error": None}  # fmt: skip
    results_to_csv(output, tmp_path / "a.csv")
    assert read_csv(tmp_path / "a.csv")[1] == ["r0", "[0, 1]", "[0, -1]", ""]
    with pytest.raises(InputError, match="has no embeddings"):
        results_to_npy(output, tmp_path / "a.npy")


def test_each_score_can_have_a_row_of_its_own(tmp_path: Path) -> None:
    output = scored_run(tmp_path, ("/v1/rerank", RERANK), ("/v1/rerank", RERANK))
    summary = results_to_parquet(output, tmp_path / "a.parquet", BackOptions(choices="rows"))
    assert (summary.rows, summary.several) == (4, 0)
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [(row["custom_id"], row["choice"], row["document"], row["answer"]) for row in rows] == [
        ("r0", 0, 0, 0.0), ("r0", 1, 1, -1.0), ("r1", 0, 0, 0.0), ("r1", 1, 1, -1.0),
    ]  # fmt: skip


def test_the_score_of_a_pair_is_a_number(tmp_path: Path) -> None:
    pair = {"text_1": "q", "text_2": "a"}
    output = scored_run(tmp_path, ("/v1/score", pair), ("/v1/score", {**pair, "text_1": "400"}))
    results_to_parquet(output, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["custom_id", "answer", "error"]
    assert table["answer"].type == pa.float64()
    assert table["answer"].to_pylist() == [1.0, None]
    results_to_xlsx(output, tmp_path / "a.xlsx")
    rows = [[*row] for row in openpyxl.load_workbook(tmp_path / "a.xlsx").active.values]
    assert rows[1][:2] == ["r0", 1]
    results_to_duckdb(output, tmp_path / "a.duckdb")
    with duckdb.connect(str(tmp_path / "a.duckdb"), read_only=True) as database:
        assert database.execute("SELECT answer FROM answers").fetchall() == [(1.0,), (None,)]


@pytest.mark.parametrize(("rows", "size"), [(3, 10), (1500, 50_000)])
def test_a_database_of_long_answers_needs_more_memory_than_the_limit(
    tmp_path: Path, rows: int, size: int
) -> None:
    """DuckDB fails with the limit that is enough for short answers; then it gets none."""
    answers = [f"{at}{'x' * size}" for at in range(rows)]

    def write_parquet(file: IO[bytes]) -> None:
        pq.write_table(pa.table({"answer": answers}), file)

    with open(tmp_path / "a.duckdb", "wb") as file:
        write_database(file, tmp_path, write_parquet)
    with duckdb.connect(str(tmp_path / "a.duckdb"), read_only=True) as database:
        assert database.execute("SELECT answer FROM answers").fetchall() == [
            (answer,) for answer in answers
        ]


def test_scores_and_texts_in_one_table_are_text(tmp_path: Path) -> None:
    responses = ("/v1/responses", {"input": "x"})
    output = scored_run(tmp_path, ("/v1/score", {"text_1": "q", "text_2": ["a", "b"]}), responses)
    results_to_parquet(output, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["answer"].to_pylist() == ["[1.0, 0.5]", "echo x"]
    assert "document" not in table.column_names


def test_a_response_has_the_columns_of_a_chat(tmp_path: Path) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    text = {"type": "output_text", "text": '{"label": 1}'}
    items = [thought, call, {"type": "message", "content": [text]}]
    answer = {"object": "response", "status": "incomplete", "output": items,
              "incomplete_details": {"reason": "max_output_tokens"}}  # fmt: skip
    output = scored_run(tmp_path, ("/v1/responses", {"input": f"body:{json.dumps(answer)}"}))
    options = BackOptions(reasoning=True, tool_calls=True, json_fields=("label",))
    summary = results_to_csv(output, tmp_path / "a.csv", options)
    header, cells = read_csv(tmp_path / "a.csv")
    row = dict(zip(header, cells, strict=True))
    assert (row["answer"], row["reasoning"], row["label"]) == ('{"label": 1}', "hm", "1")
    assert json.loads(row["tool_calls"])[0]["function"] == {"name": "f", "arguments": "{}"}
    assert (summary.cut, summary.answered) == (1, 1)


WRITERS = {
    "csv": results_to_csv,
    "jsonl": results_to_jsonl,
    "parquet": results_to_parquet,
    "xlsx": results_to_xlsx,
    "duckdb": results_to_duckdb,
    "npy": results_to_npy,
}


@pytest.mark.parametrize("form", WRITERS)
def test_no_table_is_written_under_the_name_of_another_form(tmp_path: Path, form: str) -> None:
    output = output_of(tmp_path, "A")
    for other in (*WRITERS.keys() - {form}, "json", "arrow", "XLS", "ods"):
        target = tmp_path / f"b.{other}"
        with pytest.raises(UsageError, match=f"ends in .{other.lower()}, but this writes") as error:
            WRITERS[form](output, target)
        assert f"--output b.{form}" in str(error.value)
        assert (f"aiflux results to-{other}" in str(error.value)) == (other in WRITERS)
        assert not target.exists()
    for other in ("gz", "zst"):
        with pytest.raises(UsageError, match="does not compress") as error:
            WRITERS[form](output, tmp_path / f"b.{form}.{other}")
        assert f"--output b.{form}," in str(error.value)


def test_a_csv_named_tsv_has_tabs_and_an_unknown_suffix_is_accepted(tmp_path: Path) -> None:
    output = output_of(tmp_path, "A")
    results_to_csv(output, tmp_path / "b.tsv")
    assert (tmp_path / "b.tsv").read_text().splitlines()[0].split("\t")[0] == "custom_id"
    results_to_csv(output, tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text().startswith("custom_id,")
