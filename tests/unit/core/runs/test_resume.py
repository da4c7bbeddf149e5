"""Resuming a run that was cut off anywhere: every request has one result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.core.runs.journal import scan_journal
from aiflux.errors import ExitCode
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
