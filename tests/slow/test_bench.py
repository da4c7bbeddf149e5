"""The benchmark runs to its end. Its figures are judged by people, not by tests."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bench.cases import CASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES)
def test_a_case_gives_figures(case: str) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "bench", f"BENCH=--quick {case}"],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    table = done.stdout[done.stdout.index("figure") :]
    assert "failed" not in table, table
    assert len(table.splitlines()) > 3, table


def test_what_was_measured_before_ctrl_c_is_shown() -> None:
    command = [sys.executable, "-m", "bench", "--quick", "help", "occupancy"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "occupancy" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "aiflux --help" in process.stdout.read()
        assert process.wait() == 1
        assert process.stderr.read() == "stopped\n"
