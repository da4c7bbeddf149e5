"""Results converted back to tables, joined with the source of the requests."""

from __future__ import annotations

import csv
import json
import re
import shutil
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
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
from aiflux.converters.delimited import csv_writer
from aiflux.converters.results import BackOptions
from aiflux.errors import InputError
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.working import Working


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv_writer(file).writerows(rows)
    return path


def read_csv(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def output_entry(request: dict[str, Any], answer: str | None) -> dict[str, Any]:
    """Return an entry of an output; ``None`` as the answer means failure."""
    metadata = {**request.get("metadata", {}), "model": "m:1"}
    entry: dict[str, Any] = {"input": request, "output": None, "metadata": metadata}
    if answer is None:
        return {**entry, "error": {"code": "http_400", "message": "no", "status": 400}}
    choice = {"index": 0, "message": {"role": "assistant", "content": answer}}
    return {**entry, "output": {"choices": [choice]}}


def answered(requests: Path, output: Path, *answers: str | None) -> Path:
    """Write the output of a run over ``requests``; by default each answer is its prompt."""
    entries = [json.loads(line) for line in requests.read_bytes().splitlines()]
    texts = answers or [entry["body"]["messages"][0]["content"] for entry in entries]
    lines = [json.dumps(output_entry(*pair)) for pair in zip(entries, texts, strict=True)]
    output.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return output


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=8))
def test_all_cells_are_preserved(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("back")
    source = write_csv(folder / "in.csv", [["a", "b", "c"], *map(list, rows)])
    csv_to_jsonl(
        source, folder / "q.jsonl", template="{{{b}}}", keep=["*"], delimiter=",", encoding="utf-8"
    )
    output = answered(folder / "q.jsonl", folder / "out.json")
    results_to_csv(output, folder / "1.csv")
    results_to_csv(
        output, folder / "2.csv", BackOptions(source=source, delimiter=",", encoding="utf-8")
    )
    expected = [
        [f"row-{number}", *row, f"{{{row[1]}}}", ""] for number, row in enumerate(rows, start=1)
    ]
    for name in ("1.csv", "2.csv"):
        assert read_csv(folder / name) == [
            ["custom_id", "a", "b", "c", "answer", "error"],
            *expected,
        ]


def output_of(folder: Path, *answers: str | None, **options: Any) -> Path:
    rows = [["id", "text"], *([f"n{number}", f"t{number}"] for number in range(len(answers)))]
    source = write_csv(folder / "in.csv", rows)
    csv_to_jsonl(source, folder / "q.jsonl", template="{text}", id_column="id", **options)
    return answered(folder / "q.jsonl", folder / "out.json", *answers)


def test_answers_are_joined_by_custom_id(tmp_path: Path) -> None:
    output = output_of(tmp_path, "A", None)
    write_csv(tmp_path / "in.csv", [["text", "id"], ["t1", "n1"], ["new", "n9"], ["t0", "n0"]])
    back = BackOptions(source=tmp_path / "in.csv", id_column="id")
    summary = results_to_csv(output, tmp_path / "back.csv", back)
    assert read_csv(tmp_path / "back.csv") == [
        ["custom_id", "text", "id", "answer", "error"],
        ["n1", "t1", "n1", "", "http_400: no"],
        ["n9", "new", "n9", "", "no result: it was not requested"],
        ["n0", "t0", "n0", "A", ""],
    ]
    assert (summary.answered, summary.failed, summary.unasked, summary.unused) == (1, 1, 1, 0)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(lambda asked: min(asked) < 5))
@example([0, 1, 2, 3, 4])
@example([0, 1, 1, 2, 0, 3])
@example([0, 1, 6, 2, 1])
def test_rows_in_any_order_and_number_get_their_answers_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("order")
    output = output_of(folder, *"ABCDE")
    write_csv(folder / "in.csv", [["id", "text"], *([f"n{row}", f"t{row}"] for row in rows)])
    back = BackOptions(source=folder / "in.csv", id_column="id")
    summary = results_to_csv(output, folder / "back.csv", back)
    wanted = []
    for at, row in enumerate(rows):
        if row >= 5:
            wanted.append(["", "no result: it was not requested"])
        elif row in rows[:at]:
            wanted.append(["", "no result: an earlier row of the source has this custom_id"])
        else:
            wanted.append(["ABCDE"[row], ""])
    assert [line[-2:] for line in read_csv(folder / "back.csv")[1:]] == wanted
    asked = {row for row in rows if row < 5}
    assert (summary.answered, summary.unused) == (len(asked), 5 - len(asked))


