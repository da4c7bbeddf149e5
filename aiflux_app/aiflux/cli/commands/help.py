"""``aiflux help``: the help of a command."""

from __future__ import annotations

from collections.abc import Sequence

import click

from aiflux.cli.help import print_help
from aiflux.cli.parser import argument, command


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
