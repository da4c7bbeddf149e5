"""Converters: the requests they create and the input they reject."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.converters import csv_to_jsonl, directory_to_jsonl, json_to_jsonl
from aiflux.converters.directory import parse_size, split_text
from aiflux.converters.template import Template, escape
from aiflux.converters.writer import SeenIds
from aiflux.core.batch.request import parse_request
from aiflux.errors import ConfigError, InputError, UsageError
from aiflux.util.extras import remedy

TEMPLATE = "Say: {text}"


def requests_in(path: Path) -> list[dict[str, Any]]:
    """Read requests and check each with the product's own validation."""
    lines = path.read_bytes().splitlines()
    for line in lines:
        parse_request(line, "m:1")
    return [json.loads(line) for line in lines]


def prompts(path: Path) -> dict[str, Any]:
    return {
        entry["custom_id"]: entry["body"]["messages"][-1]["content"] for entry in requests_in(path)
    }


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(error: pytest.ExceptionInfo[InputError]) -> str:
    return "\n".join([error.value.message, *error.value.problems, error.value.remedy or ""])


# --- templates ---


@given(st.text())
def test_an_escaped_text_renders_to_itself(text: str) -> None:
    assert Template(escape(text)).render({}) == text


names = st.text(st.characters(exclude_characters="{}"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(st.text(), names)), st.text(), st.dictionaries(names, st.text()))
def test_all_names_are_filled_in(
    parts: list[tuple[str, str]], end: str, values: dict[str, str]
) -> None:
    text = "".join(escape(literal) + f"{{{name}}}" for literal, name in parts) + escape(end)
    template = Template(text)
    known = {name: "{" + name for _, name in parts} | values
    assert template.render(known) == "".join(a + known[name] for a, name in parts) + end
    assert set(template.names) == {name for _, name in parts}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nb {", "a single { at line 2, column 3"),
        ("{text} }", "a single } at line 1, column 8"),
        ("{}", "{} without a name at line 1, column 1"),
        ("{a{b}", "a single {"),
    ],
)
def test_an_invalid_template_is_reported_with_its_position(text: str, words: str) -> None:
    with pytest.raises(InputError, match="template") as error:
        Template(text)
    assert words in refused(error)


# --- csv ---


def test_rows_become_requests(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", 'id,text\r\na,"x, ""y""\nz"\r\n\r\nb,{q}\r\n')
    output = tmp_path / "out.jsonl"
    summary = csv_to_jsonl(
        source, output, template="{{{text}}} {id}", id_column="id", keep=["id"],
        model="m:1", system="be brief", temperature=0.5, max_tokens=7, params={"seed": 3},
    )  # fmt: skip
    assert (summary.rows, summary.requests, summary.skipped) == (2, 2, 0)
    first, second = requests_in(output)
    assert first == {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m:1", "temperature": 0.5, "max_tokens": 7, "seed": 3,
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": '{x, "y"\nz} a'},
            ],
        },
        "metadata": {
            "columns": {"id": "a"},
            "cell_digests": {"text": "5850e282baf8", "id": "433911c6eb0d"},
        },
    }  # fmt: skip
    assert second["body"]["messages"][1]["content"] == "{{q}} b"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_delimiter_and_encoding_are_detected(tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [["id", "text"], *([str(i), f"déjà vu à l'école, {i} fêtes; naïve"] for i in range(30))]
    source = tmp_path / "in.csv"
    with open(source, "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    summary = csv_to_jsonl(source, tmp_path / "out.jsonl", template="{text}")
    assert list(prompts(tmp_path / "out.jsonl").values()) == [row[1] for row in rows[1:]]
    assert repr(delimiter) in summary.notes[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [None, ";"])
def test_the_first_line_can_declare_the_delimiter(
    tmp_path: Path, delimiter: str | None, encoding: str
) -> None:
    """Excel writes and reads such a line; line numbers include it."""
    source = tmp_path / "in.csv"
    text = "sep=;\r\nid;text\r\n1;été, déjà\r\n2\r\n3;deux\r\n"
    source.write_text(text, encoding=encoding, newline="")
    output = tmp_path / "out.jsonl"
    summary = csv_to_jsonl(
        source, output, template="{text}", id_column="id", delimiter=delimiter, skip_bad=True
    )
    assert prompts(output) == {"1": "été, déjà", "3": "deux"}
    assert [row.place for row in summary.examples] == ["line 4"]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Größe, schön", "latin-1"),
        ("It’s a “test” — really…", "cp1252"),
        ("Все люди рождаются свободными и равными в своем достоинстве и правах.", "cp1251"),
        ("日本語のテキストです。今日は天気がいいですね。", "shift_jis"),
    ],
)
def test_unambiguous_encodings_are_guessed(tmp_path: Path, text: str, encoding: str) -> None:
    source = write(tmp_path / "in.csv", f"id;text\n1;{text}\n".encode(encoding))
    summary = csv_to_jsonl(source, tmp_path / "out.jsonl", template="{text}")
    assert prompts(tmp_path / "out.jsonl") == {"row-1": text}
    assert "encoding guessed" in summary.notes[0]


