"""What helps people to start: completion in real shells, and the starter project."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from aiflux.cli.commands.help import NAMES
from aiflux.cli.completion import SHELLS
from aiflux.cli.main import main
from aiflux.core.config.config import Config
from aiflux.core.runs.registry import register
from tests.unit.command_line import PROGRAM, parse
from tests.unit.made_runs import MadeRun

BIN = str(Path(sys.executable).parent)
# What bash does when a person presses the Tab key. Where compopt is called, it completes files.
COMPLETE = """\
. "$1"
compopt() { echo "compopt $2"; }
COMP_WORDS=("${@:2}")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
COMP_LINE="${COMP_WORDS[*]}"
COMP_POINT=${#COMP_LINE}
read -r -a how <<<"$(complete -p aiflux)"
for at in "${!how[@]}"; do [[ ${how[at]} != -F ]] || function=${how[at + 1]}; done
"$function" aiflux "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str) -> str:
    command = [f"{BIN}/aiflux", "completion", shell]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "aiflux.bash"
    path.write_text(script("bash"), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")


def completed(path: Path, folder: Path, *words: str) -> set[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", str(path), "aiflux", *words],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return {line for line in done.stdout.splitlines() if line}


def test_bash_completes_commands_and_options(bash_script: Path, tmp_path: Path) -> None:
    assert set(PROGRAM.list_commands(click.Context(PROGRAM))) <= completed(
        bash_script, tmp_path, ""
    )
    assert {"report", "resume", "results", "run"} == completed(bash_script, tmp_path, "r")
    assert completed(bash_script, tmp_path, "rep") == {"report"}
    assert {"--shards", "--seal"} <= completed(bash_script, tmp_path, "run", "--s")
    assert completed(bash_script, tmp_path, "report", "--js") == {"--json"}
    assert completed(bash_script, tmp_path, "completion", "z") == {"zsh"}
    assert completed(bash_script, tmp_path, "models", "ver") == {"verify"}
    assert completed(bash_script, tmp_path, "models", "nothing", "x") == set()


@pytest.mark.parametrize(
    "words", [("report", "res"), ("run", "--input", "res"), ("run", "res"), ("check", "")]
)
def test_bash_completes_files(words: tuple[str, ...], bash_script: Path, tmp_path: Path) -> None:
    assert "compopt default" in completed(bash_script, tmp_path, *words)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user with two runs, a model of a catalog and a model in the directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    (tmp_path / "work").mkdir()
    for folder, job in (("mine", "4711"), ("two words", "4712")):
        made = MadeRun(tmp_path / "work" / folder)
        assert register(made.run.path, made.output, [job]) is None
    return tmp_path / "work"


def test_bash_completes_runs_and_their_jobs(bash_script: Path, known: Path) -> None:
    assert completed(bash_script, known, "status", "mi") == {"mine/results.json"}
    assert completed(bash_script, known, "cancel", "4711") == {"4711"}
    # What has to be quoted is left to the shell's own completion of files.
    assert completed(bash_script, known, "status", "two") == {"compopt default"}


def test_bash_completes_models_though_their_names_have_colons(
    bash_script: Path, known: Path
) -> None:
    assert "llama3.2:3b" in completed(bash_script, known, "run", "--model", "llama3.")
    # Bash takes the colon for the end of a word, and inserts what follows it.
    split = completed(bash_script, known, "models", "show", "llama3.2", ":", "")
    assert {"1b", "3b"} <= split
    assert completed(bash_script, known, "models", "show", "llama3.2", ":", "3") == {"3b"}
    assert completed(bash_script, known, "run", "-m", "smollm2", ":", "135") == {"135m"}


def test_completion_reports_no_error_in_the_configuration(bash_script: Path, known: Path) -> None:
    (known / "aiflux.yaml").write_text("slrm: {}\n", encoding="utf-8")
    assert completed(bash_script, known, "run", "--model", "llama") == set()


def test_fish_completes_commands_options_runs_and_files(known: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (known / "aiflux.fish").write_text(script("fish"), encoding="utf-8")
    (known / "my results.json").touch()
    for typed, wanted in (
        ("aiflux repo", "report"), ("aiflux report --js", "--json"),
        ("aiflux report my", "my results.json"), ("aiflux run --input my", "my results.json"),
        ("aiflux status mine", "mine/results.json"),
        ("aiflux models show llama3.2:3", "llama3.2:3b"),
    ):  # fmt: skip
        command = f"source aiflux.fish; complete -C '{typed}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", command], cwd=known,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [wanted], typed


def test_zsh_gets_the_same_completions_as_bash(known: Path) -> None:
    def answered(words: str) -> list[str]:
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        done = subprocess.run(
            [f"{BIN}/aiflux"], cwd=known, capture_output=True, text=True, check=True,
            env={**os.environ, **asked, "_AIFLUX_COMPLETE": "zsh_complete"},
        )  # fmt: skip
        return done.stdout.splitlines()

    assert answered("aiflux rep")[:2] == ["plain", "report"]
    assert answered("aiflux status mi")[:2] == ["plain", "mine/results.json"]
    assert answered("aiflux status other")[0] == "file"


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_read_their_script(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script was not tried")
    path = tmp_path / "script"
    path.write_text(script(shell), encoding="utf-8")
    subprocess.run([shell, "-n", str(path)], check=True, capture_output=True)


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 0
    assert "aiflux" in capsys.readouterr().out


def test_the_starter_project_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["examples"]) == 0
    folder = tmp_path / "aiflux-examples"
    assert {path.name for path in folder.iterdir()} == set(NAMES)
    assert main(["check", str(folder / "prompts.jsonl"), "--model", "llama3.2:3b"]) == 0
    config = Config(environ={}, directory=folder)
    config.get_slurm_config().checked()
    assert config.values["model"].value == "llama3.2:3b"
    lines = (folder / "README.md").read_text().splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("aiflux ")]
    assert len(commands) > 5
    for command in commands:
        parse(command)


def test_the_starter_script_makes_requests_and_reads_answers(tmp_path: Path) -> None:
    assert main(["examples", str(tmp_path)]) == 0
    (tmp_path / "questions.txt").write_text("Who?\n\nWhy: é?\n", encoding="utf-8")
    command = [sys.executable, str(tmp_path / "answers.py")]
    made = subprocess.run(
        [*command, str(tmp_path / "questions.txt")], capture_output=True, check=True
    ).stdout
    (tmp_path / "more.jsonl").write_bytes(made)
    assert main(["check", "--model", "m:1", str(tmp_path / "more.jsonl")]) == 0
    answer = {"choices": [{"message": {"content": "A\nB"}}]}
    results = [
        {"input": {"custom_id": "a"}, "output": answer},
        {"input": {"custom_id": "b"}, "output": None, "error": {"message": "no"}},
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    printed = subprocess.run(
        [*command, str(tmp_path / "results.json")], capture_output=True, text=True, check=True
    ).stdout
    assert printed == "a\tA B\nb\tFAILED: no\n"


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "aiflux.yaml").write_text("mine")
    assert main(["examples", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["aiflux.yaml"]
    assert (tmp_path / "aiflux.yaml").read_text() == "mine"
    assert "aiflux.yaml" in capsys.readouterr().err
