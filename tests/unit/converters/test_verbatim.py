"""Tables with answers whose rows are those of the source, byte for byte."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aiflux.converters import csv_to_jsonl, json_to_jsonl, results_to_table
from aiflux.converters.results import BackOptions
from aiflux.util.text import whole_text
from tests.unit.converters.test_results import answered


def back(source: Path, *answers: str | None, template: str = "{text}", **options: str) -> bytes:
    """Ask each row of a table, and return the table with the answers."""
    folder = source.parent
    csv_to_jsonl(source, folder / "q.jsonl", template=template, **options)  # type: ignore[arg-type]
    output = answered(folder / "q.jsonl", folder / "out.json", *answers)
    target = folder / f"back{source.suffix}"
    errors = None in answers
    results_to_table(
        output, target, BackOptions(source=source, custom_ids=False, errors=errors, **options)
    )
    return target.read_bytes()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("text\n1\n", "text,answer\n1,A\n"),
        ("text\n1", "text,answer\n1,A"),
        ("text\r\n1\r\n", "text,answer\r\n1,A\r\n"),
        ('"text"\n"1"\n', '"text","answer"\n"1","A"\n'),
        ("text;n\n007;1,5\n", "text;n;answer\n007;1,5;A\n"),
        ('sep=;\ntext;n\n1;"x;y"\n', 'sep=;\ntext;n;answer\n1;"x;y";A\n'),
        ('text,n\n"a ""b"", c",\n', 'text,n,answer\n"a ""b"", c",,A\n'),
        ('text,n\n\n"two\nlines",\n\n', 'text,n,answer\n\n"two\nlines",,A\n'),
        ('"text" "n"\n"1" "a" 2\n', '"text" "n" "answer"\n"1" "a" 2 "A"\n'),
        ("text|n\n 1 |NULL\n", "text|n|answer\n 1 |NULL|A\n"),
    ],
)
def test_rows_stay_as_they_are(tmp_path: Path, before: str, after: str) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(before.encode())
    assert back(source, "A") == after.encode()


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]
)
def test_the_encoding_stays(tmp_path: Path, encoding: str) -> None:
    source = tmp_path / "in.csv"
    lines = ["text,n\n", "Größe über alles für 5 €,1\n"]
    source.write_bytes("".join(lines).encode(encoding))
    given = {"encoding": encoding} if encoding in ("utf-16-le", "utf-16-be", "cp1252") else {}
    wanted = f"{lines[0][:-1]},answer\n{lines[1][:-1]},schön\n".encode(encoding)
    assert back(source, "schön", **given) == wanted


def test_utf_16_with_the_other_byte_order(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes("\ufefftext\nä\n".encode("utf-16-be"))
    assert back(source, "ö") == "\ufefftext,answer\nä,ö\n".encode("utf-16-be")


def test_an_answer_that_the_encoding_lacks(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes("text\nGröße\n".encode("cp1252"))
    wanted = "\ufefftext,answer\nGröße,😀\n".encode()
    assert back(source, "😀", encoding="cp1252") == wanted


def test_failed_rows_have_an_empty_cell_and_a_reason(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text('"text"\n"1"\n"2"\n')
    assert back(source, "A", None).decode() == (
        '"text","answer","error"\n"1","A",\n"2",,"http_400: no"\n'
    )


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=8),
    answers=st.lists(cells, min_size=8, max_size=8),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_any_table_of_any_dialect(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    answers: list[str],
    delimiter: str,
    quoting: int,
    ending: str,
) -> None:
    # Python's writer leaves CR without quotes if lines end with LF, and no reader restores it.
    bare = ending == "\n" and quoting == csv.QUOTE_MINIMAL
    assume(not (bare and any("\r" in cell for row in rows for cell in row)))
    source = tmp_path_factory.mktemp("back") / "in.csv"
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=ending)  # type: ignore[arg-type]
    writer.writerows([("text", "n"), *rows])
    source.write_bytes(text.getvalue().encode())
    written = back(
        source, *answers[: len(rows)], template="<{text}>", delimiter=delimiter, encoding="utf-8"
    ).decode()
    table = list(csv.reader(io.StringIO(written, newline=""), delimiter=delimiter, strict=True))
    assert table == [
        ["text", "n", "answer"],
        *([*row, answer] for row, answer in zip(rows, answers, strict=False)),
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
json_entries = st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1, max_size=5)


@settings(max_examples=40)
@given(entries=json_entries, indent=st.sampled_from([None, 1]), answer=st.text())
def test_any_json_keeps_its_values(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[dict[str, Any]],
    indent: int | None,
    answer: str,
) -> None:
    rows = [{**entry, "prompt": "p"} for entry in entries]
    assume(not any("answer" in row for row in rows))
    folder = tmp_path_factory.mktemp("back")
    (folder / "in.json").write_text(json.dumps(rows, indent=indent))
    json_to_jsonl(folder / "in.json", folder / "q.jsonl", template="{prompt}")
    output = answered(folder / "q.jsonl", folder / "out.json", *[answer] * len(rows))
    options = BackOptions(
        source=folder / "in.json", custom_ids=False, errors=False, in_order=True
    )  # fmt: skip
    for name in ("b.json", "b.jsonl"):
        results_to_table(output, folder / name, options)
        text = (folder / name).read_text()
        found = (
            json.loads(text) if name == "b.json" else list(map(json.loads, text.split("\n")[:-1]))
        )
        assert found == [{**row, "answer": whole_text(answer)} for row in rows]
