"""``aiflux ask``: from a table to the same table with answers, in one command."""

from __future__ import annotations

import csv
import gzip
import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aiflux.cli.commands import ask as ask_module
from aiflux.cli.commands.convert import convert
from aiflux.cli.main import main
from aiflux.converters import csv_to_jsonl
from aiflux.converters.answer_table import AnswerTable
from aiflux.converters.writer import Summary
from aiflux.core.runs.directory import RunDirectory
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.command_line import option_names, parse
from tests.unit.fake_commands import FakeCommands, waiting_slurm
from tests.unit.helpers import request_line
from tests.unit.terminals import on_terminal

AIFLUX = [sys.executable, "-m", "aiflux.cli"]
TEMPLATE = "answer:{text}"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    return tmp_path


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    """A server that echoes each prompt."""
    with FaultyEngine() as engine:
        yield engine


def words(engine: FaultyEngine, *more: str, source: str = "in.csv", output: str = "out.csv",
          template: str | None = TEMPLATE) -> list[str]:  # fmt: skip
    given = () if template is None else ("--template", template)
    fast = ("--retry-delay", "0.01", "--max-retries", "0")
    named = ("--output", output, "--engine-url", engine.url, "-m", "m:1")
    return ["ask", source, *given, *named, *fast, *more]


def ask(engine: FaultyEngine, *more: str, **names: Any) -> int:
    return main(words(engine, *more, **names))


def stopped_code(engine: FaultyEngine) -> int:
    """Stop the command after some answers of a slow engine; return its exit code."""
    engine.delay = 0.1
    line = [*AIFLUX, *words(engine, "--concurrency", "1", "--save-frequency", "1")]
    with subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as stopped:
        while engine.seen.total() < 3:
            time.sleep(0.01)
        stopped.send_signal(signal.SIGTERM)
    return stopped.returncode


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--samples=3", "--param=n=3"])
def test_several_answers_to_a_row_are_columns(
    place: Path, engine: FaultyEngine, option: str
) -> None:
    engine.choices = 1
    write(place / "in.csv", "id,text\n1,a\n2,b\n")
    assert ask(engine, option, template="{text}") == 0
    first, second = rows_of("out.csv")
    assert first.keys() == {"id", "text", "answer", "answer_2", "answer_3"}
    assert {name: first[name].split()[0] for name in ("answer", "answer_2", "answer_3")} == {
        "answer": "a", "answer_2": "a", "answer_3": "a",
    }  # fmt: skip
    assert len({*list(first.values())[2:], *list(second.values())[2:]}) == 6


