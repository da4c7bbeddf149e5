"""``aiflux.ask``: a column of answers for a DataFrame, or for a table in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aiflux
from aiflux.errors import (
    ConfigError,
    ImageError,
    InputError,
    PreflightError,
    RunConflictError,
    StoppedError,
    UsageError,
)
from tests.conftest import LEFT_OUT
from tests.tools.faulty_engine import FaultyEngine


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine() as engine:
        yield engine


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def ask(source: Any, engine: FaultyEngine, *output: str, **more: Any) -> Any:
    given = {"template": "answer:{text}", "model": "m:1", "engine_url": engine.url}
    fast = {"retry_delay": 0.01, "max_retries": 0, "progress": False}
    return aiflux.ask(source, *output, **{**given, **fast, **more})


def test_a_table_of_arrow_gets_a_column(place: Path, engine: FaultyEngine) -> None:
    table = pa.table({"text": ["a", "b"], "n": pa.array([1, None], pa.uint8())})
    answered = ask(table, engine)
    assert answered == table.append_column("answer", pa.array(["a", "b"]))
    assert ask(table, engine) == answered
    assert engine.seen.total() == 2, "the same call again sends nothing"
    assert [path.suffixes for path in place.glob("ask-*")] == [[".parquet", ".aiflux"]]
    wide = pa.table({"text": ["x", "a", "b"], "n": pa.array([7, 1, None], pa.uint8())})
    halves = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    for same in (halves, wide.slice(1), table.replace_schema_metadata({"by": "another version"})):
        assert ask(same, engine).column("answer").to_pylist() == ["a", "b"]
    assert engine.seen.total() == 2, "the same rows are the same question"
    ask(table.slice(0, 1), engine)
    assert len([*place.glob("ask-*")]) == 2, "other rows are another question"


def test_rows_with_nothing_filled_in_are_logged(
    engine: FaultyEngine, caplog: pytest.LogCaptureFixture
) -> None:
    ask(pa.table({"text": ["a", None]}), engine)
    assert "1 request with nothing filled in" in caplog.text


def test_prompts_of_several_parts(place: Path, engine: FaultyEngine) -> None:
    table = pa.table({"text": ["a"], "First name": ["Ann"]})
    (place / "t.j2").write_text('{{ row["First name"] }} {{ text }}')
    (place / "e.csv").write_text("text,First name,answer\nx,Bob,y\n")
    more = {"template": Path("t.j2"), "system_template": "For {First name}."}
    answered = ask(table, engine, examples="e.csv", **more)
    assert answered.column("answer").to_pylist() == ["echo Ann a"]
    turns = [turn["content"] for turn in engine.bodies[0]["messages"]]
    assert turns == ["For Ann.", "Bob x", "y", "Ann a"]
    rows = [{"text": "x", "First name": "Bob", "answer": "y"}]
    assert ask(table, engine, examples=rows, **more) == answered
    assert engine.seen.total() == 1, "the same rows from a file are the same question"
    (place / "t.j2").write_text("{{ text }}!")
    ask(table, engine, examples=rows, **more)
    assert engine.seen.total() == 2
    turns = [("user", "{text}"), ("assistant", "{First name}"), ("user", "answer:c")]
    assert ask(table, engine, template=None, turns=turns).column("answer").to_pylist() == ["c"]
    with pytest.raises(ConfigError, match="did you mean 'examples'"):
        ask(table, engine, example=rows)


def test_a_table_with_rare_types(place: Path, engine: FaultyEngine) -> None:
    if hasattr(pa, "string_view"):  # pyarrow 16
        table = pa.table({"text": pa.array(["a", "b"], pa.string_view())})
        assert ask(table, engine).column("answer").to_pylist() == ["a", "b"]
        assert ask(table, engine).column("answer").to_pylist() == ["a", "b"]
        assert engine.seen.total() == 2
    runs = pa.RunEndEncodedArray.from_arrays([1], ["x"])
    with pytest.raises(InputError, match="cannot be stored as a table"):
        ask(pa.table({"text": ["c"], "n": runs}), engine)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_dataframe_gets_a_column(engine: FaultyEngine, library: str) -> None:
    if find_spec(library) is None:
        pytest.skip(f"{LEFT_OUT}{library} is not installed")
    frames = pytest.importorskip(library)
    frame = frames.DataFrame({"text": ["a", "b"], "code": ["007", None]})
    if library == "pandas":
        frame.index = [7, 7]
        frame["kind"] = frame["text"].astype("category")
    answered = ask(frame, engine)
    assert [*answered.columns] == [*frame.columns, "answer"]
    assert [*answered["answer"]] == ["a", "b"]
    before = answered.drop(columns="answer") if library == "pandas" else answered.drop("answer")
    assert before.equals(frame)
    assert "answer" not in frame.columns


def test_a_missing_library_of_the_output_is_found_before_anything_is_sent(
    place: Path, engine: FaultyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xlsxwriter", None)
    with pytest.raises(ConfigError, match="needs the Python package xlsxwriter"):
        ask(pa.table({"text": ["a"]}), engine, "answers.xlsx")
    assert engine.seen.total() == 0
    assert [*place.glob("answers*")] == []


def test_a_table_is_written_too(place: Path, engine: FaultyEngine) -> None:
    table = pa.table({"text": ["a"], "n": [1]})
    answered = ask(table, engine, "answers.csv")
    assert (place / "answers.csv").read_text().splitlines() == ["text,n,answer", "a,1,a"]
    assert answered.column_names == ["text", "n", "answer"]
    with pytest.raises(RunConflictError, match="changed since"):
        ask(pa.table({"text": ["b"], "n": [1]}), engine, "answers.csv")
    assert ask(table, engine, "answers.csv") == answered


def test_a_file_becomes_a_file(place: Path, engine: FaultyEngine) -> None:
    (place / "in.csv").write_text("text;n\na;007\n")
    assert ask("in.csv", engine, "out.csv") == str(place / "out.csv")
    assert (place / "out.csv").read_text() == "text;n;answer\na;007;a\n"
    assert ask(Path("in.csv"), engine, "out.parquet") == place / "out.parquet"
    assert pq.read_table("out.parquet").to_pydict() == {
        "text": ["a"], "n": ["007"], "answer": ["a"],
    }  # fmt: skip


def test_other_settings_are_refused_and_forced(engine: FaultyEngine) -> None:
    table = pa.table({"text": ["a"]})
    ask(table, engine)
    with pytest.raises(RunConflictError, match="begun with engine external, model m:1"):
        ask(table, engine, temperature=1)
    ask(table, engine, temperature=1, force=True)
    assert [body.get("temperature") for body in engine.bodies] == [None, 1]
    assert ask(table, engine, temperature=1).column("answer").to_pylist() == ["a"]
    assert len(engine.bodies) == 2


def test_a_run_that_ended_early_is_named_with_its_reason(engine: FaultyEngine) -> None:
    engine.stop()
    with pytest.raises(StoppedError, match=r"the run of .*answers\.csv failed with 0 of 1.*done: "):
        ask(pa.table({"text": ["a"]}), engine, "answers.csv", engine_wait=0.1)


def test_failed_rows_have_a_reason(engine: FaultyEngine) -> None:
    table = pa.table({"text": ["a", "400"]})
    answered = ask(table, engine, template="{text}")
    assert answered.column("answer").to_pylist() == ["echo a", None]
    assert str(answered.column("error")[1]).startswith("http_400")


def test_fields_of_a_schema(engine: FaultyEngine) -> None:
    engine.answer = '{"stars": 4}'
    schema = {"type": "object", "properties": {"stars": {"type": "integer"}}}
    answered = ask(pa.table({"text": ["a"]}), engine, schema=schema)
    assert answered.column("stars").to_pylist() == [4]


def test_a_run_that_ends_early_is_resumed_by_the_same_call(engine: FaultyEngine) -> None:
    table = pa.table({"text": [f"t{at}" for at in range(6)]})
    engine.stop()
    with pytest.raises(StoppedError, match="failed with 0 of 6"):
        ask(table, engine, engine_wait=0.1)
    engine.start()
    assert ask(table, engine, engine_wait=0.1).column("answer").to_pylist() == [
        f"t{at}" for at in range(6)
    ]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_what_is_no_table_of_a_library_is_refused(engine: FaultyEngine, library: str) -> None:
    if find_spec(library) is None:
        pytest.skip(f"{LEFT_OUT}{library} is not installed")
    frames = pytest.importorskip(library)
    with pytest.raises(InputError, match="Series is neither a path nor a DataFrame"):
        ask(frames.Series(["a"]), engine)
    if library == "pandas":
        sparse = frames.arrays.SparseArray([0])
        half = frames.Series(["a\ud800"], dtype=object)
        for content in ({"text": ["a"], "n": sparse}, {"text": half}, {"text": ["a", 1]}):
            with pytest.raises(InputError, match="cannot be stored as a table"):
                ask(frames.DataFrame(content), engine)
        twice = frames.DataFrame([["a", "b"]], columns=["text", "text"])
        with pytest.raises(InputError, match="Duplicate column names"):
            ask(twice, engine)
    assert engine.bodies == []


OLLAMA = {"engine_url": None}


@pytest.mark.parametrize(
    ("source", "more", "error", "message"),
    [
        ("in.csv", {}, UsageError, "no output was given"),
        ("in.xyz", {"output": "o.csv"}, UsageError, "the kind of"),
        (["a"], {}, InputError, "list is neither a path nor a DataFrame"),
        (pa.table({"text": ["a"], "answer": ["b"]}), {}, InputError, "already has a column"),
        (pa.table({"txt": ["a"]}), {}, InputError, "no such column"),
        (pa.table({"text": ["a"]}), {"colour": 1}, ConfigError, "unknown option 'colour'"),
        (pa.table({"text": ["a"]}), {"slots": 0}, ConfigError, "slots"),
        (pa.table({"text": ["a"]}), {"local": True}, UsageError, "cannot be combined"),
        (pa.table({"text": ["a"]}), {"model": None}, InputError, "body.model is missing"),
        (pa.table({"text": ["a"]}), {"engine_url": "serve:x"}, UsageError, "no engine is served"),
        (pa.table({"text": ["a"]}), {**OLLAMA, "local": True}, ImageError, "no image"),
        (pa.table({"text": ["a"]}), {**OLLAMA, "model": "lama3.2:3b"}, PreflightError, "2 prob"),
    ],
)
def test_what_is_refused_leaves_no_data(
    place: Path,
    engine: FaultyEngine,
    source: Any,
    more: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        ask(source, engine, **more)
    assert engine.bodies == []
    assert {path.name for path in place.iterdir()} <= {".local"}


def test_rows_that_are_refused_do_not_replace_those_of_the_run(
    place: Path, engine: FaultyEngine
) -> None:
    first, other = pa.table({"text": ["a"], "n": [1]}), pa.table({"text": ["b"], "n": [1]})
    ask(first, engine, "out.csv")
    with pytest.raises(RunConflictError):
        ask(other, engine, "out.csv")
    folder = place / "out.csv.aiflux"
    assert pq.read_table(folder / "source.parquet") == first
    assert [path.name for path in folder.glob("*source.parquet")] == ["source.parquet"]
    assert ask(first, engine, "out.csv")["answer"].to_pylist() == ["a"]


def test_a_run_that_began_keeps_its_data(place: Path, engine: FaultyEngine) -> None:
    engine.stop()
    with pytest.raises(StoppedError):
        ask(pa.table({"text": ["a"]}), engine, "out.csv", engine_wait=0.1)
    assert (place / "out.csv.aiflux" / "source.parquet").is_file()
