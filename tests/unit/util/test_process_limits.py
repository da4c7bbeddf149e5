"""Real limits of a process: AI-Flux continues with less or stops with a remedy; it never hangs."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

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


def allowed(printed: str) -> int:
    found = re.search(r"requests in flight: at most (\d+), by the limit on", printed)
    assert found, printed
    return int(found[1])


@pytest.fixture(scope="module")
def started() -> int:
    """Address space of AI-Flux at its start on this machine, in bytes."""
    code = "import aiflux.cli.main; print(open('/proc/self/status').read())"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    found = re.search(r"VmPeak:\s+(\d+) kB", printed.stdout)
    assert found
    return int(found[1]) << 10


def limited_to(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


MORE = [1, 3, 6, 10, 14, 18, 25, 33, 40, 65, 100, 130]
"""MiB beyond the start; the need of one thread, or ten, differs between machines."""


@pytest.mark.parametrize("mib", MORE)
def test_little_memory_is_enough_or_the_stop_names_the_limit(
    mib: int, started: int, engine: FaultyEngine, tmp_path: Path
) -> None:
    working = Working(tmp_path, engine.url).prompts(*["hello"] * REQUESTS)
    done = run(tmp_path, engine, limited_to(started + mib * MIB))
    if done.returncode == ExitCode.STOPPED:
        assert "ulimit -v" in done.stderr
        assert "run the same command again" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert len(working.results) == REQUESTS
        if "requests in flight: at most" in done.stderr:
            assert engine.most <= allowed(done.stderr)
    assert "Traceback" not in done.stderr


# Python waits forever for a thread with memory for its stack and a little more.
HASHING = """
import re, resource, sys
from aiflux.core.batch.input_file import in_thread
size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1])
limit = (size + int(sys.argv[1])) << 10
resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, 8 << 20))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
hashed = []
with in_thread(lambda start, end, plain: hashed.append(start)) as add:
    for number in range(3):
        add(number, number, True)
print(hashed)
"""


@pytest.mark.parametrize("kib", [8192 + 4 * step for step in range(9)])
def test_an_input_is_hashed_without_memory_for_a_thread(kib: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HASHING, str(kib)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout == "[0, 1, 2]\n", done.stderr


HELPING = """
import resource
from aiflux.errors import StoppedError
from aiflux.worker.dispatcher import Helpers
helpers = Helpers(lambda work: work(), lambda: None)
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    helpers.submit(lambda: None)
except StoppedError as error:
    print(error.remedy, helpers.busy())
"""


def test_the_worker_does_not_wait_for_work_that_no_thread_can_do() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELPING], capture_output=True, text=True, check=True
    )
    assert "ulimit -v" in done.stdout
    assert done.stdout.endswith(" False\n")


@pytest.mark.parametrize("mib", [1, 4, 10, 20])
def test_the_worker_stops_likewise(mib: int, started: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aiflux.worker", "--run-dir", "none"],
        cwd=tmp_path, preexec_fn=limited_to(started + mib * MIB),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    if done.returncode != ExitCode.USAGE:  # the run does not exist
        assert done.returncode == ExitCode.STOPPED, done.stderr
        assert "ulimit -v" in done.stderr


# A command that loads numpy, whose OpenBLAS ends the process or hangs if its memory is short.
LIBRARIES = {
    "pyarrow": ["convert", "parquet", "in.parquet", "--template", "{text}", "-o", "q.jsonl"],
    "matplotlib": ["report", "out.json", "-o", "-"],
}


@pytest.mark.parametrize("mib", [50, 100, 150, 190, 230, 250, 300, 370, 420, 480])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_gets_the_memory_that_it_needs_or_is_not_loaded(
    library: str, mib: int, started: int, engine: FaultyEngine, tmp_path: Path
) -> None:
    Working(tmp_path, engine.url).prompts(*["hello"] * 3).run()
    rows = pyarrow.table({"text": ["hello"] * 100})
    parquet.write_table(rows, tmp_path / "in.parquet")
    done = subprocess.run(
        [sys.executable, "-m", "aiflux.cli", *LIBRARIES[library]],
        cwd=tmp_path, preexec_fn=limited_to(started + mib * MIB),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if done.returncode:
        assert done.returncode == ExitCode.STOPPED, done.stderr
        assert done.stderr.startswith("error: ")
        assert "ulimit -v" in done.stderr
    assert "Traceback" not in done.stderr
    assert "OpenBLAS" not in done.stderr


LOADING = """
import resource, sys
from aiflux.errors import ConfigError
from aiflux.util.extras import need
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(getattr(resource, sys.argv[1]), (limit if len(sys.argv) < 3 else 3,) * 2)
try:
    need("_decimal", "schema", "this")
except Exception as error:
    print(type(error.__cause__).__name__, error)
"""


@pytest.mark.parametrize(
    ("limit", "remedy"),
    [(["RLIMIT_AS"], "ulimit -v"), (["RLIMIT_NOFILE", "3"], "ulimit -n")],
)
def test_a_library_that_does_not_fit_is_not_reported_as_missing(
    limit: list[str], remedy: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADING, *limit], capture_output=True, text=True, check=True
    )
    assert "Error" in done.stdout, done.stderr
    assert remedy in done.stdout
    assert "pip install" not in done.stdout


@pytest.mark.parametrize("files", [12, 64])
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
