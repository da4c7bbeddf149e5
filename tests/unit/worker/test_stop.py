"""Signals to the worker: an orderly stop, or an immediate one if nothing is in flight."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiflux.errors import ExitCode, StoppedError
from aiflux.worker.stop import Stopper
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.working import Working

AIFLUX = ["-m", "aiflux.cli", "run", "--input", "in.jsonl", "--output", "out.json"]
PROGRAMS = pytest.mark.parametrize(
    "program",
    [
        AIFLUX,
        ["-m", "aiflux.worker", "in.jsonl", "out.json"],
    ],
    ids=["aiflux", "the worker"],
)
ENDING = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["TERM", "HUP"])


@pytest.fixture
def stopper() -> Iterator[Stopper]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    stopper = Stopper()
    stopper.install()
    yield stopper
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_requests_a_stop(stopper: Stopper) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopper.stopping
    assert stopper.reason == "signal SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_work_without_requests_in_flight_stops_at_once(
    stopper: Stopper, number: signal.Signals
) -> None:
    cleaned = []

    def work() -> None:
        with stopper.raising():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)
                cleaned.append(True)

    with pytest.raises(StoppedError, match=number.name) as caught:
        work()
    assert cleaned, "a second signal does not interrupt the cleanup"
    assert caught.value.exit_code == ExitCode.STOPPED
    os.kill(os.getpid(), number)
    with pytest.raises(StoppedError), stopper.raising():
        pytest.fail("nothing is started after a stop was requested")


def test_the_early_warning_of_the_time_limit_stops_nothing_at_once(stopper: Stopper) -> None:
    with stopper.raising():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stopper.time_is_up


def test_a_signal_while_a_stop_is_requested_does_not_block_it() -> None:
    """A handler runs in the main thread wherever that is, also within `stop` itself."""
    program = """
import os, signal, sys
from aiflux.worker.stop import Stopper
stopper = Stopper()
stopper.install()
steps = 0
def send(frame, event, argument):
    global steps
    steps += 1
    if steps == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)
    frame.f_trace_opcodes = True
    return send
sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for it in settrace only
sys.settrace(send)
stopper.stop("a test")
sys.settrace(None)
assert stopper.stopping
print(steps)
"""
    step, steps = 0, 1
    while step < steps:
        step += 1
        done = subprocess.run(
            [sys.executable, "-c", program, str(step)],
            check=False, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        steps = int(done.stdout)


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine() as engine:
        yield engine


def started(
    program: list[str], folder: Path, engine: FaultyEngine, *prefix: str
) -> subprocess.Popen[str]:
    more = ["--engine-url", engine.url, "--drain-seconds", "0.1"]
    return subprocess.Popen(
        [*prefix, sys.executable, *program, *more],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not true():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def listens(process: subprocess.Popen[str], number: int) -> bool:
    """Return whether a process has a handler for a signal (proc(5), SigCgt)."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


