"""Usage errors have one format, and closed streams cause no other errors."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux.cli.main import main, make_program
from aiflux.cli.usage_errors import options_of_all
from aiflux.engines.outcome import Kind, Outcome
from aiflux.util.text import nearest
from aiflux.worker.progress import TerminalReporter
from aiflux.worker.stats import Stats
from tests.unit.made_runs import MadeRun


def wrong(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """Return the error and its remedy."""
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    seen, remedy = printed.err.splitlines()
    assert seen.startswith("error: ")
    assert remedy.startswith("  -> ")
    return seen.removeprefix("error: "), remedy.removeprefix("  -> ")


@pytest.mark.parametrize(
    ("words", "seen", "remedy"),
    [
        ("reprot x", "unknown command 'aiflux reprot'", "did you mean 'report'?"),
        ("convert cvs", "unknown command 'aiflux convert cvs'", "did you mean 'csv'?"),
        ("models pul x", "unknown command 'aiflux models pul'", "did you mean 'pull'?"),
        ("help modles", "unknown command 'aiflux modles'", "did you mean 'models'?"),
        ("run --inptu x", "aiflux run: unknown option --inptu", "did you mean --input?"),
        ("--vresion", "aiflux: unknown option --vresion", "did you mean --version?"),
        ("status --shards 3 x", "aiflux status: unknown option --shards", "aiflux run, "),
        ("report --image x", "aiflux report: unknown option --image", "aiflux run, "),
        ("jobs --json --zzz", "aiflux jobs: unknown option --zzz", "see aiflux jobs --help"),
        ("run", "aiflux run needs an input", "such as: aiflux run prompts.jsonl --model"),
        ("run a.jsonl -i b.jsonl", "aiflux run: INPUT and --input cannot be combined", "give one"),
        ("run a.jsonl --force --retry-failed", "--force and --retry-failed cannot be combined",
         "give one of them (--no-retry-failed,"),
        ("run a.jsonl --force --force-resume", "--force and --force-resume cannot be combined",
         "give one of them"),
        ("status", "aiflux status needs RUN", "such as: aiflux status results.json"),
        ("models", "aiflux models needs a subcommand", "such as: aiflux models pull"),
        ("jobs extra", "aiflux jobs: unexpected argument 'extra'", "see aiflux jobs --help"),
        ("jobs a b", "aiflux jobs: unexpected arguments 'a', 'b'", "see aiflux jobs --help"),
        ("report -x y", "aiflux report: unknown option -x", "see aiflux report --help"),
        ("run --input x --shards", "aiflux run: --shards needs a value", "such as: aiflux run"),
        ("run x --model --force", "aiflux run: --model needs a value", "such as: aiflux run"),
        ("jobs --json=3", "aiflux jobs: --json takes no value", "such as: aiflux jobs"),
        ("jobs --help=3", "aiflux jobs: --help takes no value", "such as: aiflux jobs"),
        ("run x --no-seal=3", "aiflux run: --no-seal takes no value", "such as: aiflux run"),
        ("run x -model a", "aiflux run: unexpected argument 'a'", "did you mean --model? see"),
        ("run x --eng", "unknown option --eng", "did you mean --engine or --engine-command or "
         "--engine-env or --engine-arg or --engine-url, ...? see aiflux run --help-all"),
        ("run x --engine-ar", "unknown option --engine-ar", "did you mean --engine-arg? see"),
        ("watch --interval a x", "aiflux watch: --interval 'a' is not a number", "such as: "),
        ("logs --shard a x", "aiflux logs: --shard 'a' is not a whole number", "such as: "),
        ("run x --pilot 1", "--pilot '1' is not a whole number of at least 2", "such as: "),
        ("completion cmd", "aiflux completion: 'cmd' is not a possible SHELL", "use one of: bash"),
        ("image build --base x", "aiflux image build: --base cannot be 'x'", "use one of: auto"),
        ("--json jobs", "--json belongs after the command", "such as: aiflux jobs --json"),
        ("run --input a --local --dry-run", "--local and --dry-run cannot be combined", "give one"),
        ("estimate --request 3 --input x", "unknown option --request", "did you mean --requests"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_says_what_to_type(
    words: str, seen: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = wrong(capsys, *words.split())
    assert printed[0].endswith(seen) or seen in printed[0]
    assert printed[1].startswith(remedy)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--modle", "--model"),
        ("--moddel", "--model"),
        ("--modell", "--model"),
        ("--modl", "--model"),
        ("--nodel", "--model"),
        ("--imput", "--input"),
        ("--ouput", "--output"),
        ("--outptu", "--output"),
        ("--tiem", "--time"),
        ("--grse", "--gres"),
        ("--acount", "--account"),
        ("--patition", "--partition"),
        ("--concurency", "--concurrency"),
        ("--max-retrys", "--max-retries"),
        ("--max_failures", "--max-failures"),
        ("--engine-ulr", "--engine-url"),
        ("--models-dri", "--models-dir"),
        ("--context-lenght", "--context-length"),
        ("--dryrun", "--dry-run"),
        ("--drain-second", "--drain-seconds"),
    ],
)
def test_a_typing_error_gets_the_option_that_was_meant(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, remedy = wrong(capsys, "run", "in.jsonl", typed, "x")
    assert remedy.startswith(f"did you mean {meant}?")


def test_two_letters_in_the_wrong_order_are_recognised_in_every_option() -> None:
    program = make_program()
    for _, names in options_of_all(program):
        known = {name for name in names if name.startswith("--")}
        for name in known:
            for at in range(2, len(name) - 1):
                typed = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
                assert nearest(typed, known) == name


def test_words_that_only_look_like_options_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "in.csv"
    table.write_text("text\na\n")
    words = ["convert", "csv", "--input", str(table), "--template", "--- {text}", "--dry-run"]
    assert main(words) == 0
    assert "--- a" in capsys.readouterr().out
    assert wrong(capsys, "status", "--", "--nope")[0].startswith("no run found at '--nope'")


@pytest.mark.parametrize("words", ["--debug status nowhere", "status nowhere --debug"])
def test_every_command_shows_traces(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_name_that_is_no_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    seen, remedy = wrong(capsys, "check", os.fsdecode(b"b\xe4d.jsonl"))
    assert r"b'b\xe4d.jsonl' is not valid" in seen
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
    made.status(0, "completed")
    made.whole("completed", 0)
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
    printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n")
    line = next(line for line in printed.splitlines() if "req/s" in line)
    assert len(line) <= width
    assert f"{stats.done}/1000000" in line
    assert "12345 failed, " in line
    assert "ETA " in line
    assert "…" not in line


@COMMANDS
def test_a_full_disk_behind_stdout_is_no_bug(command: str, finished: str) -> None:
    done = shell('"$@" >/dev/full', *words_of(command, finished))
    assert done.returncode == 5
    assert done.stderr.startswith("error: cannot write to stdout: No space")


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


def test_a_name_in_other_letter_case_is_the_nearest() -> None:
    assert nearest("TEXT", ["test", "text"]) == "text"
    assert nearest("CUSTOM_ID", ["id", "custom_id"]) == "custom_id"
    assert nearest("TEXT", ["label"]) is None
