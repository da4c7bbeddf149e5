"""``aiflux.chain``: the steps of a file, from Python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import aiflux
from aiflux.errors import ConfigError, RunConflictError, TooManyFailuresError
from tests.tools.faulty_engine import FaultyEngine

STEPS = """
source: in.csv
output: out.csv
model: m:1
max_retries: 0
steps:
  first:
    template: "answer:{text}"
  second:
    filter: first != "b"
    template: "{first}"
"""


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine() as engine:
        yield engine


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "steps.yaml").write_text(STEPS)
    return tmp_path


def chain(place: Path, engine: FaultyEngine, **more: object) -> Path:
    given = {"engine_url": engine.url, "workspace": place, "progress": False, **more}
    return aiflux.chain("steps.yaml", **given)  # type: ignore[arg-type]


def test_the_table_is_written_and_the_same_call_sends_nothing(
    place: Path, engine: FaultyEngine
) -> None:
    (place / "in.csv").write_text("text\na\nb\n")
    assert chain(place, engine) == place / "out.csv"
    assert (place / "out.csv").read_text() == "text,first,second\na,a,echo a\nb,b,\n"
    assert chain(place, engine) == place / "out.csv"
    assert engine.seen.total() == 3
    with pytest.raises(RunConflictError, match="step first changed since it was begun: model"):
        chain(place, engine, model="m:2")
    chain(place, engine, model="m:2", force=True)
    assert engine.bodies[-1]["model"] == "m:2"
    with pytest.raises(ConfigError, match="unknown"):
        chain(place, engine, modle="m:2")


def test_failures_are_raised_unless_they_are_allowed(place: Path, engine: FaultyEngine) -> None:
    (place / "in.csv").write_text("text\na\n400*1\n")
    with pytest.raises(TooManyFailuresError):
        chain(place, engine)
    assert not (place / "out.csv").exists()
    chain(place, engine, retry_failed=True)
    assert (place / "out.csv").read_text().splitlines()[1] == "a,a,echo a"
