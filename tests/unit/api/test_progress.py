"""The progress of `Run.wait`: on a terminal, in a notebook, and nothing elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux import Run
from aiflux.api.progress import notebook_data
from tests.unit.made_runs import MadeRun
from tests.unit.terminals import on_terminal

LINE = "running: 50/100 done (50 %), 1 failed, 2.0 requests/s, 300 tokens/s"
# The part of IPython that a kernel has loaded, with what it displays on stdout.
IPYTHON = """
class Shell:
    kernel = {kernel}
def get_ipython():
    return Shell()
"""
DISPLAY = """
import json
class Handle:
    def update(self, data, raw):
        print(json.dumps(["update", data]))
def display(data, raw, display_id):
    print(json.dumps(["display", data]))
    return Handle()
"""


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    made = MadeRun(tmp_path / "r")
    made.status(0, "in_progress", 49, 1)
    return made


def code(made: MadeRun, first: str = "") -> list[str]:
    """Return a program that waits for a run a moment."""
    wait = "import sys, aiflux; aiflux.open_run(sys.argv[1]).wait(timeout=0.3)"
    return [sys.executable, "-c", f"{first}\n{wait}", str(made.output)]


@pytest.mark.parametrize("columns", [140, 80])
def test_a_terminal_shows_a_bar_that_is_updated_in_place(made: MadeRun, columns: int) -> None:
    environ = {"COLUMNS": str(columns), "TERM": "xterm"}
    text = on_terminal(code(made), "stderr", columns=columns, environ=environ)
    assert LINE[: columns // 2] in text
    assert "━" in text
    assert text.count("\n") == 1, "it is one line"


def test_elsewhere_nothing_is_shown(made: MadeRun) -> None:
    done = subprocess.run(code(made), capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


@pytest.mark.parametrize("kernel", [True, False])
def test_a_notebook_shows_a_bar_that_is_updated_in_place(
    made: MadeRun, tmp_path: Path, kernel: bool
) -> None:
    package = tmp_path / "IPython"
    package.mkdir()
    (package / "__init__.py").write_text(IPYTHON.format(kernel="object()" if kernel else "None"))
    (package / "display.py").write_text(DISPLAY)
    done = subprocess.run(
        code(made, f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import IPython.display"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stderr == ""
    if not kernel:
        assert calls == []
        return
    assert [name for name, _ in calls[:2]] == ["display", "update"]
    assert calls[0][1]["text/plain"].startswith(LINE)
    assert calls[0][1]["text/html"].startswith('<progress value="50" max="100"></progress> ')


def test_a_notebook_gets_no_markup_of_others(made: MadeRun) -> None:
    data = notebook_data(Run.open(made.output).status())
    assert data["text/plain"].startswith(LINE)
    assert "<" not in data["text/html"].partition("</progress>")[2]