def test_a_source_without_matching_custom_ids_is_rejected(tmp_path: Path) -> None:
    output = output_of(tmp_path, "A")
    with pytest.raises(InputError, match="no row of") as error:
        results_to_csv(output, tmp_path / "back.csv", BackOptions(source=tmp_path / "in.csv"))
    assert "(columns: 'id', 'text')" in str(error.value.remedy)
    assert not (tmp_path / "back.csv").exists()
    wrong = BackOptions(source=tmp_path / "in.csv", id_column="x")
    with pytest.raises(InputError, match="no such column"):
        results_to_csv(output, tmp_path / "back.csv", wrong)
    with pytest.raises(InputError, match="is also an input"):
        results_to_csv(output, output)
    with pytest.raises(InputError, match="does not exist"):
        results_to_csv(tmp_path / "none.json", tmp_path / "back.csv")
    with pytest.raises(InputError, match="is not an output"):
        results_to_csv(tmp_path / "q.jsonl", tmp_path / "back.csv")


FENCED = '```json\n{"label": "x", "score": 2.5, "answer": null}\n```'


def test_json_answers_become_columns(tmp_path: Path) -> None:
    output = output_of(tmp_path, '{"label": "y", "n": [1], "score": 1}', FENCED, "words", None)
    summary = results_to_csv(output, tmp_path / "back.csv", BackOptions(json_fields=()))
    header, *rows = read_csv(tmp_path / "back.csv")
    assert header == ["custom_id", "answer", "error", "label", "n", "score", "aiflux_answer"]
    assert [row[3:] for row in rows] == [
        ["y", "[1]", "1", ""], ["x", "", "2.5", ""], [""] * 4, [""] * 4,
    ]  # fmt: skip
    assert summary.unfit == 1
    results_to_csv(output, tmp_path / "back.csv", BackOptions(json_fields=("score", "none")))
    assert read_csv(tmp_path / "back.csv")[1][3:] == ["1", ""]


def test_parquet_columns_have_types(tmp_path: Path) -> None:
    answers = ('{"s": 1, "ok": true, "m": "a"}', '{"s": 2.5, "ok": false, "m": 3}')
    output = output_of(tmp_path, *answers, keep=["text"])
    results_to_parquet(output, tmp_path / "back.parquet", BackOptions(json_fields=()))
    table = pq.read_table(tmp_path / "back.parquet")
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds == {
        "custom_id": "string", "text": "string", "answer": "string", "error": "string",
        "s": "double", "ok": "bool", "m": "string",
    }  # fmt: skip
    assert table.column("s").to_pylist() == [1.0, 2.5]
    assert table.column("m").to_pylist() == ["a", "3"]


def test_a_parquet_source_keeps_its_types(tmp_path: Path) -> None:
    output = output_of(tmp_path, "A", "B")
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"k": ["n1", "n0"], "tags": [["a"], []], "n": pa.array([1, 2], "i2")}),
                   source)  # fmt: skip
    back = BackOptions(source=source, id_column="k")
    results_to_parquet(output, tmp_path / "back.parquet", back)
    table = pq.read_table(tmp_path / "back.parquet")
    assert table.column("tags").to_pylist() == [["a"], []]
    assert str(table.schema.field("n").type) == "int16"
    assert table.column("answer").to_pylist() == ["B", "A"]


