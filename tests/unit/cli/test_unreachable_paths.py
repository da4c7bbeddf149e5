"""Paths that the system refuses to look at: every command names them, with exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from aiflux.cli.main import main

RUN = ["run", "--engine-url", "http://127.0.0.1:9"]
CSV = ["convert", "csv", "--template", "{text}"]
COMMANDS = [
    ["status", "PATH"],
    ["results", "show", "PATH"],
    ["results", "to-csv", "o.json", "--output", "PATH"],
    ["results", "to-csv", "o.json", "--source", "PATH", "--output", "made"],
    ["check", "PATH"],
    [*RUN, "--input", "PATH", "--output", "made.json"],
    [*RUN, "--input", "q.jsonl", "--output", "PATH.json"],
    [*CSV, "--input", "PATH", "--output", "made"],
    [*CSV, "--input", "t.csv", "--output", "PATH"],
    ["convert", "csv", "--input", "t.csv", "--template-file", "PATH", "--output", "made"],
    [*CSV, "--input", "t.csv", "--schema", "PATH", "--output", "made"],
    ["convert", "dir", "--input", "PATH", "--output", "made"],
    ["convert", "images", "--input", "PATH", "--output", "made"],
    ["convert", "json", "--input", "PATH", "--output", "made"],
    ["convert", "parquet", "--template", "{t}", "--input", "PATH", "--output", "made"],
    ["examples", "PATH"],
    ["bundle", "verify", "PATH"],
    ["bundle", "install", "PATH"],
    ["image", "info", "PATH"],
    ["image", "sign", "PATH"],
    ["models", "import", "PATH"],
    ["models", "import", "--gguf", "PATH", "--name", "m:1"],
    ["models", "import", "--gguf", "q.jsonl", "--name", "m:1", "--template", "PATH"],
    ["report", "PATH"],
    ["logs", "PATH"],
    ["resume", "PATH"],
    ["merge", "PATH"],
    ["cancel", "PATH"],
    ["watch", "PATH"],
    ["estimate", "PATH", "--engine-url", "http://127.0.0.1:9", "--output", "made.json"],
    ["run", "--input", "q.jsonl", "--output", "made.json", "--image", "PATH", "--dry-run"],
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("text\na\n", encoding="utf-8")
    assert main([*CSV, "--input", "t.csv", "--model", "m:1", "--output", "q.jsonl"]) == 0
    entry = '{"input": {"custom_id": "1", "body": {}}, "output": {"choices": []}, "metadata": {}}'
    (tmp_path / "o.json").write_text(f"[\n{entry}\n]\n", encoding="utf-8")
    (tmp_path / "closed").mkdir(0o700)
    (tmp_path / "closed").chmod(0)
    (tmp_path / "loop").symlink_to("loop")
    yield tmp_path
    (tmp_path / "closed").chmod(0o700)


PATHS = ["n" * 300, f"{'n' * 300}/x", "closed/x", "loop", "gone/x", "t.csv/x"]


@pytest.mark.ordinary_user
def test_a_path_that_cannot_be_reached(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.iterdir())
    capsys.readouterr()
    for command, path in product(COMMANDS, PATHS):
        if path in ("loop", "gone/x") and ("PATH.json" in command or "examples" in command):
            continue  # another name, and a directory that the command makes
        if path == "loop" and command[-2:] == ["--output", "PATH"]:
            continue  # a broken link is replaced
        words = [word.replace("PATH", path) for word in command]
        assert main(words) == 2, words
        printed = capsys.readouterr().err
        assert "Traceback" not in printed, words
        assert printed.startswith("error: "), words
        assert "  -> " in printed, words
    assert sorted(place.iterdir()) == before
