"""Real limits of a process: it goes on with less, or stops with the remedy, and never hangs."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiflux.errors import ExitCode
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.working import Working

REQUESTS = 30
MIB = 1 << 20


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine(delay=0.05) as engine:
        yield engine


def run(
    folder: Path, engine: FaultyEngine, limit: Callable[[], None]
) -> subprocess.CompletedProcess[str]:
    words = ["run", "--input", "in.jsonl", "--output", "out.json", "--concurrency", "100"]
    return subprocess.run(
        [sys.executable, "-m", "aiflux.cli", *words, "--engine-url", engine.url],
        cwd=folder, preexec_fn=limit, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def allowed(told: str) -> int:
    found = re.search(r"requests in flight: at most (\d+), by the limit on", told)
    assert found, told
    return int(found[1])


@pytest.mark.parametrize("mib", [75, 90, 110, 120, 150, 200])
def test_few_threads_are_enough_and_none_stop_the_run(
    mib: int, engine: FaultyEngine, tmp_path: Path
) -> None:
    """How much memory it takes for one thread, or for ten, differs from machine to machine."""
    working = Working(tmp_path, engine.url).prompts(*["hello"] * REQUESTS)
    done = run(
        tmp_path,
        engine,
        lambda: resource.setrlimit(resource.RLIMIT_AS, (mib * MIB, mib * MIB)),
    )
    if done.returncode == ExitCode.STOPPED:
        assert "ulimit -v" in done.stderr
        assert "run the same command again" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert len(working.results) == REQUESTS
        assert engine.most <= allowed(done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("files", [10, 64])
def test_concurrency_fits_the_limit_on_open_files(
    files: int, engine: FaultyEngine, tmp_path: Path
) -> None:
    working = Working(tmp_path, engine.url).prompts(*["hello"] * REQUESTS)
    done = run(tmp_path, engine, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)))
    assert done.returncode == 0, done.stderr
    assert "open files (ulimit -n)" in done.stderr
    assert engine.most <= allowed(done.stderr) < files
    assert len(working.results) == REQUESTS


def test_too_few_files_for_anything_is_a_stop(engine: FaultyEngine, tmp_path: Path) -> None:
    Working(tmp_path, engine.url).prompts("hello")
    done = run(tmp_path, engine, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (7, 7)))
    assert done.returncode == ExitCode.STOPPED, done.stderr
    assert "raise it (ulimit -n)" in done.stderr


def test_the_soft_limit_on_files_is_raised(engine: FaultyEngine, tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    working = Working(tmp_path, engine.url).prompts(*["hello"] * REQUESTS)
    done = run(tmp_path, engine, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard)))
    assert done.returncode == 0, done.stderr
    assert "at most" not in done.stderr
    assert len(working.results) == REQUESTS
