"""``aiflux chain``: several steps over the rows of a table, each a run of its own."""

from __future__ import annotations

import csv
import html
import json
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aiflux import __version__
from aiflux.api.chain_run import chain as run_chain
from aiflux.cli.chain_estimate import _row_of
from aiflux.cli.main import main
from aiflux.converters.chain.folder import ChainRuns
from aiflux.converters.chain.rows import Sample, shown_order
from aiflux.converters.chain.steps_file import read_chain
from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import StoppedError, TooManyFailuresError, UsageError
from tests.tools.counting_server import VLLM, CountingServer
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.tools.make_tiny_gguf import tiny
from tests.unit.fake_commands import FakeCommands
from tests.unit.fake_site import FakeSite

AIFLUX = [sys.executable, "-m", "aiflux.cli"]
SCORE = {"type": "object", "properties": {"score": {"type": "number"}}, "required": ["score"]}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    (tmp_path / "score.json").write_text(json.dumps(SCORE))
    return tmp_path


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    """A server that echoes each prompt."""
    with FaultyEngine() as engine:
        yield engine


def words(engine: FaultyEngine, *more: str) -> list[str]:
    fast = ("--retry-delay", "0.01", "--max-retries", "0")
    return ["chain", "steps.yaml", "--engine-url", engine.url, *fast, *more]


def chain(engine: FaultyEngine, *more: str) -> int:
    return main(words(engine, *more))


def estimate(engine: FaultyEngine, *more: str) -> int:
    return main(["estimate", *words(engine, "--concurrency", "4", *more)[1:]])


def steps(text: str, source: str = "in.csv", output: str = "out.csv", more: str = "") -> Path:
    """Write a file of steps for the model m:1."""
    path = Path("steps.yaml")
    indented = "".join(f"  {line}\n" for line in text.strip("\n").splitlines())
    path.write_text(f"source: {source}\noutput: {output}\nmodel: m:1\n{more}steps:\n{indented}")
    return path


WHOLE = "source: in.csv\noutput: out.csv\n"
TWO = """
first:
  template: "answer:{text}"
second:
  filter: first|length > 3
  template: "answer:{first}-{id}"
"""


