"""Soak test: the same command eight times at once, repeated fifty times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.core.runs.test_concurrent_starts import one_runs


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(50))
def test_exactly_one_of_eight_commands_runs(tmp_path: Path, turn: int) -> None:
    one_runs(tmp_path, 8)
