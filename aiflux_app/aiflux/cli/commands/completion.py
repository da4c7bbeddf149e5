"""``aiflux completion``: the script that completes command lines in a shell."""

from __future__ import annotations

import click

from aiflux.cli.completion import SHELLS, script
from aiflux.cli.parser import COMPLETE, Choice, argument, command


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
