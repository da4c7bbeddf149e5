"""Run the processes of a measurement with a time limit, and record their resource usage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.decoding import Cost

ROOT = Path(__file__).resolve().parent.parent
_POLL = 0.005
_ERROR_SHOWN = 800


@dataclass(frozen=True)
class Usage:
    """Resource usage of a process.

    Attributes:
        began: start time on the system's monotonic clock.
        wall, cpu: seconds.
        rss: peak resident memory in bytes.
    """

    began: float
    wall: float
    cpu: float
    rss: int


def tool_output(
    command: Sequence[str], environ: Mapping[str, str] | None = None, limit: float = 600
) -> tuple[str, str]:
    """Run a tool; return its output and its messages.

    Raises:
        RuntimeError: it failed; shows the end of its messages.
    """
    done = subprocess.run(
        command,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{Path(command[0]).name}: exit {done.returncode}: {done.stderr[-_ERROR_SHOWN:]}"
        )
    return done.stdout, done.stderr


def run(
    command: Sequence[str],
    *,
    limit: float,
    output: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Usage:
    """Run a command and return its resource usage.

    Raises:
        RuntimeError: the command failed, or took longer than ``limit`` seconds.
    """
    with tempfile.TemporaryFile() as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if output is None else output,
            stderr=errors,
        )
        status, usage = _wait(process, began + limit)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            output = errors.read().decode("utf-8", "replace")[-_ERROR_SHOWN:]
            raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}: {output}")
    return Usage(began, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _wait(process: subprocess.Popen[bytes], deadline: float) -> tuple[int, Any]:
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            return status, usage
        if time.monotonic() > deadline:
            process.kill()
            _, status, usage = os.wait4(process.pid, 0)
            return status, usage
        time.sleep(_POLL)


@dataclass(frozen=True)
class RunningEngine:
    """A running engine."""

    url: str

    def stats(self) -> dict[str, Any]:
        """Return its statistics."""
        with urllib.request.urlopen(self.url + "/stats", timeout=10) as response:
            content: dict[str, Any] = json.load(response)
        return content


@contextmanager
def engine(
    slots: int = 0, cost: Cost | None = None, others: tuple[int, float, float] = (0, 0, 0)
) -> Iterator[RunningEngine]:
    """Run an engine; with 0 slots it answers at once.

    Args:
        others: another user's requests in flight, and their start and end in seconds.
    """
    cost = cost or Cost()
    command = [sys.executable, "-m", "bench.engine", "--slots", str(slots)]
    command += ["--base", repr(cost.base), "--each", repr(cost.each)]
    for option, value in zip(("others", "others-start", "others-end"), others, strict=True):
        command += [f"--{option}", repr(value)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield RunningEngine(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.terminate()
            process.wait(10)


def worker(
    engine_url: str, source: Path, output: Path, *options: str, limit: float = 600.0
) -> Usage:
    """Run the real worker over an input."""
    command = [sys.executable, "-m", "aiflux.worker", str(source), str(output)]
    command += ["--engine-url", engine_url, *options]
    return run(command, limit=limit)
