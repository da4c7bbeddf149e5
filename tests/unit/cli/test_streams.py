"""Streams that take nothing: the work goes on, and the exit code is the run's."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiflux.core.runs.registry import entries
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import waiting_slurm
from tests.unit.helpers import write_input
from tests.unit.working import Working

PROGRAMS = {
    "aiflux": ["-m", "aiflux.cli", "run", "--input", "in.jsonl", "--output", "out.json"],
    "the worker": ["-m", "aiflux.worker", "in.jsonl", "out.json"],
}
REQUESTS = 40


def reader_gone() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def not_for_writing() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def vanished_terminal() -> int:
    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs


def full_and_not_waiting() -> int:
    """Return a pipe that nobody reads and that another program has set to O_NONBLOCK."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.write(writer, b"x" * (1 << 20))
    UNREAD.append(reader)
    return writer


UNREAD: list[int] = []
BROKEN: list[Callable[[], int]] = [
    reader_gone, full_disk, not_for_writing, vanished_terminal, full_and_not_waiting,
]  # fmt: skip


@pytest.fixture(params=BROKEN, ids=lambda make: make.__name__)
def broken(request: pytest.FixtureRequest) -> Iterator[int]:
    descriptor = request.param()
    yield descriptor
    os.close(descriptor)
    while UNREAD:
        os.close(UNREAD.pop())


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine() as engine:
        yield engine


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_needs_no_one_who_reads_it(
    program: str, broken: int, engine: FaultyEngine, tmp_path: Path
) -> None:
    working = Working(tmp_path, engine.url).prompts(*["hello"] * REQUESTS, "400")
    command = [sys.executable, *PROGRAMS[program], "--engine-url", engine.url]
    done = subprocess.run(
        command, cwd=tmp_path, stdout=broken, stderr=broken, check=False, timeout=60
    )
    assert done.returncode == 3
    assert len(working.results) == REQUESTS + 1


def test_a_run_needs_no_streams(engine: FaultyEngine, tmp_path: Path) -> None:
    working = Working(tmp_path, engine.url).prompts(*["hello"] * REQUESTS)
    command = [sys.executable, *PROGRAMS["the worker"], "--engine-url", engine.url]
    closed = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *command]
    assert subprocess.run(closed, cwd=tmp_path, check=False, timeout=60).returncode == 0
    assert len(working.results) == REQUESTS


def test_a_submission_needs_no_one_who_reads_it(
    broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = waiting_slurm(tmp_path / "bin", monkeypatch)
    image = tmp_path / "aiflux.sif"
    make_sif(image, version="1")
    write_input(tmp_path / "in.jsonl", 2)
    words = ["--no-preflight", "--image", str(image), "--model", "m:1", "--partition", "p"]
    done = subprocess.run(
        [sys.executable, *PROGRAMS["aiflux"], *words],
        cwd=tmp_path, stdout=broken, stderr=broken, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert len(fakes.calls("sbatch")) == 1
    assert [entry.run_dir.name for entry in entries(os.environ)] == ["out.json.aiflux"]


def test_what_stdout_does_not_take_is_reported(engine: FaultyEngine, tmp_path: Path) -> None:
    Working(tmp_path, engine.url).prompts("hello")
    command = [sys.executable, *PROGRAMS["aiflux"], "--engine-url", engine.url, "--json"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            timeout=60,
        )  # fmt: skip
    assert done.returncode == 0
    assert "warning: cannot write to stdout: No space left" in done.stderr


def test_what_follows_a_run_ends_with_its_reader(engine: FaultyEngine, tmp_path: Path) -> None:
    """``| head -1`` ends a command that would print forever."""
    output = tmp_path / "results.json"
    entry = {
        "input": json.loads((write_input(tmp_path / "in.jsonl", 1)).read_text()),
        "output": {"choices": [{"message": {"content": "x" * 300}, "finish_reason": "stop"}]},
        "metadata": {},
    }
    output.write_text("[\n" + ",\n".join([json.dumps(entry)] * 30_000) + "\n]\n")
    show = [sys.executable, "-m", "aiflux.cli", "results", "show", str(output), "--json"]
    script = '"$@" --limit 30000 | head -n 1; echo "${PIPESTATUS[0]}"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *show], capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    assert done.stdout.endswith("\n0\n")
    assert done.stderr == ""
