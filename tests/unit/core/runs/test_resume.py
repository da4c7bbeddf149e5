"""Resuming a run that was cut off anywhere: every request has one result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.api.report import read_report
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import scan_journal
from aiflux.core.runs.status_file import requests_left
from aiflux.errors import ExitCode
from aiflux.slurm.monitor import gather
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.working import Working

PROMPTS = [f"prompt {index}" for index in range(12)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose journal is then cut off at any byte."""
    place = tmp_path_factory.mktemp("finished")
    with FaultyEngine() as engine:
        assert Working(place, engine.url).prompts(*PROMPTS).run() is ExitCode.OK
    return place


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_run_cut_anywhere_resumes_with_each_request_once(
    finished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    place = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(finished, place)
    journal = Working(place, "http://127.0.0.1:1").journal
    content = journal.read_bytes()
    cut = data.draw(st.integers(0, len(content)), label="cut")
    journal.write_bytes(content[:cut])
    kept = scan_journal(journal).done
    (place / "out.json").unlink()
    # The plan names the input by its path, so the copy's own plan has to be made again.
    shutil.rmtree(place / "out.json.aiflux" / "status")
    (place / "out.json.aiflux" / "status").mkdir()
    plan = place / "out.json.aiflux" / "plan.json"
    plan.write_text(plan.read_text("utf-8").replace(str(finished), str(place)), "utf-8")
    edited = data.draw(st.sets(st.sampled_from(range(len(PROMPTS)))), label="edited")
    prompts = [f"{text} edited" if i in edited else text for i, text in enumerate(PROMPTS)]
    with FaultyEngine() as engine:
        working = Working(place, engine.url).prompts(*prompts)
        plan.write_text(_with_url(plan.read_text("utf-8"), engine.url), "utf-8")
        assert working.run() is ExitCode.OK
    texts = [e["output"]["choices"][0]["message"]["content"] for e in working.results]
    assert texts == [f"echo {prompt}" for prompt in prompts]
    assert set(engine.seen.values()) <= {1}
    assert len(engine.seen) >= len(PROMPTS) - kept
    assert len(engine.seen) <= len(PROMPTS) - kept + len(edited)


def _with_url(plan: str, url: str) -> str:
    import json

    content = json.loads(plan)
    content["options"]["engine_url"] = url
    return json.dumps(content)


def _sums(working: Working) -> tuple[int, int, int]:
    """Return prompt tokens, answer tokens and starts of a run, on which all views agree."""
    run = RunDirectory.of_output(working.output)
    view, report = gather(run), read_report(run)
    assert (view.prompt_tokens, view.completion_tokens) == (
        report.tokens.prompt,
        report.tokens.completion,
    )
    assert view.restarts == report.times.starts - len(view.shards)
    return view.prompt_tokens, view.completion_tokens, report.times.starts


@pytest.mark.parametrize("how", ["retried", "row changed", "row added", "row removed"])
def test_the_sums_cover_the_starts_before_the_run_was_planned_again(
    tmp_path: Path, how: str
) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, max_retries=0, max_failures="1")
        assert working.prompts("500*1", "one", "two").run() is ExitCode.OK
        assert _sums(working) == (6, 10, 1)
        working.options["retry_failed"] = how == "retried"
        rows = {
            "retried": ("500*1", "one", "two"),
            "row changed": ("500*1", "one", "three"),
            "row added": ("500*1", "one", "two", "three"),
            "row removed": ("500*1", "one"),
        }
        opened = working.prompts(*rows[how]).open(force=True)
        sent = {"row removed": 0}.get(how, 1)
        assert requests_left(opened.plan, opened.run, opened.open_shards) == sent
        assert gather(opened.run).prompt_tokens == 6
        assert working.shard(0) is ExitCode.OK
    assert _sums(working) == (6 + 3 * sent, 10 + 5 * sent, 2)


def test_the_sums_of_all_shards_are_kept_when_their_number_changes(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts(*PROMPTS)
        working.open(shards=3)
        assert [working.shard(index) for index in (0, 2)] == [ExitCode.OK] * 2
        opened = working.open(shards=2)
        assert requests_left(opened.plan, opened.run, opened.open_shards) == 4
        assert [working.shard(index) for index in (0, 1)] == [ExitCode.OK] * 2
    assert _sums(working) == (3 * 12, 5 * 12, 4)


def test_a_restarted_run_begins_its_sums_again(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("one", "two")
        assert [working.run(), working.run(force=True)] == [ExitCode.OK] * 2
    assert _sums(working) == (6, 10, 1)
