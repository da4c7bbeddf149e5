"""The same command several times at once: one start runs, the others are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.open import draft_run
from aiflux.engines.kinds import kind_named
from aiflux.errors import RunConflictError
from aiflux.util.lease import acquire
from aiflux.worker.shard import Context, work
from tests.tools import at_once
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import write_input
from tests.unit.working import Working


def one_runs(place: Path, starts: int) -> None:
    """Start the command several times; one start does the work, the others exit with code 2."""
    write_input(place / "in.jsonl", 12)
    with FaultyEngine(delay=0.05) as engine:
        done = subprocess.run(
            [sys.executable, at_once.__file__, str(place), engine.url, str(starts)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    codes = json.loads(done.stdout)
    outputs = [(place / f"output-{number}").read_text(encoding="utf-8") for number in range(starts)]
    shown = "\n".join(f"{code}: {text}" for code, text in zip(codes, outputs, strict=True))
    assert set(codes) <= {0, 2}, shown
    assert 0 in codes, shown
    for code, text in zip(codes, outputs, strict=True):
        # Who comes when the run has ended already sees it finished.
        reasons = ("in use by process", "at the same time") if code else ("wrote", "finished")
        assert any(reason in text for reason in reasons), shown
    assert sum("wrote" in text for text in outputs) == 1, shown
    assert len(json.loads((place / "out.json").read_text(encoding="utf-8"))) == 12
    assert set(engine.seen.values()) == {1}


@pytest.mark.parametrize("turn", range(2))
def test_one_of_eight_concurrent_starts_runs(tmp_path: Path, turn: int) -> None:
    one_runs(tmp_path, 8)


def test_of_two_starts_with_the_same_plan_the_first_at_a_shard_runs(tmp_path: Path) -> None:
    """A plan that another start wrote before this one's lease does not end this one."""
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("one", "two")
        first, second = working.open(), working.open()
        context = Context(working.reporter, working.stopper)
        with (
            acquire(second.run.lease(0), "the shard"),
            pytest.raises(RunConflictError, match="in use by process"),
        ):
            work(second.plan, second.run, 0, context)
        work(first.plan, first.run, 0, context)
    assert len(working.results) == 2


def test_a_draft_made_before_the_run_ended_is_refused(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("one", "two")
        begun = working.open()
        late = draft_run(
            working.input,
            working.output,
            RunOptions(**working.options),
            None,
            kind_named("external"),
        )
        work(begun.plan, begun.run, 0, Context(working.reporter, working.stopper))
        written = working.output.stat().st_ino
        with pytest.raises(RunConflictError, match="at the same time"):
            late.open()
        assert working.output.stat().st_ino == written


def test_a_draft_made_before_another_start_began_the_run_is_refused(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("one", "two")
        late = draft_run(
            working.input,
            working.output,
            RunOptions(**working.options),
            None,
            kind_named("external"),
        )
        assert working.run() == 0
        with pytest.raises(RunConflictError, match="at the same time"):
            late.open()
        assert working.open().finished
