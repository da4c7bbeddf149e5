"""The run directory: its owner, its files, and leftovers of killed starts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aiflux.cli.main import main as command_line
from aiflux.core.runs.output import merge, merge_partial
from aiflux.errors import AifluxError, ExitCode, RunConflictError, StorageError
from aiflux.slurm.submit import plan_resume
from aiflux.util.files import atomic_write, remove_leftovers
from aiflux.util.lease import acquire
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.core.runs.test_output import opened, write_journals
from tests.unit.made_runs import MadeRun
from tests.unit.working import Working


def to_another(path: Path) -> None:
    """Give the run directory to another user; only root can do this."""
    if os.geteuid() == 0:
        os.chown(path, 4242, -1)
    else:
        path.rename(path.with_suffix(".mine"))
        path.symlink_to("/usr")


@pytest.mark.parametrize(
    ("foreign", "words"),
    [
        (to_another, "belongs to another user"),
        (lambda path: path.chmod(0o770), "others can write .* \\(mode 0770\\)"),
        (lambda path: path.chmod(0o702), "others can write"),
    ],
)
def test_a_run_directory_that_others_can_write_is_refused(
    tmp_path: Path, foreign: Callable[[Path], None], words: str
) -> None:
    working = Working(tmp_path, "http://127.0.0.1:1").prompts("one")
    opened_run = working.open()
    plan, run = opened_run.plan, opened_run.run
    foreign(run.path)
    acts: list[Callable[[], Any]] = [
        working.open,
        lambda: merge(plan, run, print),
        lambda: plan_resume(run, {}),
    ]
    for act in acts:
        with pytest.raises(RunConflictError, match=words):
            act()
    if not run.path.is_symlink():
        assert working.shard(0) is ExitCode.USAGE
        assert working.run() is ExitCode.USAGE


def test_a_run_directory_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run = Working(tmp_path, "http://127.0.0.1:1").prompts("one").open().run
    finally:
        os.umask(before)
    for folder in (run.path, run.path / "journal", run.path / "status", run.path / "logs"):
        assert folder.stat().st_mode & 0o777 == 0o700


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value within a JSON value."""
    yield place
    if isinstance(value, list):
        value = dict(enumerate(value))
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from leaves(inner, (*place, name))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    inner = changed(value[place[0]], place[1:], new)
    if isinstance(value, dict):
        return {**value, place[0]: inner}
    return [*value[: place[0]], inner, *value[place[0] + 1 :]]


COMMANDS = [["status"], ["report", "--json"], ["merge"], ["resume"], ["merge", "--partial"]]
STRANGE = [None, True, 3, -1, 1e300, "", "x", [], [[]], {}, {"a": 1}, [{"a": []}]]


@settings(max_examples=40)
@given(data=st.data())
def test_a_json_value_of_the_wrong_type_is_an_error_and_not_a_bug(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    made = MadeRun(tmp_path_factory.mktemp("types"), shards=2, each=2)
    made.submit()
    made.status(0, "completed", completed=2, engines=[{"index": 0, "slots": 4}], exit_code=0)
    made.status(1, "in_progress", completed=1, errors=(("r3", "no"),), lease=False)
    made.whole("in_progress", 3)
    run = made.run
    target = data.draw(
        st.sampled_from([run.plan, run.submissions, run.status(0), run.status(1), run.run_status])
    )
    content = json.loads(target.read_text())
    place = data.draw(st.sampled_from([*leaves(content)]), label="place")
    new = data.draw(st.sampled_from(STRANGE), label="new")
    target.write_text(json.dumps(changed(content, place, new)))
    for command in COMMANDS:
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            code = command_line([*command[:1], str(run.path), *command[1:]])
        assert code != ExitCode.BUG, stderr.getvalue()
        assert "Traceback" not in stderr.getvalue()


@settings(max_examples=60)
@given(data=st.data())
def test_a_lease_with_a_value_of_the_wrong_type_is_not_held(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("lease") / "lease"
    with acquire(path, "it"):
        content = path.read_bytes()
    holder = json.loads(content[12:])
    place = data.draw(st.sampled_from([*leaves(holder)]))
    holder = changed(holder, place, data.draw(st.sampled_from(STRANGE)))
    path.write_bytes(content[:12] + json.dumps(holder).encode())
    moments = iter(range(0, 100_000, 5))
    with contextlib.suppress(AifluxError):
        acquire(path, "it", sleep=lambda _: None, clock=lambda: float(next(moments))).release()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", [".plan.lease", ".merge.lease", ".shard-0000.lease",
                                  "jobs.json", "plan.json", "journal/shard-0000.jsonl",
                                  "status/run.json", "status/shard-0000.json"])  # fmt: skip