def test_an_ambiguous_encoding_must_be_specified(tmp_path: Path) -> None:
    """Several encodings fit and read differently: a guess would silently change letters."""
    content = "id,text\n1,Déjà vu à l'école; naïve\n".encode("cp1252")
    source, output = write(tmp_path / "in.csv", content), tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="ambiguous") as error:
        csv_to_jsonl(source, output, template="{text}")
    assert re.search(r"may be .*cp1252 \('\S+'\)", refused(error))
    assert "--encoding" in refused(error)
    csv_to_jsonl(source, output, template="{text}", encoding="cp1252")
    assert prompts(output) == {"row-1": "Déjà vu à l'école; naïve"}


def test_a_missing_column_lists_the_existing_ones(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "id,text\n1,a\n")
    for wrong in (
        {"template": "{txt}"},
        {"template": TEMPLATE, "id_column": "txt"},
        {"template": TEMPLATE, "keep": ["txt"]},
    ):
        with pytest.raises(InputError, match="'txt'") as error:
            csv_to_jsonl(source, tmp_path / "out.jsonl", **wrong)
        assert "its columns are 'id', 'text'" in refused(error)
    assert not (tmp_path / "out.jsonl").exists()


RAGGED = 'id,text\n1,a\n2\n3,"c\nd"\n4,e,f\n5,g\n'


@pytest.mark.parametrize("name", ["q.jsonl.gz", "q.jsonl.zst", "q.csv.gz", "q.csv", "q.parquet"])
def test_requests_are_not_written_under_the_name_of_another_form(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "a.csv", "text\none\n")
    with pytest.raises(UsageError, match=r"named as a compressed file|requests are JSON") as error:
        csv_to_jsonl(source, tmp_path / name, template="{text}")
    assert "--output q.jsonl" in str(error.value)
    assert not (tmp_path / name).exists()


def test_ragged_csv_rows_are_reported_with_their_lines(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.csv", RAGGED), tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="2 of 5 rows") as error:
        csv_to_jsonl(source, output, template=TEMPLATE)
    assert error.value.problems == (
        "line 3: 1 cell, but the header has 2: '2'",
        "line 6: 3 cells, but the header has 2: '4,e,f'",
    )
    assert "--skip-bad" in str(error.value.remedy)
    assert list(tmp_path.iterdir()) == [source]


def test_skip_bad_converts_the_rest_and_lists_skipped_rows(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.csv", RAGGED), tmp_path / "out.jsonl"
    summary = csv_to_jsonl(source, output, template="{text}", skip_bad=True)
    assert (summary.rows, summary.requests, summary.skipped) == (5, 3, 2)
    assert prompts(output) == {"row-1": "a", "row-3": "c\nd", "row-5": "g"}
    assert summary.skipped_path == tmp_path / "out.skipped.jsonl"
    listed = [json.loads(line) for line in summary.skipped_path.read_text().splitlines()]
    assert [entry["place"] for entry in listed] == ["line 3", "line 6"]
    csv_to_jsonl(write(source, "id,text\n1,a\n"), output, template="{text}", skip_bad=True)
    assert not summary.skipped_path.exists()


def test_a_duplicate_custom_id_is_reported_with_both_lines(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "id,text\na,1\nb,2\na,3\n,4\n")
    with pytest.raises(InputError, match="2 of 4") as error:
        csv_to_jsonl(source, tmp_path / "out.jsonl", template=TEMPLATE, id_column="id")
    assert "line 4: custom_id 'a' was already used at line 2" in refused(error)
    assert "line 5: the custom_id is empty" in refused(error)


def test_the_wrong_encoding_is_reported_with_its_line(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", b"id,text\n1,a\n2,caf\xe9\n")
    with pytest.raises(InputError, match="1 of 2 rows") as error:
        csv_to_jsonl(source, tmp_path / "out.jsonl", template=TEMPLATE, encoding="utf-8")
    assert "line 3: column 'text' has the byte 0xe9, which is not valid utf-8" in refused(error)
    assert "--encoding" in refused(error)
    with pytest.raises(InputError, match="unknown"):
        csv_to_jsonl(source, tmp_path / "out.jsonl", template=TEMPLATE, encoding="klingon")


def test_one_invalid_byte_does_not_change_the_encoding_from_utf_8(tmp_path: Path) -> None:
    rows = "".join(f"{i},日本語のテキスト\n" for i in range(50)).encode()
    source = write(tmp_path / "in.csv", b"id,text\n" + rows + b"x,\xff\n" + rows)
    output = tmp_path / "out.jsonl"
    summary = csv_to_jsonl(source, output, template="{text}", skip_bad=True)
    assert (summary.requests, summary.skipped) == (100, 1)
    assert set(prompts(output).values()) == {"日本語のテキスト"}


def test_utf_16_without_byte_order_mark_is_read(tmp_path: Path) -> None:
    for name in ("utf-16-le", "utf-16-be"):
        source = write(tmp_path / "in.csv", "id,text\n1,naïve\n2,plain\n".encode(name))
        summary = csv_to_jsonl(source, tmp_path / "o.jsonl", template="{text}")
        assert list(prompts(tmp_path / "o.jsonl").values()) == ["naïve", "plain"]
        assert f"encoding {name}, delimiter ',' (encoding guessed" in summary.notes[0]


@pytest.mark.parametrize("delimiter", [None, ","])
def test_input_that_is_invalid_in_the_specified_encoding(
    tmp_path: Path, delimiter: str | None
) -> None:
    source = write(tmp_path / "in.csv", "id,text\n1,a\n".encode("utf-16-le"))
    # Python 3.13 does not mention the missing byte order mark.
    with pytest.raises(InputError, match=r"is not valid utf-16 at the beginning: .+") as error:
        csv_to_jsonl(
            source, tmp_path / "o", template="{text}", encoding="utf-16", delimiter=delimiter
        )
    assert "utf-16-le" in str(error.value.remedy)


def test_text_that_reads_the_same_in_cp1252_is_read_as_cp1252(tmp_path: Path) -> None:
    """cp1250 has the same German letters, but another one for an à that may follow."""
    text = "Die Lieferung war schön und überraschend günstig, aber größer als gedacht\n" * 20
    later = "x\n" * 150_000 + "voilà\n"
    source = write(tmp_path / "in.csv", ("text\n" + text + later).encode("cp1252"))
    csv_to_jsonl(source, tmp_path / "o.jsonl", template="{text}", delimiter=";")
    assert list(prompts(tmp_path / "o.jsonl").values())[-1] == "voilà"


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"BZh91AY", "bzcat FILE | aiflux convert"),
        (b"PK\x03\x04", "use `aiflux convert table`"),
        (b"SQLite format 3\0", "use `aiflux convert table`"),
        (b"PAR1", "use `aiflux convert parquet`"),
        (b"%PDF-1.7", "use `aiflux convert dir`"),
    ],
)
def test_other_file_types_are_recognized(tmp_path: Path, start: bytes, words: str) -> None:
    source = write(tmp_path / "in.csv", start + b"\xff\0" * 50)
    with pytest.raises(InputError, match="is not CSV: it is") as error:
        csv_to_jsonl(source, tmp_path / "o.jsonl", template=TEMPLATE)
    assert words in str(error.value.remedy)


