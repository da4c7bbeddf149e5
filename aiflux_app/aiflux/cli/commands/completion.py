"""``aiflux completion``: what lets a shell complete commands, options and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import shtab

SHELLS = ("bash", "zsh", "fish")
_EXAMPLES = """\
examples:
  source <(aiflux completion bash)                      # for this shell
  aiflux completion bash > ~/.local/share/bash-completion/completions/aiflux
  aiflux completion zsh > ~/.zfunc/_aiflux              # fpath+=~/.zfunc
  aiflux completion fish > ~/.config/fish/completions/aiflux.fish
"""
_FILES = {"FILE", "F", "R", "PATH", "RUN", "SIF"}
_FOLDERS = {"DIR", "FOLDER"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Print the script that lets a shell complete aiflux's commands, options and files."
    )
    parser.epilog = _EXAMPLES
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def execute(arguments: argparse.Namespace) -> int:
    """Print the script."""
    print(script(arguments.shell))
    return 0


def script(shell: str) -> str:
    """Return a shell's script; it holds every command and option as they are now."""
    from aiflux.cli.main import make_parser

    parser = make_parser()
    for action in _actions(parser):
        name = str(action.metavar or action.dest).upper()
        if name in _FILES or name in _FOLDERS:
            kind = shtab.DIRECTORY if name in _FOLDERS else shtab.FILE
            action.complete = kind  # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell)
    return text


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        elif action.choices is None and action.nargs != 0:
            yield action
