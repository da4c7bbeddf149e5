"""Runs of another user, and runs that cannot be read: every command names the owner."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiflux.cli.main import main
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.working import Working

OTHER = 4242


def foreign(run: Path) -> None:
    """The directory of another user, with the permissions that AI-Flux gives it."""
    for path in [run, *run.rglob("*")][::-1]:
        os.chown(path, OTHER, OTHER)


def opened(run: Path) -> None:
    """Another user's, who lets others look into the directory, but not into the files."""
    for path in [run, *(each for each in run.rglob("*") if each.is_dir())]:
        path.chmod(0o755)
    foreign(run)


def closed(run: Path) -> None:
    """One's own, without any permission."""
    run.chmod(0)


def public(run: Path) -> None:
    """Another user's, who lets everybody read all of it."""
    for path in [run, *run.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    foreign(run)


READING = ("status", "status --json", "watch", "logs", "report", "report --json")
CHANGING = ("resume", "resume --local", "merge", "merge --partial", "cancel")


def commands(working: Working, run: Path, words: str) -> list[list[str]]:
    """Return a command with each name that the run has."""
    if words not in ("run", "estimate"):
        return [[*words.split(), str(name)] for name in (working.output, run)]
    url = str(working.options["engine_url"])
    paths = ["--input", str(working.input), "--output", str(working.output)]
    return [[words, "--engine-url", url, *paths]]


@pytest.fixture(params=["out.json", "out.jsonl"])
def working(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Working]:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, request.param).prompts("one")
        assert working.run() == 0
        yield working


@pytest.mark.ordinary_user
@pytest.mark.parametrize("state", [foreign, opened, closed])
def test_a_run_that_may_not_be_read(
    working: Working, capsys: pytest.CaptureFixture[str], state: Callable[[Path], None]
) -> None:
    run = Path(f"{working.output}.aiflux")
    state(run)
    for words in (*READING, *CHANGING, "run", "estimate"):
        for command in commands(working, run, words):
            assert main(command) == 2, command
            printed = capsys.readouterr()
            assert printed.out == "", command
            if state is closed:
                assert f"chmod u+rwX {run}" in printed.err, command
            else:
                assert f"user {OTHER}" in printed.err, command
    assert main(["results", "show", str(working.output)]) == 0
    assert "echo one" in capsys.readouterr().out
    assert main(["results", "to-jsonl", str(working.output), "--output", "-"]) == 0
    assert "echo one" in capsys.readouterr().out


@pytest.mark.ordinary_user
def test_a_run_of_another_user_that_may_be_read(
    working: Working, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(f"{working.output}.aiflux")
    public(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["merge", str(working.output)]) == 0
    assert "already finished" in capsys.readouterr().out
    changing = {*CHANGING, "merge --again", "run", "estimate"} - {"merge"}
    for words in sorted(changing):
        for command in commands(working, run, words):
            assert main(command) == 2, command
            assert f"user {OTHER}" in capsys.readouterr().err, command
    for words in ("status", "status --json", "report --json", "results show"):
        for command in commands(working, run, words):
            assert main(command) == 0, command
            capsys.readouterr()
    assert main(["report", str(working.output)]) == 2
    printed = capsys.readouterr().err
    assert f"user {OTHER}" in printed
    assert "--output" in printed
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
