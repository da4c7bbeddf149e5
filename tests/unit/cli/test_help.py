"""Help fits a screen, shows an example that works, is quick and has colours on a terminal only."""

from __future__ import annotations

import os
import pty
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from aiflux.cli.help import command_help
from aiflux.cli.main import GROUPS, main
from aiflux.cli.parser import Command, Option
from tests.unit.command_line import PROGRAM, commands, leaves, option_names, parse

WIDTH = 80
HEIGHT = 38  # of 40 lines, the prompt and the command need two
COMMANDS = list(commands())
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
AIFLUX = [sys.executable, "-m", "aiflux.cli"]
per_command = pytest.mark.parametrize("ctx", COMMANDS, ids=lambda ctx: str(ctx.command_path))


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def examples(ctx: click.Context) -> Sequence[str]:
    return ctx.command.examples  # type: ignore[attr-defined,no-any-return]


@per_command
def test_help_fits_a_screen(ctx: click.Context) -> None:
    lines = ctx.get_help().splitlines()
    assert len(lines) <= HEIGHT
    assert all(len(line) <= WIDTH for line in lines), max(lines, key=len)
    assert all(line == line.rstrip() for line in lines)
    assert ctx.command.help


@per_command
def test_every_command_shows_an_example_that_parses(ctx: click.Context) -> None:
    assert examples(ctx), ctx.command_path
    for example in examples(ctx):
        words = shlex.split(example.partition("<(")[2].strip(")") or example.split(" > ")[0])
        words = words[: words.index("#")] if "#" in words else words
        assert words[: len(ctx.command_path.split())] == ctx.command_path.split()
        parse([word.strip(")") for word in words[1:]])


@per_command
def test_every_option_has_a_text_in_the_same_form(ctx: click.Context) -> None:
    for param in ctx.command.params:
        text = getattr(param, "help", None)
        assert text, f"{ctx.command_path} {param.name}"
        assert text[0].isupper(), text
        assert not text.endswith("."), text


def test_the_list_of_commands_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 24 <= len(lines) <= HEIGHT + 1
    assert all(len(line) < WIDTH for line in lines)
    for title, group in GROUPS.items():
        at = lines.index(f"{title}:")
        listed = [line.split()[0] for line in lines[at + 1 : at + 1 + len(group)]]
        assert listed == list(group)


def test_help_all_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help-all"]) == 0
    printed = capsys.readouterr().out
    (run,) = (ctx for ctx in leaves() if ctx.command_path == "aiflux run")
    hidden = {"--nodes"}
    assert all(option in printed for option in option_names(run.command) - hidden)
    assert "--nodes " not in printed
    assert "--request-timeout" not in run.get_help()


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Prepare:" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["run", "models pull", "convert csv", ""])
def test_the_help_command_shows_what_help_shows(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["help", *words.split()]) == 0
    asked = capsys.readouterr().out
    assert main([*words.split(), "--help"]) == 0
    assert capsys.readouterr().out == asked


def seen_on_a_terminal(*words: str, **environ: str) -> str:
    """Return what a command writes to a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*AIFLUX, *words], stdout=theirs, env={**os.environ, "TERM": "xterm-256color", **environ}
    ) as process:
        os.close(theirs)
        text = b""
        try:
            while block := os.read(ours, 1 << 16):
                text += block
        except OSError:  # so Linux says that the other end is closed
            pass
        os.close(ours)
    assert process.returncode == 0
    return text.decode()


def test_help_has_colours_on_a_terminal_that_has_them() -> None:
    coloured = seen_on_a_terminal("run", "--help")
    assert COLOUR.search(coloured)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", seen_on_a_terminal("jobs", "-h", NO_COLOR="1"))
    assert not COLOUR.search(seen_on_a_terminal("jobs", "-h", TERM="dumb"))


# Seconds of a processor, which other work on the machine changes little; the best of some.
LIMITS = {
    "import aiflux.slurm": 0.1,
    "from aiflux.cli.main import main; main(['--help'])": 0.2,
}


def cpu_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize("code", LIMITS)
def test_it_is_quick(code: str) -> None:
    # Other processes on the same core make every step slower: measured against Python's own start.
    best = min(cpu_seconds(code) for _ in range(5))
    assert best < LIMITS[code] * max(1.0, min(cpu_seconds("pass") for _ in range(5)) / 0.015)


def imported(*words: str, cwd: Path) -> set[str]:
    code = "import sys\nfrom aiflux.cli.main import main\nmain(sys.argv[1:])\n"
    code += "print(*(name for name in sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, check=True
    )
    return {*done.stderr.splitlines()[-1].split()}


def test_only_help_imports_what_makes_help(tmp_path: Path) -> None:
    assert not any(name.startswith("rich_click") for name in imported("jobs", cwd=tmp_path))
    listing = imported("--help", cwd=tmp_path)
    assert "rich_click" in listing
    assert not any(name.startswith("aiflux.cli.commands.") for name in listing)
    assert not {"requests", "aiflux.slurm.submit"} & listing


@pytest.mark.parametrize("path", ["aiflux run", "aiflux resume", "aiflux models list"])
def test_the_short_help_leaves_out_what_is_rare(path: str) -> None:
    (ctx,) = (each for each in COMMANDS if each.command_path == path)
    assert isinstance(ctx.command, Command)
    rare = {param.name for param in ctx.command.rare_params}
    assert rare
    whole, short = command_help(ctx, ctx.command.examples, whole=True), ctx.get_help()
    for param in ctx.command.params:
        if isinstance(param, Option) and not param.hidden:
            name = re.compile(rf"(?<![\w-]){max(param.opts, key=len)}(?![\w-])")
            assert name.search(whole)
            assert bool(name.search(short)) == (param.name not in rare)


def test_the_program_lists_its_commands_for_click() -> None:
    assert PROGRAM.list_commands(click.Context(PROGRAM)) == [
        name for group in GROUPS.values() for name in group
    ]
