"""Prompts: Jinja2 files, examples, system messages and conversations, for every kind of input."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.converters import (
    csv_to_jsonl,
    directory_to_jsonl,
    images_to_jsonl,
    json_to_jsonl,
    parquet_to_jsonl,
    read_examples,
    table_to_jsonl,
)
from aiflux.converters.prompt import prompt_and_form
from aiflux.converters.request_form import make_form
from aiflux.converters.results.answers import prompt_text, request_text
from aiflux.converters.writer import Summary
from aiflux.errors import InputError, UsageError
from tests.unit.converters.test_converters import refused, requests_in, write

ROWS = [
    {"text": "good", "First name": "Ann", "stars": 5, "persona": "kind"},
    {"text": "b{d} {{ x }}", "First name": "Bob", "stars": 1, "persona": None},
]
EXAMPLES = [
    {"text": "fine", "First name": "Cy", "stars": 4, "answer": "yes"},
    {"text": "poor", "First name": "Di", "stars": 2, "answer": {"label": "no"}},
]
JINJA = """\
{% if stars | int > 3 %}
Happy:
{% endif %}
{{ row["First name"] }} wrote: {{ text }}
"""


def _csv(folder: Path) -> Path:
    lines = [",".join(ROWS[0]), *(",".join(str(v or "") for v in row.values()) for row in ROWS)]
    return write(folder / "in.csv", "\n".join(lines))


def _json(folder: Path) -> Path:
    return write(folder / "in.json", json.dumps(ROWS))


def _jsonl(folder: Path) -> Path:
    return write(folder / "in.jsonl", "\n".join(map(json.dumps, ROWS)))


def _parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "in.parquet")
    return folder / "in.parquet"


def _workbook(folder: Path) -> Path:
    book = openpyxl.Workbook()
    for row in (list(ROWS[0]), *(list(row.values()) for row in ROWS)):
        book.active.append(row)
    book.save(folder / "in.xlsx")
    return folder / "in.xlsx"


def _sqlite(folder: Path) -> Path:
    (folder / "in.db").unlink(missing_ok=True)
    with closing(sqlite3.connect(folder / "in.db")) as base, base:
        base.execute('CREATE TABLE t (text, "First name", stars, persona)')
        base.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", [(*row.values(),) for row in ROWS])
    return folder / "in.db"


Converter = Callable[..., Summary]
KINDS: list[tuple[Callable[[Path], Path], Converter]] = [
    (_csv, csv_to_jsonl),
    (_json, json_to_jsonl),
    (_jsonl, json_to_jsonl),
    (_parquet, parquet_to_jsonl),
    (_workbook, table_to_jsonl),
    (_sqlite, table_to_jsonl),
]
every_kind = pytest.mark.parametrize(("make", "convert"), KINDS)


def turns_of(path: Path) -> list[list[tuple[str, str]]]:
    return [
        [(turn["role"], turn["content"]) for turn in entry["body"]["messages"]]
        for entry in requests_in(path)
    ]


@every_kind
def test_a_jinja_file_is_the_template(
    tmp_path: Path, make: Callable[[Path], Path], convert: Converter
) -> None:
    template = write(tmp_path / "t.j2", JINJA)
    convert(make(tmp_path), tmp_path / "o.jsonl", template=template)
    assert turns_of(tmp_path / "o.jsonl") == [
        [("user", "Happy:\nAnn wrote: good")],
        [("user", "Bob wrote: b{d} {{ x }}")],
    ]
    used = requests_in(tmp_path / "o.jsonl")[0]["metadata"]["cell_digests"]
    assert set(used) == {"stars", "First name", "text"}


@every_kind
def test_any_other_file_is_a_plain_template(
    tmp_path: Path, make: Callable[[Path], Path], convert: Converter
) -> None:
    template = write(tmp_path / "t.txt", "\ufeff{First name}: {text}\n\n")
    convert(make(tmp_path), tmp_path / "o.jsonl", template=template)
    assert turns_of(tmp_path / "o.jsonl")[0] == [("user", "Ann: good\n")]


@every_kind
def test_examples_come_before_the_prompt(
    tmp_path: Path, make: Callable[[Path], Path], convert: Converter
) -> None:
    convert(
        make(tmp_path), tmp_path / "o.jsonl", template="Good? {text}", system="S",
        examples=EXAMPLES,
    )  # fmt: skip
    assert turns_of(tmp_path / "o.jsonl")[0] == [
        ("system", "S"),
        ("user", "Good? fine"), ("assistant", "yes"),
        ("user", "Good? poor"), ("assistant", '{"label": "no"}'),
        ("user", "Good? good"),
    ]  # fmt: skip


@every_kind
def test_each_row_has_its_own_system_message(
    tmp_path: Path, make: Callable[[Path], Path], convert: Converter
) -> None:
    source, output = make(tmp_path), tmp_path / "o.jsonl"
    convert(source, output, template="{text}", system_template="{persona}")
    first, second = turns_of(output)
    assert first == [("system", "kind"), ("user", "good")]
    assert second == [("user", "b{d} {{ x }}")], "none for a row whose system message is blank"
    assert "persona" in requests_in(output)[0]["metadata"]["cell_digests"]
    file = write(tmp_path / "s.j2", "You are {{ persona or 'calm' }}, {{ row['First name'] }}.\n")
    convert(source, output, template="{text}", system_template=file)
    assert [turns[0] for turns in turns_of(output)] == [
        ("system", "You are kind, Ann."), ("system", "You are calm, Bob."),
    ]  # fmt: skip


@every_kind
def test_columns_become_a_conversation(
    tmp_path: Path, make: Callable[[Path], Path], convert: Converter
) -> None:
    turns = [("user", "{text}?"), ("assistant", "{stars} stars"), ("user", "{persona}")]
    summary = convert(make(tmp_path), tmp_path / "o.jsonl", turns=turns)
    assert turns_of(tmp_path / "o.jsonl") == [
        [("user", "good?"), ("assistant", "5 stars"), ("user", "kind")],
        [("user", "b{d} {{ x }}?"), ("assistant", "1 stars")],
    ]
    assert "1 request that end with an assistant's turn" in summary.notes[-1]
    convert(make(tmp_path), tmp_path / "o.jsonl", turns=turns, drop_last_assistant=True)
    assert turns_of(tmp_path / "o.jsonl")[1] == [("user", "b{d} {{ x }}?")]


@every_kind
def test_a_missing_column_is_reported(
    tmp_path: Path, make: Callable[[Path], Path], convert: Converter
) -> None:
    template = write(tmp_path / "t.j2", "{{ txet }}")
    for options in (
        {"template": template},
        {"template": "{text}", "system_template": template},
        {"template": "{text}", "system_template": "{txet}"},
        {"turns": [("user", "{text}"), ("assistant", "{txet}")]},
    ):
        with pytest.raises(InputError) as error:
            convert(make(tmp_path), tmp_path / "o.jsonl", **options)
        assert "'txet'" in refused(error)
        assert "text'" in refused(error).replace("txet", ""), "the columns or the nearest one"
        assert not (tmp_path / "o.jsonl").exists()


def test_rows_for_which_a_template_fails(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "text,n\na,1\nb,0\nc,x\n")
    template = write(tmp_path / "t.j2", "{{ text }}\n{{ 6 // (n | int(1)) }}\n{{ n + 1 }}")
    with pytest.raises(InputError) as error:
        csv_to_jsonl(source, tmp_path / "o.jsonl", template=template)
    assert "3 of 3 rows" in error.value.message
    # Before Python 3.14, "integer division or modulo by zero".
    assert re.search("line 3: the template 't.j2', line 2: .*division .*by zero", refused(error))
    template = write(tmp_path / "t.j2", "{{ text }}{{ 6 // (n | int(1)) }}")
    with pytest.raises(InputError, match="1 of 3 rows"):
        csv_to_jsonl(source, tmp_path / "o.jsonl", template=template)
    assert not (tmp_path / "o.jsonl").exists()
    summary = csv_to_jsonl(source, tmp_path / "o.jsonl", template=template, skip_bad=True)
    assert turns_of(tmp_path / "o.jsonl") == [[("user", "a6")], [("user", "c6")]]
    assert [row.number for row in summary.examples] == [3]


def test_prompts_with_nothing_filled_in_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "text,b\na,\n ,\n,x\n")
    template = write(tmp_path / "t.j2", "Sum up: {{ text }}")
    summary = csv_to_jsonl(source, tmp_path / "o.jsonl", template=template)
    assert "2 requests with nothing filled in" in summary.notes[-1]
    template = write(tmp_path / "t.j2", "{% for cell in row.values() %}{{ cell }}{% endfor %}")
    summary = csv_to_jsonl(source, tmp_path / "o.jsonl", template=template)
    assert "1 request with nothing filled in" in summary.notes[-1]
    summary = csv_to_jsonl(source, tmp_path / "o.jsonl", turns=[("user", "Q {text}")] * 2)
    assert "2 requests with nothing filled in" in summary.notes[-1]
    assert turns_of(tmp_path / "o.jsonl")[1] == [("user", "Q  ")]


def test_an_empty_turn_before_another_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "a,b,c\n1,2,3\n1,,3\n")
    turns = [("user", "{a}"), ("assistant", "{b}"), ("user", "{c}")]
    with pytest.raises(InputError) as error:
        csv_to_jsonl(source, tmp_path / "o.jsonl", turns=turns)
    assert "line 3: turn 2 (assistant) is empty, but turn 3 is not" in refused(error)


def test_fields_inside_cells_and_the_whole_row(tmp_path: Path) -> None:
    rows = [{"meta": {"source": "web", "tags": ["a", "b"]}, "none": None, "n": 0.5}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    write(tmp_path / "in.json", json.dumps(rows))
    text = (
        "{{ meta.source }} {{ meta.tags | join('+') }} {{ n * 2 }} "
        "{{ none is none }} {{ row | tojson }}"
    )
    template = write(tmp_path / "t.j2", text)
    wanted = f"web a+b 1.0 true {json.dumps(rows[0])}"
    parquet_to_jsonl(tmp_path / "in.parquet", tmp_path / "o.jsonl", template=template)
    assert turns_of(tmp_path / "o.jsonl") == [[("user", wanted)]]
    json_to_jsonl(tmp_path / "in.json", tmp_path / "o.jsonl", template=template)
    assert turns_of(tmp_path / "o.jsonl") == [[("user", wanted)]]


def test_fields_that_only_some_entries_have(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", '{"text": "a", "title": "T"}\n{"text": "b"}\n"c"\n')
    template = write(
        tmp_path / "t.j2", "{% if title is defined %}{{ title }}: {% endif %}{{ text }}"
    )
    json_to_jsonl(source, tmp_path / "o.jsonl", template=template)
    assert [turns[0][1] for turns in turns_of(tmp_path / "o.jsonl")] == ["T: a", "b", "c"]
    with pytest.raises(InputError) as error:
        json_to_jsonl(source, tmp_path / "o.jsonl", template=write(template, "{{ titel }}"))
    assert "line 1: the template 't.j2': no column or field 'titel'; did you mean 'title'?" in (
        refused(error)
    )


@pytest.mark.parametrize("template", ["t.j2", "{text} {chunk}/{chunks} {source_file}"])
def test_files_of_a_directory(tmp_path: Path, template: str) -> None:
    write(tmp_path / "d" / "a.txt", "one two " * 20)
    write(tmp_path / "t.j2", "{{ text }} {{ chunk + 0 }}/{{ chunks }} {{ source_file }}")
    given = tmp_path / template if template == "t.j2" else template
    examples = [{"text": "T", "source_file": "f", "chunk": 1, "chunks": 1, "answer": "A"}]
    directory_to_jsonl(
        tmp_path / "d", tmp_path / "o.jsonl", template=given, chunk_tokens=40,
        system_template="File {source_file}", examples=examples,
    )  # fmt: skip
    first, second = turns_of(tmp_path / "o.jsonl")
    assert first[:3] == [("system", "File a.txt"), ("user", "T 1/1 f"), ("assistant", "A")]
    assert second[-1][1].endswith(" 2/2 a.txt")


def test_a_template_that_fails_for_a_file_leaves_none_of_its_chunks(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.txt", "one two " * 20)
    write(tmp_path / "d" / "b.txt", "short")
    template = write(tmp_path / "t.j2", "{{ text }}{{ 1 // (2 - chunk) }}")
    summary = directory_to_jsonl(
        tmp_path / "d", tmp_path / "o.jsonl", template=template, chunk_tokens=40, skip_bad=True
    )
    assert (summary.rows, summary.requests, summary.skipped) == (2, 1, 1)
    assert re.search("a.txt: the template 't.j2': .*division .*by zero", str(summary.examples[0]))


def test_images_have_templates_but_no_examples(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "d").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "d" / "a.png")
    template = write(tmp_path / "t.j2", "What is {{ name | upper }}?")
    images_to_jsonl(
        tmp_path / "d", tmp_path / "o.jsonl", template=template, system_template="{source_file}"
    )
    system, user = requests_in(tmp_path / "o.jsonl")[0]["body"]["messages"]
    assert system["content"] == "a.png"
    assert user["content"][0] == {"type": "text", "text": "What is A?"}
    assert user["content"][1]["type"] == "image_url"
    with pytest.raises(UsageError, match="--examples have no images"):
        images_to_jsonl(tmp_path / "d", None, examples=[{"name": "a", "answer": "b"}], limit=1)
    template.write_text("{{ name | int / 0 }}")
    with pytest.raises(InputError) as error:
        images_to_jsonl(tmp_path / "d", tmp_path / "o.jsonl", template=template)
    assert "a.png: the template 't.j2': division by zero" in refused(error)


# --- examples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make for make, _ in KINDS])
def test_examples_of_every_kind_of_table(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    found = read_examples(make(tmp_path))
    assert [row["text"] for row in found] == [row["text"] for row in ROWS]
    assert list(found[0]) == list(ROWS[0])


def test_answers_in_another_column(tmp_path: Path) -> None:
    write(tmp_path / "in.csv", "text\nq\n")
    csv_to_jsonl(
        tmp_path / "in.csv", tmp_path / "o.jsonl", template="{text}",
        examples=read_examples(write(tmp_path / "e.csv", "text,label\na,b\n")),
        example_answer="label",
    )  # fmt: skip
    assert turns_of(tmp_path / "o.jsonl") == [[("user", "a"), ("assistant", "b"), ("user", "q")]]


def test_conversations_as_examples_and_as_rows(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "u"}]
    shown = [
        {"role": "user", "content": "e"}, {"role": "assistant", "content": "f"},
    ]  # fmt: skip
    source = write(tmp_path / "in.jsonl", json.dumps({"messages": own}))
    examples = [{"messages": shown}, {"messages": shown[:1], "answer": "g"}]
    json_to_jsonl(source, tmp_path / "o.jsonl", examples=examples)
    wanted = [("system", "own"), ("user", "e"), ("assistant", "f"), ("user", "e")]
    wanted += [("assistant", "g"), ("user", "u")]
    assert turns_of(tmp_path / "o.jsonl") == [wanted]
    pq.write_table(pa.table({"chat": [own]}), tmp_path / "in.parquet")
    parquet_to_jsonl(
        tmp_path / "in.parquet", tmp_path / "o.jsonl", template="{chat}",
        examples=[{"chat": shown}, {"chat": shown[:1], "answer": "g"}],
    )  # fmt: skip
    assert turns_of(tmp_path / "o.jsonl") == [wanted]
    write(source, json.dumps({"chat": own}))
    json_to_jsonl(source, tmp_path / "o.jsonl", template="{chat}", examples=[{"chat": shown}])
    assert turns_of(tmp_path / "o.jsonl") == [[*wanted[:3], wanted[-1]]]
    write(source, json.dumps({"messages": own}))
    with pytest.raises(InputError, match=r"example 1 .*has a system message: use --system"):
        json_to_jsonl(source, tmp_path / "o.jsonl", examples=[{"messages": own, "answer": "x"}])


def test_rows_with_the_prompt_of_an_example_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "text\nfine\nother\nfine\n")
    summary = csv_to_jsonl(source, tmp_path / "o.jsonl", template="Good? {text}", examples=EXAMPLES)
    assert summary.notes[-1] == (
        "2 requests with the prompt of an example, so that the answer is in the request (line 2, 4)"
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "example 2 cannot be used: it has no column 'answer'"),
        ({"answer": "a"}, "example 2 cannot be used: it has no column 'text'"),
        ({"text": "a", "answer": " "}, "its answer, in column 'answer', is empty"),
        ({"text": "a", "answer": None}, "its answer, in column 'answer', is empty"),
        ({"text": "", "answer": "a"}, "its prompt is empty"),
    ],
)
@pytest.mark.parametrize("jinja", [False, True])
def test_examples_that_cannot_be_used(
    tmp_path: Path, row: dict[str, Any], words: str, jinja: bool
) -> None:
    template = write(tmp_path / "t.j2", "{{ text }}") if jinja else "{text}"
    source = write(tmp_path / "in.csv", "text\na\n")
    with pytest.raises(InputError) as error:
        csv_to_jsonl(source, tmp_path / "o.jsonl", template=template, examples=[EXAMPLES[0], row])
    if jinja and "'text'" in words:
        words = "the template 't.j2': no column or field 'text'"
    assert words in refused(error)
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.md", "x", "are not a table"),
        ("e.csv", "text,answer\n", "have 0 rows"),
        ("e.csv", "text,answer\na\n", "line 2: 1 cell"),
        ("e.csv", "text\n" + "a\n" * 1001, "have more than 1000 rows"),
        ("e.jsonl", "{\n", "line 1: not JSON"),
        ("none.csv", None, "cannot be read"),
    ],
)
def test_files_of_examples_that_are_refused(
    tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    path = tmp_path / name if content is None else write(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        read_examples(path)
    assert words in refused(error)


def test_the_prompt_that_is_shown_is_that_of_the_row(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "text\nfine\n")
    csv_to_jsonl(source, tmp_path / "o.jsonl", template="{text}", system="S", examples=EXAMPLES)
    body = requests_in(tmp_path / "o.jsonl")[0]["body"]
    assert prompt_text(body) == "fine"
    assert request_text(body).split("\n")[:3] == ["S", "fine", "yes"]


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "no template was given"),
        ({"template": "x", "turns": [("user", "{a}")]}, "--turn and a template"),
        ({"turns": [("system", "{a}")]}, "use user or assistant; for a system message"),
        ({"turns": [("tool", "{a}")]}, "use user or assistant"),
        ({"turns": [("user", "a"), ("assistant", "b")]}, "nothing to fill in"),
        ({"template": "{a}", "system": "s", "system_template": "{a}"}, "cannot be combined"),
        ({"template": "{a}", "examples": "e.csv"}, "read_examples"),
        ({"template": "{a}", "examples": [{}] * 1001}, "more than 1000"),
        ({"template": "{a}", "example_answer": "b"}, "--example-answer needs --examples"),
        (
            {"template": "{a}", "examples": [{}], "system": "s", "endpoint": "completions"},
            "--system and --examples require the chat endpoint, not completions",
        ),
        ({"turns": [("user", "{a}")], "endpoint": "embeddings"}, "requires the chat endpoint"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    given = dict(options)
    with pytest.raises(UsageError) as error:
        prompt_and_form(given.pop("template", None), make_form(**given))
    assert words in f"{error.value.message} {error.value.remedy}"


@pytest.mark.parametrize("text", ["no name", "{{text}}", "no.j2"])
def test_a_template_without_names_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="has nothing to fill in") as error:
        prompt_and_form(text, make_form())
    assert ("--template-file no.j2" in refused(error)) == text.endswith(".j2")
    with pytest.raises(InputError, match="has nothing to fill in"):
        prompt_and_form(write(tmp_path / "t.j2", "no name {# {{ a }} #}"), make_form())


def test_a_constant_system_message_from_a_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "text\na\n")
    file = write(tmp_path / "s.txt", "Be brief.\n")
    csv_to_jsonl(source, tmp_path / "o.jsonl", template="{text}", system_template=file)
    assert turns_of(tmp_path / "o.jsonl") == [[("system", "Be brief."), ("user", "a")]]


@given(st.text(), st.text(min_size=1).filter(str.strip))
def test_examples_and_turns_are_never_templates(text: str, answer: str) -> None:
    prompt, form = prompt_and_form(
        "<{a}>", make_form(examples=[{"a": f"{{a}}{text}", "answer": answer}])
    )
    assert [turn["content"] for turn in form.shots] == [f"<{{a}}{text}>", answer]
    assert prompt.filled({"a": text}).content == f"<{text}>"


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_reason_that_all_rows_share_is_reported_once(tmp_path: Path, skip_bad: bool) -> None:
    rows = [{"text": f"row {number}"} for number in range(40)]
    source = write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, rows)))
    table = write(tmp_path / "in.csv", "text\n" + "\n".join(row["text"] for row in rows))
    division = write(tmp_path / "t.j2", "{{ text }} {{ 1 / 0 }}")
    for convert, path, prompt, words in (
        (json_to_jsonl, source, {"template": "{txt}"}, "no field 'txt'; did you mean 'text'?"),
        (json_to_jsonl, source, {"field": "texts"}, "no field 'texts'; did you mean 'text'?"),
        (json_to_jsonl, source, {}, "no prompt: set --field or --template"),
        (json_to_jsonl, source, {"template": division}, "division by zero"),
        (csv_to_jsonl, table, {"template": division}, "division by zero"),
    ):
        with pytest.raises(InputError, match=r"^all 40 .* for the same reason") as error:
            convert(path, tmp_path / "o.jsonl", skip_bad=skip_bad, **prompt)
        assert [words in problem for problem in error.value.problems] == [True]
        assert "template" in str(error.value.remedy)
    write(source, "\n".join(map(json.dumps, [*rows, {"txt": "x"}])))
    with pytest.raises(
        InputError, match="no valid line" if skip_bad else "invalid; nothing"
    ) as error:
        json_to_jsonl(source, tmp_path / "o.jsonl", template="{none}", skip_bad=skip_bad)
    assert len(error.value.problems) > 10


@every_kind
def test_a_column_in_literal_braces_is_warned_of(
    tmp_path: Path, make: Callable[[Path], Path], convert: Converter
) -> None:
    """Also in system messages and turns. JSON and other names in braces are meant."""
    source, fine = make(tmp_path), 'Answer as {{"text": "..."}} or {{none}}: {{{text}}} {stars}'
    jinja = write(tmp_path / "t.j2", "{text} {{ stars }} {{ '{stars}' }} {{ {'a': 1}['a'] }}")
    wrong = "sends {text} as text"
    single, double = "write {text}", "write {{ text }}"
    for prompt, remedy in (
        ({"template": "Sum {{text}} {stars}"}, single),
        ({"template": "Sum {{ text }} {stars}"}, single),
        ({"template": "{stars}", "system_template": "{{text}}"}, single),
        ({"turns": [("user", "{stars}"), ("assistant", "{{text}}")]}, single),
        ({"template": jinja}, double),
    ):
        notes = convert(source, tmp_path / "o.jsonl", **prompt).notes
        assert len([note for note in notes if wrong in note and note.endswith(remedy)]) == 1, notes
    notes = convert(source, tmp_path / "o.jsonl", template=fine).notes
    assert not any("as text" in note for note in notes)


def test_a_name_in_literal_braces_is_warned_of_in_directories(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", "x")
    out = tmp_path / "o.jsonl"
    notes = directory_to_jsonl(tmp_path / "in", out, template="{{source_file}} {text}").notes
    assert notes[-1].endswith("write {source_file}")
