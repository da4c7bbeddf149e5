"""The end of a run: the journals decide, and exit code 0 means a complete output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.output import merge, merge_when_last
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import Status, read_run_status
from aiflux.errors import AifluxError, ExitCode, StorageError
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.core.runs.test_output import opened, write_journals
from tests.unit.working import Working

PROMPTS = [f"prompt {index}" for index in range(8)]
# A file that can be opened, and whose first byte the kernel refuses with EIO.
EIO = Path("/proc/self/mem")


def test_an_absent_status_differs_from_an_unreadable_one(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert read_run_status(run) is None, "the run directory does not exist"
    run.create()
    assert read_run_status(run) is None
    run.run_status.symlink_to(EIO)
    with pytest.raises(StorageError, match=r"cannot read .*run\.json: Input/output error"):
        read_run_status(run)
    run.run_status.unlink()
    run.run_status.symlink_to(run.run_status)
    with pytest.raises(StorageError, match="symbolic links"):
        read_run_status(run)
    run.run_status.unlink()
    run.run_status.mkdir()
    with pytest.raises(StorageError, match="is a directory instead of a file"):
        read_run_status(run)
    run.run_status.rmdir()
    os.mkfifo(run.run_status)
    with pytest.raises(StorageError, match="is a pipe"):
        read_run_status(run)


_LIMITED = """
import os, resource, sys
from pathlib import Path
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.status_file import read_run_status
from aiflux.errors import AifluxError
kind, run = sys.argv[1], RunDirectory(Path(sys.argv[2]))
if kind == "files":
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1,) * 2)
elif os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    print(read_run_status(run))
except AifluxError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("kind", "words"),
    [("files", "Too many open files"), ("permission", "Permission denied")],
)
def test_a_status_unreadable_for_lack_of_files_or_permission_is_an_error(
    tmp_path: Path, kind: str, words: str
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.run_status.write_text("{}")
    if kind == "permission":
        run.run_status.chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, kind, str(run.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.STOPPED, done.stderr
    assert words in done.stdout
    assert "->" in done.stdout


def test_an_unreadable_status_at_the_end_is_not_a_success(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts(*PROMPTS)
        run = working.open(shards=2).run
        assert working.shard(1) is ExitCode.OK
        kept = run.status(1).read_bytes()
        run.status(1).unlink()
        run.status(1).symlink_to(EIO)
        assert working.shard(0) is ExitCode.STOPPED
        assert "Input/output error" in str(working.error)
        assert not working.output.exists()
        run.status(1).unlink()
        run.status(1).write_bytes(kept)
        assert working.shard(0) is ExitCode.OK
    assert len(working.results) == 8
    assert set(engine.seen.values()) == {1}


@pytest.mark.parametrize("stale", ["absent", "as it was"])
def test_a_shard_that_just_ended_is_recognized_by_its_mark(tmp_path: Path, stale: str) -> None:
    """Another node's cache can show no status, or an old one, for a minute."""
    run = opened(tmp_path, 6, 3)
    write_journals(run, [2] * 6, 0)
    ended = []
    for shard in (2, 0, 1):
        status = Status(run.run.status(shard), run.plan, shard)
        ended.append(merge_when_last(run.plan, run.run, shard, status, lambda _: None))
        if stale == "absent":
            run.run.status(shard).unlink()
        else:
            status.enter("in_progress")
    assert [counts is not None for counts in ended] == [False, False, True]
    assert len(json.loads(run.plan.output.read_bytes())) == 6


def test_a_mark_left_by_a_killed_process_is_ignored(
    tmp_path: Path,
) -> None:
    run = opened(tmp_path, 6, 2)
    write_journals(run, [2] * 6, 0)
    run.run.done_mark(1, run.plan.id).touch()
    for shard, last in ((0, False), (1, True)):
        status = Status(run.run.status(shard), run.plan, shard)
        counts = merge_when_last(run.plan, run.run, shard, status, lambda _: None)
        assert (counts is not None) is last


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two shards."""
    place = tmp_path_factory.mktemp("finished")
    with FaultyEngine() as engine:
        working = Working(place, engine.url).prompts(*PROMPTS)
        working.open(shards=2)
        assert [working.shard(index) for index in (0, 1)] == [ExitCode.OK, ExitCode.OK]
    return place


def copy_of(finished: Path, place: Path, url: str) -> Working:
    """Return a copy of the finished run, with its paths and engine adapted."""
    shutil.copytree(finished, place)
    plan = place / "out.json.aiflux" / "plan.json"
    content = json.loads(plan.read_text(encoding="utf-8").replace(str(finished), str(place)))
    content["options"]["engine_url"] = url
    plan.write_text(json.dumps(content), encoding="utf-8")
    return Working(place, url)


def all_shards(working: Working, *, force: bool) -> ExitCode:
    """Repeat `aiflux run`: process open requests, or write the output."""
    working.error = None
    try:
        run = working.open(shards=2, force=force)
    except AifluxError as error:
        working.error = error
        return error.exit_code
    for shard in run.open_shards:
        if (code := working.shard(shard)) is not ExitCode.OK:
            return code
    return by_hand(working) if not run.open_shards and not run.finished else ExitCode.OK


def by_hand(working: Working) -> ExitCode:
    """Run `aiflux merge`."""
    run = RunDirectory.of_output(working.output)
    try:
        merge(read_plan(run), run, lambda _: None)
    except AifluxError as error:
        working.error = error
        return error.exit_code
    return ExitCode.OK


def whole(working: Working) -> bool:
    answers = [entry["output"]["choices"][0]["message"]["content"] for entry in working.results]
    return answers == [f"echo {prompt}" for prompt in PROMPTS]


def damage(path: Path, how: str, at: int) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    at %= max(1, len(content))
    if how == "gone":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        changed = {
            "cut": content[:at],
            "flipped": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
            "empty object": b"{}",
            "a list": b"[1]",
            "zeros": b"\0" * len(content),
        }
        path.write_bytes(changed[how])


FILES = ["plan.json", "journal/shard-0000.jsonl", "journal/shard-0001.jsonl", "status/run.json",
         "status/shard-0000.json", "status/shard-0001.json"]  # fmt: skip
HOW = ["gone", "folder", "cut", "empty object", "a list", "zeros", "flipped"]
Damage = list[tuple[str, str, int]]


@example(
    damaged=[(FILES[1], "cut", 1), (FILES[2], "gone", 0), (FILES[5], "gone", 0)],
    output=False,
    first=by_hand,
)
@example(
    damaged=[(FILES[1], "cut", 1), (FILES[2], "gone", 0), (FILES[5], "gone", 0)],
    output=False,
    first=lambda working: all_shards(working, force=False),
)
@settings(max_examples=30)
@given(
    damaged=st.lists(
        # A flipped bit in a plan can make another plan, which is no damage that shows.
        st.tuples(st.just(FILES[0]), st.sampled_from(HOW[:-1]), st.integers(0, 5000))
        | st.tuples(st.sampled_from(FILES[1:]), st.sampled_from(HOW), st.integers(0, 5000)),
        min_size=1,
        max_size=3,
        unique_by=lambda each: each[0],
    ),
    output=st.booleans(),
    first=st.sampled_from([by_hand, lambda working: all_shards(working, force=False)]),
)
def test_after_any_damage_the_named_commands_write_the_output(
    finished: Path,
    tmp_path_factory: pytest.TempPathFactory,
    damaged: Damage,
    output: bool,
    first: Callable[[Working], ExitCode],
) -> None:
    place = tmp_path_factory.mktemp("damaged") / "run"
    with FaultyEngine() as engine:
        working = copy_of(finished, place, engine.url)
        run = RunDirectory.of_output(working.output)
        for name, how, at in damaged:
            damage(run.path / name, how, at)
        if not output:
            working.output.unlink()
        code, force = first(working), False
        for _ in range(8):
            if code is ExitCode.OK:
                break
            words = str(working.error)
            assert code in (ExitCode.USAGE, ExitCode.STOPPED), words
            if "mv " in words:
                moved = next(p for p in (*run.path.rglob("*"), run.path) if f"{p} ELSE" in words)
                shutil.move(moved, place / "elsewhere" / str(len(words)) / moved.name)
            force = force or "--force to overwrite" in words
            assert "mv " in words or force or "same" in words or "check the path" in words
            code = all_shards(working, force=force)
        assert code is ExitCode.OK, words
        assert whole(working)
