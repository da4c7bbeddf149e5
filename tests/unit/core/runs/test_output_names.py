"""Names of outputs: impossible ones are refused before anything starts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.cli.main import main
from aiflux.core.runs.directory import checked_output
from aiflux.errors import UsageError
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.working import Working


@pytest.fixture(scope="module")
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine() as running:
        yield running


def run(engine: FaultyEngine, folder: Path, output: str, *more: str) -> int:
    source = Working(folder, engine.url).prompts("one", "400").input
    words = ["--engine-url", engine.url, "--input", str(source), "--output", output, *more]
    return main(["run", *words])


# A name of 255 bytes is one that the file system takes: what is added to it, it does not.
LONG = "n" * 250 + ".json"


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (LONG, "name is 255 bytes long; at most 240 leave room"),
        ("n" * 251 + ".json", "name is 256 bytes long"),
        ("ü" * 118 + ".jsonl", "name is 242 bytes long"),
        ("/".join(["d" * 200] * 20) + "/out.json", "path is "),
        ("d" * 256 + "/out.json", "does not exist"),
        ("line\nbreak.json", "line break"),
        ("out.json/", "is a directory"),
        ("out.json/.", "is a directory"),
        ("", "is a directory"),
        ("folder.json", "is a directory"),
        ("errors.jsonl", "errors.errors.jsonl is a directory"),
        ("pipe.json", "is a device or a pipe"),
        ("nowhere.json", "is a link into a directory that does not exist"),
        ("loop.json", "is a link to itself"),
        ("taken.json", "taken.json.aiflux is a file"),
        ("~nobody-of-this-name/out.json", "does not exist"),
        ("out.txt", "does not end in .json or .jsonl"),
        ("results", "does not end in .json or .jsonl"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--force"]])
def test_an_impossible_output_name_is_refused(
    engine: FaultyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], output: str, reason: str, more: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "errors.errors.jsonl").mkdir()
    (tmp_path / "taken.json.aiflux").touch()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "nowhere.json").symlink_to(tmp_path / "missing" / "file.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    before = {*os.listdir(), "in.jsonl"}
    sent = len(engine.bodies)
    assert run(engine, tmp_path, output, *more) == 2
    assert reason in capsys.readouterr().err
    assert {*os.listdir()} == before
    assert len(engine.bodies) == sent


def test_convert_refuses_the_same_output_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.csv").write_text("text,n\na,1\nb\n", encoding="utf-8")
    convert = ["convert", "csv", "--input", "in.csv", "--template", "{text}", "--skip-bad"]
    for name, reason in (
        ("out/", "is a directory"),
        ("n" * 256, "too long"),
        ("n" * 249 + ".jsonl", "too long"),  # the list of what is skipped
        ("~nobody-of-this-name/out.jsonl", "does not exist"),
    ):
        assert main([*convert, "--output", name]) == 2, name
        assert reason in capsys.readouterr().err
    assert os.listdir() == ["in.csv"]


parts = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=70)


@settings(max_examples=5)
@given(parts, st.integers(1, 4), st.sampled_from([".json", ".jsonl"]))
def test_any_other_name_works_for_all_files_named_after_it(
    engine: FaultyEngine, tmp_path_factory: pytest.TempPathFactory, part: str, times: int,
    suffix: str,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("names")
    output = folder / (part * times + suffix)
    try:
        checked_output(output)
    except UsageError:
        assert run(engine, folder, str(output)) == 2
        assert os.listdir(folder) == ["in.jsonl"]
        return
    assert run(engine, folder, str(output)) == 3  # one request failed
    assert main(["merge", "--partial", str(output)]) == 0
    assert main(["results", "to-jsonl", str(output)]) == 0
    table = next(folder.glob("*.table.jsonl"))
    answers = [json.loads(line)["answer"] for line in table.read_bytes().splitlines()]
    assert answers.count(None) == 1


def test_the_longest_possible_names_work(engine: FaultyEngine, tmp_path: Path) -> None:
    deep = tmp_path
    while (room := 3936 - len(str(deep)) - len("//out.json")) > 0:
        deep /= "d" * min(room, 200)
        deep.mkdir()
    assert len(str(deep / "out.json")) in (3935, 3936)
    long = (tmp_path / ("n" * 235 + ".json"), tmp_path / ("m" * 234 + ".jsonl"))
    for output in (*long, deep / "out.json"):
        assert run(engine, tmp_path, str(output)) == 3
        assert main(["merge", "--partial", str(output)]) == 0
        assert main(["results", "to-csv", str(output)]) == 0
