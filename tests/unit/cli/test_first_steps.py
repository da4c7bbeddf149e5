"""What helps people to start: completion in real shells, and the starter project."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux.cli.commands.completion import SHELLS, script
from aiflux.cli.commands.examples import NAMES
from aiflux.cli.main import COMMANDS, main, make_parser
from aiflux.core.config.config import Config

# What bash does when a person presses the Tab key.
COMPLETE = """\
. "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
COMP_LINE="${COMP_WORDS[*]}"
COMP_POINT=${#COMP_LINE}
read -r -a how <<<"$(complete -p aiflux)"
for at in "${!how[@]}"; do [[ ${how[at]} != -F ]] || function=${how[at + 1]}; done
"$function" aiflux "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}" 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "aiflux.bash"
    path.write_text(script("bash"), encoding="utf-8")
    return path


def completed(path: Path, folder: Path, *words: str) -> set[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", str(path), "aiflux", *words],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_bash_completes_commands_and_options(bash_script: Path, tmp_path: Path) -> None:
    assert set(COMMANDS) <= completed(bash_script, tmp_path, "")
    assert {"report", "resume", "results", "run"} <= completed(bash_script, tmp_path, "r")
    assert "run" not in completed(bash_script, tmp_path, "rep")
    assert {"--shards", "--seal"} & completed(bash_script, tmp_path, "run", "--s")
    assert completed(bash_script, tmp_path, "report", "--js") == {"--json"}
    assert completed(bash_script, tmp_path, "completion", "z") == {"zsh"}


def test_bash_completes_files(bash_script: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").touch()
    assert "results.json" in completed(bash_script, tmp_path, "report", "res")
    assert "results.json" in completed(bash_script, tmp_path, "run", "--input", "res")


def test_fish_completes_commands_options_and_files(tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (tmp_path / "aiflux.fish").write_text(script("fish"), encoding="utf-8")
    (tmp_path / "my results.json").touch()
    for typed, told in (
        ("aiflux repo", "report"), ("aiflux report --js", "--json"),
        ("aiflux report my", "my results.json"), ("aiflux run --input my", "my results.json"),
    ):  # fmt: skip
        command = f"source aiflux.fish; complete -C '{typed}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", command], cwd=tmp_path,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [told], typed


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
        make_parser().parse_args(command)


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
    told = subprocess.run(
        [*command, str(tmp_path / "results.json")], capture_output=True, text=True, check=True
    ).stdout
    assert told == "a\tA B\nb\tFAILED: no\n"


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "aiflux.yaml").write_text("mine")
    assert main(["examples", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["aiflux.yaml"]
    assert (tmp_path / "aiflux.yaml").read_text() == "mine"
    assert "aiflux.yaml" in capsys.readouterr().err