def test_a_table_gets_a_column_of_answers(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", 'id,text,day\n007,good,2026-01-02\n008,"a, b",\n')
    assert ask(engine) == 0
    expected = 'id,text,day,answer\n007,good,2026-01-02,good\n008,"a, b",,"a, b"\n'
    assert (place / "out.csv").read_text() == expected
    printed = capsys.readouterr().out
    assert "2 requests from in.csv" in printed
    assert "2 rows -> out.csv: 2 answered, 0 failed" in printed
    assert {path.name for path in place.glob("[!.]*")} == {"in.csv", "out.csv", "out.csv.aiflux"}


@pytest.mark.parametrize("command", ["status", "watch", "report", "results show"])
@pytest.mark.parametrize("output", ["out.csv", "out.jsonl"])
def test_the_run_has_the_name_of_the_table(
    place: Path,
    engine: FaultyEngine,
    command: str,
    output: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(place / "in.csv", "text\ngood\n")
    assert ask(engine, output=output) == 0
    for name in (output, f"{output}.aiflux"):
        capsys.readouterr()
        assert main([*command.split(), name]) == 0
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(output)


def test_other_tables_of_the_run_are_next_to_it(place: Path, engine: FaultyEngine) -> None:
    write(place / "in.csv", "text\ngood\n")
    assert ask(engine) == 0
    assert main(["results", "to-parquet", "out.csv", "--source", "in.csv"]) == 0
    assert pq.read_table(place / "out.parquet").column("answer").to_pylist() == ["good"]
    assert main(["results", "to-csv", "out.csv"]) == 2, "the table itself is kept"


def test_the_same_command_again_sends_nothing_and_changes_nothing(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\ngood\nbad\n")
    assert ask(engine) == 0
    before = (place / "out.csv").stat()
    (place / "in.csv").touch()
    assert ask(engine) == 0
    assert (place / "out.csv").stat() == before
    assert engine.seen.total() == 2
    assert "out.csv is up to date" in capsys.readouterr().out
    content = (place / "out.csv").read_bytes()
    (place / "out.csv").unlink()
    assert ask(engine) == 0
    assert (place / "out.csv").read_bytes() == content
    assert engine.seen.total() == 2


def test_failed_rows_are_empty_and_found_again(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "id,text\n1,good\n2,400*1\n")
    assert ask(engine, template="{text}") == 3
    first, second = rows_of("out.csv")
    assert (first["answer"], first["error"]) == ("echo good", "")
    assert second["answer"] == ""
    assert second["error"].startswith("http_400")
    assert "aiflux results show out.csv --failed" in capsys.readouterr().out
    assert main(["results", "show", "out.csv", "--failed"]) == 0
    assert "row-2" in capsys.readouterr().out
    assert ask(engine, template="{text}") == 3
    assert ask(engine, "--retry-failed", template="{text}") == 0
    assert [row["answer"] for row in rows_of("out.csv")] == ["echo good", "echo 400*1"]
    assert "error" not in rows_of("out.csv")[0]


def test_parquet_keeps_its_schema(place: Path, engine: FaultyEngine) -> None:
    moments = pa.array([1, None, 3], pa.timestamp("ns", "Europe/Berlin"))
    table = pa.table(
        {
            "text": ["a", "b", "c"],
            "n": pa.array([1, 2, None], pa.uint64()),
            "price": pa.array(["1.10", "2.00", None]).cast(pa.decimal128(9, 2)),
            "when": moments,
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "tags": [["a"], [], None],
            "half": pa.array([0.1, 0.2, None], pa.float32()),
            "raw": [b"\xff", b"", None],
            "nested": [{"k": 1}, None, {"k": 2}],
        }
    ).replace_schema_metadata({"pandas": '{"columns": []}', "own": "kept"})
    pq.write_table(table, place / "in.parquet", row_group_size=2)
    assert ask(engine, source="in.parquet", output="out.parquet") == 0
    back = pq.read_table(place / "out.parquet")
    assert back.drop_columns("answer").schema.equals(
        pq.read_table(place / "in.parquet").schema, check_metadata=True
    )
    assert back.drop_columns("answer").equals(pq.read_table(place / "in.parquet"))
    assert back.column("answer").to_pylist() == ["a", "b", "c"]


def test_a_pattern_of_parquet_files_is_one_table(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "parts").mkdir()
    for part in "ab":
        pq.write_table(pa.table({"text": [f"{part}1", f"{part}2"]}), f"parts/{part}.parquet")
    names = {"source": "parts/*.parquet", "output": "out.parquet"}
    for sent in (4, 4):
        assert ask(engine, **names) == 0
        assert len(engine.bodies) == sent
    assert "out.parquet is up to date" in capsys.readouterr().out
    table = pq.read_table("out.parquet").to_pylist()
    assert [row["text"] for row in table] == ["a1", "a2", "b1", "b2"]
    assert all(row["answer"] for row in table)
    pq.write_table(pa.table({"text": ["b1", "other"]}), "parts/b.parquet")
    assert ask(engine, **names) == 2
    assert "changed" in capsys.readouterr().err
    assert ask(engine, **{**names, "source": "parts/*.arrow", "output": "other.csv"}) == 2
    assert "no file matches" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_keeps_its_values(place: Path, engine: FaultyEngine, suffix: str) -> None:
    entries = [
        f'{{"id": {10**30}, "text": "a\\u00e9", "price": 1.10, "inner": {{"k": [1, null]}}}}',
        '{ "text": "b\\ud83d", "same": 1e2 }',
    ]
    text = "\n".join(entries) if suffix == "jsonl" else "[" + ",\n ".join(entries) + "]"
    write(place / f"in.{suffix}", text)
    assert ask(engine, source=f"in.{suffix}", output=f"out.{suffix}") == 0
    lines = (place / f"out.{suffix}").read_text().splitlines()
    lines = lines[1:-1] if suffix == "json" else lines
    assert lines[0].startswith(entries[0][:-1] + ", ")
    assert [json.loads(line.rstrip(","))["answer"] for line in lines] == ["aé", "b\ufffd"]
    json.loads((place / f"out.{suffix}").read_text()) if suffix == "json" else None


def test_a_directory_becomes_a_table_of_its_files(place: Path, engine: FaultyEngine) -> None:
    (place / "d").mkdir()
    write(place / "d" / "b.txt", "B")
    write(place / "d" / "a.md", "A")
    assert ask(engine, source="d", template=None) == 0
    lines = (place / "out.csv").read_text().splitlines()
    assert lines == ["source_file,answer", "a.md,echo A", "b.txt,echo B"]
    write(place / "d" / "c.txt", "C")
    assert ask(engine, source="d", template=None) == 2, "the directory changed"


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "json", "parquet"])
def test_a_csv_in_another_form(place: Path, engine: FaultyEngine, suffix: str) -> None:
    write(place / "in.csv", 'id,text\n007,"a\nb"\n008,\n')
    assert ask(engine, output=f"out.{suffix}") == 0
    columns = {"id": ["007", "008"], "text": ["a\nb", ""], "answer": ["a\nb", ""]}
    path = place / f"out.{suffix}"
    if suffix == "parquet":
        assert pq.read_table(path).to_pydict() == columns
    elif suffix == "tsv":
        assert path.read_text() == 'id\ttext\tanswer\n007\t"a\nb"\t"a\nb"\n008\t\t\n'
    else:
        lines = path.read_text().strip("[]\n").splitlines()
        found = [json.loads(line.rstrip(",")) for line in lines]
        assert {name: [row[name] for row in found] for name in columns} == columns


def test_a_workbook_becomes_a_workbook(place: Path, engine: FaultyEngine) -> None:
    book = openpyxl.Workbook()
    day = datetime(2026, 1, 2)
    for row in (["text", "n", "day", "code"], ["a", 1.5, day, "007"], ["b", 2, None, None]):
        book.active.append(row)
    book.save(place / "in.xlsx")
    assert ask(engine, source="in.xlsx", output="out.xlsx") == 0
    rows = [[*row] for row in openpyxl.load_workbook(place / "out.xlsx").active.values]
    assert rows == [
        ["text", "n", "day", "code", "answer"],
        ["a", 1.5, day, "007", "a"],
        ["b", 2, None, None, "b"],
    ]


def test_a_database_becomes_a_typed_table(place: Path, engine: FaultyEngine) -> None:
    with sqlite3.connect(place / "in.db") as connection:
        connection.execute("CREATE TABLE reviews (id INTEGER, text TEXT, stars REAL)")
        connection.executemany(
            "INSERT INTO reviews VALUES (?, ?, ?)", [(7, "a", 1.5), (8, "b", None), (9, "c", 2.0)]
        )
    connection.close()
    query = ("--query", "SELECT * FROM reviews WHERE id < 9")
    assert ask(engine, *query, source="in.db", output="out.parquet") == 0
    back = pq.read_table(place / "out.parquet")
    assert back.to_pydict() == {
        "id": [7, 8], "text": ["a", "b"], "stars": [1.5, None], "answer": ["a", "b"],
    }  # fmt: skip
    assert [str(kind) for kind in back.schema.types] == ["int64", "string", "double", "string"]
    assert ask(engine, source="in.db", output="out.parquet") == 2, "another query"


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_embeddings_of_a_column(place: Path, engine: FaultyEngine, form: str) -> None:
    if form == "csv":
        write(place / "in.csv", "text\na\nb\n")
    else:
        pq.write_table(pa.table({"text": ["a", "b"]}), place / "in.parquet")
    line = ("--endpoint", "embeddings", "--answer-column", "vector")
    assert ask(engine, *line, source=f"in.{form}", output="out.parquet") == 0
    column = pq.read_table(place / "out.parquet").column("vector")
    assert str(column.type) == "fixed_size_list<element: float>[2]"
    assert column.to_pylist() == [[0.5, -0.25]] * 2


def test_images_of_a_directory(place: Path, engine: FaultyEngine) -> None:
    (place / "d").mkdir()
    for name in ("b.png", "a.png"):
        Image.new("RGB", (2, 2)).save(place / "d" / name)
    assert ask(engine, "--kind", "images", source="d", template="What is in {name}?") == 0
    assert [row["source_file"] for row in rows_of("out.csv")] == ["a.png", "b.png"]
    assert all(row["answer"] for row in rows_of("out.csv"))


def test_a_compressed_csv(place: Path, engine: FaultyEngine) -> None:
    with gzip.open(place / "in.csv.gz", "wb") as file:
        file.write(b"id;text\r\n007;a\r\n")
    assert ask(engine, source="in.csv.gz") == 0
    assert (place / "out.csv").read_bytes() == b"id;text;answer\r\n007;a;a\r\n"


def test_fields_of_a_schema_become_columns(place: Path, engine: FaultyEngine) -> None:
    engine.answer = '{"label": "x", "score": 2}'
    properties = {"label": {"type": "string"}, "score": {"type": "integer"}}
    write(place / "s.json", json.dumps({"type": "object", "properties": properties}))
    pq.write_table(pa.table({"text": ["a"]}), place / "in.parquet")
    assert ask(
        engine, "--schema", "s.json", source="in.parquet", output="out.parquet"
    ) == 0  # fmt: skip
    back = pq.read_table(place / "out.parquet")
    assert [(field.name, str(field.type)) for field in back.schema] == [
        ("text", "string"), ("answer", "string"), ("label", "string"), ("score", "int64"),
    ]  # fmt: skip
    write(place / "s.json", json.dumps({"type": "object", "properties": {"other": {}}}))
    assert ask(engine, "--schema", "s.json", source="in.parquet", output="out.parquet") == 2


def test_both_streams_in_one_file_are_in_order(place: Path, engine: FaultyEngine) -> None:
    write(place / "in.csv", "text\na\n")
    line = [*AIFLUX, *words(engine)]
    shown = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    assert shown.stdout.startswith(b"1 request from in.csv\n")
    assert shown.stdout.endswith(b"1 row -> out.csv: 1 answered, 0 failed\n")


# --- what may change and what may not ---------------------------------------------------------


def test_a_changed_source_is_refused(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text,n\na,1\nb,2\n")
    assert ask(engine) == 0
    write(place / "in.csv", "text,n\na,1\nc,2\n")
    content = (place / "out.csv").read_bytes()
    assert ask(engine) == 2
    error = capsys.readouterr().err
    assert "changed since out.csv was begun; the first request that differs is 'row-2'" in error
    assert "--force" in error
    assert (place / "out.csv").read_bytes() == content
    assert engine.seen.total() == 2
    assert ask(engine, "--force") == 0
    assert [row["answer"] for row in rows_of("out.csv")] == ["a", "c"]
    asked = {f"answer:{text}": 1 for text in "abc"}
    assert engine.seen == asked, "only the changed row is asked again"


def test_new_rows_of_a_database_that_is_being_written_are_seen(
    place: Path, engine: FaultyEngine
) -> None:
    with closing(sqlite3.connect("in.db")) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("CREATE TABLE texts(text)")
        writer.execute("INSERT INTO texts VALUES('a')")
        writer.commit()
        assert ask(engine, source="in.db") == 0
        assert ask(engine, source="in.db") == 0
        writer.execute("INSERT INTO texts VALUES('b')")
        writer.commit()
        assert ask(engine, source="in.db") == 2
        assert ask(engine, "--force", source="in.db") == 0
    assert [row["answer"] for row in rows_of("out.csv")] == ["a", "b"]
    assert engine.seen.total() == 2


def test_a_change_outside_the_prompt_is_in_the_table(place: Path, engine: FaultyEngine) -> None:
    write(place / "in.csv", "text,n\na,1\nb,2\n")
    assert ask(engine) == 0
    write(place / "in.csv", "id,text,n\nx,a,1\ny,b,3\n")
    assert ask(engine) == 0
    assert (place / "out.csv").read_text() == "id,text,n,answer\nx,a,1,a\ny,b,3,b\n"
    before = (place / "out.csv").stat()
    assert ask(engine) == 0
    assert (place / "out.csv").stat() == before
    assert engine.seen.total() == 2


@pytest.mark.parametrize("change", ["text\na\nb\nc\n", "text\na\n", "text\na\nB\n"])
def test_a_source_that_changes_during_the_run(
    place: Path, engine: FaultyEngine, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\nb\n")

    def changed(method: str, path: str, _: Any) -> None:
        if "completions" in path:
            write(place / "in.csv", change)

    engine.instead = changed
    assert ask(engine) == 2
    assert "changed since out.csv was begun" in capsys.readouterr().err
    assert not (place / "out.csv").exists()
    write(place / "in.csv", "text\na\nb\n")
    assert ask(engine) == 0
    assert engine.seen.total() == 2


def test_a_changed_template_is_refused(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\n")
    assert ask(engine) == 0
    assert ask(engine, template="Say {text}") == 2
    error = capsys.readouterr().err
    assert "with the template 'answer:{text}'; this command has 'Say {text}'" in error
    assert ask(engine, template="Say {text}", output="other.csv") == 0
    assert ask(engine, "--system", "S") == 2
    assert "begun without system; this command has 'S'" in capsys.readouterr().err
    assert ask(engine, "--force", template="Say {text}") == 0
    assert rows_of("out.csv") == [{"text": "a", "answer": "echo Say a"}]


@pytest.mark.parametrize("more", [("-m", "o:1"), ("--temperature", "1"), ("--samples", "2")])
def test_other_settings_are_refused_and_forced(
    place: Path, engine: FaultyEngine, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\nb\n")
    assert ask(engine) == 0
    capsys.readouterr()
    assert ask(engine, *more) == 2
    error = capsys.readouterr().err
    assert "error: out.csv: begun with engine external, model m:1" in error
    assert "or --force to answer all rows again" in error
    assert not any(name in error for name in ("--force-resume", "results.json"))
    assert ask(engine, *more, "--force") == 0
    asked = engine.seen.total()
    assert asked == (6 if "--samples" in more else 4), "each row is asked again"
    assert ask(engine, *more) == 0
    assert engine.seen.total() == asked
    assert not [*place.rglob("*.discarded")]


def test_an_unfinished_table_is_begun_again_with_other_settings(
    place: Path, engine: FaultyEngine
) -> None:
    write(place / "in.csv", "text\n" + "".join(f"t{at}\n" for at in range(20)))
    assert stopped_code(engine) == 5
    engine.delay = 0
    before = engine.seen.total()
    other = ("--temperature", "1")
    assert ask(engine, *other) == 2
    engine.stop()
    assert ask(engine, *other, "--force", "--engine-wait", "0.1") == 4
    engine.start()
    assert main(["status", "out.csv"]) == 0
    assert ask(engine) == 0, "a start that was refused discards no answers"
    assert before < engine.seen.total() < before + 20
    assert ask(engine, *other, "--force") == 0
    assert [body.get("temperature") for body in engine.bodies[-20:]] == [1] * 20


def test_the_content_of_the_files_of_a_prompt_counts(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text,First name\na,Ann\n")
    files = {
        "t.j2": '{{ row["First name"] }}: {{ text }}',
        "s.txt": "For {First name}.",
        "e.jsonl": '{"text": "x", "First name": "Bob", "label": "y"}\n',
    }
    for name, content in files.items():
        write(place / name, content)
    more = ("--template-file", "t.j2", "--system-file", "s.txt", "--examples", "e.jsonl")
    more = (*more, "--example-answer", "label")
    assert ask(engine, *more, template=None) == 0
    assert [turn["content"] for turn in engine.bodies[0]["messages"]] == [
        "For Ann.", "Bob: x", "y", "Ann: a",
    ]  # fmt: skip
    assert rows_of("out.csv") == [{"text": "a", "First name": "Ann", "answer": "echo Ann: a"}]
    for name in files:
        (place / name).rename(place / f"other-{name}")
    moved = [f"other-{word}" if word in files else word for word in more]
    assert ask(engine, *moved, template=None) == 0
    assert engine.seen.total() == 1, "the same content in other files is the same question"
    capsys.readouterr()
    for name, what in (("t.j2", "template"), ("s.txt", "system_template"), ("e.jsonl", "examples")):
        write(place / f"other-{name}", files[name].replace("x", "z").replace("For", "To") + " ")
        assert ask(engine, *moved, template=None) == 2
        assert f"out.csv was begun with the {what} " in capsys.readouterr().err
        write(place / f"other-{name}", files[name])
    plain = write(place / "t.txt", files["t.j2"].replace("{{", "{").replace("}}", "}"))
    assert ask(engine, "--template-file", plain.name, template=None) == 2
    assert engine.seen.total() == 1


def test_a_conversation_from_columns(place: Path, engine: FaultyEngine) -> None:
    write(place / "in.csv", "q,a,f\nx,y,answer:z\n")
    turns = ("--turn", "user={q}", "--turn", "assistant={a}", "--turn", "user={f}")
    assert ask(engine, *turns, template=None) == 0
    assert ask(engine, *turns, template=None) == 0
    assert engine.seen.total() == 1
    assert rows_of("out.csv") == [{"q": "x", "a": "y", "f": "answer:z", "answer": "z"}]
    assert ask(engine, *turns[:-2], template=None) == 2


def test_a_field_inside_a_column(place: Path, engine: FaultyEngine) -> None:
    rows = [{"meta": {"source": "answer:web"}}, {"meta": {"source": "answer:book"}}]
    pq.write_table(pa.Table.from_pylist(rows), place / "in.parquet")
    names = {"source": "in.parquet", "output": "out.parquet"}
    assert ask(engine, template="{meta.source}", **names) == 0
    assert pq.read_table("out.parquet").column("answer").to_pylist() == ["web", "book"]


def test_a_field_that_no_entry_needs_to_have(place: Path, engine: FaultyEngine) -> None:
    write(place / "in.jsonl", '{"b": 1, "a": "x"}\n{"b": 2}\n')
    write(place / "t.j2", "answer:{{ a | default('none') }}")
    more = ("--template-file", "t.j2")
    assert ask(engine, *more, template=None, source="in.jsonl", output="out.jsonl") == 0
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in found] == ["x", "none"]


def test_a_wrong_template_can_be_corrected(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\n")
    assert ask(engine, template="{txt}") == 2
    assert "the template names 'txt', but the input has no such column" in capsys.readouterr().err
    assert not (place / "out.csv.aiflux").exists()
    assert ask(engine, template="Say") == 2
    assert ask(engine) == 0


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("text\n", (), "contains no row"),
        ("text\na\n", ("--examples", "none.csv"), "'none.csv' cannot be read"),
        ("text\na\n", ("--turn", "user={text}"), "--template and --turn cannot be combined"),
        ("", (), "is empty"),
        ("text,answer\n1,2\n", (), "already has a column 'answer'"),
        ("text,n\n1\n", (), "line 2: 1 cell, but the header has 2"),
        ("text\na\n", ("--recursive",), "--recursive cannot be used with an input of the kind csv"),
        ("text\na\n", ("--local",), "--local and --engine-url cannot be combined"),
        ("text\na\n", ("--output", "in.csv"), "same file"),
        ("text\na\n", ("--output", "out.doc"), "no form that AI-Flux can write"),
        ("text\na\n", ("--output", "none/out.csv"), "does not exist"),
    ],
)
def test_what_is_refused_before_anything_is_sent(
    place: Path,
    engine: FaultyEngine,
    content: str,
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(place / "in.csv", content)
    assert ask(engine, *more) == 2
    assert message in capsys.readouterr().err
    assert engine.bodies == []
    assert {path.name for path in place.glob("[!.]*")} == {"in.csv"}


@pytest.mark.parametrize(
    ("output", "module"),
    [
        ("o.xlsx", "xlsxwriter"),
        ("o.parquet", "pyarrow.parquet"),
        ("o.duckdb", "pyarrow.parquet"),
        ("o.duckdb", "duckdb"),
    ],
)
def test_a_missing_library_of_the_output_is_found_before_anything_is_sent(
    place: Path,
    engine: FaultyEngine,
    output: str,
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    write(place / "in.csv", "text\na\n")
    assert ask(engine, output=output) == 2
    assert f"needs the Python package {module.partition('.')[0]}" in capsys.readouterr().err
    assert engine.bodies == []
    assert {path.name for path in place.glob("[!.]*")} == {"in.csv"}


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_an_option_of_slurm_that_may_be_meant_for_the_input_is_named(
    place: Path, engine: FaultyEngine, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "papers").mkdir()
    write(place / "papers" / "a.txt", "a")
    given = ("--exclude", "drafts/*", *more)
    assert ask(engine, *given, source="papers", template="answer:{text}") == 0
    note = "note: --exclude has no effect: a running server needs no job; for the input: --input-ex"
    assert note in capsys.readouterr().err


def test_options_of_slurm_have_no_effect_without_a_job(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\n")
    given = ["-m", "m:1", "--local", "--partition", "p", "--time", "1:00:00", "--no-seal"]
    assert main(["ask", "in.csv", "--template", "{text}", "--dry-run", *given]) == 0
    note = "note: --partition and --time have no effect: no job is submitted\n"
    assert capsys.readouterr().err.startswith(note)
    assert main(["run", "none.jsonl", *given]) == 2
    assert capsys.readouterr().err.startswith(note)


def test_the_same_source_by_another_path_continues_the_table(
    place: Path, engine: FaultyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place / "in.csv", "id,text\n1,a\n2,b\n")
    assert ask(engine) == 0
    (place / "sub").mkdir()
    (place / "link").symlink_to(place)
    assert ask(engine, source="sub/../in.csv", output="link/out.csv") == 0
    monkeypatch.chdir(place / "sub")
    assert ask(engine, source="../link/in.csv", output="../out.csv") == 0
    assert len(engine.bodies) == 2


def test_a_link_to_the_source_is_not_replaced(place: Path, engine: FaultyEngine) -> None:
    source = write(place / "in.csv", "text\na\n")
    (place / "out.csv").symlink_to("in.csv")
    assert ask(engine, "--force") == 2
    assert source.read_text() == "text\na\n"


def test_what_slurm_refuses_leaves_no_data(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / ".fakes").mkdir()
    commands = waiting_slurm(place / ".fakes", monkeypatch)
    write(place / "in.csv", "text\na\n")
    commands.add("squeue", "")
    commands.add("sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    line = ["ask", "in.csv", "--template", "{text}", "-o", "out.csv", "-m", "m:1", "--no-seal"]
    line += ["--engine-command", "sleep {port}"]
    assert main(line) == 2
    assert "Invalid account" in capsys.readouterr().err
    assert {path.name for path in place.glob("[!.]*")} == {"in.csv"}
    commands.add("squeue", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    assert main(line) == 2
    assert (place / "out.csv.aiflux").is_dir(), "Slurm may have the job"


def test_a_model_is_named_before_anything_is_written(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\n")
    line = ["ask", "in.csv", "--template", "{text}", "-o", "out.csv", "--engine-url", engine.url]
    assert main(line) == 2
    assert "no model was named" in capsys.readouterr().err
    assert {path.name for path in place.glob("[!.]*")} == {"in.csv"}


def test_another_name_for_the_column(place: Path, engine: FaultyEngine) -> None:
    write(place / "in.csv", "text,answer,error\na,1,2\n400,3,4\n")
    assert ask(engine, "--answer-column", "model", template="{text}") == 3
    assert list(rows_of("out.csv")[0]) == ["text", "answer", "error", "model", "aiflux_error"]


def test_another_name_for_the_column_of_a_table_that_exists(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\n")
    assert ask(engine) == 0
    before = (place / "out.csv").stat()
    assert ask(engine, "--answer-column", "reply") == 2
    assert "out.csv" in capsys.readouterr().err
    assert ask(engine) == 0, "what was refused has changed nothing"
    assert (place / "out.csv").stat() == before
    assert ask(engine, "--answer-column", "reply", "--force") == 0
    assert rows_of("out.csv") == [{"text": "a", "reply": "a"}]
    assert engine.seen.total() == 1


def test_an_output_in_the_directory_that_is_read(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "a.txt", "A")
    assert ask(engine, source=".", template=None) == 2
    assert "is in the directory that is the input" in capsys.readouterr().err


def test_existing_tables_are_kept(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\n")
    write(place / "out.csv", "mine\n")
    assert ask(engine) == 2
    assert engine.bodies == []
    assert (place / "out.csv").read_text() == "mine\n"
    assert ask(engine, "--force") == 0
    write(place / "out.csv", "edited\n")
    assert ask(engine) == 2
    assert "--force" in capsys.readouterr().err
    assert (place / "out.csv").read_text() == "edited\n"
    assert ask(engine, "--force") == 0
    assert rows_of("out.csv") == [{"text": "a", "answer": "a"}]
    assert engine.seen.total() == 1, "the answers are kept"


def test_a_run_with_the_name_of_the_table(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\n")
    assert main(["convert", "csv", "in.csv", "--template", "{text}", "-o", "q.jsonl"]) == 0
    assert main(["run", "q.jsonl", "-m", "m:1", "--engine-url", engine.url, "-o", "o.json"]) == 0
    (place / "o.json").unlink()
    assert ask(engine, output="o.json") == 2
    assert "is the run directory of `aiflux run`" in capsys.readouterr().err


def test_rows_that_are_skipped(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text,n\na,1\nshort\nb,2\n")
    assert ask(engine, "--skip-bad") == 0
    assert [row["answer"] for row in rows_of("out.csv")] == ["a", "b"]
    # A skipped row that can be read would be in the table, with the reason here.
    assert [row["error"] for row in rows_of("out.csv")] == ["", ""]
    printed = capsys.readouterr().out
    assert "skipped 1 row" in printed
    assert "line 3: 1 cell, but the header has 2" in printed
    assert "left out" in printed


def test_as_json(place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "in.csv", "text\na\n400\n")
    assert ask(engine, "--json", template="{text}") == 3
    content = json.loads(capsys.readouterr().out)
    assert content == {
        "output": str(place / "out.csv"), "state": "finished with failures", "rows": 2,
        "requests": 2, "skipped": 0, "answered": 1, "failed": 1, "left_out": 0,
    }  # fmt: skip


def test_a_dry_run(place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "in.csv", "text\n" + "a\n" * 5)
    assert ask(engine, "--dry-run") == 0
    assert capsys.readouterr().out.count('"custom_id"') == 3
    assert {path.name for path in place.glob("[!.]*")} == {"in.csv"}


# --- stops ------------------------------------------------------------------------------------


def test_a_killed_process_is_resumed_by_the_same_command(place: Path, engine: FaultyEngine) -> None:
    count = 60
    write(place / "in.csv", "text\n" + "".join(f"t{at}\n" for at in range(count)))
    engine.delay = 0.05
    line = words(engine, "--concurrency", "2")
    with subprocess.Popen([*AIFLUX, *line], stderr=subprocess.DEVNULL) as process:
        while engine.seen.total() < 10:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (place / "out.csv").exists()
    engine.delay = 0.0
    assert main(line) == 0
    assert rows_of("out.csv") == [{"text": f"t{at}", "answer": f"t{at}"} for at in range(count)]
    assert engine.seen.total() < count + 10, "what was answered is not asked again"


def test_a_forced_command_that_was_killed_before_its_run_was_planned_is_resumed(
    place: Path, engine: FaultyEngine
) -> None:
    write(place / "in.csv", "text\na\nb\n")
    assert ask(engine) == 0
    table = AnswerTable.of("out.csv")
    known = table.record()
    assert known is not None
    question = replace(known.question, asked={**known.question.asked, "template": f"{TEMPLATE}!"})

    def convert_again(target: Path) -> Summary:
        return csv_to_jsonl(place / "in.csv", target, template=f"{TEMPLATE}!")

    _, replaced = table.prepare(question, convert_again, force=True)  # the kill comes here
    assert replaced
    assert ask(engine, template=f"{TEMPLATE}!") == 0
    assert [row["answer"] for row in rows_of("out.csv")] == ["a!", "b!"]
    assert engine.seen.total() == 4


def test_a_process_killed_while_it_writes_the_table(place: Path, engine: FaultyEngine) -> None:
    write(place / "in.csv", "text\na\n")
    assert ask(engine) == 0
    content = (place / "out.csv").read_bytes()
    record = place / "out.csv.aiflux" / "ask.json"
    fields = json.loads(record.read_text())
    record.write_text(json.dumps({**fields, "writing": True, "table": None}))
    assert ask(engine) == 0
    assert (place / "out.csv").read_bytes() == content
    assert json.loads(record.read_text())["writing"] is False


def test_the_same_command_twice_at_once(place: Path, engine: FaultyEngine) -> None:
    write(place / "in.csv", "text\n" + "".join(f"t{at}\n" for at in range(20)))
    engine.delay = 0.2
    line = [*AIFLUX, *words(engine, "--concurrency", "2")]
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as first:
        while not engine.seen:
            time.sleep(0.01)
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as second:
            shown, _ = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), shown
    assert engine.seen.total() == 20
    assert [row["answer"] for row in rows_of("out.csv")] == [f"t{at}" for at in range(20)]


def test_a_resumed_run_still_needs_its_table(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\nb\n")
    engine.stop()
    assert ask(engine, "--engine-wait", "0.1") == 4
    engine.start()
    assert main(["resume", "out.csv"]) == 0
    capsys.readouterr()
    assert main(["status", "out.csv"]) == 0
    assert "write out.csv: run the same `aiflux ask` command again" in capsys.readouterr().out
    assert ask(engine, "--engine-wait", "0.1") == 0
    assert main(["status", "out.csv"]) == 0
    assert "aiflux ask" not in capsys.readouterr().out
    assert len(rows_of("out.csv")) == 2


def test_a_stopped_table_names_what_goes_on_and_has_a_partial_table(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "id,text\n" + "".join(f"{at},t{at}\n" for at in range(20)))
    stopped_code(engine)
    assert main(["results", "show", "out.csv"]) == 2
    error = capsys.readouterr().err
    assert f"the run of {place}/out.csv is not finished" in error
    assert "the same `aiflux ask` command" in error
    assert f"write the results so far: aiflux merge --partial {place}/out.csv" in error
    assert "results.json" not in error
    assert main(["merge", "--partial", "out.csv"]) == 0
    assert "out.partial.csv" in capsys.readouterr().out
    rows = rows_of("out.partial.csv")
    assert rows[0] == {"id": "0", "text": "t0", "answer": "t0"}
    assert rows[-1]["answer"] == ""
    assert not (place / "out.csv").exists()


def test_failed_rows_are_tried_again_by_the_command_that_the_error_names(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\n400*1\n")
    assert ask(engine, template="{text}") == 3
    assert main(["resume", "out.csv"]) == 3
    assert "the same `aiflux ask` command with --retry-failed" in capsys.readouterr().err
    assert ask(engine, "--retry-failed", template="{text}") == 0


# --- Slurm ------------------------------------------------------------------------------------


def slurm_words(*more: str) -> list[str]:
    server = Path(__file__).parents[2] / "tools" / "command_server.py"
    command = f"{sys.executable} {server} --port {{port}}"
    return ["ask", "in.csv", "--template", TEMPLATE, "-o", "out.csv", "-m", "tiny:latest",
            "--engine-command", command, "--no-preflight", *more]  # fmt: skip


def test_a_job_is_submitted_and_the_same_command_finishes(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = FakeCommands(place / "bin")
    for name in ("sacct", "scontrol"):
        fakes.say(name, status=1)
    fakes.say("sbatch", "100\n")
    fakes.say("squeue", "100|N/A|PENDING|N/A|0:00||Priority\n")
    monkeypatch.setenv("PATH", fakes.path)
    write(place / "in.csv", "text\na\n")
    assert main(slurm_words("--no-wait")) == 0
    printed = capsys.readouterr().out
    assert "submitted job 100: 1 request -> " in printed
    assert "out.csv: run the same command again to wait for it" in printed
    assert main(slurm_words("--no-wait")) == 0
    assert "submitted" not in capsys.readouterr().out
    assert main(slurm_words("--temperature", "1")) == 2
    assert "out.csv: temperature was not given, and is now 1.0" in capsys.readouterr().err
    write(place / "in.csv", "text\nother\n")
    assert main(slurm_words()) == 2
    assert "cancel its jobs first (aiflux cancel" in capsys.readouterr().err
    write(place / "in.csv", "text\na\n")

    with subprocess.Popen(
        [*AIFLUX, *slurm_words()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None
        assert "waiting: 0/1 done" in next(line for line in waiting.stdout if ":" in line)
        waiting.send_signal(signal.SIGINT)
        _, error = waiting.communicate()
    assert waiting.returncode == 5
    assert "the run continues" in error

    run = RunDirectory(place / "out.csv.aiflux" / "results.json.aiflux")
    assert len(fakes.calls("sbatch")) == 1
    with subprocess.Popen([*AIFLUX, *slurm_words()], stdout=subprocess.PIPE, text=True) as waiting:
        work = [sys.executable, "-m", "aiflux.worker", "--run-dir", str(run.path)]
        subprocess.run(work, check=True, stderr=subprocess.DEVNULL)
        fakes.say("squeue", "")
        shown, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert "1 row -> out.csv: 1 answered, 0 failed" in shown
    assert rows_of("out.csv") == [{"text": "a", "answer": "a"}]
    assert len(fakes.calls("sbatch")) == 1


# --- what is printed ----------------------------------------------------------------------------


def test_one_of_something_is_singular(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "in.csv", "text\na\n")
    assert ask(engine) == 0
    for name, prompt in (("one.jsonl", "echo a"), ("bad.jsonl", "400"), ("a.jsonl", "echo a")):
        body = {"messages": [{"role": "user", "content": prompt}]}
        write(place / name, f"{request_line('a', body=body)}\n")
    embedding = {"body": {"input": "a"}, "url": "/v1/embeddings"}
    write(place / "v.jsonl", json.dumps({"custom_id": "a", "method": "POST", **embedding}) + "\n")
    at_engine = ["--engine-url", engine.url, "-m", "m:1", "--max-retries", "0"]
    for name, code in (("one", 0), ("bad", 3), ("v", 0)):
        assert main(["check", f"{name}.jsonl", *at_engine[:4]]) == 0
        assert main(["run", f"{name}.jsonl", *at_engine, "--dry-run"]) == 0
        assert main(["run", f"{name}.jsonl", *at_engine, "-o", f"{name}.json"]) == code
        assert main(["run", f"{name}.jsonl", *at_engine, "-o", f"{name}.json"]) == code
        for command in (["status"], ["results", "show"], ["merge"], ["results", "to-csv"]):
            assert main([*command, f"{name}.json"]) in (0, code)
    assert main(["estimate", "a.jsonl", *at_engine]) == 0
    printed = "".join(capsys.readouterr())
    nouns = "answers|bytes|embeddings|errors|numbers|prompts|requests|results|rows|slots|tokens"
    assert re.findall(rf"(?<![\w.,:-])1 (?:{nouns})\b", printed) == []
    assert "1 of 1 request failed" in printed
    assert "1 embedding of " in printed


# --- a terminal -------------------------------------------------------------------------------


def test_the_first_answers_are_shown_on_a_terminal(place: Path, engine: FaultyEngine) -> None:
    rows = "".join(f'"text {at} {"x" * 200}"\n' for at in range(9))
    write(place / "in.csv", f"text\n{rows}")
    line = [*AIFLUX, *words(engine, template="Sum up: answer:{text}")]
    seen = on_terminal(line, "stdout", "stderr", columns=100, lines=40)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    lines = [line.rstrip() for line in shown.replace("\r", "\n").splitlines()]
    listed = [line for line in lines if re.match(r"  row-\d ", line)]
    assert len(listed) == 5
    assert re.match(r"  row-\d  text \d x+…  text \d x+…$", listed[0]), listed[0]
    assert all(len(line) < 100 for line in listed)
    assert lines.count("first answers") == 1
    assert "\\x1b" not in shown


def test_no_answers_are_shown_in_a_pipe(place: Path, engine: FaultyEngine) -> None:
    write(place / "in.csv", "text\nprivate\n")
    done = subprocess.run(
        [*AIFLUX, *words(engine)], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert "private" not in done.stdout + done.stderr


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(convert.commands))
def test_every_option_of_a_converter_is_one_of_ask(kind: str) -> None:
    """A new reader works here without a change."""
    own = {param.name for param in ask_module.ask.params}
    wanted = {str(param.name) for param in convert.commands[kind].params} - ask_module._LEFT_OUT
    assert {ask_module._own_name(name) for name in wanted} <= own


def test_help_lists_what_most_people_need() -> None:
    context = parse(["ask", "in.csv", "--template", "x", "-o", "o.csv"])
    shown = context.get_help()
    assert all(name in shown for name in ("--template", "--output", "--model", "--local"))
    assert "--chunk-tokens" not in shown
    assert "--chunk-tokens" in option_names(context.command)