def test_a_stray_quote_is_reported_with_all_affected_lines(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", 'id,text\n1,"a\n2,b\n3,c\n4,"d"\n5,e\n')
    with pytest.raises(InputError, match="1 of 2 rows") as error:
        csv_to_jsonl(source, tmp_path / "o.jsonl", template=TEMPLATE)
    assert "lines 2 to 5: not valid CSV" in refused(error)


def test_a_nul_character_is_rejected(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", b"id,text\n1,a\0b\n2,c\n")
    with pytest.raises(InputError, match="1 of 2 rows") as error:
        csv_to_jsonl(source, tmp_path / "o.jsonl", template=TEMPLATE)
    assert re.search("line 2: (column 'text'|it) has a NUL character", refused(error))
    write(source, b"id\0,text\n1,a\n2,b\n3,c\n4,d\n")
    with pytest.raises(InputError, match=r"the header .* has a NUL character"):
        csv_to_jsonl(source, tmp_path / "o.jsonl", template=TEMPLATE)


def test_a_single_column_file_explains_how_to_quote_a_delimiter(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "text\nhello, world\n")
    with pytest.raises(InputError) as error:
        csv_to_jsonl(source, tmp_path / "o.jsonl", template="{text}")
    assert "quote a cell that contains ','" in refused(error)


def test_binary_input_is_not_csv(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", bytes(range(256)) * 40)
    with pytest.raises(InputError, match="binary") as error:
        csv_to_jsonl(source, tmp_path / "out.jsonl", template=TEMPLATE)
    assert "--encoding" in refused(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("\n\n", "no header line"),
        ("id,text\n", "contains no row"),
        ('id,text\n1,"a\n2,b\n', 'lines 2 to 3: a quote (") is not closed before the end'),
        ('id,text\n1,"a"b\n', "line 2: not valid CSV"),
    ],
)
def test_invalid_tables_are_rejected(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(InputError, match=r".") as error:
        csv_to_jsonl(write(tmp_path / "in.csv", content), tmp_path / "o.jsonl", template=TEMPLATE)
    assert words in refused(error)


def test_invalid_paths_are_rejected(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "text\na\n")
    with pytest.raises(InputError, match="same file"):
        csv_to_jsonl(source, source, template=TEMPLATE)
    with pytest.raises(InputError, match="output directory"):
        csv_to_jsonl(source, tmp_path / "no" / "out.jsonl", template=TEMPLATE)
    with pytest.raises(InputError, match="cannot be read"):
        csv_to_jsonl(tmp_path / "no.csv", tmp_path / "out.jsonl", template=TEMPLATE)
    with pytest.raises(InputError, match="is a directory"):
        csv_to_jsonl(tmp_path, tmp_path / "out.jsonl", template=TEMPLATE)


def test_a_preview_writes_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "text\n" + "a\n" * 9)
    summary = csv_to_jsonl(source, None, template=TEMPLATE, limit=3)
    assert [entry["custom_id"] for entry in summary.first] == ["row-1", "row-2", "row-3"]
    assert list(tmp_path.iterdir()) == [source]


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "text\n" + "a\n" * 3000)
    calls: list[tuple[int, int]] = []
    csv_to_jsonl(
        source, tmp_path / "o.jsonl", template=TEMPLATE, progress=lambda *at: calls.append(at)
    )
    assert calls[-1] == (source.stat().st_size, source.stat().st_size)
    assert len(calls) > 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"params": {"model": "x"}}, "--model"),
        ({"params": {"messages": []}}, "--template"),
        ({"endpoint": "images"}, "unknown"),
        ({"endpoint": "embeddings", "system": "x"}, "--system"),
        ({"endpoint": "embeddings", "max_tokens": 5}, "do not apply to embeddings"),
        ({"params": {"x": float("inf")}}, "--param x is not valid JSON"),
        ({"temperature": float("nan")}, "--temperature nan is not 0 or more"),
        ({"temperature": -1}, "--temperature -1 is not"),
        ({"max_tokens": 0}, "--max-tokens 0 is not 1 or more"),
        ({"model": " "}, "--model is empty"),
    ],
)
def test_conflicting_options_are_rejected(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    source = write(tmp_path / "in.csv", "text\na\n")
    with pytest.raises(UsageError) as error:
        csv_to_jsonl(source, tmp_path / "o.jsonl", template=TEMPLATE, **options)
    assert words in f"{error.value.message} {error.value.remedy}"


def test_embeddings_and_completions(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.csv", "text\na\n"), tmp_path / "o.jsonl"
    csv_to_jsonl(source, output, template="{text}", endpoint="embeddings")
    assert requests_in(output)[0]["body"] == {"input": "a"}
    csv_to_jsonl(source, output, template="{text}", endpoint="completions")
    assert requests_in(output)[0]["body"] == {"prompt": "a"}


# --- schemas ---


def test_a_schema_becomes_the_response_format(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.csv", "text\na\n"), tmp_path / "o.jsonl"
    schema = {"title": "My answer!", "type": "object"}
    path = write(tmp_path / "s.json", json.dumps(schema))
    csv_to_jsonl(source, output, template="{text}", schema=path)
    wanted = requests_in(output)[0]["body"]["response_format"]
    assert wanted["type"] == "json_schema"
    assert wanted["json_schema"]["schema"] == schema
    assert wanted["json_schema"]["name"] == "My_answer_"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"type": "strin"}', "is invalid: at $.type"),
        ('{"$ref": "http://x/y"}', "refers to 'http://x/y'"),
        ('{"$ref": "#/$defs/y"}', "which does not exist"),
        ('{"label": "string"}', "allows any answer"),
        ('{"name": "x", "schema": {"type": "object"}}', "a complete response_format"),
        ('{"type": "json_schema", "json_schema": {}}', "a complete response_format"),
    ],
)
def test_invalid_schemas_are_rejected(tmp_path: Path, content: str, words: str) -> None:
    source = write(tmp_path / "in.csv", "text\na\n")
    path = write(tmp_path / "s.json", content)
    with pytest.raises(InputError) as error:
        csv_to_jsonl(source, tmp_path / "o.jsonl", template="{text}", schema=path)
    assert words in refused(error)


