"""Files made by R, pandas, LibreOffice and JavaScript; ``made_elsewhere/README.md`` says how."""

from __future__ import annotations

import json
import struct
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from aiflux.converters import (
    csv_to_jsonl,
    json_to_jsonl,
    parquet_to_jsonl,
    results_to_csv,
    results_to_jsonl,
    results_to_parquet,
)
from aiflux.converters.cells import as_text
from aiflux.converters.delimited import DelimitedTable
from aiflux.converters.documents import read_document
from aiflux.converters.results import BackOptions
from aiflux.converters.table import Row
from aiflux.errors import InputError
from tests.unit.converters.test_converters import requests_in
from tests.unit.converters.test_results import answered, read_csv

HERE = Path(__file__).parent / "made_elsewhere"
TABLES = json.loads((HERE / "tables_read_back.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_as_pandas_reads_it(tmp_path: Path, name: str) -> None:
    header, *rows = TABLES[name]
    encoding = "cp1252" if Path(name).stem in ("latin1", "windows") else None
    table = DelimitedTable.of(HERE / name, None, encoding)
    found = list(table.rows())
    assert all(isinstance(row, Row) for row in found), found
    assert [list(row.cells.values()) for row in found if isinstance(row, Row)] == rows
    # pandas calls a column without a name "Unnamed: 0".
    assert [*table.columns] == [
        f"column_{at}" if column.startswith("Unnamed") else column
        for at, column in enumerate(header, start=1)
    ]
    template = f"{{{table.columns[-1]}}} {{{table.columns[0]}}}"
    options = {"delimiter": table.delimiter, "encoding": encoding}
    csv_to_jsonl(HERE / name, tmp_path / "q.jsonl", template=template, keep=["*"], **options)
    output = answered(tmp_path / "q.jsonl", tmp_path / "out.json")
    for source in (None, HERE / name):
        results_to_csv(output, tmp_path / "back.csv", BackOptions(source=source, **options))
        back = read_csv(tmp_path / "back.csv")[1:]
        assert [row[1:-2] for row in back] == rows
        assert [row[-2] for row in back] == [f"{row[-1]} {row[0]}" for row in rows]


def test_cells_that_r_escapes_are_refused_with_what_writes_them_whole() -> None:
    """R escapes quotes but not backslashes, so that ``\\"`` can be either; R cannot tell itself."""
    table = DelimitedTable.of(HERE / "r" / "table.txt", None, None)
    assert (table.delimiter, table.columns[0]) == (" ", "text")
    refused = [str(row) for row in table.rows() if not isinstance(row, Row)]
    assert refused[0].startswith("line 2: not valid CSV")
    assert 'in R: qmethod = "double"' in refused[0]


@pytest.mark.parametrize("name", ["latin1.csv", "windows.csv"])
def test_an_encoding_that_cannot_be_told_names_the_candidates(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cp1252 \('ümlaut'\)"):
        csv_to_jsonl(next(HERE.glob(f"*/{name}")), tmp_path / "q.jsonl", template="{text}")


TYPES: dict[str, list[Any]] = {
    "text": ['He said "hi", and left', "two\nlines; ümlaut €", "", None, "tab\there | pipe\\"],
    "when": [
        "2026-01-02T03:04:05", None, "1999-12-31T00:00:00", "2026-06-07T08:09:10.123456789", None,
    ],
    "score": [1.5, None, 1e10, None, -0.25],
    "count": [1, None, 2**53 + 1, 0, -5],
    "done": [True, None, False, True, False],
    "label": ["a", "b", None, "a", "c"],
    "zoned": [
        "2026-01-02T04:04:05+01:00", None, "1999-12-31T01:00:00+01:00",
        "2026-06-07T10:09:10.123456789+0200", None,
    ],
    "took": ["0:01:30", None, "0:00:00", "1 day, 0:00:01", "0:00:01"],
    "price": ["1.10", None, "-0.01", "99.00", None],
    "day": ["2026-01-02", None, "1999-12-31", None, None],
    "tags": [["x", "y"], [], None, ["z"], ["x"]],
    "large": [2**63, 0, 2**64 - 1, 1, 2],
    "small": [0.1, 0.2, 0.3, None, 5.0],
    "raw": ["bytes", "/wA=", None, "", "x"],
}  # fmt: skip


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The output of a run over ``types.parquet`` with ``--keep '*'``."""
    source, requests = HERE / "pandas" / "types.parquet", tmp_path / "q.jsonl"
    parquet_to_jsonl(source, requests, template="{label} {count}", keep=["*"])
    columns = [request["metadata"]["columns"] for request in requests_in(requests)]
    assert columns == [
        dict(zip(TYPES, row, strict=True)) for row in zip(*TYPES.values(), strict=True)
    ]
    kinds = {name: {type(column[name]) for column in columns} for name in TYPES}
    assert kinds["large"] == {int}
    assert kinds["count"] == {int, type(None)}
    assert kinds["done"] == {bool, type(None)}
    assert kinds["score"] == kinds["small"] == {float, type(None)}
    return answered(requests, tmp_path / "out.json")


def test_kept_columns_have_the_types_that_json_has(kept: Path, tmp_path: Path) -> None:
    results_to_jsonl(kept, tmp_path / "b.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text("utf-8").splitlines()]
    assert {name: [row[name] for row in rows] for name in TYPES} == TYPES
    results_to_parquet(kept, tmp_path / "b.parquet")
    table = pq.read_table(tmp_path / "b.parquet")
    kinds = {name: str(table.schema.field(name).type) for name in TYPES}
    numbers = {"score": "double", "count": "int64", "done": "bool", "small": "double"}
    others = {"day": "date32[day]", "raw": "binary"}
    assert kinds == dict.fromkeys(TYPES, "string") | numbers | others
    texts = {name: [None if cell is None else json.dumps(cell) for cell in TYPES[name]]
             for name in ("tags", "large")}  # fmt: skip
    days = [cell if cell is None else date.fromisoformat(cell) for cell in TYPES["day"]]
    raw = [b"bytes", b"\xff\x00", None, b"", b"x"]
    own = {"day": days, "raw": raw}
    assert {name: table.column(name).to_pylist() for name in TYPES} == {**TYPES, **texts, **own}
    results_to_csv(kept, tmp_path / "b.csv")
    first = dict(zip(*read_csv(tmp_path / "b.csv")[:2], strict=True))
    assert [first[name] for name in ("score", "count", "done", "price", "tags", "large")] == [
        "1.5", "1", "true", "1.10", '["x", "y"]', str(2**63),
    ]  # fmt: skip


def test_a_parquet_source_gives_its_own_types_back(kept: Path, tmp_path: Path) -> None:
    source = HERE / "pandas" / "types.parquet"
    results_to_parquet(kept, tmp_path / "b.parquet", BackOptions(source=source))
    ours, theirs = pq.read_table(tmp_path / "b.parquet"), pq.read_table(source)
    for name in TYPES:
        assert ours.schema.field(name).type == theirs.schema.field(name).type
        mine, own = ours.column(name).combine_chunks(), theirs.column(name).combine_chunks()
        if name == "label":  # categories come in the order of their first use
            mine, own = mine.dictionary_decode(), own.dictionary_decode()
        assert mine.equals(own), name


def test_the_index_of_a_frame_is_a_column(tmp_path: Path) -> None:
    for name, column, values in (
        ("index.parquet", "label", ["a", "b", "", "a", "c"]),
        ("filtered.parquet", "__index_level_0__", ["0", "2", "3"]),
    ):
        source, requests = HERE / "pandas" / name, tmp_path / "q.jsonl"
        parquet_to_jsonl(source, requests, template=f"{{{column}}}|{{text}}", keep=[column])
        output = answered(requests, tmp_path / "out.json")
        results_to_jsonl(output, tmp_path / "b.jsonl", BackOptions(source=source))
        rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text("utf-8").splitlines()]
        assert [row["answer"].partition("|")[0] for row in rows] == values
        assert [as_text(row[column]) for row in rows] == values


def texts_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])


@pytest.mark.parametrize("name", ["compact.json", "indented.json", "lines.jsonl"])
def test_json_of_javascript_is_read_as_javascript_reads_it(tmp_path: Path, name: str) -> None:
    theirs = json.loads((HERE / "javascript" / "read_back.json").read_text("utf-8"))
    requests = tmp_path / "q.jsonl"
    json_to_jsonl(
        HERE / "javascript" / name, requests, template="{text}", id_field="id", keep=["*"]
    )
    made = requests_in(requests)
    assert [request["custom_id"] for request in made] == [row["id"] for row in theirs]
    for request, row in zip(made, theirs, strict=True):
        units = texts_of(request["body"]).encode("utf-16-le", "surrogatepass")
        assert [*struct.unpack(f"<{len(units) // 2}H", units)] == row.pop("text")
        columns = request["metadata"]["columns"]
        del columns["text"]
        assert columns == row
        assert list(columns) == list(row)


def test_json_in_utf_16_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save the file as UTF-8"):
        json_to_jsonl(HERE / "javascript" / "utf16.json", tmp_path / "q.jsonl", template="{text}")


@pytest.mark.parametrize("name", ["records.json", "lines.jsonl"])
def test_json_of_pandas_keeps_its_values(tmp_path: Path, name: str) -> None:
    requests = tmp_path / "q.jsonl"
    json_to_jsonl(HERE / "pandas" / name, requests, template="{label}: {text}", keep=["*"])
    columns = [request["metadata"]["columns"] for request in requests_in(requests)]
    for key in ("text", "score", "count", "done", "label"):
        assert [column[key] for column in columns] == TYPES[key]


SHOWN = [
    "Kings", "The king of France died.", "Tab\tand", "a new line, a link, a note[1], ümlaut € 😀.",
    "• First point", "• Second point", "Top left\tTop right", "Before inner",
    "Inner one\tInner two", "After inner\tBottom right", "Beside a box goes on.", "Inside the box",
    "A shape too.", "Inside the shape", "The end.", "[1] \tAt the foot.",
]  # fmt: skip


def test_a_document_of_libreoffice_is_read_whole() -> None:
    """Tracked changes, a table in a table, a text box, a shape, a list, a footnote."""
    text = read_document(HERE / "libreoffice" / "text.docx").text
    assert text.split("\n") == SHOWN
    theirs = (HERE / "libreoffice" / "text_read_back.txt").read_text(encoding="utf-8-sig")
    deleted = theirs.replace("Belgium", "").replace("note1", "note[1]")
    assert set(deleted.split()) <= set(text.split())


def test_the_lists_of_a_document_have_the_numbers_that_libreoffice_shows() -> None:
    """Nested lists, letters and Roman numbers, a list that begins at 5, one in a table."""
    text = read_document(HERE / "libreoffice" / "lists.docx").text
    theirs = (HERE / "libreoffice" / "lists_read_back.txt").read_text(encoding="utf-8-sig")
    assert text.split() == theirs.split()
    assert "iv. four" in text
