"""Inputs that once broke a run or a table, as they were found; ``cases/`` holds them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet
import pytest

from aiflux.cli.main import main
from tests.tools.faulty_engine import FaultyEngine

CASES = Path(__file__).parent / "cases"
NO_OBJECT = "line 1: the schema in body.response_format is wrong: json_schema is not an object"
REFUSED = {
    "infinity-in-body": "line 1: the number 1e400 is too large at column 97",
    "validate-crash-jsint": NO_OBJECT,
    "validate-crash-jslist": NO_OBJECT,
    "validate-crash-schstr": NO_OBJECT,
    "validate-crash-metaint": (
        "line 1: the schema in body.response_format is wrong: at $.$schema: it is not a string"
    ),
}
ANSWERED = ("lone-surrogate", "nul-in-answer-python310")


def test_every_case_has_a_test() -> None:
    assert {path.stem for path in CASES.iterdir()} == {*REFUSED, *ANSWERED}


@pytest.mark.parametrize("name", REFUSED)
def test_a_case_is_refused_with_its_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    case = str(CASES / f"{name}.jsonl")
    with FaultyEngine() as engine:
        options = ["--engine-url", engine.url, "--output", "o.json", "--validate"]
        assert main(["check", case, "--model", "m"]) == 2
        assert REFUSED[name] in capsys.readouterr().err
        assert main(["run", case, "--model", "m", *options]) == 2
        assert REFUSED[name] in capsys.readouterr().err
    assert not engine.bodies


@pytest.mark.parametrize("name", ANSWERED)
def test_a_case_is_answered_and_written_in_every_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = CASES / f"{name}.jsonl"
    asked = [json.loads(line) for line in case.read_text(encoding="utf-8").splitlines()]
    prompts = [each["body"]["messages"][0]["content"] for each in asked]
    with FaultyEngine() as engine:
        options = ["--engine-url", engine.url, "--output", "o.json", "--validate"]
        assert main(["run", str(case), "--model", "m", *options]) == 0
    assert sorted(body["messages"][0]["content"] for body in engine.bodies) == sorted(prompts)
    results = json.loads(Path("o.json").read_bytes().decode())
    assert [entry["input"]["custom_id"] for entry in results] == [
        each["custom_id"] for each in asked
    ]
    answers = [entry["output"]["choices"][0]["message"]["content"] for entry in results]
    assert answers == [f"echo {prompt}" for prompt in prompts]
    for form in ("csv", "jsonl", "parquet"):
        assert main(["results", f"to-{form}", "o.json", "--output", f"a.{form}"]) == 0
    with open("a.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(asked)
    assert len(Path("a.jsonl").read_bytes().decode().splitlines()) == len(asked)
    assert pyarrow.parquet.read_table("a.parquet").num_rows == len(asked)