# --- json ---


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects(tmp_path: Path, indent: int | None) -> None:
    entries = [{"id": f"n{i}", "q": {"text": f"ü{i}"}, "tags": [1, {"a": 2}]} for i in range(500)]
    source = write(tmp_path / "in.json", json.dumps(entries, indent=indent, ensure_ascii=False))
    output = tmp_path / "out.jsonl"
    summary = json_to_jsonl(
        source, output, template="{q.text} {tags}", id_field="id", keep=["q.text"]
    )
    assert summary.requests == 500
    assert prompts(output)["n7"] == 'ü7 [1, {"a": 2}]'
    assert requests_in(output)[7]["metadata"]["columns"] == {"q.text": "ü7"}


def test_json_lines_of_all_forms(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    source = write(
        tmp_path / "in.jsonl",
        "\n".join(json.dumps(value) for value in ({"messages": talk}, talk, "text")),
    )
    output = tmp_path / "out.jsonl"
    json_to_jsonl(source, output, system="s")
    first, second, third = requests_in(output)
    assert first["body"]["messages"] == [{"role": "system", "content": "s"}, *talk]
    assert second["body"] == first["body"]
    assert third["body"]["messages"][-1] == {"role": "user", "content": "text"}


def test_one_object_and_a_field(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", '{\n "q": "one"\n}\n{"q": 2}')
    output = tmp_path / "out.jsonl"
    json_to_jsonl(source, output, field="q")
    assert prompts(output) == {"row-1": "one", "row-2": "2"}
    with pytest.raises(UsageError, match="cannot be combined"):
        json_to_jsonl(source, output, field="q", template="{q}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"a": 1}', "no field 'q' (its fields are 'a')"),
        ("7", "no field 'q' (it is a number)"),
        ('{"q": 1', "not JSON"),
        ('{"q": NaN}', "NaN is not JSON at column 7"),
    ],
)
def test_invalid_entries_are_reported(tmp_path: Path, line: str, words: str) -> None:
    source = write(tmp_path / "in.jsonl", f'{{"q": 1}}\n\n{line}\n')
    output = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="1 of 2 lines") as error:
        json_to_jsonl(source, output, field="q")
    assert f"line 3: {words}" in refused(error)
    assert json_to_jsonl(source, output, field="q", skip_bad=True).requests == 1