def test_a_directory_or_a_pipe_instead_of_a_file_is_named(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("one", "two")
        run = working.open().run
        path = run.path / name
        path.unlink(missing_ok=True)
        make(path)
        for act in (lambda: working.shard(0), working.run):
            code = act()
            assert code in (ExitCode.OK, ExitCode.USAGE, ExitCode.STOPPED)
            if code is not ExitCode.OK:
                assert str(path) in str(working.error)
                assert "->" in str(working.error)
            else:
                assert len(working.results) == 2


_WRITE = """
import sys, time
from pathlib import Path
from types import FrameType
from aiflux.util.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"x" * 5_000_000)
    file.flush()
    print("written", flush=True)
    time.sleep(60)
"""


def killed_while_it_writes(*targets: Path) -> None:
    for target in targets:
        with subprocess.Popen([sys.executable, "-c", _WRITE, str(target)],
                              stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
            process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_the_next_start_removes_leftovers_of_a_killed_one(tmp_path: Path, name: str) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, name).prompts("one", "two")
        run = working.open().run
        killed_while_it_writes(working.output, run.run_status, run.status(0), run.plan)
        mine = [tmp_path / ".out.json.swp", tmp_path / ".out.json.a.aiflux-part", tmp_path / "x"]
        for path in mine:
            path.touch()
        assert len([*tmp_path.rglob(".*.aiflux-part")]) == 5
        assert working.run() is ExitCode.OK
        left = [path for path in tmp_path.rglob("*.aiflux-part") if path not in mine]
        assert left == []
        assert all(path.exists() for path in mine[::2])


def test_a_merge_removes_leftovers_of_a_killed_merge(tmp_path: Path) -> None:
    run = opened(tmp_path, 4, 2)
    write_journals(run, [2] * 4, 0)
    partial = tmp_path / "out.partial.json"
    killed_while_it_writes(run.plan.output, partial)
    assert len([*tmp_path.glob(".*")]) == 2
    merge_partial(run.plan, run.run)
    merge(run.plan, run.run, print)
    assert not [*tmp_path.glob(".*")]


@given(
    name=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
    .filter(lambda name: name not in (".", ".."))
    .map(lambda name: name.encode()[:250].decode(errors="ignore") or "n")
)
def test_leftovers_are_distinguished_from_other_files(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    place = tmp_path_factory.mktemp("names")
    target, other = place / name, place / f"{name[:20]}{'x' * 20}"
    assume(target != other)
    with atomic_write(other) as file:
        file.write(b"whole")
        with pytest.raises(StorageError), atomic_write(target):
            remove_leftovers(target)
    assert [path.read_bytes() for path in place.iterdir()] == [b"whole"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # between open() and its with
def test_an_interrupt_at_any_instruction_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C can come between any two instructions; after the last one the target is complete."""
    target = tmp_path / "out.json"
    writing = atomic_write.__wrapped__.__code__  # type: ignore[attr-defined]
    places = {writing, *(each.__code__ for each in (contextlib._GeneratorContextManager.__enter__,
                         contextlib._GeneratorContextManager.__exit__))}  # fmt: skip
    left = 0

    def interrupt(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal left
        if frame.f_code not in places:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return interrupt

    outcomes = []
    while True:
        count = left = len(outcomes) + 1
        before = sys.gettrace()
        try:
            sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for it in settrace only
            sys.settrace(interrupt)
            with atomic_write(target) as file:
                file.write(b"whole")
        except KeyboardInterrupt:
            outcomes.append(target.exists())
        else:
            break
        finally:
            sys.settrace(before)
        assert [path.name for path in tmp_path.iterdir()] in ([], ["out.json"]), f"place {count}"
        target.unlink(missing_ok=True)
    assert {False, True} == set(outcomes)