def test_a_number_too_large_for_parquet_becomes_text(tmp_path: Path) -> None:
    output = output_of(tmp_path, f'{{"n": {10**30}}}', '{"n": 1}')
    results_to_parquet(output, tmp_path / "b.parquet", BackOptions(json_fields=()))
    assert pq.read_table(tmp_path / "b.parquet").column("n").to_pylist() == [str(10**30), "1"]
    results_to_jsonl(output, tmp_path / "b.jsonl", BackOptions(json_fields=()))
    assert json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])["n"] == 10**30


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ('Sure!\n```json\n{"label": "x"}\n```\nHope it helps.', "x"),
        ('The label is {"label": "x"}.', "x"),
        ('<think>maybe {"label": "y"}</think>\n{"label": "x"}', "x"),
        ('```\n{"label": "x"}\n```\nor\n```\n{"label": "y"}\n```', ""),
        ('{"label": "x"} or {"label": "y"}', ""),
        ('[{"label": "x"}]', ""),
        ('{"label": "x', ""),
    ],
)
def test_a_json_object_is_found_among_other_words(tmp_path: Path, answer: str, label: str) -> None:
    output = output_of(tmp_path, answer)
    summary = results_to_csv(output, tmp_path / "b.csv", BackOptions(json_fields=("label",)))
    assert read_csv(tmp_path / "b.csv")[1][-1] == label
    assert summary.unfit == (not label)


def test_column_names_stay_unique(tmp_path: Path) -> None:
    """A JSON field called ``answer`` together with a source column of the same name."""
    output = output_of(tmp_path, '{"answer": "field", "custom_id": "f"}')
    source = write_csv(tmp_path / "s.csv", [["id", "text", "answer"], ["n0", "t0", "gold"]])
    back = BackOptions(source=source, id_column="id", json_fields=())
    results_to_csv(output, tmp_path / "b.csv", back)
    header, row = read_csv(tmp_path / "b.csv")
    assert header[3:] == ["answer", "aiflux_answer", "error", "aiflux_answer_2", "aiflux_custom_id"]
    assert row[3:] == ["gold", '{"answer": "field", "custom_id": "f"}', "", "field", "f"]


ROWS = [["a", "0", "x"], ["b", "", "y"], ["a", "0", "z"], ["", "1", "b"]]


@st.composite
def edited(draw: st.DrawFn) -> tuple[list[list[str]], list[list[str]]]:
    """Return rows, and the same rows after some edits."""
    cell = st.sampled_from(["a", "b", "0", "1", ""])
    rows = draw(st.lists(st.tuples(cell, cell, cell).map(list), min_size=1, max_size=6))
    after = [list(row) for row in rows]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(after) - 1)))
        change = draw(st.sampled_from(["insert", "delete", "swap", "edit"]))
        if change == "insert" or not after:
            after.insert(at, draw(st.tuples(cell, cell, cell).map(list)))
        elif change == "delete":
            del after[at]
        elif change == "swap":
            other = draw(st.integers(0, len(after) - 1))
            after[at], after[other] = after[other], after[at]
        else:
            after[at][draw(st.integers(0, 2))] = draw(cell)
    return rows, after