def test_a_prompt_source_is_required(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", '{"a": 1}')
    with pytest.raises(InputError) as error:
        json_to_jsonl(source, tmp_path / "o.jsonl")
    assert "set --field or --template" in refused(error)
    write(source, '{"custom_id": "x", "method": "POST", "url": "/v1", "body": {}}')
    with pytest.raises(InputError) as error:
        json_to_jsonl(source, tmp_path / "o.jsonl")
    assert "already a request" in refused(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"q": 1}\n,{"q": tru}]', "not valid JSON at entry 2 (line 2)"),
        ('[{"q": 1} {"q": 2}]', "a comma or ] is missing"),
        ('[{"q": 1}', "a comma or ] is missing"),
        ('[{"q": 1},', "the file ends inside the array"),
        ('[{"q": 1}] 2', "unexpected content after the array"),
        ("[]", "contains no entry"),
    ],
)
def test_an_invalid_array_is_reported_with_its_position(
    tmp_path: Path, content: str, words: str
) -> None:
    with pytest.raises(InputError) as error:
        json_to_jsonl(write(tmp_path / "in.json", content), tmp_path / "o.jsonl", field="q")
    assert words in refused(error)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)  # fmt: skip


@given(st.lists(values), st.sampled_from([None, 1]), st.booleans())
def test_an_array_is_read_as_the_json_module_reads_it(
    tmp_path_factory: pytest.TempPathFactory, content: list[Any], indent: int | None, ascii: bool
) -> None:
    from aiflux.converters.json_records import JsonFile

    path = tmp_path_factory.mktemp("json") / "in.json"
    path.write_text(
        json.dumps(content, indent=indent, ensure_ascii=ascii), encoding="utf-8", errors="replace"
    )
    read = [item.value for item in JsonFile.of(path).values()]  # type: ignore[union-attr]
    assert read == json.loads(path.read_text(encoding="utf-8"))


# --- directories ---


def test_files_become_requests(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "b.md", "# B")
    write(folder / "a.txt", "caf\xe9 au lait, d\xe9j\xe0 vu".encode("cp1252"))
    write(folder / "deep" / "c.py", "print()")
    write(folder / ".git" / "config", "no")
    write(folder / "bin.dat", b"\x00\x01")
    write(folder / "none.txt", "")
    write(folder / "blank.txt", " \n")
    output = folder / "out.jsonl"
    summary = directory_to_jsonl(folder, output, recursive=True, template="{source_file}: {text}",
                                 encoding="cp1252")  # fmt: skip
    assert list(prompts(output)) == ["a.txt", "b.md", "deep/c.py"]
    assert prompts(output)["a.txt"] == "a.txt: café au lait, déjà vu"
    assert requests_in(output)[2]["metadata"] == {"source_file": "deep/c.py"}
    skipped = {item.place: item.reason for item in summary.examples}
    assert skipped == {
        "bin.dat": "binary",
        "blank.txt": "contains no text",
        "none.txt": "empty",
    }
    summary = directory_to_jsonl(folder, None, limit=9, patterns=["*.md", "*.txt"], exclude=["a*"])
    assert [entry["custom_id"] for entry in summary.first] == ["b.md"]
    deep = directory_to_jsonl(folder, None, limit=9, recursive=True, patterns=["deep/*"])
    assert [entry["custom_id"] for entry in deep.first] == ["deep/c.py"]


def test_text_with_an_ambiguous_encoding_is_invalid(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", "déjà vu".encode("cp1252"))
    with pytest.raises(InputError, match="1 of 1 files") as error:
        directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    assert "a.txt: not UTF-8" in refused(error)
    with pytest.raises(InputError, match="1 of 1 files") as error:
        directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl", encoding="ascii")
    assert "byte 0xe9 at offset 1 is invalid in UTF-8 and ascii" in refused(error)


def test_links_to_directories_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "a.txt", "a")
    (folder / "self").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    summary = directory_to_jsonl(folder, tmp_path / "o.jsonl", recursive=True)
    assert summary.requests == 1
    assert [item.place for item in summary.examples] == ["gone.txt", "self/"]
    assert "links to directories are not followed" in summary.examples[1].reason


