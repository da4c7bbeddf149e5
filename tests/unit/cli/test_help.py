"""Help fits a screen, shows an example that works, and is quick."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest

from aiflux.cli.main import GROUPS, main, make_parser
from aiflux.cli.parser import Parser

WIDTH = 80
HEIGHT = 45


def every(parser: Parser) -> Iterator[Parser]:
    for command, _ in parser.commands():
        yield command
        yield from every(command)


PARSER = make_parser()
COMMANDS = list(every(PARSER))
per_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.prog))


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def examples(command: Parser) -> list[str]:
    _, _, text = (command.epilog or "").partition("example")
    lines = text.partition(":")[2].splitlines()
    return [line.strip() for line in lines if line.strip().startswith("aiflux ")]


@per_command
def test_help_fits_a_screen(command: Parser) -> None:
    lines = command.format_help().splitlines()
    assert len(lines) <= HEIGHT
    assert all(len(line) <= WIDTH for line in lines), max(lines, key=len)
    assert command.description


@per_command
def test_every_command_shows_an_example_that_parses(command: Parser) -> None:
    assert examples(command), command.prog
    for example in examples(command):
        words = shlex.split(example.split(" > ")[0], comments=True)
        assert words[: len(command.prog.split())] == command.prog.split()
        PARSER.parse_args(words[1:])


def test_the_list_of_commands_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    assert 24 <= len(lines) <= 40
    assert all(len(line) < WIDTH for line in lines)
    for title, commands in GROUPS.items():
        at = lines.index(f"{title}:")
        listed = [line.split()[0] for line in lines[at + 1 : at + 1 + len(commands)]]
        assert listed == list(commands)


def test_help_all_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "--help-all"])
    told = capsys.readouterr().out
    assert end.value.code == 0
    (run,) = (command for command in COMMANDS if command.prog == "aiflux run")
    assert all(option in told for option in {*run._option_string_actions} - {"--nodes"})
    assert "--request-timeout" not in run.format_help()


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "prepare:" in capsys.readouterr().out