def write_table(path: Path, rows: list[list[str]]) -> Path:
    """Write rows as CSV, TSV or Parquet, by suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(dict(zip("abc", zip(*rows, strict=True), strict=False))), path)
        return path
    mark = "\t" if path.suffix == ".tsv" else ","
    text = "".join(mark.join(f'"{cell}"' for cell in row) + "\n" for row in [list("abc"), *rows])
    path.write_text(text, encoding="utf-8")
    return path


def convert(source: Path, requests: Path, **options: Any) -> None:
    if source.suffix == ".parquet":
        parquet_to_jsonl(source, requests, **options)
    else:
        csv_to_jsonl(source, requests, **options)


@given(
    st.sampled_from([None, "a"]),
    edited(),
    st.sampled_from(["in.csv", "in.tsv", "in.parquet"]),
    st.data(),
)
def test_no_row_gets_the_answer_of_another_row(
    tmp_path_factory: pytest.TempPathFactory, id_column: str | None,
    versions: tuple[list[list[str]], list[list[str]]], name: str, data: st.DataObject,
) -> None:  # fmt: skip
    """Rows are inserted, deleted, swapped or edited: they are matched correctly, or rejected."""
    before, after = versions
    folder = tmp_path_factory.mktemp("source")
    source = write_table(folder / name, before)
    template = data.draw(st.sampled_from(["{b}", "{b} and {c}", "{c}: {c}"]))
    options = {"template": template, "id_column": id_column, "skip_bad": True}
    try:
        convert(source, folder / "q.jsonl", **options)
    except InputError:  # every custom_id is empty
        return
    output = answered(folder / "q.jsonl", folder / "out.json")
    back = BackOptions(source=source, id_column=id_column)
    summary = results_to_csv(output, folder / "same.csv", back)
    assert summary.unused == 0
    if not after:
        return
    write_table(source, after)
    try:
        results_to_csv(output, folder / "back.csv", back)
    except InputError:
        assert before != after
        assert not (folder / "back.csv").exists()
        return
    header, *rows = read_csv(folder / "back.csv")
    for row in (dict(zip(header, cells, strict=True)) for cells in rows):
        if not row["error"]:
            assert row["answer"] == template.format(**row)


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
@pytest.mark.parametrize("kind", ["in.csv", "in.tsv", "in.parquet"])
def test_a_changed_source_is_rejected_with_the_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    source = write_table(tmp_path / kind, ROWS)
    convert(source, tmp_path / "q.jsonl", template="answer:{b}{c}")
    output = tmp_path / name
    with FaultyEngine() as engine:
        assert main(["run", "--engine-url", engine.url, "--model", "m:1", "--input",
                     str(tmp_path / "q.jsonl"), "--output", str(output)]) == 0  # fmt: skip
    capsys.readouterr()
    words = ["results", "to-csv", str(output), "--source", str(source), "--output", "-"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert [line.split(",")[4] for line in captured.out.splitlines()[1:]] == ["0x", "y", "0z", "1b"]
    assert "not asked" not in captured.err
    write_table(source, [["new", "0", "z"], *ROWS])
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    place = "row 1 of" if kind == "in.parquet" else "line 2 of"
    assert (
        f"{place} {str(source)!r} differs from the row that became 'row-1': column 'c'"
        in captured.err
    )
    assert "use the file as it was converted" in captured.err
    write_table(source, [*ROWS, ["new", "0", "z"]])  # rows can be added at the end
    assert main(words) == 0
    assert "1 of the source without a result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [("rename", "column 'b' is missing"), ("metadata", "did not create this request from a table"),
     ("form", "requires its run directory")],
)  # fmt: skip
def test_rows_known_only_by_number_are_rejected(tmp_path: Path, change: str, reason: str) -> None:
    source = write_csv(tmp_path / "in.csv", [["id", "b"], ["row-1", "one"], ["row-2", "two"]])
    csv_to_jsonl(source, tmp_path / "q.jsonl", template="{b}")
    output = answered(tmp_path / "q.jsonl", tmp_path / "out.json")
    if change == "rename":
        write_csv(source, [["id", "other"], ["row-1", "one"], ["row-2", "two"]])
    elif change == "metadata":
        entries = json.loads(output.read_text())
        for entry in entries:
            del entry["input"]["metadata"]
        lines = ",\n".join(map(json.dumps, entries))
        output.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    else:
        output = output.with_suffix(".jsonl")
        body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "one"}}]}
        entry = {"custom_id": "row-1", "response": {"status_code": 200, "body": body}}
        output.write_text(json.dumps({**entry, "error": None}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be matched") as error:
        results_to_csv(output, tmp_path / "b.csv", BackOptions(source=source))
    assert reason in str(error.value)
    assert "--id-column" in str(error.value.remedy)
    # With a column of custom_ids, all rows can be matched.
    results_to_csv(output, tmp_path / "b.csv", BackOptions(source=source, id_column="id"))
    assert read_csv(tmp_path / "b.csv")[1] == ["row-1", "row-1", "one", "one", ""]


def test_skipped_rows_get_no_answer(tmp_path: Path) -> None:
    """The first row with a custom_id is not text, so the second one was requested."""
    source = tmp_path / "in.parquet"
    texts = pa.array([b"\xff", b"ok", b"x", b"y"])
    pq.write_table(pa.table({"id": pa.array([b"a", b"a", b"\xff", b"b"]), "text": texts}), source)
    options = {"template": "{text}", "id_column": "id", "skip_bad": True}
    parquet_to_jsonl(source, tmp_path / "q.jsonl", **options)
    output = answered(tmp_path / "q.jsonl", tmp_path / "out.json")
    results_to_jsonl(output, tmp_path / "b.jsonl", BackOptions(source=source, id_column="id"))
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [None, "ok", None, "y"]


def test_a_row_without_a_request_gets_no_answer_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["id", "text"], ["a", "one"], ["a", "two"], ["b"], ["c", "three"]]
    source = write_csv(tmp_path / "in.csv", rows)
    csv_to_jsonl(source, tmp_path / "q.jsonl", template="{text}", id_column="id", skip_bad=True)
    output = answered(tmp_path / "q.jsonl", tmp_path / "out.json")
    words = ["to-csv", str(output), "--source", str(source), "--id-column", "id", "--output", "-"]
    assert main(["results", *words]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:] == [
        "a,a,one,one,",
        "a,a,two,,no result: an earlier row of the source has this custom_id",
        "c,c,three,three,",
    ]
    assert "1 of the source with the custom_id of an earlier row" in captured.err
    assert "1 of the rows of the source left out: they cannot be read" in captured.err
    assert "without a row" not in captured.err


def test_warnings_about_answers_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = output_of(tmp_path, "words", "more", "cut")
    content = json.loads(output.read_text())
    content[2]["output"]["choices"][0]["finish_reason"] = "content_filter"
    content[0]["output"]["choices"][0]["finish_reason"] = "length"
    content[1]["output"]["choices"] *= 2
    output.write_text("[\n" + ",\n".join(map(json.dumps, content)) + "\n]\n", encoding="utf-8")
    words = ["results", "to-csv", str(output), "--json-fields", "label", "--output", "-"]
    assert main(words) == 0
    captured = capsys.readouterr().err
    assert "1 of the answers cut at the token limit" in captured
    assert "1 of the answers stopped by a content filter" in captured
    assert "1 of the answers with several choices" in captured
    assert "3 of the answers without a JSON object: their fields are empty (n0, n1, n2)" in captured
    assert "no answer has the field 'label'" in captured


def test_excel_formulas_are_escaped(tmp_path: Path) -> None:
    output = output_of(tmp_path, '=HYPERLINK("x")', "-5", "@x", "é")
    results_to_csv(output, tmp_path / "b.csv", BackOptions(excel=True))
    assert (tmp_path / "b.csv").read_bytes().startswith("\ufeffcustom_id".encode())
    answers = [row[1] for row in read_csv(tmp_path / "b.csv")[1:]]
    assert answers == ['\'=HYPERLINK("x")', "-5", "'@x", "é"]


def test_answers_are_shown_in_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = output_of(tmp_path, "a\x1b[31mred", "b", None)
    assert main(["results", "show", str(output), "--limit", "1"]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out
    assert r"a\x1b[31mred" in captured.out
    assert "2 more are not shown" in captured.err
    long = output_of(tmp_path, "".join(f"{number:04}" for number in range(90)))
    assert main(["results", "show", str(long)]) == 0
    shown = re.sub(r"[^0-9]", "", capsys.readouterr().out)
    assert sum(f"{number:04}" in shown for number in range(90)) > 60  # the rest is on two lines
    output = output_of(tmp_path, "a\x1b[31mred", "b", None)
    assert main(["results", "show", str(output), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [entry["answer"] for entry in shown] == ["a\x1b[31mred", "b", None]
    assert shown[2]["error"]["code"] == "http_400"
    assert shown[2]["prompt"] == "t2"
    assert main(["results", "show", str(output_of(tmp_path, "x")), "--failed"]) == 0
    assert capsys.readouterr().out == "no request failed\n"
    assert main(["results", "show", str(output), "--failed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["results", "show", str(output), "--limit", "-1"]) == 2
    assert "--limit '-1' is not a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": None},
        {"input": {"custom_id": 7}},
        {"input": {"custom_id": "n0", "body": []}},
        {"error": {"status": 400}},
    ],
)
def test_a_damaged_output_is_reported(
    tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output = output_of(tmp_path, "A")
    entry = {**json.loads(output.read_text())[0], **change}
    output.write_text(f"[\n{json.dumps(entry)}\n]\n", encoding="utf-8")
    for words in (["show"], ["to-csv", "--output", "-"]):
        assert main(["results", words[0], str(output), *words[1:]]) == 2
        assert "is not an output of AI-Flux" in capsys.readouterr().err


@pytest.mark.parametrize("body", [{"choices": 3}, {"object": "list", "data": [None]}, [], "x"])
def test_an_answer_of_unknown_form_is_empty(tmp_path: Path, body: Any) -> None:
    output = output_of(tmp_path, "A")
    entry = {**json.loads(output.read_text())[0], "output": body}
    output.write_text(f"[\n{json.dumps(entry)}\n]\n", encoding="utf-8")
    results_to_csv(output, tmp_path / "b.csv")
    assert read_csv(tmp_path / "b.csv")[1] == ["n0", "", ""]
    assert main(["results", "show", str(output)]) == 0


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
@pytest.mark.parametrize("named", ["output", "directory", "gone"])
def test_csv_to_requests_and_results_to_csv(
    tmp_path: Path, name: str, named: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The complete workflow with the commands; the second row fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))
    source = write_csv(tmp_path / "in.csv", [["id", "text"], ["a", 'x, "y"\nz'], ["b", "400"]])
    convert = ["convert", "csv", "--input", "in.csv", "--template", 'answer:{{"t": "{id}"}} {text}',
               "--id-column", "id", "--keep", "text", "--output", "q.jsonl"]  # fmt: skip
    assert main(convert) == 0
    assert main(convert) == 2  # the output already exists
    assert "--force" in capsys.readouterr().err
    with FaultyEngine() as engine:
        ran = main(["run", "--engine-url", engine.url, "--model", "m:1", "--input", "q.jsonl",
                    "--output", name])  # fmt: skip
    assert ran == 3
    if named == "gone":
        shutil.rmtree(tmp_path / f"{name}.aiflux")
    run = f"{name}.aiflux" if named == "directory" else name
    assert main(["results", "to-csv", run, "--source", source.name, "--id-column", "id"]) == 0
    assert "2 rows -> " in capsys.readouterr().out
    rows = read_csv(tmp_path / "out.csv")
    assert rows[0] == ["custom_id", "id", "text", "answer", "error"]
    assert rows[1] == ["a", "a", 'x, "y"\nz', '{"t": "a"} x, "y"\nz', ""]
    assert rows[2][4].startswith("http_400: ")
    assert main(["results", "to-jsonl", run, "--output", "-"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    known = [line.get("text") for line in lines]
    assert known == (
        [None, None] if (name, named) == ("out.jsonl", "gone") else ['x, "y"\nz', "400"]
    )
    assert main(["results", "show", run, "--failed"]) == 0
    shown = capsys.readouterr().out
    assert "http_400" in shown
    assert "x, " not in shown


def test_an_embedding_counts_as_an_answer(tmp_path: Path) -> None:
    line = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings",
            "body": {"model": "m:1", "input": "x"}}  # fmt: skip
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url)
        working.input.write_text(json.dumps(line) + "\n", encoding="utf-8")
        assert working.run() == 0
    results_to_csv(working.output, tmp_path / "back.csv")
    assert read_csv(tmp_path / "back.csv")[1] == ["e", "[0.5, -0.25]", ""]


def test_the_examples_in_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "converters.md").read_text("utf-8")
    prompts, back = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (jinja,) = re.findall(r"^```jinja\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "review.j2").write_text(jinja)
    write_csv(tmp_path / "reviews.csv", [["text", "label"], ["Good", "good"], ["Broke", "bad"]])
    write_csv(tmp_path / "rated.csv", [["text", "rating"], ["Fine", 5]])
    exec(compile(prompts, "converters.md", "exec"), {})  # noqa: S102
    made = [json.loads(Path(name).read_bytes().splitlines()[1])["body"]["messages"]
            for name in ("prompts.jsonl", "rated.jsonl", "turns.jsonl")]  # fmt: skip
    assert [[turn["content"] for turn in turns] for turns in made] == [
        ["The customer is unhappy.\nAnswer this review in English: Broke"],
        ["Fine", "5", "Broke"],
        ["Broke", "I find it bad.", "Why?"],
    ]
    source = write_csv(tmp_path / "reviews.csv", [["id", "text"], ["a", "good"]])
    csv_to_jsonl(source, tmp_path / "q.jsonl", template="{text}", id_column="id")
    answered(tmp_path / "q.jsonl", tmp_path / "results.json")
    exec(compile(back, "converters.md", "exec"), {})  # noqa: S102
    assert read_csv(tmp_path / "answers.csv")[1] == ["a", "a", "good", "good", ""]


JSON = (
    '{"id": "a", "n": 1, "meta": {"text": "x"}}\n{"id": "b", "meta": {"text": "y"}, "more": [1]}\n'
)


@pytest.mark.parametrize("form", ["jsonl", "json"])
@pytest.mark.parametrize("by_id", [False, True])
def test_json_as_the_source(tmp_path: Path, form: str, by_id: bool) -> None:
    source = tmp_path / f"in.{form}"
    source.write_text(JSON if form == "jsonl" else f"[{','.join(JSON.splitlines())}]")
    named: dict[str, Any] = {"id_field": "id"} if by_id else {}
    json_to_jsonl(source, tmp_path / "q.jsonl", template="<{meta.text}>", **named)
    output = answered(tmp_path / "q.jsonl", tmp_path / "out.json")
    back = BackOptions(source=source, id_column="id" if by_id else None)
    results_to_jsonl(output, tmp_path / "back.jsonl", back)
    rows = [json.loads(line) for line in (tmp_path / "back.jsonl").read_text().splitlines()]
    assert [(row["id"], row["n"], row["meta"], row["more"], row["answer"]) for row in rows] == [
        ("a", 1, {"text": "x"}, None, "<x>"),
        ("b", None, {"text": "y"}, [1], "<y>"),
    ]
    results_to_parquet(output, tmp_path / "back.parquet", back)
    schema = pq.read_schema(tmp_path / "back.parquet")
    assert str(schema.field("n").type) == "int64"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"a text"\n', '"another"\n'),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', '{"messages": []}\n'),
        ('[{"role": "user", "content": "a"}]\n', '[{"role": "user", "content": "b"}]\n'),
    ],
)
def test_a_changed_json_source_is_noticed(tmp_path: Path, before: str, after: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(before)
    json_to_jsonl(source, tmp_path / "q.jsonl")
    output = answered(tmp_path / "q.jsonl", tmp_path / "out.json", "A")
    back = BackOptions(source=source)
    assert results_to_jsonl(output, tmp_path / "back.jsonl", back).answered == 1
    source.write_text(after)
    with pytest.raises(InputError, match="differs from the row"):
        results_to_jsonl(output, tmp_path / "back.jsonl", back)


def test_named_fields_have_types_in_parquet(tmp_path: Path) -> None:
    output = output_of(tmp_path, '{"s": 1, "t": "a"}', '{"s": 2, "t": "b"}')
    back = BackOptions(source=tmp_path / "in.csv", id_column="id", json_fields=("s", "t"))
    results_to_parquet(output, tmp_path / "b.parquet", back)
    schema = pq.read_schema(tmp_path / "b.parquet")
    assert [str(schema.field(name).type) for name in "st"] == ["int64", "string"]


def test_kept_columns_have_their_types_again(tmp_path: Path) -> None:
    day, moment = date(2026, 1, 2), datetime(2026, 1, 2, 3, 4, 5, 6)
    columns = {
        "text": ["a", "b"], "day": [day, None], "at": [moment, moment], "hour": [time(1, 2), None],
        "raw": [b"x", b"\xff\x00"], "n": [1, None],
        "price": pa.array(["1.10", None]).cast(pa.decimal128(9, 2)),
        "zoned": pa.array([moment, None], pa.timestamp("us", "UTC")),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    parquet_to_jsonl(tmp_path / "in.parquet", tmp_path / "q.jsonl", template="{text}", keep=["*"])
    output = answered(tmp_path / "q.jsonl", tmp_path / "out.json")
    results_to_parquet(output, tmp_path / "b.parquet")
    table = pq.read_table(tmp_path / "b.parquet")
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds == {
        "custom_id": "string", "text": "string", "day": "date32[day]", "at": "timestamp[us]",
        "hour": "time64[us]", "raw": "binary", "n": "int64", "price": "string", "zoned": "string",
        "answer": "string", "error": "string",
    }  # fmt: skip
    for name in ("day", "at", "hour", "raw", "n"):
        assert table.column(name).to_pylist() == columns[name]
    results_to_csv(output, tmp_path / "b.csv")
    row = dict(zip(*read_csv(tmp_path / "b.csv")[:2], strict=True))
    assert (row["day"], row["at"], row["price"]) == ("2026-01-02", moment.isoformat(), "1.10")