def test_a_single_pattern_is_not_split_into_letters(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.md", "a")
    write(tmp_path / "in" / "b.txt", "b")
    write(tmp_path / "in" / "~$c.docx", "left by a word processor")
    for options, found in (({"patterns": "*.md"}, "a.md"), ({"exclude": "*.md"}, "b.txt")):
        directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl", **options)
        assert list(prompts(tmp_path / "o.jsonl")) == [found]
    source = write(tmp_path / "in.csv", "text,kind\na,b\n")
    csv_to_jsonl(source, tmp_path / "o.jsonl", template="{text}", keep="kind")
    assert requests_in(tmp_path / "o.jsonl")[0]["metadata"]["columns"] == {"kind": "b"}


def test_utf_16_texts_are_read(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", "héllo\r\nyou".encode("utf-16"))
    write(tmp_path / "in" / "b.txt", b"\xff\xfe\x00\xd8x")
    output = tmp_path / "o.jsonl"
    with pytest.raises(InputError, match="1 of 2 files") as error:
        directory_to_jsonl(tmp_path / "in", output)
    assert "b.txt: starts with a utf-16 byte order mark, but is not valid utf-16" in refused(error)
    directory_to_jsonl(tmp_path / "in", output, skip_bad=True)
    assert prompts(output) == {"a.txt": "héllo\nyou"}


def test_a_nul_deep_inside_a_file_makes_it_binary(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", "a" * 20_000 + "\0")
    write(tmp_path / "in" / "b.txt", "b")
    assert directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl").requests == 1


def test_a_directory_without_matching_files_suggests_options(tmp_path: Path) -> None:
    write(tmp_path / "in" / "deep" / "a.txt", "a")
    for options, words in (
        ({}, "use --recursive to include subdirectories"),
        ({"patterns": ["*.md"], "recursive": True}, "check --pattern"),
    ):
        with pytest.raises(InputError, match="contains no file") as error:
            directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl", **options)
        assert words in str(error.value.remedy)
    with pytest.raises(InputError, match="is not a directory") as error:
        directory_to_jsonl(tmp_path / "in" / "deep" / "a.txt", tmp_path / "o.jsonl")
    assert "--pattern 'a.txt'" in str(error.value.remedy)


def test_a_list_inside_an_object_is_suggested(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", '{"data": [{"q": "a"}], "meta": [1]}')
    with pytest.raises(InputError, match="1 of 1 entries") as error:
        json_to_jsonl(source, tmp_path / "o.jsonl", field="q")
    assert "the entries of 'data' have it: extract them with jq '.data'" in refused(error)


def test_list_indexes_in_a_field_path_start_at_0(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", '[{"a": [{"t": "x"}, {"t": "y"}]}]')
    json_to_jsonl(source, tmp_path / "o.jsonl", template="{a.1.t}{a.0.t}")
    assert list(prompts(tmp_path / "o.jsonl").values()) == ["yx"]
    with pytest.raises(InputError, match="1 of 1"):
        json_to_jsonl(source, tmp_path / "o.jsonl", field="a.2.t")


def test_nan_affects_only_its_own_entry(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", '[{"q": "a"}, {"q": "b", "x": NaN}, {"q": "c"}]')
    with pytest.raises(InputError, match="1 of 3 entries") as error:
        json_to_jsonl(source, tmp_path / "o.jsonl", field="q")
    assert "entry 2: it contains NaN, which is not JSON; use null" in refused(error)
    assert json_to_jsonl(source, tmp_path / "o.jsonl", field="q", skip_bad=True).requests == 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("1e999", "the number 1e999 is too large"),
        ("[" * 250 + "]" * 250, "nested more than 200 levels deep"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested more than 200 levels deep"),
    ],
)
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_value_that_cannot_be_sent_affects_only_its_own_entry(
    tmp_path: Path, value: str, reason: str, form: str
) -> None:
    lines = ['{"q": "a"}', f'{{"q": "b", "x": {value}}}', '{"q": "c"}']
    text = "\n".join(lines) if form == "jsonl" else f"[{','.join(lines)}]"
    source = write(tmp_path / f"in.{form}", text)
    with pytest.raises(InputError, match="1 of 3") as error:
        json_to_jsonl(source, tmp_path / "o.jsonl", field="q", keep="*")
    message = refused(error)
    assert (reason if form == "json" else reason.split(" is too", maxsplit=1)[0]) in message
    assert json_to_jsonl(source, tmp_path / "o.jsonl", field="q", skip_bad=True).requests == 2


def test_input_that_is_not_json_is_rejected(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", '{"q": "a"}\n\nnope\n{"cut\n')
    with pytest.raises(InputError) as error:
        json_to_jsonl(source, tmp_path / "o.jsonl", field="q")
    assert "line 3: not JSON: Expecting value at column 1" in refused(error)
    assert "line 4: not JSON: Unterminated string starting at column 2" in refused(error)
    for content, words in ((b"", "is empty"), (b"\x1f\x8b\x08\0", "is incomplete: its gzip data")):
        with pytest.raises(InputError, match=words):
            json_to_jsonl(write(source, content), tmp_path / "o.jsonl", field="q")
    with pytest.raises(InputError, match=r"not valid JSON at line 1: byte 0xe9"):
        json_to_jsonl(write(tmp_path / "in.json", b'["caf\xe9"]'), tmp_path / "o.jsonl")


def test_unusual_file_names_are_printed_on_one_line(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a\x1b[31m\nb.bin", b"\0")
    write(tmp_path / "in" / os.fsdecode(b"c\xff.bin"), b"\0")
    write(tmp_path / "in" / "d.txt", "d")
    skipped = directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl").examples
    assert [str(item) for item in skipped] == [
        r"a\x1b[31m\nb.bin: binary", "c\ufffd.bin: binary",
    ]  # fmt: skip


def test_a_second_conversion_ignores_files_of_the_first(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.bin", b"\0")
    for _ in range(2):
        directory_to_jsonl(tmp_path, tmp_path / "o.jsonl")
        assert list(prompts(tmp_path / "o.jsonl")) == ["a.txt"]


def test_a_huge_file_is_skipped_without_reading_it(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "a.txt", "a")
    with open(folder / "huge.txt", "wb") as file:
        file.truncate(2 << 30)
    summary = directory_to_jsonl(folder, tmp_path / "o.jsonl")
    assert summary.requests == 1
    assert [str(item) for item in summary.examples] == ["huge.txt: 2G exceeds --max-file-size 20M"]


def test_unreadable_files_are_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "a.txt", "a")
    os.mkfifo(folder / "pipe.txt")
    write(folder / "secret.txt", "x").chmod(0)
    summary = directory_to_jsonl(folder, tmp_path / "o.jsonl")
    reasons = {item.place: item.reason for item in summary.examples}
    assert reasons["pipe.txt"] == "not a regular file"
    if os.geteuid() != 0:
        assert "cannot be read: Permission denied" in reasons["secret.txt"]


@pytest.mark.parametrize("content", [None, b"\x00"])
def test_an_empty_directory_is_rejected(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    if content is not None:
        write(folder / "x.bin", content)
    with pytest.raises(InputError, match=r"contains no .*file") as error:
        directory_to_jsonl(folder, tmp_path / "o.jsonl")
    assert ("x.bin: binary" in refused(error)) == (content is not None)
    with pytest.raises(InputError, match="does not exist"):
        directory_to_jsonl(tmp_path / "no", tmp_path / "o.jsonl")


def test_long_texts_are_split(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "long.txt", "One two three. " * 100)
    write(folder / "short.txt", "One.")
    output = tmp_path / "o.jsonl"
    summary = directory_to_jsonl(folder, output, chunk_tokens=100, overlap=20)
    assert summary.rows == 2
    assert summary.requests == len(prompts(output)) == 7
    first = requests_in(output)[0]
    assert first["custom_id"] == "long.txt#1"
    assert first["metadata"] == {"source_file": "long.txt", "chunk": 1, "chunks": 6}
    assert requests_in(output)[-1]["custom_id"] == "short.txt"
    with pytest.raises(UsageError, match="overlap"):
        directory_to_jsonl(folder, output, chunk_tokens=10, overlap=9)
    with pytest.raises(UsageError, match="--chunk-tokens"):
        directory_to_jsonl(folder, output, overlap=9)


@given(st.text(min_size=1), st.integers(1, 20))
def test_chunks_without_overlap_join_to_the_text(text: str, tokens: int) -> None:
    chunks = list(split_text(text, tokens))
    assert "".join(chunks) == text
    assert all(chunks)
    sizes = [len(chunk.encode("utf-8", "replace")) for chunk in chunks]
    assert all(
        size <= 3 * tokens or len(chunk) == 1 for size, chunk in zip(sizes, chunks, strict=True)
    )


@given(st.text(min_size=1), st.integers(2, 20), st.data())
def test_chunks_with_overlap_cover_the_whole_text(
    text: str, tokens: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, tokens // 2))
    covered = 0
    for chunk in split_text(text, tokens, overlap):
        # A repetitive text matches at several positions: take the last possible one.
        place = text.rfind(chunk, 0, covered + len(chunk))
        assert place >= 0
        covered = max(covered, place + len(chunk))
    assert covered == len(text)


def test_an_overlap_is_counted_in_bytes_too() -> None:
    """A Chinese character counts as one token, so an overlap of 50 tokens is 50 characters."""
    chunks = list(split_text("这是一个测试。" * 200, 100, 50))
    assert len(chunks) < 40
    assert chunks[0].endswith("。")
    assert chunks[1].startswith(chunks[0][-50:])


def test_a_cell_that_spans_columns_is_read_once(tmp_path: Path) -> None:
    from docx import Document

    document = Document()
    table = document.add_table(2, 2)
    table.cell(0, 0).text = "title"
    table.cell(0, 0).merge(table.cell(0, 1))
    table.cell(1, 1).text = "right"
    (tmp_path / "in").mkdir()
    document.save(str(tmp_path / "in" / "a.docx"))
    directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    assert prompts(tmp_path / "o.jsonl") == {"a.docx": "title\n\tright"}


def test_a_docx_that_decompresses_to_too_much_is_invalid(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with (
        zipfile.ZipFile(tmp_path / "in" / "a.docx", "w", zipfile.ZIP_DEFLATED) as packed,
        packed.open("word/document.xml", "w", force_zip64=True) as part,
    ):
        for _ in range(300):
            part.write(bytes(1 << 20))
    with pytest.raises(InputError, match="1 of 1 files") as error:
        directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    assert "a.docx: the DOCX decompresses to 300 MiB" in refused(error)


def test_warnings_of_pypdf_are_not_printed(tmp_path: Path) -> None:
    write(tmp_path / "a.pdf", "no PDF")
    code = (
        "import sys; from aiflux.converters import directory_to_jsonl as convert; "
        "from aiflux.errors import InputError\n"
        "try: convert(sys.argv[1], None, limit=1)\n"
        "except InputError as error: print(error.problems)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "a.pdf: the PDF is damaged" in done.stdout


def test_a_pdf_and_a_docx_are_read(tmp_path: Path) -> None:
    from docx import Document

    folder = tmp_path / "in"
    folder.mkdir()
    document = Document()
    document.add_paragraph("First words")
    table = document.add_table(1, 2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "left", "right"
    document.add_paragraph("Last words")
    document.save(str(folder / "a.docx"))
    write(folder / "b.pdf", small_pdf("Hello from a page"))
    output = tmp_path / "o.jsonl"
    directory_to_jsonl(folder, output)
    assert prompts(output) == {
        "a.docx": "First words\nleft\tright\nLast words",
        "b.pdf": "Hello from a page",
    }


HELVETICA = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"


def small_pdf(text: str, font: bytes = HELVETICA) -> bytes:
    """Return a PDF of one page, written by hand."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R"
        b"/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%b\nendstream" % (len(stream), stream),
        font,
    ]
    content, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        places.append(len(content))
        content += b"%d 0 obj%b\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    count, start = len(objects) + 1, len(content)
    return content + (
        b"xref\n0 %d\n0000000000 65535 f \n%btrailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF"
        % (count, table, count, start)
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.pdf", small_pdf("hi")[:200], "the PDF is damaged"),
        ("x.pdf", b"nonsense", "the PDF is damaged"),
        ("x.docx", b"nonsense", "the DOCX is damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_document_is_invalid(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    folder = tmp_path / "in"
    write(folder / name, content)
    write(folder / "good.txt", "good")
    with pytest.raises(InputError, match="1 of 2 files") as error:
        directory_to_jsonl(folder, tmp_path / "o.jsonl")
    assert f"{name}: {words}" in refused(error)
    assert "save it" in refused(error)
    summary = directory_to_jsonl(folder, tmp_path / "o.jsonl", skip_bad=True)
    assert (summary.requests, summary.skipped) == (1, 1)


def test_a_missing_library_is_reported_with_its_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    write(tmp_path / "in" / "x.pdf", b"x")
    with pytest.raises(ConfigError) as error:
        directory_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl", skip_bad=True)
    assert error.value.remedy == remedy("documents", has_pip=True)


# --- the rest ---


@given(st.lists(st.text(), max_size=300))
def test_first_use_returns_where_a_name_was_first_used(names: list[str]) -> None:
    seen = SeenIds()
    for number, name in enumerate(names, start=1):
        first = names.index(name) + 1
        assert seen.first_use(name, number) == (None if first == number else first)


def test_first_use_finds_a_hundred_thousand_names() -> None:
    seen = SeenIds()
    assert all(seen.first_use(f"n{i}", i) is None for i in range(100_000))
    assert all(seen.first_use(f"n{i}", 0) == i for i in range(100_000))


def test_sizes_are_parsed() -> None:
    assert [parse_size(text) for text in ("7", "2k", "10M", "3GB", "1MiB")] == [
        7, 2048, 10 << 20, 3 << 30, 1 << 20,
    ]  # fmt: skip
    with pytest.raises(UsageError):
        parse_size("big")


def test_importing_the_package_imports_no_heavy_modules(tmp_path: Path) -> None:
    code = (
        "import sys, aiflux.converters as c; before = set(sys.modules); c.csv_to_jsonl; "
        "heavy = {'csv', 'json', 'pyarrow', 'PIL', 'pypdf', 'docx', 'chardet'}; "
        "print(sorted(heavy & before), sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] ['chardet', 'csv', 'json']"
