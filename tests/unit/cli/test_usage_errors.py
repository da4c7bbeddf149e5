"""Wrong command lines are told in the one form, and streams that take nothing cost nothing else."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux.cli.main import main
from aiflux.engines.outcome import Kind, Outcome
from aiflux.worker.progress import TerminalReporter
from aiflux.worker.stats import Stats
from tests.unit.made_runs import MadeRun


def wrong(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """Return what is said to be wrong, and what to do."""
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    seen, remedy = told.err.splitlines()
    assert seen.startswith("error: ")
    assert remedy.startswith("  -> ")
    return seen.removeprefix("error: "), remedy.removeprefix("  -> ")


@pytest.mark.parametrize(
    ("words", "seen", "remedy"),
    [
        ("reprot x", "'reprot' is no command of aiflux", "did you mean 'report'?"),
        ("convert cvs", "'cvs' is no kind of aiflux convert", "did you mean 'csv'?"),
        ("models pul x", "'pul' is no action of aiflux models", "did you mean 'pull'?"),
        ("run --inptu x", "aiflux run has no option --inptu", "did you mean --input?"),
        ("--vresion", "aiflux has no option --vresion", "did you mean --version?"),
        ("status --shards 3 x", "aiflux status has no option --shards", "aiflux run, "),
        ("report --image x", "aiflux report has no option --image", "aiflux run, "),
        ("jobs --json --zzz", "aiflux jobs has no option --zzz", "aiflux jobs --help lists"),
        ("run", "aiflux run needs --input", "such as: aiflux run --model"),
        ("status", "aiflux status needs R", "such as: aiflux status results.json"),
        ("models", "aiflux models needs ACTION", "such as: aiflux models pull"),
        ("jobs extra", "aiflux jobs has no use for 'extra'", "aiflux jobs --help lists"),
        ("report -x y", "aiflux report has no use for '-x'", "aiflux report --help lists"),
        ("run --input x --shards", "aiflux run: --shards has no value", "such as: aiflux run"),
        ("watch --interval a x", "aiflux watch: --interval 'a' is not a number", "such as: "),
        ("logs --shard a x", "aiflux logs: --shard 'a' is not a whole number", "such as: "),
        ("completion cmd", "'cmd' is no shell of aiflux completion", "known are: bash"),
        ("image build --base x", "aiflux image build: --base cannot be 'x'", "known are: auto"),
        ("--json jobs", "--json stands before the command", "put it behind: aiflux jobs --json"),
        ("run --input a --local --dry-run", "--dry-run and --local exclude each other", "give one"),
        ("estimate --request 3 --input x", "ambiguous option: --request", "such as: aiflux est"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_says_what_to_type(
    words: str, seen: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = wrong(capsys, *words.split())
    assert told[0].endswith(seen) or seen in told[0]
    assert told[1].startswith(remedy)


def test_words_that_only_look_like_options_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "in.csv"
    table.write_text("text\na\n")
    words = ["convert", "csv", "--input", str(table), "--template", "--- {text}", "--dry-run"]
    assert main(words) == 0
    assert "--- a" in capsys.readouterr().out
    assert wrong(capsys, "status", "--", "--nope")[0].startswith("no run is found at '--nope'")


@pytest.mark.parametrize("words", ["--debug status nowhere", "status nowhere --debug"])
def test_every_command_shows_traces(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_name_that_is_no_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    seen, remedy = wrong(capsys, "check", os.fsdecode(b"b\xe4d.jsonl"))
    assert r"b'b\xe4d.jsonl' is no text" in seen
    assert "rename" in remedy


def shell(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in which ``$@`` is aiflux with words."""
    command = [sys.executable, "-m", "aiflux.cli", *words]
    return subprocess.run(
        ["bash", "-c", script, "bash", *command],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture
def finished(tmp_path: Path) -> str:
    made = MadeRun(tmp_path)
    made.status(0, "completed", 100)
    made.whole("completed", 100)
    return str(made.output)


COMMANDS = pytest.mark.parametrize("command", ["status", "report --json", "config show", "jobs"])


def words_of(command: str, run: str) -> list[str]:
    words = command.split()
    return [*words, run] if words[0] in ("status", "report") else words


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_of_a_run_shows_its_figures_whole(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    now = [0.0]
    stats = Stats(1_000_000, 200_000, 12_345, clock=lambda: now[0])
    verdict = Outcome(Kind.ANSWERED, completion_tokens=30)
    for _ in range(50):
        now[0] += 0.01
        stats.recorded(verdict, "r")
    screen = Terminal()
    reporter = TerminalReporter(screen)
    reporter.show(stats)
    reporter.close()
    told = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n")
    line = next(line for line in told.splitlines() if "req/s" in line)
    assert len(line) <= width
    assert f"{stats.done}/1000000" in line
    assert "12345 failed, " in line
    assert "ETA " in line
    assert "…" not in line


@COMMANDS
def test_a_full_disk_behind_stdout_is_no_bug(command: str, finished: str) -> None:
    done = shell('"$@" >/dev/full', *words_of(command, finished))
    assert done.returncode == 5
    assert done.stderr.startswith("error: what was to be printed could not be written: No space")


@COMMANDS
def test_a_reader_that_went_away_is_no_error(command: str, finished: str) -> None:
    done = shell('{ sleep 0.2; "$@"; echo "$?" >&2; } | true', *words_of(command, finished))
    assert done.stderr == "0\n"


@COMMANDS
def test_a_closed_stdout_is_no_error(command: str, finished: str) -> None:
    done = shell('"$@" >&-', *words_of(command, finished))
    assert (done.returncode, done.stderr) == (0, "")


def test_what_an_encoding_lacks_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request = {"custom_id": "é", "method": "POST", "url": "/v1/chat/completions", "body": {}}
    request["body"] = {"messages": [{"role": "user", "content": "é" * 500}]}
    message = {"role": "assistant", "content": "日本 …"}
    answer = {"choices": [{"message": message, "finish_reason": "stop"}]}
    output = tmp_path / "results.json"
    entry = json.dumps({"input": request, "output": answer, "metadata": {}})
    output.write_text(f"[\n{entry}\n]\n")
    plain = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"
    done = shell(f'export {plain}; "$@"', "results", "show", output.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\xe9" in done.stdout
