"""An input that changes after the run was planned: no output is written and no answer lost."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aiflux.core.runs.journal import scan_journal
from aiflux.core.runs.output import merge, merge_partial
from aiflux.errors import AifluxError, ExitCode, StoppedError
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.core.runs.test_output import opened, write_journals
from tests.unit.helpers import request_line
from tests.unit.working import Working

CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "cut": (lambda lines: lines[:-1], "is shorter than when the run was planned: 5 requests"),
    "more": (
        lambda lines: [*lines, request_line("new").encode()],
        "is longer .* 7 requests instead of 6; line 7 .new. is the first that differs",
    ),
    "reordered": (lambda lines: [lines[1], lines[0], *lines[2:]], "reordered"),
    "edited": (
        lambda lines: [*lines[:2], lines[2].replace(b"say", b"cry"), *lines[3:]],
        "was edited .*; line 3 .r2. is the first that differs",
    ),
    "repeated": (lambda lines: [lines[0], lines[0], *lines[2:]], "was edited or reordered"),
    "endings": (lambda lines: [line + b"\r" for line in lines], "has other line endings"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_change_is_named_and_the_answers_are_kept(
    tmp_path: Path, change: str, name: str, shards: int
) -> None:
    source = tmp_path / "in.jsonl"
    lines = [request_line(f"r{number}").encode() for number in range(6)]
    source.write_bytes(b"\n".join(lines) + b"\n")
    run = Working(tmp_path, "http://127.0.0.1:1", name).open(shards=shards)
    write_journals(run, [2] * 6, 0)
    edit, reported = CHANGES[change]
    source.write_bytes(b"\n".join(edit(lines)) + b"\n")
    for write in (
        lambda: merge(run.plan, run.run, print),
        lambda: merge_partial(run.plan, run.run),
    ):
        with pytest.raises(StoppedError, match="no output was written") as caught:
            write()
        assert caught.value.exit_code == ExitCode.STOPPED
        assert "aiflux merge" in str(caught.value.remedy)
    with pytest.raises(StoppedError, match=reported):
        merge(run.plan, run.run, print)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", f"{name}.aiflux"}
    source.write_bytes(b"\n".join(lines) + b"\n")
    assert merge(run.plan, run.run, print).total == 6


@settings(max_examples=25)
@given(data=st.data(), shards=st.integers(1, 4))
def test_any_change_prevents_the_output(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shards: int
) -> None:
    run = opened(tmp_path_factory.mktemp("changed"), 8, shards)
    write_journals(run, [2] * 8, 0)
    source = run.plan.input_path
    before = source.read_bytes()
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(before))] * 2)))
    part = data.draw(st.sampled_from([b"", b"\n", b"x", before[:start], before[end:]]))
    after = before[:start] + part + before[end:]
    assume([line for line in after.splitlines() if line] != before.split(b"\r\n\n"))
    assume(after != before)
    source.write_bytes(after)
    with pytest.raises(StoppedError):
        merge(run.plan, run.run, print)
    assert not run.plan.output.exists()
    source.write_bytes(before)
    assert merge(run.plan, run.run, print).total == 8


def test_a_deleted_input_is_reported_as_missing(tmp_path: Path) -> None:
    run = opened(tmp_path, 5, 1)
    write_journals(run, [2] * 5, 0)
    kept = tmp_path / "kept.jsonl"
    run.plan.input_path.rename(kept)
    for write in (
        lambda: merge(run.plan, run.run, print),
        lambda: merge_partial(run.plan, run.run),
    ):
        with pytest.raises(StoppedError, match=r"in\.jsonl no longer exists") as caught:
            write()
        assert "restore the input" in str(caught.value.remedy)
        assert "make room" not in str(caught.value)
    kept.rename(run.plan.input_path)
    assert merge(run.plan, run.run, print).total == 5


def test_an_input_replaced_by_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    run = opened(tmp_path, 6, 1)
    write_journals(run, [2] * 6, 0)
    content = run.plan.input_path.read_bytes()
    run.plan.input_path.unlink()
    os.mkfifo(run.plan.input_path)
    with pytest.raises(AifluxError, match="a pipe or a device instead of a file") as caught:
        merge(run.plan, run.run, print)
    assert caught.value.exit_code == ExitCode.STOPPED
    assert not run.plan.output.exists()
    run.plan.input_path.unlink()
    run.plan.input_path.write_bytes(content)
    assert merge(run.plan, run.run, print).total == 6


@pytest.mark.parametrize("left", [7, 0])
def test_an_input_truncated_while_requests_are_in_flight_stops_the_run(
    tmp_path: Path, left: int
) -> None:
    with FaultyEngine(delay=0.5) as engine:
        working = Working(tmp_path, engine.url, concurrency=20).prompts(*map(str, range(20)))
        lines = working.input.read_bytes().splitlines(keepends=True)

        def cut() -> None:
            while engine.most < 20:
                time.sleep(0.005)
            working.input.write_bytes(b"".join(lines[:left]))

        thread = threading.Thread(target=cut, daemon=True)
        thread.start()
        assert working.run() is ExitCode.STOPPED
        thread.join()
        assert "is shorter" in str(working.error)
        assert not working.output.exists()
        assert working.status["status"] == "cancelled"
        assert scan_journal(working.journal).done == 20
        working.input.write_bytes(b"".join(lines))
        assert working.run() is ExitCode.OK
    assert len(working.results) == 20
    assert set(engine.seen.values()) == {1}


def test_an_input_edited_before_all_lines_are_read_stops_the_run(tmp_path: Path) -> None:
    """The worker reads a file that differs from the planned one; its lines are not requests."""
    prompts = [f"{number} " + "x" * 100_000 for number in range(30)]
    with FaultyEngine(delay=0.01) as engine:
        working = Working(tmp_path, engine.url, concurrency=1).prompts(*prompts)
        whole = working.input.read_bytes()

        def edit() -> None:
            while not engine.seen:
                time.sleep(0.002)
            os.truncate(working.input, 0)
            working.input.write_bytes(b"y" * len(whole))

        thread = threading.Thread(target=edit, daemon=True)
        thread.start()
        assert working.run() is ExitCode.STOPPED
        thread.join()
        assert "changed while it was processed" in str(working.error)
        working.input.write_bytes(whole)
        assert working.run() is ExitCode.OK
    assert len(working.results) == 30


def test_an_input_edited_in_place_before_the_start_is_refused(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("one", "two")
        working.open()
        before = working.input.read_text(encoding="utf-8")
        working.input.write_text(before.replace("two", "owt"), encoding="utf-8")
        assert working.shard(0) is ExitCode.USAGE
        assert "was edited" in str(working.error)
        assert not engine.seen
        working.input.write_text(before, encoding="utf-8")
        assert working.shard(0) is ExitCode.OK, "its time stamp alone is no change"


def test_lines_that_moved_to_another_shard_keep_their_answers(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("one", "two", "six", "ten")
        working.open(shards=2)
        assert working.shard(0) is ExitCode.OK
        lines = working.input.read_bytes().splitlines(keepends=True)
        working.input.write_bytes(b"".join(reversed(lines)))
        for shard in working.open(shards=2).open_shards:
            assert working.shard(shard) is ExitCode.OK
    assert set(engine.seen.values()) == {1}
    names = [json.loads(line)["custom_id"] for line in reversed(lines)]
    assert [entry["input"]["custom_id"] for entry in working.results] == names


@pytest.mark.parametrize("name", ["out.json", "out.jsonl", "out.errors.jsonl"])
def test_an_output_created_by_others_meanwhile_is_kept(tmp_path: Path, name: str) -> None:
    output = "out.json" if name == "out.json" else "out.jsonl"
    made = opened(tmp_path, 3, 1, output)
    write_journals(made, [2, 2, 2], 0)
    (tmp_path / name).write_text("theirs", encoding="utf-8")
    with pytest.raises(StoppedError, match="created by others"):
        merge(made.plan, made.run, lambda _: None)
    assert (tmp_path / name).read_text(encoding="utf-8") == "theirs"
    (tmp_path / name).unlink()
    assert merge(made.plan, made.run, lambda _: None).total == 3
