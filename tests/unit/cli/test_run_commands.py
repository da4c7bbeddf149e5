"""jobs, status, watch, logs and cancel: what they print, ask of Slurm, and end with."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from aiflux.cli.commands import jobs
from aiflux.cli.main import main
from aiflux.cli.render.run import Frame, one_line, overview, typed
from aiflux.core.runs.registry import register
from aiflux.slurm.monitor import gather
from aiflux.util.times import duration
from tests.unit.fake_commands import FakeCommands
from tests.unit.helpers import await_next_time
from tests.unit.made_runs import MadeRun

ENDED = ("a", "bad \x1b[31m\x07 thing\nand\ttabs"), ("b", "x" * 500)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    """A Slurm that knows nothing, and a place to be in."""
    fakes = FakeCommands(tmp_path / "bin")
    for name in ("sacct", "scontrol"):
        fakes.say(name, status=1)
    fakes.say("squeue")
    fakes.say("scancel")
    monkeypatch.setenv("PATH", fakes.path)
    monkeypatch.chdir(tmp_path)
    return fakes


def row(job: str, task: str = "N/A", state: str = "RUNNING", reason: str = "None") -> str:
    return f"{job}|{task}|{state}|N/A|1:00|n1|{reason}\n"


@pytest.fixture
def made(slurm: FakeCommands, tmp_path: Path) -> MadeRun:
    """A run of three shards: done, running, waiting."""
    made = MadeRun(tmp_path / "r", 3)
    made.submit()
    made.status(0, "completed", 98, 2, errors=ENDED)
    made.status(1, "in_progress", 50)
    slurm.say("squeue", row("100", "1") + row("100", "2", "PENDING", "Resources"))
    return made


def known(made: MadeRun, *jobs: str) -> None:
    """Enter a run into the registry of the test's own user, later than the one before."""
    enter(made.run.path, made.output, *jobs)


def enter(run: Path, output: Path, *jobs: str) -> None:
    await_next_time()
    assert register(run, output, jobs, os.environ) is None


