"""The command line for tests: every command, and command lines that are parsed but not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from aiflux.cli.main import make_program

PROGRAM = make_program()


def commands(ctx: click.Context | None = None) -> Iterator[click.Context]:
    """Yield a context for every command and subcommand, in the order of the help."""
    if ctx is None:
        ctx = click.Context(PROGRAM, info_name="aiflux", **PROGRAM.context_settings)
    if isinstance(ctx.command, click.Group):
        for name in ctx.command.list_commands(ctx):
            command = ctx.command.get_command(ctx, name)
            assert command is not None
            below = click.Context(command, info_name=name, parent=ctx)
            yield below
            yield from commands(below)


def leaves() -> Iterator[click.Context]:
    """Yield the commands that have no subcommands."""
    return (ctx for ctx in commands() if not isinstance(ctx.command, click.Group))


def parse(words: Sequence[str]) -> click.Context:
    """Return the context of a command line: its command and the values of its parameters.

    Raises:
        UsageError, click.UsageError: the command line is wrong.
    """
    ctx = PROGRAM.make_context("aiflux", [*words])
    while isinstance(ctx.command, click.Group):
        left = [*ctx._protected_args, *ctx.args]
        name, command, rest = ctx.command.resolve_command(ctx, left)
        assert command is not None
        ctx = command.make_context(name, rest, parent=ctx)
    return ctx


def option_names(command: click.Command) -> set[str]:
    """Return every name of every option of a command, but for those that all commands have."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    return {name for option in options for name in (*option.opts, *option.secondary_opts)}
