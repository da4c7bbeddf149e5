"""Help fits a screen, shows an example that works, is quick and has colours on a terminal only."""

from __future__ import annotations

import re
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
from tests.unit.terminals import on_terminal

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
    assert lines[0] == "Usage: aiflux [--version] [--verbose] [--help] COMMAND [ARGS]..."
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


def test_the_help_of_serve_shows_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help-all"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Engine to start: llamacpp, vllm (default: by the model)" in printed
    assert "(default: ollama)" not in printed
    assert "GPUs for each engine (default: all GPUs of the job)" in printed


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
    return on_terminal([*AIFLUX, *words], "stdout", environ=environ)


def test_help_has_colours_on_a_terminal_that_has_them() -> None:
    coloured = seen_on_a_terminal("run", "--help")
    assert COLOUR.search(coloured)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", seen_on_a_terminal("jobs", "-h", NO_COLOR="1"))
    assert not COLOUR.search(seen_on_a_terminal("jobs", "-h", TERM="dumb"))


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


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, aiflux, aiflux.slurm; print(*sys.modules)"
    # Without the site's packages, which files of their own may import.
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    packages = {name.split(".")[0] for name in done.stdout.split()} - {"__main__"}
    assert packages - sys.stdlib_module_names == {"aiflux"}


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
