"""Workbooks, databases, folders of Parquet and Arrow files: rows, types, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
import re
import sqlite3
from base64 import b64encode
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import date, datetime
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import openpyxl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.cli.main import main
from aiflux.converters import csv_to_jsonl, parquet_to_jsonl, table_to_jsonl
from aiflux.converters.template import Template, escape
from aiflux.converters.writer import SHOWN_BEFORE, Summary
from aiflux.errors import AifluxError, InputError, UsageError
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.converters.test_converters import prompts, refused, requests_in, write

HERE = Path(__file__).parent / "made_elsewhere"


def converted(source: Path | str, template: str, **options: Any) -> list[Any]:
    output = Path(source).parent / "converted" / "o.jsonl"
    output.parent.mkdir(exist_ok=True)
    table_to_jsonl(source, output, template=template, **options)
    return [*prompts(output).values()]


def kept(source: Path, **options: Any) -> list[dict[str, Any]]:
    """Return all cells as the metadata of requests has them."""
    output = source.parent / "kept.json.l"
    table_to_jsonl(source, output, template="{text}", keep=["*"], **options)
    return [entry["metadata"]["columns"] for entry in requests_in(output)]


# --- databases ---


def sqlite(path: Path, *statements: str) -> Path:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)
    return path


def duck(path: Path, *statements: str) -> Path:
    with duckdb.connect(str(path)) as connection:
        for statement in statements:
            connection.execute(statement)
    return path


MAKE = 'CREATE TABLE "a ""b" (id INTEGER, text VARCHAR)'
FILL = "INSERT INTO \"a \"\"b\" VALUES (1, 'one'), (2, NULL), (3, 'drei ä')"
Make = Callable[..., Path]
each_database = pytest.mark.parametrize("make", [sqlite, duck])


@each_database
def test_the_only_table_of_a_database(tmp_path: Path, make: Make) -> None:
    source = make(tmp_path / "in.db", MAKE, FILL)
    assert converted(source, "{id}: {text}") == ["1: one", "2: ", "3: drei ä"]
    assert converted(source, "{text}", table='a "b', id_column="id") == ["one", "", "drei ä"]


@each_database
def test_a_query_and_a_view(tmp_path: Path, make: Make) -> None:
    view = 'CREATE VIEW v AS SELECT text || \'!\' AS text FROM "a ""b" WHERE id <> 2'
    source = make(tmp_path / "in.db", MAKE, FILL, view)
    assert converted(source, "{text}", table="v") == ["one!", "drei ä!"]
    query = 'SELECT text, count(*) AS n FROM "a ""b" GROUP BY text ORDER BY text NULLS FIRST'
    assert converted(source, "{text} {n}", query=query) == [" 1", "drei ä 1", "one 1"]
    for options, words in (
        ({}, "has 2 tables: "),
        ({"table": "w"}, "has no table 'w'"),
        ({"query": "SELECT nothing"}, "the query for "),
        ({"query": "SELEC 1"}, "the query for "),
    ):
        with pytest.raises(InputError, match=words) as error:
            table_to_jsonl(source, tmp_path / "o.jsonl", template="{text}", **options)
        assert error.value.remedy
    with pytest.raises(UsageError, match="cannot be combined"):
        table_to_jsonl(source, tmp_path / "o.jsonl", template="{text}", table="v", query="x")


@each_database
@pytest.mark.parametrize(
    "query",
    [
        'DELETE FROM "a ""b"',
        'DROP TABLE "a ""b"',
        "CREATE TABLE x (id INTEGER)",
        "ATTACH 'other.db' AS other",
        "PRAGMA journal_mode = WAL",
        "VACUUM INTO 'other.db'",
        "COPY (SELECT 1) TO 'other.csv'",
        "SELECT * FROM read_csv('secret.csv')",
        'SELECT 1; DELETE FROM "a ""b"',
    ],
)
def test_a_query_cannot_write_or_read_anything_else(
    tmp_path: Path, make: Make, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "secret.csv", "text\nsecret\n")
    source = make(tmp_path / "in.db", MAKE, FILL)
    before = source.read_bytes()
    with pytest.raises(InputError):
        table_to_jsonl(source, tmp_path / "o.jsonl", template="{text}", query=query)
    assert source.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"in.db", "secret.csv"}


def test_types_of_sqlite(tmp_path: Path) -> None:
    source = sqlite(
        tmp_path / "in.db",
        "CREATE TABLE t (text, n, x, raw)",
        "INSERT INTO t VALUES ('a', 9223372036854775807, 0.1, x'00ff'), (NULL, NULL, 2.0, x'41')",
    )
    assert kept(source) == [
        {"text": "a", "n": 2**63 - 1, "x": 0.1, "raw": "AP8="},
        {"text": None, "n": None, "x": 2.0, "raw": "A"},
    ]


def test_text_that_is_not_utf8_is_reported_with_its_row(tmp_path: Path) -> None:
    source = sqlite(
        tmp_path / "in.db",
        "CREATE TABLE t (text)",
        "INSERT INTO t VALUES ('a'), (CAST(x'66e9' AS TEXT)), (CAST(x'610062' AS TEXT))",
    )
    with pytest.raises(InputError, match="2 of 3 rows") as error:
        table_to_jsonl(source, tmp_path / "o.jsonl", template="{text}")
    assert "row 2: column 'text' has the byte 0xe9" in refused(error)
    assert "row 3: column 'text' has a NUL character" in refused(error)
    assert converted(source, "{text}", skip_bad=True) == ["a"]


def test_a_database_in_use_is_read(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "in.db")) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("CREATE TABLE t (text)")
        writer.execute("INSERT INTO t VALUES ('a')")
        writer.commit()
        writer.execute("INSERT INTO t VALUES ('not committed')")
        assert converted(tmp_path / "in.db", "{text}") == ["a"]


def test_types_of_duckdb(tmp_path: Path) -> None:
    source = duck(
        tmp_path / "in.db",
        "CREATE TABLE t AS SELECT 'a' AS text, {'b': [1, 2], 'c': DATE '2026-01-02'} AS s, "
        "MAP {'k': 1.5::DECIMAL(4, 2)} AS m, "
        "170141183460469231731687303715884105727::HUGEINT AS h, "
        "TIMESTAMP '2026-01-02 03:04:05.678' AS at, 'x'::BLOB AS raw, "
        "'00000000-0000-0000-0000-000000000001'::UUID AS u",
    )
    assert kept(source) == [
        {
            "text": "a",
            "s": {"b": [1, 2], "c": "2026-01-02"},
            "m": {"k": "1.50"},
            "h": 2**127 - 1,
            "at": "2026-01-02T03:04:05.678000",
            "raw": "x",
            "u": "00000000-0000-0000-0000-000000000001",
        }
    ]
    assert converted(source, "{s} {s.b.1} {m.k}") == ['{"b": [1, 2], "c": "2026-01-02"} 2 1.50']


@each_database
def test_damaged_databases_are_refused(tmp_path: Path, make: Make) -> None:
    rows = ", ".join(f"({at}, 'text {at}')" for at in range(5000))
    source = make(tmp_path / "in.db", MAKE, FILL.partition("(1")[0] + rows)
    whole = source.read_bytes()
    for bad in (whole[:50], whole[: len(whole) // 2], whole[:200] + b"\xff" * 9000 + whole[9200:]):
        write(source, bad)
        with pytest.raises(InputError):
            table_to_jsonl(source, tmp_path / "o.jsonl", template="{text}")
    assert not (tmp_path / "o.jsonl").exists()


# --- workbooks ---


def workbook(path: Path) -> Path:
    """Make a workbook with a hidden sheet, an offset, an empty row and columns without a name."""
    book = openpyxl.Workbook()
    hidden = book.active
    hidden.title = "old"
    hidden.sheet_state = "hidden"
    sheet = book.create_sheet("data")
    rows: list[list[Any]] = [
        [],
        [None, "text", "n", "day", None, "text"],
        [None, "a", 1, date(2026, 1, 2), "x", True],
        [None, None, None, None, None, None],
        [None, "b", 1.5, datetime(2026, 1, 2, 3, 4, 5), None, "=1+1"],
        [None, "1e5", 12345678901234567, None, "#N/A", 0],
    ]
    for row in rows:
        sheet.append(row)
    other = book.create_sheet("more")
    other.append(["text"])
    other.append(["from more"])
    book.save(path)
    return path


def test_a_sheet_of_excel(tmp_path: Path) -> None:
    source = workbook(tmp_path / "in.xlsx")
    summary = table_to_jsonl(source, tmp_path / "o.jsonl", template="{text}", keep=["*"])
    first, second, third = (entry["metadata"]["columns"] for entry in requests_in(summary.output))
    assert [first["text"], first["n"], first["day"], first["text_2"]] == [
        "a", 1, "2026-01-02", True,
    ]  # fmt: skip
    assert (second["n"], second["day"]) == (1.5, "2026-01-02T03:04:05")
    assert third["text"] == "1e5"
    assert [*prompts(tmp_path / "o.jsonl")] == ["row-1", "row-2", "row-3"]
    assert summary.notes[0] == "sheet 'data' (also: 'more'; choose with --table)"
    assert "is called 'text_2'" in summary.notes[1]
    assert converted(source, "{text}", table="more") == ["from more"]
    with pytest.raises(InputError, match="has no sheet 'Data'"):
        converted(source, "{text}", table="Data")
    with pytest.raises(InputError, match="is empty"):
        converted(source, "{text}", table="old")
    with pytest.raises(UsageError, match="is not a database"):
        converted(source, "{text}", query="SELECT 1")


def test_a_missing_column_names_the_sheet_or_table_and_the_others(tmp_path: Path) -> None:
    """The first sheet or the chosen table may be the wrong one."""
    book = openpyxl.Workbook()
    book.active.title = "About"
    book.active.append(["About this"])
    book.create_sheet("Answers").append(["text"])
    book.save(tmp_path / "in.xlsx")
    made = ("CREATE TABLE about (a)", "CREATE TABLE answers (text)")
    base = sqlite(tmp_path / "in.db", *made)
    for source, options, part, other in (
        (tmp_path / "in.xlsx", {}, "the sheet 'About'", "'Answers'"),
        (base, {"table": "about"}, "the table 'about'", "'answers'"),
    ):
        for names in ({"template": "{text}"}, {"template": "{a}", "id_column": "text"}):
            with pytest.raises(InputError, match=f"but {part} has no such column") as error:
                table_to_jsonl(source, tmp_path / "o.jsonl", **names, **options)
            assert f"--table NAME chooses another one: {other}" in str(error.value)
    with pytest.raises(InputError, match="but the query has no such column"):
        table_to_jsonl(base, tmp_path / "o.jsonl", template="{b}", query="SELECT 1 AS a")


def test_bad_cells_are_named_by_the_row_of_the_sheet(tmp_path: Path) -> None:
    source = workbook(tmp_path / "in.xlsx")
    with pytest.raises(InputError, match="3 of 3 rows") as error:
        table_to_jsonl(source, tmp_path / "o.jsonl", template="{text.field}")
    assert "row 3: column 'text' has no field 'field'" in refused(error)
    assert "row 5: column 'text' has no field 'field'" in refused(error)


def test_damaged_workbooks_are_refused(tmp_path: Path) -> None:
    whole = workbook(tmp_path / "in.xlsx").read_bytes()
    for at, bad in enumerate((whole[:300], whole[:-30], b"PK\x03\x04" + bytes(500), whole[:2000])):
        source = write(tmp_path / f"{at}.xlsx", bad)
        with pytest.raises(InputError, match="cannot be read as a workbook"):
            table_to_jsonl(source, tmp_path / "o.jsonl", template="{text}")


@pytest.mark.parametrize("name", ["sheet.xlsx", "sheet.ods"])
def test_workbooks_that_pandas_wrote(tmp_path: Path, name: str) -> None:
    """The values are those that openpyxl and odfpy read back."""
    output = tmp_path / "o.jsonl"
    table_to_jsonl(HERE / "pandas" / name, output, template="{text}", keep=["*"])
    rows = [entry["metadata"]["columns"] for entry in requests_in(output)]
    assert [row["count"] for row in rows] == [1, None, 2**53, 0, -5]
    assert [row["done"] for row in rows] == [True, None, False, True, False]
    assert [row["score"] for row in rows][:3] == [1.5, None, 10**10]
    assert rows[0]["when"] == "2026-01-02T03:04:05"
    assert rows[1]["text"] == "two\nlines; ümlaut €"
    assert rows[3]["text"] is None


# --- folders and other forms ---


def test_folders_patterns_and_partitions_of_parquet(tmp_path: Path) -> None:
    for year, text in ((2025, "b"), (2024, "a")):
        folder = tmp_path / "in" / f"year={year}" / "kind=a%2Fb"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"text": [text, text * 2]}), folder / "part-0.parquet")
    write(tmp_path / "in" / "_SUCCESS", "")
    write(tmp_path / "in" / ".part.parquet.crc", "x")
    expected = ["a 2024 a/b", "aa 2024 a/b", "b 2025 a/b", "bb 2025 a/b"]
    assert converted(tmp_path / "in", "{text} {year} {kind}") == expected
    pattern = str(tmp_path / "in" / "**" / "*.parquet")
    parquet_to_jsonl(pattern, tmp_path / "o.jsonl", template="{text}")
    assert [*prompts(tmp_path / "o.jsonl").values()] == ["a", "aa", "b", "bb"]
    with pytest.raises(InputError, match="no file matches"):
        parquet_to_jsonl(tmp_path / "*.pq", tmp_path / "p.jsonl", template="{text}")
    pq.write_table(pa.table({"txt": ["x"]}), tmp_path / "in" / "z.parquet")
    with pytest.raises(InputError, match="has other columns than") as error:
        parquet_to_jsonl(tmp_path / "in", tmp_path / "p.jsonl", template="{text}")
    assert "'txt'" in error.value.message


def stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def file(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


FORMS: dict[str, Callable[[pa.Table, Path], Any]] = {
    "stream": stream,
    "file": file,
    "feather": lambda table, path: pyarrow.feather.write_feather(table, path, "zstd"),
    "parquet": pq.write_table,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_arrow_has_the_same_rows(tmp_path: Path, form: str) -> None:
    table = pa.table(
        {
            "text": pa.array([f"t{at}" for at in range(2500)]).dictionary_encode(),
            "n": [*range(2499), None],
            "tags": [["a", "b"]] * 2500,
        }
    )
    FORMS[form](table, tmp_path / "in.arrow")
    whole = (tmp_path / "in.arrow").read_bytes()
    rows = converted(tmp_path / "in.arrow", "{n}{text}{tags}")
    assert rows == [f'{at}t{at}["a", "b"]' for at in range(2499)] + ['t2499["a", "b"]']
    for bad in (whole[: len(whole) // 2], whole[:20]):
        write(tmp_path / "bad.arrow", bad)
        with pytest.raises(InputError, match="cannot be read as Parquet or Arrow"):
            converted(tmp_path / "bad.arrow", "{n}")


def test_a_dataset_of_save_to_disk(tmp_path: Path) -> None:
    """Its state lists the files in order; other files are not part of it."""
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name in names:
        stream(pa.table({"text": [name[:10]]}), folder / name)
    stream(pa.table({"text": ["cached"]}), folder / "cache-1.arrow")
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    write(folder / "state.json", json.dumps(state))
    write(tmp_path / "data" / "dataset_dict.json", '{"splits": ["train", "test"]}')
    assert converted(folder, "{text}") == ["data-00001", "data-00000"]
    with pytest.raises(InputError, match="with the splits train, test") as error:
        converted(tmp_path / "data", "{text}")
    assert f"{folder}" in str(error.value.remedy)
    write(folder / "state.json", "{}")
    with pytest.raises(InputError, match="not a file of save_to_disk"):
        converted(folder, "{text}")


def test_a_csv_is_a_table_and_json_has_its_own_command(tmp_path: Path) -> None:
    assert converted(write(tmp_path / "in.csv", "text\na\n"), "{text}") == ["a"]
    with pytest.raises(InputError, match="is a JSON file"):
        converted(write(tmp_path / "in.jsonl", "{}"), "{text}")
    with pytest.raises(UsageError, match="has only one table"):
        converted(tmp_path / "in.csv", "{text}", table="x")
    with pytest.raises(InputError, match="cannot be read"):
        converted(tmp_path / "gone.csv", "{text}")


def test_the_command_converts_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sqlite(tmp_path / "in.db", MAKE, FILL)
    words = ["convert", "table", "in.db", "--template", "{text}", "--output", "q.jsonl"]
    assert main([*words, "--query", 'SELECT text FROM "a ""b" WHERE id = 1']) == 0
    assert prompts(tmp_path / "q.jsonl") == {"row-1": "one"}
    assert "SQLite: SELECT text" in capsys.readouterr().out


def made_tables(folder: Path) -> dict[str, bytes]:
    rows = [(f"row {at}", [at]) for at in range(100)]
    table = pa.table({"text": [text for text, _ in rows], "n": [n for _, n in rows]})
    for name, form in FORMS.items():
        form(table, folder / f"{name}.arrow")
    values = ", ".join(f"({at}, 'row {at}')" for at in range(100))
    sqlite(folder / "a.db", MAKE, FILL.partition("(1")[0] + values)
    workbook(folder / "a.xlsx")
    (folder / "a.ods").write_bytes((HERE / "pandas" / "sheet.ods").read_bytes())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_damage_is_refused_or_changes_rows_only(tmp_path: Path) -> None:
    """Damage never ends the process; all it raises are errors of AI-Flux."""
    (tmp_path / "in").mkdir()
    source = random.Random(11)
    for name, whole in made_tables(tmp_path / "in").items():
        for _ in range(25):
            bad = bytearray(whole)
            for _ in range(source.choice([1, 1, 3, 20])):
                bad[source.randrange(4, len(bad))] = source.randrange(256)
            end = source.choice([len(bad), len(bad), source.randrange(16, len(bad))])
            path = write(tmp_path / name, bytes(bad[:end]))
            with suppress(AifluxError):
                table_to_jsonl(path, tmp_path / "o.jsonl", template="{text}", keep=["*"])


# --- delimited text ---


def csv_of(path: Path, content: str, template: str, **options: Any) -> dict[str, Any]:
    csv_to_jsonl(write(path / "in.csv", content), path / "o.jsonl", template=template, **options)
    return prompts(path / "o.jsonl")


def test_a_table_without_a_header(tmp_path: Path) -> None:
    found = csv_of(tmp_path, "a,1\nb,2\n", "{column_1}{column_2}", header=False)
    assert found == {"row-1": "a1", "row-2": "b2"}
    with pytest.raises(InputError, match="1 of 2 rows") as error:
        csv_of(tmp_path, "a,1\nb\n", "{column_1}", header=False)
    assert "line 2: 1 cell" in refused(error)


def test_lines_before_the_table_and_comments(tmp_path: Path) -> None:
    content = 'Report 2026\n\n# by us\nid,text\n1,"a\n# not a comment\nb"\n# a comment\n2,c\n'
    found = csv_of(tmp_path, content, "{text}", skip_lines=2, comment="#", id_column="id")
    assert found == {"1": "a\n# not a comment\nb", "2": "c"}
    with pytest.raises(InputError, match="1 of 2 rows") as error:
        csv_of(tmp_path, content.replace("2,c", "2"), "{text}", skip_lines=2, comment="#")
    assert "line 9: 1 cell" in refused(error)
    with pytest.raises(InputError, match="no header line"):
        csv_of(tmp_path, content, "{text}", skip_lines=50)


def test_runs_of_blanks(tmp_path: Path) -> None:
    content = '  id   text \t n\n 1   "a  b"  \t2\n10  c""d      3  \n\n'
    found = csv_of(tmp_path, content, "{text}|{n}", delimiter="blanks", id_column="id")
    assert found == {"1": "a  b|2", "10": 'c""d|3'}


def test_duplicate_names_are_renamed_and_noted(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "x,x,x_2,x\n1,2,3,4\n")
    template = "{x}{x_3}{x_2}{x_4}"
    summary = csv_to_jsonl(source, tmp_path / "o.jsonl", template=template)
    assert prompts(tmp_path / "o.jsonl") == {"row-1": "1234"}
    assert "column 2 is called 'x_3', as 'x' exists" in summary.notes


def test_row_names_of_r_with_runs_of_blanks(tmp_path: Path) -> None:
    content = '"text" "n"\n"1" "a b" 5\n"2" "c" 6\n'
    found = csv_of(tmp_path, content, "{text}{n}", id_column="row.names")
    assert found == {"1": "a b5", "2": "c6"}


# --- there and back ---


def ask(source: Path, *more: str) -> str:
    """Ask about each row of a table; return the table of answers."""
    answers = source.parent / "answers.csv"
    with FaultyEngine() as engine:
        words = ["ask", str(source), "--template", "{text}", "--model", "m:1", "--engine-url"]
        assert main([*words, engine.url, "--output", str(answers), *more]) == 0
    return answers.read_text(encoding="utf-8-sig")


def test_answers_go_next_to_the_rows_of_any_table(tmp_path: Path) -> None:
    sqlite(tmp_path / "in.db", MAKE, FILL)
    query = 'SELECT text, id FROM "a ""b" WHERE text IS NOT NULL ORDER BY id'
    answered = ask(tmp_path / "in.db", "--query", query)
    assert answered.splitlines() == ["text,id,answer", "one,1,echo one", "drei ä,3,echo drei ä"]
    (tmp_path / "b").mkdir()
    answered = ask(workbook(tmp_path / "b" / "in.xlsx"), "--table", "more")
    assert answered.splitlines() == ["text,answer", "from more,echo from more"]
    (tmp_path / "c").mkdir()
    packed = tmp_path / "c" / "in.csv.gz"
    packed.write_bytes(gzip.compress(b'id,"text"\r\n01,"a"\r\n'))
    assert ask(packed) == 'id,"text",answer\n01,"a",echo a\n'
    (tmp_path / "d").mkdir()
    source = write(tmp_path / "d" / "in.csv", "# by us\na,1\n# more\nb,2\n")
    more = ["--no-header", "--comment", "#", "--template", "{column_1}"]
    with FaultyEngine() as engine:
        words = ["ask", str(source), *more, "--model", "m:1", "--engine-url", engine.url]
        assert main([*words, "--output", str(tmp_path / "d" / "out.csv")]) == 0
    lines = (tmp_path / "d" / "out.csv").read_text("utf-8").splitlines()
    assert lines == ["column_1,column_2,answer", "a,1,echo a", "b,2,echo b"]


def test_answers_of_a_folder_of_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "year=2024"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), folder / "a.parquet")
    pq.write_table(pa.table({"n": [2], "text": ["b"]}), folder / "b.parquet")
    with FaultyEngine() as engine:
        words = ["ask", str(tmp_path / "in"), "--kind", "parquet", "--template", "{text}"]
        words += ["--model", "m:1", "--engine-url", engine.url]
        assert main([*words, "--output", str(tmp_path / "out.parquet")]) == 0
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [
        {"text": "a", "n": 1, "year": "2024", "answer": "echo a"},
        {"text": "b", "n": 2, "year": "2024", "answer": "echo b"},
    ]


# --- the requests of any rows ---

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
CELLS |= st.sampled_from(["", " ", "%s", '"', "\\", "a\r\nb", "{x}", "ö", "\u2028", "😀"])
VALUES = CELLS | st.none() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False)
VALUES |= st.sampled_from([b"", b" ", b"\xff", "ö".encode()])
PARTS = st.lists(st.sampled_from("xy") | CELLS.map(lambda text: (text,)), max_size=4)
Parts = list[str | tuple[str]]  # names, and texts between them


def template_of(parts: Parts) -> Template:
    texts = (f"{{{part}}}" if isinstance(part, str) else escape(part[0]) for part in parts)
    return Template("".join(texts))


def plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return b64encode(value).decode()
    return None if value in (math.inf, -math.inf) else value


def prompt_text(value: Any) -> str:
    """Return a value as a prompt has it."""
    if isinstance(value, bytes):
        return value.decode()
    if value in (math.inf, -math.inf):
        return str(value)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


class PlainConversion:
    """Makes each request by itself, in the plainest way."""

    def __init__(self, parts: Parts, system: Parts | None, named: bool, keep: list[str]) -> None:
        self.parts, self.system, self.named, self.keep = parts, system, named, keep
        self.ids: set[str] = set()
        self.lines: list[str] = []
        self.bad: list[int] = []
        self.empty = 0

    def add(self, count: int, number: int, row: dict[str, Any]) -> None:
        asked = [part for part in self.parts if isinstance(part, str)]
        names = [part for part in (*asked, *(self.system or ())) if isinstance(part, str)]
        try:
            name = prompt_text(row["id"]) if self.named else f"row-{count}"
            texts = {each: prompt_text(row[each]) for each in names}
        except UnicodeDecodeError:
            name = ""
        if not name or name in self.ids:
            self.bad.append(number)
            return
        self.ids.add(name)
        given = (row[each] for each in asked)
        self.empty += all(not (each.strip() if isinstance(each, str | bytes) else each is not None)
                          for each in given)  # fmt: skip
        filled = [
            "".join(texts[part] if isinstance(part, str) else part[0] for part in parts)
            for parts in (self.system or [], self.parts)
        ]
        messages = [{"role": "system", "content": filled[0]}] if filled[0].strip() else []
        messages.append({"role": "user", "content": filled[1]})
        digests = {
            each: blake2b(text.encode(), digest_size=6).hexdigest() for each, text in texts.items()
        }
        metadata: dict[str, Any] = {"cell_digests": digests}
        if self.keep:
            metadata["columns"] = {each: plain(row[each]) for each in self.keep}
            binary = {each: row[each] for each in self.keep if isinstance(row[each], bytes)}
            types = {
                each: "bytes" if plain(value).encode() == value else "base64"
                for each, value in binary.items()
            }
            metadata |= {"column_types": types} if types else {}
        entry = {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m:1", "top_p": 0.5, "messages": messages},
            "metadata": metadata,
        }
        self.lines.append(json.dumps(entry, ensure_ascii=False))


@given(
    st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=150),
    PARTS.filter(lambda parts: any(isinstance(part, str) for part in parts)),
    st.none() | PARTS,
    st.booleans(),
    st.sampled_from([[], ["y"], ["x", "id"]]),
    st.booleans(),
)
def test_requests_are_those_that_each_row_makes_by_itself(
    rows: list[tuple[Any, ...]],
    parts: Parts,
    system: Parts | None,
    named: bool,
    keep: list[str],
    as_csv: bool,
) -> None:
    plainly = PlainConversion(parts, system, named, keep)
    header = ("id", "x", "y")
    options: dict[str, Any] = {
        "template": template_of(parts),
        "system_template": None if system is None else template_of(system),
        "id_column": "id" if named else None,
        "keep": keep,
        "model": "m:1",
        "params": {"top_p": 0.5},
        "skip_bad": True,
    }
    with TemporaryDirectory() as folder:
        source, output = Path(folder, "in"), Path(folder, "o.jsonl")
        if as_csv:
            rows = [tuple(str(plain(value)) for value in row) for row in rows]
            line = 2
            with open(source, "w", encoding="utf-8", newline="") as file:
                file.write("id,x,y\n")
                for count, row in enumerate(rows, start=1):
                    csv.writer(file, quoting=csv.QUOTE_ALL).writerow(row)
                    plainly.add(count, line, dict(zip(header, row, strict=True)))
                    line += 1 + len(re.findall("\r\n|\r|\n", "\0".join(row)))
        else:
            with closing(sqlite3.connect(source)) as connection, connection:
                connection.execute("CREATE TABLE t (id, x, y)")
                connection.executemany("INSERT INTO t VALUES (?, ?, ?)", rows)
            for count, row in enumerate(rows, start=1):
                plainly.add(count, count, dict(zip(header, row, strict=True)))

        def convert() -> Summary:
            if as_csv:
                return csv_to_jsonl(source, output, encoding="utf-8", delimiter=",", **options)
            return table_to_jsonl(source, output, **options)

        if not plainly.lines:
            with pytest.raises(InputError):
                convert()
            return
        summary = convert()
        assert output.read_text(encoding="utf-8").split("\n")[:-1] == plainly.lines
    assert [each.number for each in summary.examples] == plainly.bad
    assert summary.rows == len(rows)
    assert summary.requests == len(plainly.lines)
    empty = f"{plainly.empty} request"
    assert any(note.startswith(empty) for note in summary.notes) == bool(plainly.empty)


def test_an_example_and_a_repeated_id_among_many_rows(tmp_path: Path) -> None:
    rows = [f"r{at},text {at}" for at in range(300)]
    rows[200], rows[250] = "r7,text 200", "r250,that of the example"
    source = write(tmp_path / "in.csv", "\n".join(["id,x", *rows]))
    summary = csv_to_jsonl(
        source,
        tmp_path / "o.jsonl",
        template="Say: {x}",
        id_column="id",
        examples=[{"x": "that of the example", "answer": "yes"}],
        skip_bad=True,
    )
    (bad,) = summary.examples
    assert str(bad) == (
        "line 202: custom_id 'r7' was already used at line 9; every request needs a unique one"
    )
    assert summary.notes[1:] == (f"1 request {SHOWN_BEFORE} (line 252)",)
    made = requests_in(tmp_path / "o.jsonl")
    assert [entry["custom_id"] for entry in made] == [f"r{at}" for at in range(300) if at != 200]
    texts = [entry["body"]["messages"][-1]["content"] for entry in made]
    assert texts == [f"Say: {row.partition(',')[2]}" for row in rows if row != rows[200]]
