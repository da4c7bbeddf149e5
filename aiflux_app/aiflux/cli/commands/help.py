"""``aiflux help``, ``examples`` and ``completion``: help, and a project to start from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files

import click

from aiflux.cli.completion import SHELLS, script
from aiflux.cli.help import print_help
from aiflux.cli.parser import COMPLETE, FOLDER, Choice, argument, command
from aiflux.errors import ConfigError, UsageError
from aiflux.util.files import absolute, atomic_write, short, storage_error

NAMES = ("README.md", "prompts.jsonl", "aiflux.yaml", "answers.py")


@command("help", examples=["aiflux help run", "aiflux help models pull"])
@argument("words", nargs=-1, metavar="[COMMAND]...", help="The command (default: all of them)")
def help(words: Sequence[str]) -> int:
    """Show the help of a command."""
    ctx = click.get_current_context().find_root()
    for word in words:
        if not isinstance(ctx.command, click.Group):
            break
        name, found, _ = ctx.command.resolve_command(ctx, [word])
        assert found is not None  # noqa: S101 - resolve_command refuses unknown names
        ctx = click.Context(found, info_name=name, parent=ctx)
    print_help(ctx.get_help())
    return 0


@command("examples", examples=["aiflux examples first-project"])
@argument(
    "folder",
    required=False,
    default="aiflux-examples",
    metavar="[DIR]",
    type=FOLDER,
    help="Directory to write to (default: aiflux-examples)",
)
def examples(folder: str) -> int:
    """Write a small starter project: prompts, settings, a script and a README.

    Existing files are not overwritten.
    """
    directory = absolute(folder)
    with suppress(FileNotFoundError, NotADirectoryError):
        directory.stat()  # raises if the path is out of reach; since Python 3.14, exists() does not
    existing = [name for name in NAMES if (directory / name).exists()]
    if existing:
        raise ConfigError(
            f"{', '.join(existing)} in {str(directory)!r} would be overwritten; nothing was "
            "written",
            "name another directory: aiflux examples DIR",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(
            f"{short(directory)} cannot be a directory: a part of it is a file",
            "name another directory: aiflux examples DIR",
        ) from None
    except OSError as error:
        raise storage_error(error, directory) from error
    for name in NAMES:
        with atomic_write(directory / name) as file:
            file.write((files("aiflux.cli") / "starter" / name).read_bytes())
        print(f"wrote {short(directory / name)}")
    print(f"start with {short(directory / 'README.md')}")
    return 0


@command(
    "completion",
    examples=[
        "source <(aiflux completion bash)                 # in this shell",
        "aiflux completion bash > ~/.local/share/bash-completion/completions/aiflux",
        "aiflux completion zsh > ~/.zfunc/_aiflux         # with fpath+=~/.zfunc",
        "aiflux completion fish > ~/.config/fish/completions/aiflux.fish",
    ],
)
@argument("shell", type=Choice(SHELLS), metavar="SHELL", help=f"One of {', '.join(SHELLS)}")
def completion(shell: str) -> int:
    """Print the script with which a shell completes commands, options, runs, models and files."""
    print(script(shell, click.get_current_context().find_root().command, COMPLETE))
    return 0
