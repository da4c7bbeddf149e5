"""Soak: the same command given eight times at once, fifty times over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.core.runs.test_concurrent_starts import one_runs


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(50))
def test_one_of_eight_runs_every_time(tmp_path: Path, turn: int) -> None:
    one_runs(tmp_path, 8)