@ENDING
@PROGRAMS
def test_a_signal_during_the_start_is_a_stop(
    program: list[str], number: signal.Signals, engine: FaultyEngine, tmp_path: Path
) -> None:
    """The handlers are installed before the imports, which take much longer."""
    Working(tmp_path, engine.url).prompts("hang")
    process = started(program, tmp_path, engine)
    wait_until(lambda: listens(process, number), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == ExitCode.STOPPED, errors
    assert number.name in errors
    assert not engine.bodies


def test_ctrl_c_before_anything_runs_is_reported(engine: FaultyEngine, tmp_path: Path) -> None:
    Working(tmp_path, engine.url).prompts("hang")
    process = started(AIFLUX, tmp_path, engine)
    wait_until(lambda: listens(process, signal.SIGTERM), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == ExitCode.STOPPED, errors
    assert errors == "stopped by Ctrl-C before the end\n"


AT_AN_IMPORT = """
import os, sys, weakref

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            {send}

sys.meta_path.insert(0, Finder())
"""
SEND = "os.kill(os.getpid(), {})"
DROPPED = "weakref.ref(Finder(), lambda _: os.kill(os.getpid(), {}))"
"""Python drops what a callback of a weak reference raises; each import has such a callback."""


def at_an_import(
    folder: Path, module: str, number: int, send: str, *program: str
) -> subprocess.CompletedProcess[str]:
    """Run a program that gets a signal when it imports a module."""
    code = AT_AN_IMPORT.format(module=module, send=send.format(int(number)))
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", *program], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize("send", [SEND, DROPPED], ids=["raised", "dropped"])
@pytest.mark.parametrize(
    ("module", "number", "words"),
    [
        ("aiflux.errors", signal.SIGINT, "stopped by Ctrl-C before the end\n"),
        ("click", signal.SIGINT, "stopped by Ctrl-C before the end\n"),
        ("aiflux.cli.commands.jobs", signal.SIGINT, "stopped by Ctrl-C before the end\n"),
        ("aiflux.core.runs.registry", signal.SIGTERM, "stopped by SIGTERM before the end\n"),
    ],
)
def test_a_signal_during_any_import_of_a_command_is_a_stop(
    module: str, number: int, words: str, send: str, tmp_path: Path
) -> None:
    done = at_an_import(tmp_path, module, number, send, "aiflux.cli", "jobs")
    assert (done.returncode, done.stderr) == (ExitCode.STOPPED, words)


def test_ctrl_c_before_the_first_import_of_a_command_is_a_stop(tmp_path: Path) -> None:
    done = at_an_import(tmp_path, "aiflux.util.signals", signal.SIGINT, SEND, "aiflux.cli", "jobs")
    assert (done.returncode, done.stderr) == (5, "stopped by Ctrl-C before the end\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["aiflux.worker.stop", "aiflux.worker.main", "requests"])
def test_a_signal_during_any_import_of_the_worker_is_a_stop(
    module: str, number: int, engine: FaultyEngine, tmp_path: Path
) -> None:
    Working(tmp_path, engine.url).prompts("hang")
    words = ["aiflux.worker", "in.jsonl", "out.json", "--engine-url", engine.url]
    done = at_an_import(tmp_path, module, number, SEND, *words)
    if (module, number) == ("aiflux.worker.stop", signal.SIGTERM):
        assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")  # the default
    else:
        assert done.returncode == ExitCode.STOPPED, done.stderr
        assert done.stderr.count("stopped (signal ") == 1
        assert "Traceback" not in done.stderr
    assert not engine.bodies


class Dropping:
    """An object that can be weakly referenced."""


def test_a_stop_that_python_dropped_is_raised_again(stopper: Stopper) -> None:
    before = signal.getsignal(signal.SIGALRM), sys.unraisablehook

    def work() -> None:
        with stopper.raising():
            weakref.ref(Dropping(), lambda _: os.kill(os.getpid(), signal.SIGTERM))
            assert stopper.stopping
            time.sleep(20)

    with pytest.raises(StoppedError, match="SIGTERM"):
        work()
    assert (signal.getsignal(signal.SIGALRM), sys.unraisablehook) == before


INTERRUPT = """
import sys

def interrupt(frame, *_):
    if frame.f_code.co_name == "make_program":
        sys.setprofile(None)
        exec("raise KeyboardInterrupt")

sys.setprofile(interrupt)
"""


def test_ctrl_c_in_generated_code_has_the_same_exit_code(tmp_path: Path) -> None:
    """Imports run such code, for dataclasses and the like."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "aiflux.cli", "jobs"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        ExitCode.STOPPED, "stopped by Ctrl-C before the end\n"
    )  # fmt: skip


@ENDING
@PROGRAMS
def test_a_signal_stops_a_run_in_an_orderly_way(
    program: list[str], number: signal.Signals, engine: FaultyEngine, tmp_path: Path
) -> None:
    working = Working(tmp_path, engine.url).prompts("hello", "hang")
    process = started(program, tmp_path, engine)
    wait_until(lambda: bool(engine.seen["hang"]), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == ExitCode.STOPPED, errors
    assert working.status["status"] == "cancelled"


@PROGRAMS
def test_nohup_keeps_a_run_from_hanging_up(
    program: list[str], engine: FaultyEngine, tmp_path: Path
) -> None:
    engine.delay = 0.5
    working = Working(tmp_path, engine.url).prompts("hello")
    process = started(program, tmp_path, engine, "nohup")
    wait_until(lambda: bool(engine.seen["hello"]), process)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert working.status["status"] == "completed"