def test_status(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "r/results.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "r/results.json  running"
    assert lines[1].endswith(" 150/300 done (50 %), 2 failed")
    assert lines[2] == "input r/prompts.jsonl   model llama3.2:3b   job 100"
    assert lines[3] == "2.0 requests/s, 300 tokens/s, ETA 0:01:15"
    assert lines[5] == "3 shards 1 running, 1 waiting, 1 done"
    assert [line.split() for line in lines[7:11]] == [
        ["SHARD", "STATE", "DONE", "FAILED", "REQ/S", "TOK/S", "ETA", "JOB"],
        ["1", "running", "50/100", "0", "2.0", "300", "0:00:25", "100_1", "on", "gpu07"],
        ["2", "waiting", "0/100", "0", "100_2", "Resources"],
        ["0", "done", "100/100", "2", "100_0"],
    ]
    assert lines[-1] == "  a (shard 0): http_400 bad [31m thing and tabs"


def test_status_as_json(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "100", "--json"]) == 2  # neither registry nor Slurm know the job
    known(made, "100")
    capsys.readouterr()
    assert main(["status", "100", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["state"] == "running"
    assert content["exit_code"] is None
    assert [shard["state"] for shard in content["shards"]] == ["done", "running", "waiting"]
    assert content["output"] == str(made.output)


def test_status_says_when_slurm_cannot_be_asked(
    made: MadeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["status", "r/results.json"]) == 0
    assert "from the files alone: squeue is not on PATH" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "command"),
    [("cancelled", "resume --local"), ("failed", "resume --local"), ("completed", "merge")],
)
def test_status_says_how_to_go_on(
    slurm: FakeCommands,
    awkward: Path,
    state: str,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = MadeRun(awkward)
    made.status(0, state, 100, age=600)
    assert main(["status", str(made.output)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    name = typed(os.path.relpath(made.output))
    assert last == f"continue: aiflux {command} {name}"


def test_a_state_and_its_reason_are_shown_once(slurm: FakeCommands, awkward: Path) -> None:
    made = MadeRun(awkward)
    made.status(0, "cancelled", 100, age=600, ended="stopped (signal SIGTERM)", exit_code=5)
    (line,) = [line for line in frames(made, 80, 24) if "SIGTERM" in line]
    assert line.count("stopped") == 1


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_status_shows_a_long_reason_and_the_remedy_once_and_in_full(
    awkward: Path, width: int
) -> None:
    made = MadeRun(awkward, shards=8)
    reason = "stopped by Slurm before its end, since a user cancelled the whole array of jobs"
    for shard in range(8):
        made.status(shard, "cancelled", 10, age=600, ended=reason, exit_code=5)
    view = replace(gather(made.run, {"PATH": ""}), remedy="look at the log of each shard, and run "
                   "the same command with --retry-failed-after-that once more")  # fmt: skip
    lines = [line.plain for line in overview(view, Frame(width))]
    text = " ".join(" ".join(lines).split())
    (table,) = [at for at, line in enumerate(lines) if line.startswith("SHARD")]
    assert not any("…" in line for line in lines[table:])
    assert text.count("a user cancelled the whole array of jobs") == 1
    assert "shards 0-7: " in text
    assert "run the same command with --retry-failed-after-that once more" in text
    assert "continue: aiflux resume --local " in text
    assert not any(line.endswith("-") for line in lines), "no word is split"


def frames(runs: MadeRun, width: int, height: int) -> list[str]:
    view = gather(runs.run, {"PATH": ""})
    return [line.plain for line in overview(view, Frame(width, height))]


@pytest.mark.parametrize("shards", [1, 8, 300])
@pytest.mark.parametrize(("width", "height"), [(80, 23), (120, 39), (40, 10), (20, 4)])
def test_a_run_fits_into_any_terminal(tmp_path: Path, shards: int, width: int, height: int) -> None:
    made = MadeRun(tmp_path / ("long name " * 20), shards)
    for shard in range(shards):
        state = ("in_progress", "failed", "completed")[shard % 3]
        made.status(shard, state, 50, errors=ENDED, ended="why " * 50, exit_code=4)
    lines = frames(made, width, height)
    assert len(lines) <= height
    assert all(cell_len(line) <= width for line in lines)
    assert all(line.isprintable() for line in lines)
    assert "running" in lines[0] or width < 40


def test_many_shards_are_summed_up_and_the_broken_ones_shown(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "r", 300)
    for shard in range(100):
        made.status(shard, "in_progress", 50)
    made.status(200, "failed", 50, ended="no engine", exit_code=4)
    lines = frames(made, 80, 24)
    assert any(re.match(r" +200  failed .* no engine, exit code 4$", line) for line in lines)
    (rest,) = [line for line in lines if " more: " in line]
    numbers = re.findall(r"\d+", rest)
    table = [line for line in lines if re.match(r" +\d+  (running|failed)", line)]
    assert int(numbers[0]) + len(table) == 300
    assert sum(map(int, numbers[1:])) == int(numbers[0])


def test_small_words() -> None:
    assert [duration(0), duration(59.9), duration(3600), duration(200000)] == [
        *("0:00:00", "0:00:59", "1:00:00", "2d 7:33:20")
    ]
    assert one_line(" a\x1b\n\u2028b\t ") == "a b"
    assert typed("~/a b") == "~/'a b'"
    assert typed("a'b") == "'a'\"'\"'b'"


def test_jobs(made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out == "no runs; older ones: aiflux jobs --all\n"
    known(made, "99", "100")
    local = MadeRun(tmp_path / "local")
    local.status(0, "cancelled", 7)
    known(local)
    enter(tmp_path / "gone.aiflux", tmp_path / "gone", "7")
    assert main(["jobs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["JOB", "STATE", "DONE", "FAILED", "SUBMITTED", "OUTPUT"]
    assert lines[1].split()[1:4] == ["stopped", "7/100", "0"]
    assert lines[2].split()[:5] == ["100", "+1", "running", "150/300", "2"]
    assert lines[2].endswith("  r/results.json")
    assert len(lines) == 3
    assert main(["jobs", "--all", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [entry["state"] for entry in content] == ["gone", "stopped", "running"]
    assert content[2]["completed"] == 148
    assert main(["jobs", "--prune"]) == 0
    assert capsys.readouterr().out == f"forgotten: {tmp_path / 'gone.aiflux'}\n"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_the_list_of_runs_is_never_wider_than_the_terminal(width: int) -> None:
    rows = [
        ["JOB", "STATE", "DONE", "FAILED", "SUBMITTED", "OUTPUT"],
        ["123456 +3", "finished with failures", "999/1000", "1", "2026-01-02 03:04", "a/b" * 30],
    ]
    narrowed = jobs._narrowed(rows, width)
    lines = [jobs._line(row, jobs._widths(narrowed), width) for row in narrowed]
    assert all(cell_len(line.plain) <= width for line in lines)
    assert ("SUBMITTED" in lines[0].plain) is (width >= 100)
    styled = [line.plain[span.start : span.end] for line in lines for span in line.spans]
    assert all("finished with failures".startswith(words.rstrip("…")) for words in styled)
    assert styled


def test_runs_that_ended_long_ago_are_listed_on_demand(
    slurm: FakeCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path / "r")
    made.status(0, "completed", 100, age=200000)
    made.whole("completed", 100, age=200000)
    known(made, "100")
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out.startswith("no runs")
    assert main(["jobs", "--all"]) == 0
    assert "finished" in capsys.readouterr().out
    assert slurm.calls("squeue") == []


def test_cancel(made: MadeRun, slurm: FakeCommands, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", "r/results.json"]) == 0
    assert [call.argv for call in slurm.calls("scancel")] == [["100"]]
    assert capsys.readouterr().out.splitlines() == [
        "cancelled job 100",
        "  kept: 150 of 300 results, in r/results.json.aiflux/journal",
        "  continue it: aiflux resume r/results.json",
    ]


def test_a_cancelled_run_stays_stopped_when_slurm_has_forgotten_its_job(
    made: MadeRun, slurm: FakeCommands
) -> None:
    made.status(1, "in_progress", 50, age=600)
    assert main(["cancel", "r/results.json"]) == 0
    slurm.say("squeue", stderr="slurm_load_jobs error: Invalid job id specified", status=1)
    view = gather(made.run)
    assert (view.state.value, view.next_command) == ("stopped", f"aiflux resume {made.output}")
    assert [shard.reason for shard in view.shards[1:]] == [
        "its job was cancelled",
        "cancelled before the work began",
    ]
    made.submit("200", first=1)
    assert gather(made.run).state.value == "lost"


def test_cancel_where_nothing_is_to_be_cancelled(
    made: MadeRun, slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.say("squeue")
    made.status(1, "cancelled", 50)
    assert main(["cancel", "r/results.json"]) == 0
    assert slurm.calls("scancel") == []
    assert "no pending or running job: it is lost" in capsys.readouterr().out


def test_a_run_in_the_foreground_is_cancelled_where_it_runs(
    slurm: FakeCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path / "r")
    made.status(0, "in_progress", 50)
    assert main(["cancel", "r/results.json"]) == 2
    printed = capsys.readouterr().err
    assert "process 4711 on gpu07" in printed
    assert "kill -TERM 4711" in printed


def test_logs(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "r/results.json"]) == 2
    assert "the job has not started" in capsys.readouterr().err
    made.log("slurm-100_0.out", "".join(f"line {n}\n" for n in range(100)) + "cut")
    made.log("slurm-100_2.out", "two\n")
    made.log("engine-0002-0.log", "loading\n")
    made.log("engine-0002-1.log", "loading too\n")
    assert main(["logs", "r/results.json", "--lines", "2"]) == 0
    assert capsys.readouterr().out == "[0] line 99\n[0] cut\n[2] two\n"
    assert main(["logs", "r/results.json", "--shard", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 50
    assert main(["logs", "r/results.json", "--shard", "2", "--engine"]) == 0
    assert capsys.readouterr().out == "loading\nloading too\n"
    assert main(["logs", "r/results.json", "--shard", "3"]) == 2
    assert "its shards are 0 to 2" in capsys.readouterr().err


def test_the_only_shard_is_named(
    slurm: FakeCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MadeRun(tmp_path / "r", shards=1)
    assert main(["logs", "r/results.json", "--shard", "1"]) == 2
    assert "its only shard is 0" in capsys.readouterr().err


def test_logs_of_a_run_in_the_foreground(
    slurm: FakeCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MadeRun(tmp_path / "r")
    assert main(["logs", "r/results.json"]) == 2
    assert "--engine" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 200000])
def test_the_end_of_a_log_is_found_in_any_size(
    made: MadeRun, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    made.log("slurm-100_0.out", "x" * size + "\nlast\n")
    assert main(["logs", "r/results.json", "--shard", "0", "--lines", "1"]) == 0
    assert capsys.readouterr().out == "last\n"


def aiflux(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    program = "import sys; from aiflux.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.05)


class Reader:
    """Reads what a process writes, as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def end(self) -> tuple[int, str]:
        code = self.process.wait(30)
        self._thread.join()
        assert self.process.stderr is not None
        errors = self.process.stderr.read()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code, errors


@pytest.fixture
def reader() -> Iterator[Callable[..., Reader]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> Reader:
        started.append(aiflux(*arguments))
        return Reader(started[-1])

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            process.kill()


def finish(made: MadeRun, failed: int = 0) -> None:
    for shard in range(made.shards):
        made.status(shard, "completed", made.each)
        made.run.lease(shard).unlink(missing_ok=True)
    made.whole("completed", made.plan.requests - failed, failed)


def test_logs_are_followed_through_new_files_to_the_end(
    made: MadeRun, reader: Callable[..., Reader]
) -> None:
    log = made.log("slurm-100_1.out", "old\nbegun\ncu")
    shown = reader("logs", "r/results.json", "-f", "--lines", "1")
    until(lambda: shown.lines == ["[1] begun\n"])
    with open(log, "a") as file:
        file.write("t\nmore\n")
    until(lambda: shown.lines[1:] == ["[1] cut\n", "[1] more\n"])
    made.log("slurm-100_2.out", "new\n")
    until(lambda: shown.lines[3:] == ["[2] new\n"])
    with open(log, "a") as file:
        file.write("the last, cut")
    finish(made)
    assert shown.end() == (0, "")
    assert shown.lines[4:] == ["[1] the last, cut\n"]


def test_watch_without_a_terminal(made: MadeRun, reader: Callable[..., Reader]) -> None:
    shown = reader("watch", "r/results.json", "--interval", "0.1")
    until(lambda: bool(shown.lines))
    assert re.match(r"\d\d:\d\d:\d\d running: 150/300 done \(50 %\), 2 failed", shown.lines[0])
    made.status(1, "completed", 100)
    until(lambda: len(shown.lines) > 1)
    assert "200/300" in shown.lines[1]
    finish(made, failed=2)
    assert shown.end() == (3, "")
    assert "r/results.json  finished with failures\n" in shown.lines


def test_ctrl_c_leaves_the_run_alone(
    made: MadeRun, slurm: FakeCommands, reader: Callable[..., Reader]
) -> None:
    shown = reader("watch", "r/results.json")
    until(lambda: bool(shown.lines))
    shown.process.send_signal(signal.SIGINT)
    code, errors = shown.end()
    assert code == 5
    assert errors.startswith("the run continues; show it again: aiflux watch r/results.json")
    assert slurm.calls("scancel") == []


def test_watch_of_a_run_that_has_ended(
    slurm: FakeCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path / "r")
    made.status(0, "failed", 10, exit_code=4, ended="no engine")
    assert main(["watch", "r/results.json"]) == 4
    assert "failed no engine, exit code 4" in capsys.readouterr().out


def test_watch_wants_a_sensible_interval(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    for interval in ("0", "-1", "nan"):
        assert main(["watch", "r/results.json", "--interval", interval]) == 2
        assert "--interval" in capsys.readouterr().err


def watched(then: Callable[[subprocess.Popen[str]], None], code: int) -> str:
    """Return what `watch` writes to a terminal; ``then`` is called when it shows the run."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = aiflux("watch", "r/results.json", "--interval", "0.1", stdout=inside)
    os.close(inside)
    shown = io.BytesIO()

    def read() -> None:
        with suppress(OSError):
            while block := os.read(terminal, 65536):
                shown.write(block)

    thread = threading.Thread(target=read)
    thread.start()
    until(lambda: b"150/300" in shown.getvalue())
    then(process)
    assert process.wait(30) == code
    thread.join(10)
    assert process.stderr is not None
    process.stderr.close()
    os.close(terminal)
    text = shown.getvalue().decode()
    assert "\x1b[?25h" in text, "the cursor is there again"
    return text


@pytest.mark.parametrize("colours", [True, False])
def test_watch_on_a_terminal(made: MadeRun, colours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    text = watched(lambda _: finish(made), 0)
    assert "r/results.json" in text
    assert "finished" in text
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", text)) == colours


def test_ctrl_c_keeps_the_last_frame(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    text = watched(lambda process: process.send_signal(signal.SIGINT), 5)
    erased = text.rfind("\x1b[2K")
    assert text.rindex("150/300") > erased, "nothing is erased after the last frame"


def test_a_line_says_all(made: MadeRun) -> None:
    view = gather(made.run)
    assert str(view) == (
        "running: 150/300 done (50 %), 2 failed, 1 running, 1 waiting, 1 done, "
        "2.0 requests/s, 300 tokens/s, ETA 0:01:15"
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {}, None),
        ({"sealed": True, "totals": {"starts": 2, "sealed_starts": 2, "results": 1}}, {},
         "sealed: no network access"),
        ({"sealed": True, "totals": {"starts": 1, "sealed_starts": 1, "results": 0}}, {},
         "unknown whether it was always sealed: some results are from starts without a recorded "
         "check of the seal"),
        ({"sealed": True, "totals": {"starts": 2, "sealed_starts": 1, "unsealed_starts": 1,
                                     "unsealed": "--no-seal"}}, {},
         "not sealed in 1 of 2 shards: 1 of 2 starts had a network (--no-seal)"),
        ({"sealed": True, "totals": {"starts": 2, "sealed_starts": 1}}, {},
         "unknown whether it was always sealed: the seal of 1 of 2 starts was recorded"),
        ({"sealed": False, "unsealed": "--no-seal"}, {"sealed": True},
         "not sealed in 1 of 2 shards: --no-seal"),
        ({"sealed": False, "unsealed": "no\x1bnetns"}, {"sealed": False, "unsealed": "no\x1bnetns"},
         "not sealed: no netns"),
    ],
)  # fmt: skip
def test_status_says_whether_the_work_was_sealed(
    tmp_path: Path, first: dict[str, object], second: dict[str, object], expected: str | None
) -> None:
    made = MadeRun(tmp_path / "r", 2)
    made.status(0, "in_progress", 1, **first)
    made.status(1, "in_progress", 1, **second)
    lines = [str(line) for line in overview(gather(made.run), Frame())]
    assert [line for line in lines if "sealed" in line] == ([expected] if expected else [])
