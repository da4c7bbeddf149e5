"""A run in shards: split, split again, and merged once by the last one."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import scan_journal
from aiflux.core.runs.open import draft_run, mend_journals, recut_journals
from aiflux.core.runs.output import merge, merge_partial, merge_when_last
from aiflux.core.runs.plan import auto_shards, read_plan
from aiflux.core.runs.status_file import Counts, Status, open_shards, read_run_status
from aiflux.engines.kinds import kind_named
from aiflux.errors import (
    ExitCode,
    InputError,
    RunConflictError,
    StoppedError,
    TooManyFailuresError,
)
from aiflux.util.lease import acquire
from aiflux.worker.main import main
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import write_input
from tests.unit.working import Working

PROMPTS = [f"prompt {index}" for index in range(24)]


def answered(working: Working) -> list[str]:
    return [entry["output"]["choices"][0]["message"]["content"] for entry in working.results]


def run_of(working: Working) -> RunDirectory:
    return RunDirectory.of_output(working.output)


def test_the_last_shard_writes_the_output(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts(*PROMPTS)
        opened = working.open(shards=4)
        assert opened.open_shards == (0, 1, 2, 3)
        for index in (2, 0, 3):
            assert working.shard(index) is ExitCode.OK
            assert not working.output.exists()
        assert open_shards(opened.plan, opened.run) == (1,)
        assert working.shard(1) is ExitCode.OK
    assert answered(working) == [f"echo {prompt}" for prompt in PROMPTS]
    assert set(engine.seen.values()) == {1}
    whole = read_run_status(run_of(working))
    assert whole is not None
    assert whole.completed
    assert whole.counts == Counts(24, 24, 0)
    assert working.open(shards=4).finished


def test_a_failed_shard_leaves_the_rest_usable(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts(*PROMPTS)
        opened = working.open(shards=3)
        assert working.shard(0) is ExitCode.OK
        assert working.shard(2) is ExitCode.OK
        with pytest.raises(StoppedError, match="have no result"):
            merge(opened.plan, opened.run, print)
        assert not working.output.exists()
        path, counts = merge_partial(opened.plan, opened.run)
        assert path.name == "out.partial.json"
        names = [entry["input"]["custom_id"] for entry in json.loads(path.read_text("utf-8"))]
        assert len(names) == counts.total == 16
        assert names == [f"{i}:{PROMPTS[i]}" for i in (*range(8), *range(16, 24))]
        again = working.open(shards=3)
        assert again.open_shards == (1,)
        assert working.shard(1) is ExitCode.OK
    assert len(answered(working)) == 24
    assert set(engine.seen.values()) == {1}


def test_failures_are_allowed_for_the_run_not_for_the_shard(tmp_path: Path) -> None:
    prompts = ["400", *PROMPTS[:4], "400", *PROMPTS[4:8]]
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, max_failures="1").prompts(*prompts)
        working.open(shards=2)
        assert working.shard(0) is ExitCode.OK, "one of ten: allowed so far"
        assert working.shard(1) is ExitCode.FAILURES, "the second: too many in all"
    assert isinstance(working.error, TooManyFailuresError)
    assert working.error.message.startswith("2 of 10 requests failed (1 allowed")


@given(
    cuts=st.lists(st.integers(1, 30), min_size=2, max_size=4),
    done=st.sets(st.integers(0, 23)),
    edited=st.sets(st.integers(0, 23)),
)
def test_resharding_loses_no_result(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], done: set[int], edited: set[int]
) -> None:
    place = tmp_path_factory.mktemp("cut")
    working = Working(place, "http://127.0.0.1:1").prompts(*PROMPTS)
    first = working.open(shards=cuts[0])
    lines = working.input.read_bytes().splitlines()
    write_results(first.plan, first.run, [lines[index] for index in sorted(done)])
    for number in cuts[1:]:
        if number == cuts[-1]:
            texts = [f"{text} edited" if i in edited else text for i, text in enumerate(PROMPTS)]
            working.prompts(*texts)
        opened = working.open(shards=number)
        found = [scan_journal(opened.run.journal(s.index)).done for s in opened.plan.shards]
        assert sum(found) == len(done)
    _, counts = merge_partial(opened.plan, opened.run)
    assert counts.total == len(done - edited)


def write_results(plan, run, lines) -> None:  # type: ignore[no-untyped-def]
    """Write a result for each request line to the journal of its shard."""
    from aiflux.core.batch.request import request_key
    from aiflux.core.runs.journal import JournalWriter, NewResult
    from aiflux.util.lines import read_lines

    for shard in plan.shards:
        writer = JournalWriter(run.journal(shard.index))
        for _, _, raw in read_lines(plan.input_path, shard.start, shard.end):
            if raw in lines:
                name = json.loads(raw)["custom_id"]
                writer.append(NewResult(request_key(raw), name, 200, {}, None, b"{}"))
        writer.close()


@pytest.mark.parametrize("crash", ["before", "between", "after"])
def test_a_crash_during_resharding_leaves_one_complete_set_of_journals(
    tmp_path: Path, crash: str
) -> None:
    working = Working(tmp_path, "http://127.0.0.1:1").prompts(*PROMPTS)
    opened = working.open(shards=2)
    write_results(opened.plan, opened.run, working.input.read_bytes().splitlines())
    run = opened.run.path
    if crash == "before":
        (run / "journal.new").mkdir()
        (run / "journal.new" / "shard-0000.jsonl").write_text("half a l")
    else:
        recut_journals(opened.plan, opened.run)
        (run / "journal").rename(run / ("journal.new" if crash == "between" else "journal.tmp"))
        if crash == "between":
            (run / "journal.old").mkdir()
        else:
            (run / "journal.tmp").rename(run / "journal")
            (run / "journal.old").mkdir()
    mend_journals(opened.run)
    assert sorted(path.name for path in run.glob("journal*")) == ["journal"]
    assert sum(scan_journal(opened.run.journal(i)).done for i in (0, 1)) == 24
    assert working.open(shards=3).resumed


def test_one_of_several_shards_that_end_together_writes_the_output(tmp_path: Path) -> None:
    working = Working(tmp_path, "http://127.0.0.1:1").prompts(*PROMPTS)
    opened = working.open(shards=8)
    plan, run = opened.plan, opened.run
    write_results(plan, run, working.input.read_bytes().splitlines())
    gate, came = threading.Barrier(8), []

    def end(shard: int) -> None:
        gate.wait()
        status = Status(run.status(shard), plan, shard)
        came.append(merge_when_last(plan, run, shard, status, lambda _: None))

    threads = [threading.Thread(target=end, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(counts is not None and counts.total == 24 for counts in came)
    assert len(working.results) == 24
    assert not list(tmp_path.glob(".out.json*")), "no temporary file is left"
    written = working.output.stat().st_ino
    assert merge(plan, run, print).total == 24
    assert working.output.stat().st_ino == written, "a second merge has nothing to do"
    merge(plan, run, print, again=True)
    assert working.output.stat().st_ino != written


def test_a_plan_is_not_changed_while_a_worker_runs(tmp_path: Path) -> None:
    working = Working(tmp_path, "http://127.0.0.1:1").prompts(*PROMPTS)
    opened = working.open(shards=2)
    with (
        acquire(opened.run.lease(1), "the shard"),
        pytest.raises(RunConflictError, match=f"in use by process {os.getpid()}"),
    ):
        working.open(shards=3)
    assert working.open(shards=3).plan.shards != opened.plan.shards


def test_a_worker_does_not_start_while_its_plan_changes(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts(*PROMPTS)
        working.open(shards=2)
        run = run_of(working)
        ended: list[ExitCode] = []
        lease = acquire(run.plan_lease, "the plan")
        thread = threading.Thread(target=lambda: ended.append(working.shard(0)))
        thread.start()
        time.sleep(0.5)
        assert not engine.seen
        content = json.loads(run.plan.read_text("utf-8"))
        other = {"created": "later", "options": {**content["options"], "max_retries": 7}}
        run.plan.write_text(json.dumps({**content, **other}), encoding="utf-8")
        lease.release()
        thread.join()
    assert ended == [ExitCode.USAGE]
    assert "planned again" in str(working.error)
    assert not engine.seen


def test_an_input_that_changed_is_refused(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts(*PROMPTS)
        working.open(shards=2)
        working.prompts(*PROMPTS, "one more")
        assert working.shard(0) is ExitCode.USAGE
        assert isinstance(working.error, InputError)
        working.input.unlink()
        assert working.shard(0) is ExitCode.USAGE
    assert "no longer exists" in str(working.error)
    assert not engine.seen


def test_an_end_of_time_requests_a_requeue(tmp_path: Path) -> None:
    with FaultyEngine(delay=0.1) as engine:
        working = Working(tmp_path, engine.url, max_requeues=1, concurrency=1).prompts(*PROMPTS)
        working.open()
        mark = run_of(working).requeue_mark(0)
        for start, asks in ((1, True), (2, False)):
            working.stopper = type(working.stopper)()
            working.stop_soon("signal SIGUSR1", time_is_up=True)
            assert working.shard(0) is ExitCode.STOPPED
            assert mark.exists() is asks, f"start {start}"
            mark.unlink(missing_ok=True)
            assert working.status["aiflux"]["exit_code"] == 5
    assert working.status["aiflux"]["requeues"] == 1
    assert working.status["aiflux"]["totals"]["starts"] == 2


def test_a_job_that_goes_back_to_the_queue_prints_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with FaultyEngine(delay=0.1) as engine:
        working = Working(tmp_path, engine.url, max_requeues=1, concurrency=1).prompts(*PROMPTS)
        run = str(working.open().run.path)
        for error in (False, True):  # the second time, the job is not requeued any more
            stopper = working.stopper = type(working.stopper)()
            working.stop_soon("the job's time is nearly over", time_is_up=True)
            assert main(["--run-dir", run], stopper) == 5
            printed = capsys.readouterr().err
            assert "stopped (the job's time is nearly over) with" in printed
            assert ("error: " in printed) is error
            assert ("run the same command again" in printed) is error
            assert (working.status["aiflux"].get("remedy") is not None) is error


def test_a_start_without_progress_requests_no_requeue(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, drain_seconds=0.1).prompts("hang")
        working.open()
        threading.Timer(0.5, lambda: working.stopper.stop("time", time_is_up=True)).start()
        assert working.shard(0) is ExitCode.STOPPED
    assert not run_of(working).requeue_mark(0).exists()
    assert any("request more time" in text for text in working.reporter.messages)


def test_a_plain_signal_requests_no_requeue(tmp_path: Path) -> None:
    with FaultyEngine(delay=0.1) as engine:
        working = Working(tmp_path, engine.url, concurrency=1).prompts(*PROMPTS)
        working.open()
        working.stop_soon("signal SIGTERM")
        assert working.shard(0) is ExitCode.STOPPED
    assert not run_of(working).requeue_mark(0).exists()


def test_auto_shards_fit_half_the_time(tmp_path: Path) -> None:
    working = Working(tmp_path, "http://127.0.0.1:1").prompts(*PROMPTS, max_tokens=100_000)
    seen = []
    working.open(shards=lambda summary: seen.append(summary) or 1)
    assert 100_000 <= seen[0].mean_tokens < 101_000
    assert auto_shards(seen[0], 3600 * 24) == 1
    assert auto_shards(seen[0], 800) == 7
    assert auto_shards(seen[0], 1) == len(PROMPTS), "never more shards than requests"


def test_a_plan_of_many_shards_covers_the_input_once(tmp_path: Path) -> None:
    working = Working(tmp_path, "http://127.0.0.1:1").prompts(*PROMPTS)
    opened = working.open(shards=7)
    shards = read_plan(opened.run).shards
    assert [shard.start for shard in shards[1:]] == [shard.end for shard in shards[:-1]]
    assert (shards[0].start, shards[-1].end) == (0, working.input.stat().st_size)
    assert sum(shard.requests for shard in shards) == len(PROMPTS)
    assert max(s.requests for s in shards) - min(s.requests for s in shards) <= 1


def test_a_plan_of_another_version_is_not_changed(tmp_path: Path) -> None:
    working = Working(tmp_path, "http://127.0.0.1:1").prompts(*PROMPTS)
    run = working.open(shards=2).run
    content = json.loads(run.plan.read_text("utf-8"))
    content["options"]["hologram"] = True
    run.plan.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunConflictError, match="options hologram are not known here") as caught:
        read_plan(run)
    assert "rm " not in str(caught.value.remedy)
    del content["options"]["hologram"]
    content["options"].update(engine="warp", engine_url=None)
    run.plan.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunConflictError, match="another AI-Flux, or is damaged: engine = 'warp'"):
        read_plan(run)
    run.plan.write_text("{", encoding="utf-8")
    with pytest.raises(RunConflictError, match="damaged") as caught:
        read_plan(run)
    assert "rm " not in str(caught.value.remedy), "the journal next to it has results"


@pytest.mark.parametrize("kind", ["ollama", "external"])
def test_a_plan_from_before_engines_had_names_is_the_same_run(tmp_path: Path, kind: str) -> None:
    """In such a plan an address means a server, and anything else Ollama."""
    source = write_input(tmp_path / "in.jsonl", 3, body={"model": "m", "messages": [{}]})
    options = RunOptions(engine_url="http://127.0.0.1:1" if kind == "external" else None)
    opened = draft_run(source, tmp_path / "o.json", options, tmp_path, kind_named(kind)).open()
    content = json.loads(opened.run.plan.read_text(encoding="utf-8"))
    assert content["options"].pop("engine") == kind
    assert content.pop("served") == (["m"] if kind == "external" else ["m:latest"])
    opened.run.plan.write_text(json.dumps(content), encoding="utf-8")
    assert read_plan(opened.run) == opened.plan
    assert read_plan(opened.run).id == content["id"]


def test_another_engine_is_another_run(tmp_path: Path) -> None:
    with FaultyEngine(delay=0.02) as engine:
        working = Working(tmp_path, engine.url, concurrency=1).prompts(*PROMPTS)
        working.stop_soon(results=1)
        assert working.run() is ExitCode.STOPPED
    arguments = working.input, working.output, RunOptions(), tmp_path, kind_named("ollama")
    with pytest.raises(RunConflictError, match=r"engine external.*this run has engine ollama"):
        draft_run(*arguments).open()
    assert draft_run(*arguments, force_resume=True).open().resumed


def test_a_finished_run_is_restarted_with_other_settings(tmp_path: Path) -> None:
    """Nothing is mixed then; an unfinished run keeps its results and is refused."""
    with FaultyEngine() as engine:
        assert Working(tmp_path, engine.url).prompts("a", "b").run() is ExitCode.OK
        again = Working(tmp_path, engine.url, samples=2)
        assert again.run() is ExitCode.USAGE
        assert isinstance(again.error, RunConflictError)
        assert len(engine.bodies) == 2
        assert again.run(force=True) is ExitCode.OK
        assert [len(each["output"]["choices"]) for each in again.results] == [2, 2]
    with FaultyEngine(delay=0.02) as engine:
        begun = Working(tmp_path, engine.url, "begun.json", concurrency=1).prompts(*PROMPTS)
        begun.stop_soon(results=1)
        assert begun.run() is ExitCode.STOPPED
        begun.options["samples"] = 2
        assert begun.run(force=True) is ExitCode.USAGE
        assert isinstance(begun.error, RunConflictError)
