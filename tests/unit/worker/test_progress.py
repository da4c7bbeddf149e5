"""How progress and a pull look."""

from __future__ import annotations

import io

import pytest

from aiflux.worker.progress import TerminalReporter, bytes_line, summary_line
from aiflux.worker.stats import Stats


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((12.3e9, 42.5e9, 85e6, 355), "12.3 of 42.5 GB, 85 MB/s, 0:05:55 left"),
        ((0, 42.5e9, None, None), "0.0 of 42.5 GB"),
        ((4.2e7, 4.2e7, 1e6, 0), "42.0 of 42.0 MB, 1 MB/s"),
        ((100, 266, None, 0), "0.1 of 0.3 KB, 0:00:00 left"),
        ((242.5e9, 243.1e9, 999e6, 35999), "242.5 of 243.1 GB, 999 MB/s, 9:59:59 left"),
    ],
)
def test_the_bytes_of_a_pull_fit_next_to_its_bar(
    arguments: tuple[float, float, float | None, float | None], line: str
) -> None:
    assert bytes_line(*arguments) == line
    assert len(line) <= 41


def test_the_steps_of_a_pull_are_shown_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    reporter = TerminalReporter(stream)
    reporter.pull({"status": "pulling manifest"})
    reporter.pull({"status": "pulling ef9602536957", "total": 42_500_000_000})
    reporter.pull(
        {"status": "pulling ef9602536957", "total": 42_500_000_000, "completed": 12_300_000_000}
    )
    reporter.close()
    printed = stream.getvalue()
    assert "12.3 of 42.5 GB" in printed
    assert "pulling ef9602536957" in printed
    reporter.pull({"status": "success"})
    reporter.say("pulled")
    assert stream.getvalue().count("pulled") == 1


def test_requests_that_are_left_out_are_not_shown_as_failed() -> None:
    assert summary_line(Stats(4, 1, 3, 2, clock=lambda: 0.0)).startswith(
        "4/4 done (100 %), 1 failed, 2 left out (too long), "
    )
    without = summary_line(Stats(4, 1, 3, clock=lambda: 0.0))
    assert without.startswith("4/4 done (100 %), 3 failed, 0.0")
