"""The benchmark runs to its end. Its figures are judged by people, not by tests."""

from __future__ import annotations

import subprocess
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