def rows_of(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def drafts(*texts: str) -> str:
    """Return a response with several choices, for a prompt that begins with ``body:``."""
    choices = [
        {"index": at, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for at, text in enumerate(texts)
    ]
    return json.dumps({"choices": choices})


def write_drafts(*rows: tuple[str, ...]) -> None:
    """Write the source of ``BEST``: each row has the texts of its samples."""
    lines = ({"id": at, "body": drafts(*texts)} for at, texts in enumerate(rows, start=1))
    Path("in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


SAMPLES = """
draft:
  template: "body:{body}"
  samples: 3
judge:
  template: 'answer:{{"score": {draft}}}'
  schema: score.json
"""
BEST = f"{SAMPLES}  best: judge.score\n"


def test_a_missing_library_of_the_output_is_found_before_anything_is_sent(
    place: Path,
    engine: FaultyEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "xlsxwriter", None)
    (place / "in.csv").write_text("id,text\n1,a\n")
    steps(TWO, output="out.xlsx")
    assert chain(engine) == 2
    assert "needs the Python package xlsxwriter" in capsys.readouterr().err
    assert engine.seen.total() == 0


@pytest.mark.parametrize("command", [chain, estimate])
def test_options_of_slurm_have_no_effect_at_a_server(
    place: Path,
    engine: FaultyEngine,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "in.csv").write_text("id,text\n1,long\n")
    steps(TWO)
    assert command(engine, "--partition", "p") == 0
    note = "note: --partition has no effect: a running server needs no job"
    assert note in capsys.readouterr().err


def test_an_option_of_slurm_that_one_step_uses_is_not_named(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,long\n")
    first, second = TWO.strip().split("second:")
    command = "  engine_command: sleep {port}\n"  # needs no image
    steps(f"{first}  engine_url: {engine.url}\nsecond:{second}\n{command}")
    line = ["chain", "steps.yaml", "--partition", "p", "--dry-run", "--no-preflight", "--no-seal"]
    assert main(line) == 0
    assert "note:" not in capsys.readouterr().err


# --- the table --------------------------------------------------------------------------------


def test_each_step_sees_the_answers_of_those_before(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    source = 'id,text\n007,good\n008,bad\n009,"a, b"\n'
    (place / "in.csv").write_text(source)
    steps(TWO)
    assert chain(engine) == 0
    expected = (
        'id,text,first,second\n007,good,good,good-007\n008,bad,bad,\n009,"a, b","a, b","a, b-009"\n'
    )
    assert (place / "out.csv").read_text() == expected
    printed = capsys.readouterr().out
    assert "step 2 of 2: second\n  2 requests; the filter stopped 1 of 3" in printed
    assert "3 rows -> out.csv\n" in printed
    assert engine.seen.total() == 5


def test_a_judge_chooses_the_best_of_several_samples(place: Path, engine: FaultyEngine) -> None:
    write_drafts(("1", "3", "2"), ("5", "4", "5"))
    steps(BEST, "in.jsonl", "out.jsonl")
    assert chain(engine) == 0
    lines = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert [(line["id"], line["draft"], line["judge.score"]) for line in lines] == [
        (1, "3", 3),
        (2, "5", 5),
    ]
    assert [*lines[0]] == ["id", "body", "draft", "judge.score"]


COMPARE = """
draft:
  template: "body:{body}"
  samples: 3
judge:
  compare: draft
  template_file: compare.j2
  schema: verdict.json
  best: judge.best
"""
# Names the longest draft; the samples have lengths 1 to 9.
LONGEST = """answer:{% set lengths = draft|map("length")|list -%}
{"best": {{ lengths.index(lengths|max) + 1 }}, "seen": {{ draft|tojson }}}"""


def compare(template: str, more: str = "", part: str = COMPARE, output: str = "out.jsonl") -> None:
    """Write the file of a chain with a step that compares the samples of ``in.jsonl``."""
    schema = {"type": "object", "properties": {"best": {}, "seen": {}}}
    Path("verdict.json").write_text(json.dumps(schema))
    Path("compare.j2").write_text(template)
    steps(part + more, "in.jsonl", output)


def list_of_row(number: int, *texts: str) -> list[str]:
    """Return the samples of a row as a step that compares them sees them."""
    names = (f"row-{number}.{at}" for at in range(1, len(texts) + 1))
    return [texts[at] for at in shown_order([Sample(name, {}) for name in names])]


def lines_of(path: str = "out.jsonl") -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_judge_compares_all_samples_of_a_row_and_names_one(
    place: Path, engine: FaultyEngine
) -> None:
    write_drafts(("a", "bbb", "cc"), ("dd", "e", "ffff"))
    compare(LONGEST, 'after:\n  template: "answer:{draft} {judge.best}"\n')
    assert chain(engine) == 0
    lines = lines_of()
    assert [line["draft"] for line in lines] == ["bbb", "ffff"]
    for line, drawn in zip(lines, (["a", "bbb", "cc"], ["dd", "e", "ffff"]), strict=True):
        seen, best = cast(list[str], line["judge.seen"]), cast(int, line["judge.best"])
        assert sorted(seen) == drawn
        assert seen[best - 1] == line["draft"]
        assert line["after"] == f"{line['draft']} {best}"
    assert engine.seen.total() == 6, "one prompt for all samples of a row"
    assert chain(engine) == 0
    assert engine.seen.total() == 6


def test_samples_are_compared_in_an_order_of_each_row(place: Path, engine: FaultyEngine) -> None:
    """A judge that always names the first answer prefers no sample."""
    write_drafts(*(("a", "b", "c") for _ in range(60)))
    compare('answer:{"best": 1, "seen": {{ draft|tojson }}}')
    assert chain(engine) == 0
    lines = lines_of()
    assert all(line["draft"] == cast(list[str], line["judge.seen"])[0] for line in lines)
    counts = Counter(line["draft"] for line in lines)
    assert {*counts} == {"a", "b", "c"}
    assert min(counts.values()) > 10, counts
    assert len({str(line["judge.seen"]) for line in lines}) == 6, "all orders"
    shutil.rmtree(place / "out.jsonl.aiflux")
    (place / "out.jsonl").unlink()
    assert chain(engine) == 0
    assert lines_of() == lines, "the same order at each start"


def test_a_judge_can_score_all_samples_in_one_prompt(place: Path, engine: FaultyEngine) -> None:
    write_drafts(("a", "bbb", "cc"), ("dd", "e", "ff"))
    compare('answer:{"best": {{ draft|map("length")|list }}}')
    assert chain(engine) == 0
    assert [line["draft"] for line in lines_of()] == ["bbb", "dd"], "the first sample of equal ones"


def test_several_verdicts_of_a_judge_are_counted(place: Path, engine: FaultyEngine) -> None:
    verdicts: list[list[object]] = [
        ["3", "1", 3],
        ["2", "none", "1"],
        ["4", 0, True],
        [[1, 5, 0], [3, 1, 0], 1],
    ]
    rows = [
        {
            "id": at,
            "body": drafts("a", "b", "c"),
            "verdicts": drafts(*(json.dumps({"best": each}) for each in row)),
        }
        for at, row in enumerate(verdicts)
    ]
    Path("in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    compare("body:{{ verdicts }}{# {{ draft }} #}", "  samples: 3\n")
    assert chain(engine, "--max-failures", "1") == 0
    lines = lines_of()
    shown = [list_of_row(at, "a", "b", "c") for at in range(1, 5)]
    assert [line["draft"] for line in lines] == [
        shown[0][2], shown[1][0], shown[2], shown[3][1]
    ]  # fmt: skip
    assert [line["judge.best"] for line in lines] == ["3", "1", "4", [1, 5, 0]]
    assert lines[2]["error"] == (
        "judge: best has no value: 'judge.best' is '4', which is no sample from 1 to 3"
    )


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "xlsx"])
def test_a_row_without_a_readable_verdict_keeps_all_samples(
    place: Path, engine: FaultyEngine, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_drafts(("a", "bbb", "c"), ("dd", "e", "f"))
    best = "(draft|list).index('bbb') + 1 if 'bbb' in draft else 4"
    compare(f'answer:{{"best": {{{{ {best} }}}}}}', output=f"out.{form}")
    assert chain(engine) == 3
    printed = capsys.readouterr()
    assert "step judge: 1 row without a usable answer: best has no value" in printed.err
    if form == "csv":
        every = json.dumps(list_of_row(2, "dd", "e", "f"))
        assert [row["draft"] for row in rows_of("out.csv")] == ["bbb", every]


def test_a_step_without_best_makes_one_of_all_samples(place: Path, engine: FaultyEngine) -> None:
    write_drafts(("1", "3"), ("5", "4"))
    part = """
draft:
  template: "body:{body}"
  samples: 2
judge:
  template: 'answer:{{"score": {draft}}}'
  schema: score.json
merged:
  compare: draft
  template: "answer:{draft} {draft.1} {judge.0.score} {judge}"
  samples: 1
last:
  template: "answer:{draft.0} {judge.1.score}"
"""
    compare("", part=part)
    assert chain(engine) == 0
    assert lines_of()[0]["last"] == "1 3"
    assert lines_of()[0]["merged"] == '["1", "3"] 3 1 [{"score": 1}, {"score": 3}]'
    assert lines_of()[0]["draft"] == ["1", "3"]
    assert lines_of()[0]["judge.score"] == [1, 3]


def test_samples_that_failed_are_not_compared(place: Path, engine: FaultyEngine) -> None:
    write_drafts(("1", "x", "3"), ("x", "y", "z"))
    part = COMPARE.replace(
        "judge:",
        "score:\n  template: 'answer:{{\"score\": {draft}}}'\n  schema: score.json\njudge:",
    )
    compare(LONGEST.replace("lengths|max", "lengths|min"), part=part)
    assert chain(engine, "--max-failures", "1") == 0
    lines = lines_of()
    assert (lines[0]["draft"], lines[0]["judge.seen"]) == ("1", ["1", "3"])
    assert lines[1]["error"] == "score: the answer is no JSON object"


def test_the_most_frequent_answer_stays(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write_drafts(("a", "B", "b "), ("c", "d", "e"), ("-", "-", "f"), ("-", "-", "-"))
    draft, _, _ = SAMPLES.partition("judge:")
    by = "draft|trim|lower if draft != '-' else none"
    steps(f"{draft}  majority: {by}\n", "in.jsonl", "out.jsonl")
    assert chain(engine, "--max-failures", "1") == 0
    lines = lines_of()
    assert [line["draft"] for line in lines] == ["B", "c", "f", "-"]
    assert str(lines[3]["error"]).startswith("draft: majority has no value: ")
    steps(f"{draft}  majority: draft\n  best: draft\n", "in.jsonl", "out.jsonl")
    assert chain(engine) == 2
    assert "has both best and majority" in capsys.readouterr().err


def test_a_sample_without_a_readable_score_is_not_the_best(
    place: Path, engine: FaultyEngine
) -> None:
    write_drafts(("none", "1", "x"), ("x", "y", "z"))
    steps(BEST, "in.jsonl", "out.jsonl")
    assert chain(engine) == 3
    lines = lines_of()
    assert [line["draft"] for line in lines] == ["1", "x"]
    assert lines[1]["error"] == "judge: the answer is no JSON object"


def test_the_first_step_can_filter_and_choose_without_a_judge(
    place: Path, engine: FaultyEngine
) -> None:
    write_drafts(("aa", "a", "aaa"), ("b", "bb", "b"), ("c", "c", "c"))
    draft, _, _ = SAMPLES.partition("judge:")
    steps(f"{draft}  filter: id > 1\n  best: -(draft|length)\n", "in.jsonl", "out.jsonl")
    assert chain(engine) == 0
    lines = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert [line["draft"] for line in lines] == [None, "b", "c"]


def test_numbers_of_any_size_are_compared(place: Path, engine: FaultyEngine) -> None:
    huge = ["9" * 400, str(2**60), str(2**60 + 1)]
    write_drafts((huge[1], huge[0], "1.5"), (huge[1], huge[2], "nan"))
    steps(BEST, "in.jsonl", "out.jsonl")
    assert chain(engine) == 0
    lines = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert [line["draft"] for line in lines] == [huge[0], huge[2]]


def test_samples_that_no_step_chooses_from_are_rows(place: Path, engine: FaultyEngine) -> None:
    write_drafts(("1", "3", "2"), ("5", "4", "6"))
    steps(SAMPLES, "in.jsonl", "out.parquet")
    assert chain(engine) == 0
    table = pq.read_table("out.parquet")
    assert table.column("id").to_pylist() == [1, 1, 1, 2, 2, 2]
    assert table.column("choice").to_pylist() == [0, 1, 2, 0, 1, 2]
    assert table.column("judge.score").to_pylist() == [1, 3, 2, 5, 4, 6]
    assert table.schema.field("judge.score").type == pa.int64()


@pytest.mark.parametrize("form", ["csv", "parquet", "xlsx"])
def test_samples_as_rows_of_a_table_of_any_form(
    place: Path, engine: FaultyEngine, form: str
) -> None:
    table = pa.table({"id": [1, 2], "body": [drafts("1", "2"), drafts("3", "4")]})
    pq.write_table(table, "in.parquet")
    steps(SAMPLES.replace("samples: 3", "samples: 2"), "in.parquet", f"out.{form}")
    assert chain(engine) == 0
    if form == "csv":
        found = [(row["id"], row["choice"], row["draft"]) for row in rows_of("out.csv")]
        assert found == [("1", "0", "1"), ("1", "1", "2"), ("2", "0", "3"), ("2", "1", "4")]
    elif form == "parquet":
        assert pq.read_table("out.parquet").column("draft").to_pylist() == ["1", "2", "3", "4"]


def test_types_and_order_of_the_source_are_kept(place: Path, engine: FaultyEngine) -> None:
    source = pa.table({"id": pa.array([3, 1, 2], pa.int16()), "text": ["good", "bad", "fine"]})
    pq.write_table(source, "in.parquet")
    steps(TWO, "in.parquet", "out.parquet")
    assert chain(engine) == 0
    found = pq.read_table("out.parquet")
    assert found.select(["id", "text"]).equals(source)
    assert found.column("second").to_pylist() == ["good-3", None, "fine-2"]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_filtered_rows_can_be_left_out(place: Path, engine: FaultyEngine, form: str) -> None:
    rows = [{"id": "1", "text": "bad"}, {"id": "2", "text": "good"}]
    (place / "in.csv").write_text("id,text\n1,bad\n2,good\n")
    (place / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), "in.parquet")
    steps(TWO, f"in.{form}", f"out.{form}", "filtered: drop\n")
    assert chain(engine) == 0
    expected = {"id": "2", "text": "good", "first": "good", "second": "good-2"}
    if form == "csv":
        assert rows_of("out.csv") == [expected]
    elif form == "jsonl":
        assert json.loads((place / "out.jsonl").read_text()) == expected
    else:
        assert pq.read_table("out.parquet").to_pylist() == [expected]


@pytest.mark.parametrize(
    "text", ["<think>why</think>because", '```json\n{"a": 1}\n```', '{"x": [1]}', "ü\u2028\n{", '"']
)
def test_answers_of_any_text_are_kept(place: Path, engine: FaultyEngine, text: str) -> None:
    (place / "in.jsonl").write_text(json.dumps({"text": text}))
    steps('first:\n  template: "answer:{text}"\nsecond:\n  template: "answer:{first}"\n',
          "in.jsonl", "out.jsonl")  # fmt: skip
    assert chain(engine) == 0
    found = json.loads((place / "out.jsonl").read_text())
    assert found == {"text": text, "first": text, "second": text}


def test_if_no_row_passes_the_later_steps_ask_nothing(place: Path, engine: FaultyEngine) -> None:
    (place / "in.csv").write_text("id,text\n1,a\n")
    steps(f'{TWO}third:\n  template: "answer:{{second}}"\n')
    assert chain(engine) == 0
    assert rows_of("out.csv") == [{"id": "1", "text": "a", "first": "a", "second": "", "third": ""}]
    assert engine.seen.total() == 1
    assert main(["status", "out.csv"]) == 0


def test_an_answer_without_the_fields_of_its_schema_is_an_error_of_its_row(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("text\n7\nnone\n")
    steps(
        """
judge:
  template: 'answer:{text} {{"score": {text}}}'
  schema: score.json
after:
  filter: judge.score > 3
  template: "answer:{judge.score}"
"""
    )
    assert chain(engine) == 3
    assert [(row["judge.score"], row["after"], row["error"]) for row in rows_of("out.csv")] == [
        ("7", "7", ""),
        ("", "", "judge: the answer is no JSON object"),
    ]
    expected = "judge: 1 row without a usable answer: the answer is no JSON object"
    printed = capsys.readouterr()
    assert f"step {expected}" in printed.out
    assert f"step {expected}" in printed.err
    assert main(["status", "out.csv"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("out.csv  finished with failures\n")
    assert expected in printed.out
    assert re.search(r"judge +finished +2/2 +1 +0", printed.out)
    assert main(["status", "out.csv", "--json"]) == 0
    step = json.loads(capsys.readouterr().out)["steps"][0]
    assert (step["failed"], step["unusable"], step["unusable_reason"]) == (
        1,
        1,
        "the answer is no JSON object",
    )
    assert main(["watch", "out.csv"]) == 3
    assert main(["report", "out.csv"]) == 0
    assert expected in (place / "out.csv.aiflux" / "report.html").read_text()
    before = engine.seen.total()
    assert chain(engine) == 3, "the same command does not hide it"
    assert chain(engine, "--max-failures", "50%") == 0
    assert main(["watch", "out.csv"]) == 0
    assert engine.seen.total() == before


@pytest.mark.parametrize("jinja", [False, True])
def test_an_answer_without_a_field_of_the_next_template_is_an_error_of_its_row(
    place: Path, engine: FaultyEngine, jinja: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("name,other\nscore,1\nscale,2\nscope,3\n")
    (place / "after.j2").write_text("answer:{{ judge.score }}")
    used = "template_file: after.j2" if jinja else 'template: "answer:{judge.score}"'
    steps(
        f"""
judge:
  template: 'answer:{{{{"{{name}}": 7}}}}'
  schema: score.json
after:
  {used}
last:
  template: "answer:{{after}}!"
""",
        more="skip_bad: true\n",
    )
    assert chain(engine) == 3
    rows = rows_of("out.csv")
    assert [row["last"] for row in rows] == ["7!", "", ""]
    assert rows[1]["error"].startswith("after: no request could be made from the row: ")
    assert "score" in rows[1]["error"]
    assert "step after: 2 rows without a usable answer: no request" in capsys.readouterr().err
    assert main(["status", "out.csv", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [step["unusable"] for step in shown["steps"]] == [0, 2, 0]
    assert chain(engine, "--max-failures", "2") == 0


@pytest.mark.parametrize("rows", [1, 12])
def test_a_step_that_no_answer_is_usable_for_asks_nothing(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    (place / "in.csv").write_text("name\n" + "scope\n" * rows)
    steps(
        """
judge:
  template: 'answer:{{"{name}": 7}}'
  schema: score.json
after:
  template: "answer:{judge.score}"
last:
  template: "answer:{after}"
"""
    )
    assert chain(engine) == 3
    assert [row["error"][:38] for row in rows_of("out.csv")] == [
        "after: no request could be made from t"
    ] * rows
    assert "step after: " in capsys.readouterr().err
    assert chain(engine, "--max-failures", "100%") == 0
    assert engine.seen.total() == rows
    assert main(["estimate", *words(engine)[1:]]) == 0


def test_entries_without_a_field_of_the_template_are_refused_or_skipped(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.jsonl").write_text('{"id": 1, "text": "good"}\n{"id": 2}\n{"text": "fine"}\n')
    steps(TWO, "in.jsonl", "out.jsonl")
    assert chain(engine) == 2
    error = capsys.readouterr().err
    assert "line 2: no field 'text'" in error
    assert "or skip these rows with skip_bad: true" in error
    steps(TWO, "in.jsonl", "out.jsonl", "skip_bad: true\n")
    assert chain(engine) == 0
    lines = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert [(line["first"], line["second"], line["error"]) for line in lines] == [
        ("good", "good-1", None),
        (None, None, "first: no request could be made from the row: no field 'text'"),
        ("fine", None, "second: no request could be made from the row: no field 'id'"),
    ]


FAILING = """
first:
  template: "answer:{text}"
second:
  filter: first + 1 > 3
  template: "answer:{first}"
"""


def test_a_filter_that_fails_for_rows_ends_the_chain_unless_that_is_allowed(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("text\n7\nmany\n")
    steps(FAILING)
    for _ in range(2):
        assert chain(engine) == 3
        error = capsys.readouterr().err
        assert "step second: its filter failed for 2 of 2 rows: the expression" in error
        assert "becomes a number with | int" in error
    assert not (place / "out.csv").exists()
    assert engine.seen.total() == 2, "the rows are not asked about"
    assert main(["status", "out.csv"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"second +failed +2 +0 +m:1\n", printed)
    assert "becomes a number with | int" in printed
    assert main(["watch", "out.csv"]) == 3
    assert chain(engine, "--max-failures", "2") == 0
    errors = [row["error"] for row in rows_of("out.csv")]
    assert all(error.startswith("second: the filter has no value") for error in errors)
    assert main(["status", "out.csv"]) == 0
    steps(FAILING.replace("first + 1", "first|int + 1"))
    assert chain(engine) == 0
    assert [row["second"] for row in rows_of("out.csv")] == ["7", ""]
    assert engine.seen["answer:7"] == 2


def test_a_later_filter_that_fails_for_all_rows_of_the_source_is_refused_at_once(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n7,a\n8,b\n")
    steps(TWO.replace("first|length > 3", "id > 3"))
    assert chain(engine) == 3
    assert "step second: its filter failed for 2 of 2 rows" in capsys.readouterr().err
    assert not engine.seen
    steps(TWO.replace("first|length > 3", "id|int > 7"))
    assert chain(engine) == 0
    assert "the filter stopped 1 of 2" in capsys.readouterr().out


def test_jinja_templates_systems_and_examples(place: Path, engine: FaultyEngine) -> None:
    (place / "in.csv").write_text("text\n7\n2\n")
    (place / "after.j2").write_text(
        "answer:{% if judge.score > 3 %}good {{ judge.score }}{% else %}bad{% endif %}"
    )
    (place / "examples.csv").write_text("text,answer\n1,one\n")
    steps(
        """
judge:
  template: 'answer:{{"score": {text}}}'
  schema: score.json
  examples: examples.csv
after:
  template_file: after.j2
  system_template: "The score is {judge.score}."
"""
    )
    assert chain(engine) == 0
    assert [row["after"] for row in rows_of("out.csv")] == ["good 7", "bad"]
    sent = [[turn["content"] for turn in body["messages"]] for body in engine.bodies]
    assert ['answer:{"score": 1}', "one", 'answer:{"score": 7}'] in sent
    assert ["The score is 7.", "answer:good 7"] in sent
    assert chain(engine) == 0, "nothing has changed"
    (place / "after.j2").write_text("answer:{{ judge.scor }}")
    assert chain(engine) == 2


# --- stops ------------------------------------------------------------------------------------


def test_failures_in_the_middle_end_the_chain_until_they_are_allowed(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("text,more\na,fine\nb,400\n")
    steps(
        """
first:
  template: "answer:{text}"
second:
  template: "{more}"
third:
  template: "answer:{second}"
"""
    )
    assert chain(engine) == 3
    assert not (place / "out.csv").exists()
    assert "third" not in engine.seen
    capsys.readouterr()
    assert main(["status", "out.csv"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("out.csv  finished with failures\n")
    assert re.search(r"second +finished with failures +2/2 +1", printed)
    assert re.search(r"third +not started", printed)
    again = shlex.join(["aiflux", "chain", f"{place}/steps.yaml", *words(engine)[2:]])
    assert f"next: {again} --retry-failed\n" in printed
    assert chain(engine) == 3, "the same command does not hide the failure"
    before = engine.seen.total()
    assert chain(engine, "--max-failures", "1") == 0
    assert engine.seen.total() == before + 1
    rows = rows_of("out.csv")
    assert [(row["second"], row["third"]) for row in rows] == [
        ("echo fine", "echo fine"),
        ("", ""),
    ]
    assert rows[1]["first"] == "b", "the answers of earlier steps are kept"
    assert rows[1]["error"].startswith("second: ")


def test_failed_requests_are_tried_again_and_later_steps_ask_about_them(
    place: Path, engine: FaultyEngine
) -> None:
    (place / "in.csv").write_text("id,text\n1,a\n2,400*1 b\n")
    steps('first:\n  template: "{text}"\nsecond:\n  template: "answer:{id}"\n')
    assert chain(engine, "--max-failures", "1") == 0
    assert [row["second"] for row in rows_of("out.csv")] == ["1", ""]
    assert chain(engine, "--retry-failed") == 0
    assert [row["second"] for row in rows_of("out.csv")] == ["1", "2"]
    assert engine.seen["answer:1"] == 1


def test_a_killed_chain_is_resumed_by_the_same_command(place: Path, engine: FaultyEngine) -> None:
    count = 40
    (place / "in.csv").write_text("id,text\n" + "".join(f"{at},text{at}\n" for at in range(count)))
    steps(TWO)
    line = words(engine, "--concurrency", "2")
    assert chain(engine, "--dry-run") == 0
    with subprocess.Popen([*AIFLUX, *line], stderr=subprocess.DEVNULL) as process:
        while engine.seen.total() < count:
            time.sleep(0.005)
        engine.delay = 0.05
        while engine.seen.total() < count + 10:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (place / "out.csv").exists()
    engine.delay = 0.0
    assert main(line) == 0
    assert [row["second"] for row in rows_of("out.csv")] == [
        f"text{at}-{at}" for at in range(count)
    ]
    assert engine.seen.total() < 2 * count + 10, "what was answered is not asked again"
    assert not [*place.glob(".*part")]
    before = engine.seen.total()
    assert main(line) == 0
    assert engine.seen.total() == before


def test_a_forced_chain_that_was_killed_before_its_run_was_planned_is_resumed(
    place: Path, engine: FaultyEngine
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n2,fine\n")
    steps(TWO)
    assert chain(engine) == 0
    path = steps(TWO.replace("answer:{text}", "answer:{text}{id}"))
    runs = ChainRuns.of(read_chain(path))
    first, _ = runs.chain.steps
    runs.begin([{"model": "m:1", "engine": "external"}] * 2, force=True)
    _, replaced = runs.prepare(first, int, force=True)  # the kill comes here
    assert replaced
    assert chain(engine) == 2, "the second step has answers to other requests"
    assert [row["first"] for row in rows_of("out.csv")] == ["good", "fine"]
    assert chain(engine, "--force") == 0
    assert [row["second"] for row in rows_of("out.csv")] == ["good1-1", "fine2-2"]
    assert engine.seen.total() == 8


def test_a_table_that_was_removed_is_written_again(place: Path, engine: FaultyEngine) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    steps(TWO)
    assert chain(engine) == 0
    content = (place / "out.csv").read_bytes()
    (place / "out.csv").unlink()
    assert chain(engine) == 0
    assert (place / "out.csv").read_bytes() == content
    record = place / "out.csv.aiflux" / "chain.json"
    fields = json.loads(record.read_text())
    record.write_text(json.dumps({**fields, "writing": True, "table": None}))  # killed there
    assert chain(engine) == 0
    assert (place / "out.csv").read_bytes() == content
    assert engine.seen.total() == 2


def test_a_foreign_or_changed_table_is_not_overwritten(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    steps(TWO)
    (place / "out.csv").write_text("mine")
    assert chain(engine) == 2
    assert "already exists" in capsys.readouterr().err
    assert not engine.seen
    (place / "out.csv").unlink()
    assert chain(engine) == 0
    with open("out.csv", "a") as file:
        file.write("2,more\n")
    assert chain(engine) == 2
    assert "instead of the" in capsys.readouterr().err
    assert chain(engine, "--force") == 0
    assert len(rows_of("out.csv")) == 1


def test_the_same_command_twice_at_once(place: Path, engine: FaultyEngine) -> None:
    (place / "in.csv").write_text("id,text\n" + "".join(f"{at},text{at}\n" for at in range(12)))
    steps(TWO)
    engine.delay = 0.2
    line = [*AIFLUX, *words(engine, "--concurrency", "2")]
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as first:
        while not engine.seen:
            time.sleep(0.01)
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as second:
            shown, _ = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), shown
    assert engine.seen.total() == 24
    assert [row["second"] for row in rows_of("out.csv")] == [f"text{at}-{at}" for at in range(12)]


# --- changes ----------------------------------------------------------------------------------


def test_a_changed_step_is_refused_and_forced(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n2,fine\n")
    steps(TWO)
    assert chain(engine) == 0
    steps(TWO.replace("{first}-{id}", "{first}+{id}"))
    capsys.readouterr()
    assert chain(engine) == 2
    error = capsys.readouterr().err
    assert "step second changed since it was begun: template was 'answer:{first}-{id}'" in error
    assert "--force" in error
    assert chain(engine, "--force") == 0
    assert [row["second"] for row in rows_of("out.csv")] == ["good+1", "fine+2"]
    assert engine.seen["answer:good"] == 1, "the first step stays as it is"


def test_a_forced_step_asks_only_about_rows_whose_requests_changed(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n2,fine\n")
    steps(TWO)
    assert chain(engine) == 0
    for changed in ("1,good\n2,great\n3,more\n", "1,good\n", "1,good\n2,great\n"):
        (place / "in.csv").write_text(f"id,text\n{changed}")
        capsys.readouterr()
        assert chain(engine) == 2
        assert "step first was begun with other requests" in capsys.readouterr().err
    assert chain(engine, "--force") == 0
    assert [row["second"] for row in rows_of("out.csv")] == ["good-1", "great-2"]
    assert engine.seen["answer:good"] == engine.seen["answer:good-1"] == 1


def test_another_model_runs_a_step_again(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    steps(TWO)
    assert chain(engine) == 0
    steps(f"{TWO}  model: m:2\n")
    assert chain(engine) == 2
    assert "step second changed since it was begun: model was 'm:1'" in capsys.readouterr().err
    steps(f"{TWO}  samples: 2\n")
    assert chain(engine) == 2
    assert "samples was not given, and is now 2" in capsys.readouterr().err
    steps(f"{TWO}  model: m:2\n")
    assert chain(engine, "--force") == 0
    models = [body["model"] for body in engine.bodies]
    assert models == ["m:1", "m:1", "m:2"]


def test_another_choice_of_the_best_needs_no_answers(place: Path, engine: FaultyEngine) -> None:
    write_drafts(("1", "3", "2"))
    steps(BEST, "in.jsonl", "out.jsonl")
    assert chain(engine) == 0
    before = engine.seen.total()
    steps(BEST.replace("best: judge.score", "best: -judge.score"), "in.jsonl", "out.jsonl")
    assert chain(engine) == 0
    assert json.loads((place / "out.jsonl").read_text())["draft"] == "1"
    assert engine.seen.total() == before


CHOSEN = """
draft:
  template: "body:{body}"
  samples: 3
  best: draft|length
fin:
  template: "answer:{draft}"
"""


@pytest.mark.parametrize(
    ("changed", "expected", "fin"),
    [
        (CHOSEN.replace("draft|length", "-(draft|length)"), "best was 'draft|length'", "a"),
        (CHOSEN.replace("best: draft|length", "majority: draft|first"), "best was", "a"),
    ],
)
def test_another_choice_of_a_sample_before_other_steps_is_refused_and_forced(
    engine: FaultyEngine,
    capsys: pytest.CaptureFixture[str],
    changed: str,
    expected: str,
    fin: str,
) -> None:
    write_drafts(("a", "bbb", "ab"), ("ddd", "ddd", "ddd"))
    steps(CHOSEN, "in.jsonl", "out.jsonl")
    assert chain(engine) == 0
    table = lines_of()
    assert [line["fin"] for line in table] == ["bbb", "ddd"]
    before = engine.seen.total()
    steps(changed, "in.jsonl", "out.jsonl")
    capsys.readouterr()
    assert chain(engine) == 2
    error = capsys.readouterr().err
    assert f"step draft changed since it was begun: {expected}" in error
    assert "run the steps after it again: --force" in error
    assert lines_of() == table
    assert engine.seen.total() == before
    assert chain(engine, "--force") == 0
    assert [line["fin"] for line in lines_of()] == [fin, "ddd"]
    assert engine.seen.total() == before + 1, "only what changed is asked again"


def test_another_choice_among_compared_samples_is_refused_and_forced(
    engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write_drafts(("a", "bbb", "cc"))
    after = 'fin:\n  template: "answer:{draft}"\n'
    compare(LONGEST, after)
    assert chain(engine) == 0
    compare(LONGEST, after, COMPARE.replace("best: judge.best", "best: judge.best - 1"))
    assert chain(engine) == 2
    assert "step judge changed since it was begun: best was" in capsys.readouterr().err
    assert chain(engine, "--force") == 0
    assert [(line["draft"], line["fin"]) for line in lines_of()] == [("a", "a")]


def test_a_choice_can_change_before_the_later_steps_begin(engine: FaultyEngine) -> None:
    write_drafts(("a", "bbb", "cc"))
    first, _, _ = CHOSEN.partition("fin:")
    steps(first, "in.jsonl", "out.jsonl")
    assert chain(engine) == 0
    steps(CHOSEN.replace("draft|length", "-(draft|length)"), "in.jsonl", "out.jsonl")
    assert chain(engine) == 0
    assert [line["fin"] for line in lines_of()] == ["a"]


def test_a_step_that_was_removed_and_comes_back_changed_is_refused(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    first, _, second = TWO.partition("second:")
    steps(TWO)
    assert chain(engine) == 0
    steps(first)
    assert chain(engine) == 0
    assert "second" not in rows_of("out.csv")[0]
    steps(TWO)
    assert chain(engine) == 0
    assert engine.seen.total() == 2, "its answers were kept"
    steps(first)
    assert chain(engine) == 0
    steps(f"{first}second:{second}  temperature: 0.9\n")
    capsys.readouterr()
    assert chain(engine) == 2
    error = capsys.readouterr().err
    assert "step second changed since it was begun: temperature was not given" in error
    assert chain(engine, "--force") == 0
    assert [body.get("temperature") for body in engine.bodies] == [None, None, 0.9]


def write_database(path: Path, rows: int) -> None:
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE texts(id, text)")
        database.executemany(
            "INSERT INTO texts VALUES(?, ?)", [(at, f"text{at}") for at in range(rows)]
        )
        database.commit()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("query: SELECT * FROM texts WHERE id < 2", "query: SELECT * FROM texts"),
        ("query: SELECT * FROM texts", "query: SELECT * FROM texts WHERE id < 2"),
        ("query: SELECT * FROM texts", "query: SELECT id, upper(text) text FROM texts"),
    ],
)
def test_a_source_that_is_read_in_another_way_is_another_source(
    place: Path,
    engine: FaultyEngine,
    capsys: pytest.CaptureFixture[str],
    before: str,
    after: str,
) -> None:
    write_database(place / "in.db", 3)
    steps(TWO, "in.db", more=f"{before}\n")
    assert chain(engine) == 0
    steps(TWO, "in.db", more=f"{after}\n")
    capsys.readouterr()
    assert chain(engine) == 2
    assert "step first was begun with other requests" in capsys.readouterr().err
    assert chain(engine, "--force") == 0
    with closing(sqlite3.connect(place / "in.db")) as database:
        wanted = database.execute(after.partition(": ")[2]).fetchall()
    assert [(row["id"], row["text"]) for row in rows_of("out.csv")] == [
        (str(number), text) for number, text in wanted
    ]
    assert all(row["second"] == f"{row['text']}-{row['id']}" for row in rows_of("out.csv"))


def test_new_rows_of_a_database_that_is_being_written_are_seen(
    place: Path, engine: FaultyEngine
) -> None:
    write_database(place / "in.db", 2)
    steps(TWO, "in.db")
    with closing(sqlite3.connect("in.db")) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        assert chain(engine) == 0
        writer.execute("INSERT INTO texts VALUES(2, 'text2')")
        writer.commit()
        assert chain(engine) == 2
        assert chain(engine, "--force") == 0
    assert len(rows_of("out.csv")) == 3


@pytest.mark.parametrize("source", ["parts", "parts/*.parquet"])
def test_a_changed_file_of_a_source_of_several_files_is_seen(
    place: Path, engine: FaultyEngine, source: str
) -> None:
    (place / "parts").mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table({"id": [1], "text": [name]}), place / "parts" / f"{name}.parquet")
    steps('first:\n  template: "answer:{text}"\n', f'"{source}"', more="kind: parquet\n")
    assert chain(engine) == 0
    assert [row["first"] for row in rows_of("out.csv")] == ["a", "b"]
    pq.write_table(pa.table({"id": [1], "text": ["c"]}), place / "parts" / "b.parquet")
    assert chain(engine) == 2
    assert chain(engine, "--force") == 0
    assert [row["first"] for row in rows_of("out.csv")] == ["a", "c"]


def test_a_step_can_be_added_at_the_end(place: Path, engine: FaultyEngine) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    steps(TWO)
    assert chain(engine) == 0
    steps(f'{TWO}third:\n  template: "answer:{{second}}!"\n')
    assert chain(engine) == 0
    assert rows_of("out.csv")[0]["third"] == "good-1!"
    assert engine.seen.total() == 3


# --- the file ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sauce: in.csv", "line 3: unknown key 'sauce'"),
        ("model: m:1\nsteps: {a: {template: '{text}'}}", "has no 'source'"),
        ("source: in.csv\nsteps: {a: {template: '{text}'}}", "has no 'output'"),
        ("source: in.csv\noutput: out.csv", "has no 'steps'"),
        ("steps:\n  a:\n    tempalte: x", "line 5: unknown key 'tempalte' in steps.a"),
        ("steps:\n  a b:\n    template: x", "'a b' cannot be the name of a step"),
        (f"steps:\n  {'a' * 65}:\n    template: x", "at most 64 of them"),
        ("steps:\n  error:\n    template: x", "'error' cannot be the name of a step"),
        ("steps:\n  a:\n    model: m:1", "(steps.a) has no template"),
        ("steps:\n  a:\n    template: hello", "(steps.a): the template 'hello' has"),
        ("steps:\n  a:\n    template: '{txt}'", "(steps.a): template: the template names 'txt'"),
        ("steps:\n  text:\n    template: '{text}'", "already has a column 'text'"),
        ("steps:\n  a:\n    template: '{text}'\n    filter: text >", "(steps.a.filter)"),
        (
            "steps:\n  a:\n    template: '{text}'\n    system_template: '{x}'",
            "(steps.a): system: the template names 'x'",
        ),
        ("steps:\n  a:\n    template: '{text}'\n    filter: txt > 3", "names 'txt'"),
        (
            "steps:\n  a:\n    template: '{text}'\n    best: a.scor\n    schema: score.json",
            "a.scor",
        ),
        (
            "steps:\n  a:\n    template: '{text}'\n    filter: a == 'x'",
            "filter: the expression names 'a'",
        ),
        ("steps:\n  a:\n    template: '{text}'\n    compare: b", "'b' is no earlier step"),
        (
            "steps:\n  a:\n    template: '{text}'\n    best: a\n"
            "  b:\n    template: '{a}'\n    compare: a",
            "one sample of the step 'a' by then",
        ),
        (
            "samples: 2\nsteps:\n  a:\n    template: '{text}'\n"
            "  b:\n    template: '{a}'\n  c:\n    template: '{b}'\n    compare: b",
            "use compare: a",
        ),
        (
            "steps:\n  a:\n    template: '{text}'\n    schema: score.json\n"
            "  b:\n    template: '{a.score}'\n    compare: a",
            "because it is a list of all samples",
        ),
        ("steps:\n  a:\n    template: '{b}'\n  b:\n    template: '{text}'", "names 'b'"),
        ("steps:\n  a:\n    template: '{text}'\n  b:\n    template: '{a.x}'", "'a.x'"),
        ("steps:\n  a:\n    template: '{text}'\n    temperature: hot", "line 6 (steps.a.temp"),
        ("steps:\n  a:\n    template: '{text}'\n    schema: none.json", "none.json"),
        ("filtered: maybe\nsteps:\n  a:\n    template: '{text}'", "'maybe' is unknown"),
        ("steps: [a]", "must contain KEY: VALUE lines"),
        ("steps:\n  not:\n    template: '{text}'", "'not' cannot be the name of a step"),
        ("steps:\n  row:\n    template: '{text}'", "row has another meaning in expressions"),
        ("steps:\n  range:\n    template: '{text}'", "'range' cannot be the name of a step"),
        ("table: t\nsteps:\n  a:\n    template: '{text}'", "line 3 (table): table cannot be used"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_sent(
    place: Path,
    engine: FaultyEngine,
    capsys: pytest.CaptureFixture[str],
    content: str,
    expected: str,
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    whole = "" if re.search("source|output|model: m:1\nsteps", content) else WHOLE
    (place / "steps.yaml").write_text(f"{whole}{content}\n")
    assert chain(engine, "--model", "m:1") == 2
    assert expected in capsys.readouterr().err
    assert not engine.seen
    assert not [*place.glob("out.csv*")]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("tune: true", "--tune starts the engine"), ("nodes_per_engine: 2", "nodes_per_engine = 2")],
)
def test_settings_of_a_later_step_that_cannot_work_are_refused_before_anything_is_sent(
    place: Path,
    engine: FaultyEngine,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    expected: str,
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    steps(f"{TWO}  {setting}\n")
    assert chain(engine) == 2
    error = capsys.readouterr().err
    assert "(steps.second)" in error
    assert expected in error
    assert not engine.seen
    with pytest.raises(UsageError, match=r"steps\.second"):
        run_chain("steps.yaml", engine_url=engine.url)
    assert not engine.seen


def test_a_file_that_others_can_write_decides_nothing(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    steps(TWO, more=f"engine_url: {engine.url}\n").chmod(0o666)
    assert main(["chain", "steps.yaml"]) == 2
    error = capsys.readouterr().err
    assert "everyone can write to it, and could send prompts elsewhere" in error
    assert "--engine-url" in error
    assert not engine.seen
    steps(TWO)
    assert chain(engine) == 0, "without such settings, it is read"


def test_settings_of_a_step_of_all_steps_and_of_the_command_line(
    place: Path, engine: FaultyEngine
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    steps(f"{TWO}  temperature: 0.5\n", more="temperature: 0.2\nmax_tokens: 7\n")
    assert chain(engine, "--top-p", "0.9") == 0
    sent = [(body["temperature"], body["max_tokens"], body["top_p"]) for body in engine.bodies]
    assert sent == [(0.2, 7, 0.9), (0.5, 7, 0.9)]


def test_paths_start_from_the_folder_of_the_file(
    place: Path, engine: FaultyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    (place / "prompt.txt").write_text("answer:{text}!\n")
    steps("first:\n  template_file: prompt.txt\n")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    line = words(engine)
    assert main([line[0], "../steps.yaml", *line[2:]]) == 0
    assert rows_of(str(place / "out.csv"))[0]["first"] == "good!"


def test_a_dry_run_shows_the_first_requests_and_writes_nothing(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    steps(TWO)
    assert chain(engine, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "step first: model m:1" in printed
    assert '"content": "answer:good"' in printed
    assert {path.name for path in place.iterdir()} == {"in.csv", "steps.yaml", "score.json"}


# --- status and report ------------------------------------------------------------------------


def test_one_status_and_one_report(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n2,bad\n")
    steps(TWO)
    assert chain(engine, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["state"] == "finished"
    figures = [(each["name"], each["requests"], each["filtered"]) for each in shown["steps"]]
    assert figures == [("first", 2, 0), ("second", 1, 1)]
    for name in ("out.csv", "out.csv.aiflux", "steps.yaml"):
        assert main(["status", name]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("out.csv  finished\nSTEP    STATE     DONE  FAILED  FILTERED")
    assert main(["watch", "out.csv"]) == 0
    capsys.readouterr()
    assert main(["report", "out.csv"]) == 0
    page = (place / "out.csv.aiflux" / "report.html").read_text()
    links = re.findall('href="([^"]+)"', page)
    assert len(links) == 2
    assert all((place / "out.csv.aiflux" / link).is_file() for link in links)
    assert main(["report", "out.csv", "--json"]) == 0
    capsys.readouterr()
    assert main(["cancel", "out.csv"]) == 0
    assert "has no pending or running job" in capsys.readouterr().out
    assert main(["status", "out.csv.aiflux/steps/second.json"]) == 0
    assert main(["results", "show", "out.csv"]) == 2
    error = capsys.readouterr().err
    assert "is a chain of several runs" in error
    assert "out.csv.aiflux/steps/second.json" in error
    assert main(["resume", "out.csv"]) == 2
    assert f"continue it: aiflux chain {place}/steps.yaml --engine-url " in capsys.readouterr().err


def test_the_command_that_continues_a_chain_can_be_typed_as_it_is(
    tmp_path: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place = tmp_path / "a b $(x) it's"
    place.mkdir()
    monkeypatch.chdir(place)
    (place / "in.csv").write_text("id,text\n1,good\n2,400\n")
    steps('first:\n  template: "{text}"\nsecond:\n  template: "answer:{first}"\n')
    typed = [*words(engine, "--output", "it's.csv"), "--stop=--x $y", "--no-validate"]
    assert main([*typed, "--force", "--no-wait", "--json"]) == 3
    shown = json.loads(capsys.readouterr().out)["next_command"]
    assert shlex.split(shown) == [
        "aiflux", "chain", str(place / "steps.yaml"), "--output", str(place / "it's.csv"),
        "--engine-url", engine.url, "--retry-delay", "0.01", "--max-retries", "0",
        "--stop=--x $y", "--no-validate", "--retry-failed",
    ]  # fmt: skip
    for command in ("status", "cancel"):
        assert main([command, "it's.csv"]) == 0
        assert shown in capsys.readouterr().out
    assert main(["report", "it's.csv"]) == 0
    page = html.unescape((place / "it's.csv.aiflux" / "report.html").read_text())
    assert f"<code>cd {shlex.quote(str(place))} && {shown}</code>" in page
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert main(["resume", str(place / "it's.csv")]) == 2
    there = capsys.readouterr().err.partition("continue it: ")[2].strip()
    assert there == f"cd {shlex.quote(str(place))} && {shown}"
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["status", str(place / "it's.csv")]) == 0
    assert there in capsys.readouterr().out
    bash = f'aiflux() {{ {shlex.join(AIFLUX)} "$@"; }}; {there}'
    before = engine.seen.total()
    done = subprocess.run(["bash", "-c", bash], check=False, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert engine.seen.total() == before + 1, "the failed request was tried again"


def test_a_chain_from_python_is_continued_by_a_command(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,400\n")
    steps(TWO.replace("answer:{text}", "{text}"))
    with pytest.raises(TooManyFailuresError):
        run_chain(
            "steps.yaml", engine_url=engine.url, stop=["a", "-b"], max_retries=0, progress=False
        )
    assert main(["status", "out.csv"]) == 0
    printed = capsys.readouterr().out
    options = f"--engine-url {engine.url} --stop a --stop=-b --max-retries 0 --retry-failed"
    assert f"  next: aiflux chain {place}/steps.yaml {options}\n" in printed


def test_requests_that_are_left_out_are_no_failures_of_their_step(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text(f"id,text\n1,one\n2,{'word ' * 240}\n")
    steps('first:\n  template: "{text}"\nsecond:\n  template: "{first}"\n')
    with CountingServer(VLLM, 512) as server:
        line = ["chain", "steps.yaml", "--engine-url", server.url, "--too-long", "skip"]
        assert main([*line, "--dry-run"]) == 0
        assert "step first: 1 request will not be sent" in capsys.readouterr().err
        assert main([*line, "--json"]) == 0
        assert [row["error"][:27] for row in rows_of("out.csv")] == [
            "",
            "first: too_long: not sent: ",
        ]
    shown = json.loads(capsys.readouterr().out)
    counts = [(each["done"], each["failed"], each["left_out"]) for each in shown["steps"]]
    assert (shown["state"], counts) == ("finished", [(2, 0, 1), (1, 0, 0)])
    assert main(["status", "out.csv"]) == 0
    assert "  first: 1 request left out (too long)\n" in capsys.readouterr().out


def test_a_chain_that_stopped_between_two_steps(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    first, _, second = TWO.partition("second:")
    steps(first)
    assert chain(engine, "--output", "other.csv") == 0
    steps(f"{first}second:{second.replace('answer:', '404 ')}")
    assert chain(engine, "--output", "other.csv") == 4, "the engine refuses the only request"
    RunDirectory.of_output(place / "other.csv.aiflux/steps/second.json").plan.unlink()
    capsys.readouterr()
    assert main(["status", "other.csv"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("other.csv  stopped\n")
    more = ["--output", f"{place}/other.csv", *words(engine)[2:]]
    again = shlex.join(["aiflux", "chain", f"{place}/steps.yaml", *more])
    assert f"next: {again}\n" in printed


# --- estimates --------------------------------------------------------------------------------


SCORED = """
draft:
  template: "body:{body}"
  samples: 3
judge:
  template: 'answer:{{"score": {draft}}}'
  schema: score.json
  best: judge.score
after:
  filter: judge.score > 3
  template: "answer:{draft} {pad}"
"""


def write_scored(rows: int) -> None:
    """Write the source of ``SCORED``: every second row passes its filter."""
    with open("in.jsonl", "w", encoding="utf-8") as file:
        for at in range(rows):
            texts = ("1", "2", "5" if at % 2 else "3")
            row = {"id": at, "body": drafts(*texts), "pad": "x" * (at % 7)}
            file.write(f"{json.dumps(row)}\n")


def test_a_sample_of_rows_in_all_steps_estimates_the_chain(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scored(200)
    steps(SCORED, "in.jsonl", "out.jsonl")
    assert estimate(engine, "--requests", "50", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    passed = len({body for body in engine.seen if body.startswith("answer:5 ")})
    assert passed
    asked = (
        50 + 150 + sum(count for body, count in engine.seen.items() if body.startswith("answer:5 "))
    )
    assert engine.seen.total() == asked, "the sample, and nothing else"
    made = found["estimate"]
    assert (made["rows"], made["pilot"]) == (200, 50)
    by_name = {step["name"]: step["requests"] for step in made["steps"]}
    assert by_name["draft"] == {"value": 200.0, "low": 200.0, "high": 200.0}
    judge = by_name["judge"]
    assert (judge["value"], judge["high"]) == (600, pytest.approx(600))
    assert 500 < judge["low"] < 600, "rows outside the sample may fail"
    after = by_name["after"]
    assert after["value"] == (asked - 200) * 4
    assert after["low"] < 100 < after["high"], "every second row passes"
    answered = [step["estimate"]["completion_tokens"]["value"] for step in made["steps"]]
    assert made["sum"]["completion_tokens"]["value"] == pytest.approx(sum(answered))
    assert found["command"] == (
        f"aiflux chain --input steps.yaml --engine-url {engine.url} --retry-delay 0.01 "
        "--max-retries 0 --concurrency 4"
    )
    assert not (place / "out.jsonl.aiflux").exists()
    assert estimate(engine, "--requests", "50") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("pilot: 50 of 200 rows\n\nstep draft\npilot: 50 of 200 requests")
    assert re.search(r"requests +600 +557 - 600\n", printed)
    assert "all steps, one after the other\n" in printed
    assert engine.seen.total() == asked, "the answers of the pilot are used again"
    assert chain(engine) == 0
    assert len(lines_of()) == 200
    tokens = made["sum"]["prompt_tokens"]
    actual = sum(
        result["output"]["usage"]["prompt_tokens"]
        for step in ("judge", "after")
        for result in json.loads((place / f"out.jsonl.aiflux/steps/{step}.json").read_text())
    )
    assert tokens["low"] <= actual <= tokens["high"]


def test_the_pilot_of_a_chain_that_is_the_whole_chain_has_no_doubt_of_the_tokens(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scored(6)
    steps(SCORED, "in.jsonl", "out.jsonl")
    assert estimate(engine, "--json") == 0
    made = json.loads(capsys.readouterr().out)["estimate"]
    assert (made["rows"], made["pilot"]) == (6, 6)
    assert made["steps"][2]["requests"] == {"value": 3.0, "low": 3.0, "high": 3.0}
    tokens = made["sum"]["prompt_tokens"]
    assert tokens["low"] == tokens["value"] == tokens["high"]


def test_a_step_that_no_row_of_the_sample_reaches_is_left_out_of_the_sum(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n" + "".join(f"{at},t\n" for at in range(100)))
    steps(TWO)
    assert estimate(engine, "--requests", "10") == 0
    printed = capsys.readouterr().out
    assert re.search(r"step second\nrequests +0 +0 - 2\d\n", printed)
    assert "no row of the sample reached the step second" in printed
    assert "--requests 40" in printed


def test_a_request_of_no_row_of_the_pilot_is_an_error() -> None:
    assert _row_of("row-1.3.2", {"row-1"}) == "row-1"
    for name in ("row-2.1", "other", ""):
        with pytest.raises(StoppedError, match="of no row of its sample"):
            _row_of(name, {"row-1"})


def test_a_changed_chain_gets_another_pilot(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n" + "".join(f"{at},text\n" for at in range(30)))
    steps(TWO)
    assert estimate(engine, "--requests", "5") == 0
    before = engine.seen.total()
    steps(TWO.replace("{first}-", "{first}+"))
    assert estimate(engine, "--requests", "5") == 0
    assert engine.seen.total() == 2 * before
    assert estimate(engine, "--requests", "5", "--force") == 0
    assert engine.seen.total() == 3 * before
    capsys.readouterr()
    assert estimate(engine, "--engine", "ollama,vllm") == 2
    assert "several engines cannot be compared with a chain" in capsys.readouterr().err


def test_failures_of_the_pilot_are_estimated(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"{at},{'400' if at % 4 == 0 else 'text'}\n" for at in range(40))
    (place / "in.csv").write_text(f"id,text\n{rows}")
    steps('first:\n  template: "{text}"\nsecond:\n  template: "answer:{first}"\n')
    assert estimate(engine, "--json") == 0
    made = json.loads(capsys.readouterr().out)["estimate"]
    first = made["steps"][0]["estimate"]
    assert (first["pilot_failures"], first["failures"]["value"]) == (10, 10)
    assert made["steps"][1]["requests"]["value"] == 30
    assert any("10 of 40 requests failed" in text for text in first["warnings"])


# --- Slurm ------------------------------------------------------------------------------------


def slurm(place: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    """Put a Slurm on PATH that gives jobs the ids 1, 2, ... and keeps them pending."""
    fakes = FakeCommands(place / "bin")
    count = place / "bin" / "jobs"
    fakes.add("sbatch", f"echo x >>{count}; wc -l <{count} | tr -d ' '")
    fakes.say("scancel")
    waiting = "|N/A|PENDING|N/A|0:00||Dependency"
    fakes.add("squeue", f'for at in $(seq "$(wc -l <{count})"); do echo "$at{waiting}"; done')
    for name in ("sacct", "scontrol"):
        fakes.say(name, status=1)
    monkeypatch.setenv("PATH", fakes.path)
    return fakes


SERVER = Path(__file__).parents[2] / "tools" / "command_server.py"
COMMAND = f"{sys.executable} {SERVER} --port {{port}}"


def slurm_words(*more: str) -> list[str]:
    engine = ("--engine-command", COMMAND, "--gpus-per-node", "0")
    return ["chain", "steps.yaml", *engine, "--no-preflight", *more]


THREE = """
first:
  template: "answer:{text}"
second:
  filter: first|length > 3
  template: "answer:{first}-{id}"
  shards: 3
third:
  template: "answer:{second}!"
"""


def test_steps_are_submitted_at_once_and_each_waits_for_the_one_before(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n2,bad\n3,fine\n")
    steps(THREE)
    fakes = slurm(place, monkeypatch)
    assert main(slurm_words("--no-wait")) == 0
    options = [call.argv for call in fakes.calls("sbatch")]
    dependencies = [[each for each in argv if "depend" in each] for argv in options]
    assert dependencies == [[], ["--dependency=afterok:1"], ["--dependency=afterok:2"]]
    assert all("--kill-on-invalid-dep=yes" in argv for argv in options[1:])
    scripts = [Path(argv[-1]).read_text() for argv in options]
    assert "#SBATCH --array=0-2" in scripts[1]
    capsys.readouterr()
    assert main(["status", "out.csv"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"second +waiting", printed)
    assert main(["jobs", "--json"]) == 0
    assert [each["state"] for each in json.loads(capsys.readouterr().out)] == ["waiting"] * 3
    assert main(slurm_words("--no-wait")) == 0
    assert len(fakes.calls("sbatch")) == 3, "nothing is submitted twice"
    steps(THREE.replace("{second}!", "{second}?"))
    capsys.readouterr()
    assert main(slurm_words("--no-wait")) == 2
    assert "step third changed since it was begun" in capsys.readouterr().err
    steps(THREE.partition("third:")[0])
    assert main(slurm_words("--no-wait")) == 2
    assert "has no step 'third' any more, but its work goes on" in capsys.readouterr().err
    assert main(["cancel", "out.csv"]) == 0
    assert [call.argv[-1] for call in fakes.calls("scancel")] == ["3", "2", "1"]


def test_the_jobs_of_later_steps_are_checked_before_the_first_is_submitted(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    all_steps = f"engine_command: '{COMMAND}'\ngpus_per_node: 0\n"
    steps(f"{TWO}  engine: llamacpp\n", more=all_steps)
    fakes = slurm(place, monkeypatch)
    assert main(["chain", "steps.yaml", "--no-wait"]) == 2
    error = capsys.readouterr().err
    assert "error: step second: 2 problems found; no job was submitted" in error
    assert "no image aiflux-llamacpp.sif" in error
    assert "aiflux models pull m:1" in error
    assert not fakes.calls("sbatch")
    steps(TWO, more="engine: llamacpp\ngpus_per_node: 0\n")
    assert main(["chain", "steps.yaml", "--no-wait"]) == 2
    error = capsys.readouterr().err
    assert "error: steps first, second: 2 problems found; no job was submitted" in error
    assert error.count("no image aiflux-llamacpp.sif") == 1
    assert not fakes.calls("sbatch")
    steps(TWO, more=all_steps)
    assert main(["chain", "steps.yaml", "--no-wait"]) == 0
    assert len(fakes.calls("sbatch")) == 2


def files_in(place: Path) -> set[Path]:
    return {path for path in place.rglob("*") if path.is_file() and "bin" not in path.parts}


def test_a_dry_run_checks_the_jobs_of_all_steps(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n2,bad\n")
    fakes = FakeCommands(place / "bin")
    FakeSite().install(fakes)
    monkeypatch.setenv("PATH", fakes.path)
    all_steps = f"engine_command: '{COMMAND}'\ngpus_per_node: 0\n"
    good = f"{TWO}  partition: gpu\n  time: 20:00:00\n"
    steps(good, more=all_steps)
    before = files_in(place)
    assert main(["chain", "steps.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "step first: model m:1; 2 requests\n" in printed
    unknown = "number and length of its requests: not known before first has run"
    assert f"step second: model m:1; {unknown}\n" in printed
    assert files_in(place) == before
    for wrong, words in (
        ("partition: gup", "this cluster has no partition 'gup'"),
        ("partition: gpu\n  time: 30:00:00", "--time 30:00:00 is more than partition gpu allows"),
        ("mem: 900G", "--mem 900G is more than any node"),
        ("engine: llamacpp", "no image aiflux-llamacpp.sif"),
        ("engine: llamacpp", "aiflux models pull m:1"),
    ):
        steps(f"{TWO}  {wrong}\n", more=all_steps)
        assert main(["chain", "steps.yaml", "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert "step second: " in error
        assert words in error, error
    steps(f"{TWO}  partition: gup\n", more=f"{all_steps}partition: gip\n")
    assert main(["chain", "steps.yaml", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "steps first, second: 2 problems found; no job was submitted" in error
    assert "1. this cluster has no partition 'gip'" in error
    assert "2. this cluster has no partition 'gup'" in error
    assert main(["chain", "steps.yaml", "--dry-run", "--no-preflight"]) == 0
    assert files_in(place) == before


def test_a_dry_run_checks_the_table_and_what_changed(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    steps(TWO)
    (place / "out.csv").write_text("mine")
    assert chain(engine, "--dry-run") == 2
    assert "out.csv" in capsys.readouterr().err
    (place / "out.csv").unlink()
    assert chain(engine) == 0
    steps(TWO.replace("answer:{text}", "answer:{text}!"))
    before = files_in(place)
    capsys.readouterr()
    assert chain(engine, "--dry-run") == 2
    assert "step first changed since it was begun" in capsys.readouterr().err
    steps(f"{TWO}third:\n  template: 'answer:{{second}}'\n")
    assert chain(engine, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "step first: model m:1; finished\n" in printed
    assert "step third: model m:1; 1 request\n" in printed
    assert files_in(place) == before


def test_a_dry_run_checks_what_a_run_on_this_machine_needs(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    monkeypatch.setenv("PATH", str(place))
    steps(f"{TWO}  engine: llamacpp\n", more=f"engine_command: '{COMMAND}'\n")
    assert main(["chain", "steps.yaml", "--local", "--dry-run"]) == 4
    assert "step second: " in capsys.readouterr().err


def test_a_later_step_is_not_refused_for_the_prompts_of_the_first(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompts of a step that judges short answers are not known yet."""
    (place / "in.csv").write_text(f"id,text\n1,{'x' * 600}\n")
    (place / "m.gguf").write_bytes(tiny())
    make_sif(place / "aiflux-llamacpp.sif", version=__version__, engine="llamacpp",
             engine_version="1")  # fmt: skip
    small = f"engine: llamacpp\n  model: {place}/m.gguf\n  context_length: 512\n"
    steps(f"{TWO}  {small}", more=f"engine_command: '{COMMAND}'\ngpus_per_node: 0\n")
    fakes = slurm(place, monkeypatch)
    for more in ("--dry-run", "--no-wait"):
        assert main(["chain", "steps.yaml", more]) == 0, capsys.readouterr().err
    assert len(fakes.calls("sbatch")) == 2


def test_the_command_that_continues_a_chain_shows_no_key(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    steps(TWO)
    slurm(place, monkeypatch)
    with_key = ("--engine-command", f"{COMMAND} --api-key secret-word")
    assert main(slurm_words("--no-wait", *with_key)) == 0
    capsys.readouterr()
    assert main(["cancel", "out.csv"]) == 0
    printed = capsys.readouterr().out
    assert "continue it: aiflux chain " in printed
    assert "--api-key (not shown)" in printed
    with_key = ("--engine-command", f"{COMMAND} --api-key (not shown)")
    assert main(slurm_words("--no-wait", *with_key)) == 2, "as it was copied"
    assert "write them in place of '(not shown)'" in capsys.readouterr().err
    with_key = ("--engine-command", f"{COMMAND} --api-key another-word")
    assert main(slurm_words("--no-wait", *with_key)) == 2
    error = capsys.readouterr().err
    assert "changed since it was begun" in error
    assert "-word" not in error


def job(place: Path, step: str, shard: int = 0, chain: str = "out.csv") -> int:
    """Run what the job of a step runs, without the shell around it."""
    run = RunDirectory(place / f"{chain}.aiflux" / "steps" / f"{step}.json.aiflux")
    (script,) = run.path.glob("run.sbatch")
    found = re.search(r"^plan_step=\((.*)\)$", script.read_text(), re.MULTILINE)
    if found is not None:
        planned = subprocess.run([*shlex.split(found[1]), str(shard)], check=False)
        if planned.returncode:
            return planned.returncode
    work = ["-m", "aiflux.worker", "--run-dir", str(run.path), "--shard", str(shard)]
    return subprocess.run([sys.executable, *work], check=False).returncode


def test_the_jobs_of_a_step_make_its_requests(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n2,bad\n3,fine\n")
    steps(THREE)
    fakes = slurm(place, monkeypatch)
    assert main(slurm_words("--no-wait")) == 0
    assert job(place, "second") == 5, "the first step is not finished"
    steps("changed:\n  template: a file that is edited meanwhile {text}\n")
    assert job(place, "first") == 0
    with ThreadPoolExecutor() as threads:
        codes = sorted(threads.map(lambda shard: job(place, "second", shard), range(3)))
    assert codes == [0, 0, 10], "two requests, three tasks"
    assert main(["logs", "out.csv"]) == 2
    error = capsys.readouterr().err
    assert "name one of its steps, such as the last that began: " in error
    assert "out.csv.aiflux/steps/second.json;" in error
    assert job(place, "third") == 0
    fakes.say("squeue", "")
    steps(THREE)
    capsys.readouterr()
    assert main(slurm_words()) == 0
    assert len(fakes.calls("sbatch")) == 3
    assert [row["third"] for row in rows_of("out.csv")] == ["good-1!", "", "fine-3!"]


def test_the_pilot_of_a_chain_in_slurm(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"{at},{'good' if at % 2 else 'bad'}\n" for at in range(60))
    (place / "in.csv").write_text(f"id,text\n{rows}")
    steps(THREE)
    fakes = slurm(place, monkeypatch)
    line = ["estimate", *slurm_words("--requests", "20", "--time", "2-00:00:00")[1:]]
    assert main([*line, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["estimate"] is None
    assert [each["state"] for each in shown["pilot"]["steps"]] == ["waiting"] * 3
    options = [call.argv for call in fakes.calls("sbatch")]
    dependencies = [[each for each in argv if "depend" in each] for argv in options]
    assert dependencies == [[], ["--dependency=afterok:1"], ["--dependency=afterok:2"]]
    scripts = [Path(argv[-1]).read_text() for argv in options]
    assert all("#SBATCH --time=01:00:00" in script for script in scripts)
    assert not any("--array=0-2" in script for script in scripts), "a pilot is one job"
    assert main(line) == 0
    assert "run the same command again for the estimate" in capsys.readouterr().err
    assert len(fakes.calls("sbatch")) == 3, "nothing is submitted twice"
    assert main([*line, "--force"]) == 2
    assert "a pilot of this chain is still at work" in capsys.readouterr().err
    for step in ("first", "second", "third"):
        assert job(place, step, chain="out.csv.pilot/results.json") == 0
    fakes.say("squeue", "")
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("pilot: 20 of 60 rows\n\nstep first\npilot: 20 of 60 requests")
    assert re.search(r"step third\n(.*\n)+recommended: one job of 00:", printed)
    assert "full chain, with shards and time of each step in its file:\n" in printed
    assert main(["status", "out.csv.pilot/results.json"]) == 0
    again = capsys.readouterr().out.partition("next: ")[2].strip()
    given = shlex.split(again)
    assert given[:3] == ["aiflux", "estimate", f"{place}/steps.yaml"]
    assert {"--engine-command", COMMAND, "--requests", "20", "--no-preflight"} < {*given}
    assert main(["cancel", "out.csv.pilot/results.json"]) == 0
    assert f"continue it: {again}\n" in capsys.readouterr().out
    assert main(given[1:]) == 0
    assert len(fakes.calls("sbatch")) == 3


def test_a_filter_that_fails_in_a_job_is_reported(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n2,bad\n")
    steps(FAILING)
    fakes = slurm(place, monkeypatch)
    assert main(slurm_words("--no-wait")) == 0
    assert (job(place, "first"), job(place, "second")) == (0, 3)
    fakes.say("squeue", "")
    capsys.readouterr()
    assert main(slurm_words()) == 3
    assert "step second: its filter failed for 2 of 2 rows" in capsys.readouterr().err


def test_a_filter_that_stops_all_rows_in_a_job_is_shown(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n2,bad\n")
    steps(FAILING.replace("first + 1 > 3", "first|length > 9"))
    fakes = slurm(place, monkeypatch)
    assert main(slurm_words("--no-wait")) == 0
    with subprocess.Popen([*AIFLUX, *slurm_words()], stdout=subprocess.PIPE, text=True) as waiting:
        codes = job(place, "first"), job(place, "second")
        fakes.say("squeue", "")
        shown, _ = waiting.communicate(timeout=60)
    assert (*codes, waiting.returncode) == (0, 10, 0)
    assert "0 requests; the filter stopped 2 of 2" in shown


def test_a_step_whose_job_ended_before_its_plan_is_submitted_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n2,bad\n3,fine\n")
    steps(THREE)
    fakes = slurm(place, monkeypatch)
    assert main(slurm_words("--no-wait")) == 0
    assert job(place, "first") == 0
    fakes.say("squeue", "")  # Slurm has cancelled the others
    capsys.readouterr()
    assert main(["status", "out.csv"]) == 0
    assert "next: aiflux chain" in capsys.readouterr().out
    slurm(place / "again", monkeypatch)
    assert main(slurm_words("--no-wait")) == 0
    printed = capsys.readouterr().out
    assert "2 requests; the filter stopped 1 of 3" in printed, "its input is made at once"
    assert "step third: job 2, after 1" in printed


STEP = "out.csv.aiflux/steps/second.json"


def test_a_step_that_has_no_plan_yet_is_shown_as_a_part_of_its_chain(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,bad\n")
    steps(THREE)
    fakes = slurm(place, monkeypatch)
    assert main(slurm_words("--no-wait")) == 0
    for name in ("2", STEP, f"{STEP}.aiflux"):
        capsys.readouterr()
        assert main(["status", name]) == 0
        assert re.search(r"second +waiting", capsys.readouterr().out)
        assert main(["logs", name]) == 2
        assert "is a step of a chain, and has no requests yet" in capsys.readouterr().err
    assert main(["cancel", "2"]) == 0
    assert [call.argv for call in fakes.calls("scancel")] == [["2"]]
    assert [job(place, step) for step in ("first", "second", "third")] == [0, 10, 10]
    fakes.say("squeue", "")
    capsys.readouterr()
    assert main(["jobs", "--json"]) == 0
    assert [each["state"] for each in json.loads(capsys.readouterr().out)] == ["finished"] * 3
    assert main(["watch", STEP]) == 0
    assert re.search(r"second +finished", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["status", "watch", "cancel", "report"])
def test_the_root_directory_is_no_chain(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "/"]) == 2
    assert "no run found at '/'" in capsys.readouterr().err


def test_a_watched_step_that_never_got_a_plan_has_stopped(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "in.csv").write_text("id,text\n1,good\n")
    steps(THREE)
    fakes = slurm(place, monkeypatch)
    assert main(slurm_words("--no-wait")) == 0
    fakes.say("squeue", "")
    capsys.readouterr()
    assert main(["watch", "2"]) == 5
    assert re.search(r"second +stopped", capsys.readouterr().out)
