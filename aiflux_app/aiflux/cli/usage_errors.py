"""Errors in a command line: what is wrong, and what to type instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from aiflux.cli.parser import LazyGroup, Option, example_of, see_help
from aiflux.errors import UsageError
from aiflux.util.text import joined, nearest

_SHOWN_COMMANDS = 3
_SHOWN_OPTIONS = 5


def usage_error(error: click.UsageError, root: LazyGroup, words: Sequence[str]) -> UsageError:
    """Return one of click's errors in AI-Flux's form: the problem and the remedy."""
    ctx = error.ctx
    if ctx is None:
        return UsageError(error.format_message(), see_help(root.make_context("aiflux", [])))
    path = ctx.command_path
    if isinstance(error, click.NoSuchOption):
        return _no_option(error.option_name, ctx, root, words)
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return UsageError(f"{path} needs {_name(error.param, ctx)}", example_of(ctx))
    if isinstance(error, click.BadOptionUsage):
        params = ctx.command.get_params(ctx)
        taken = next((param for param in params if error.option_name in _names(param)), None)
        is_flag = isinstance(taken, click.Option) and taken.is_flag
        seen = "takes no value" if is_flag else "needs a value"
        return UsageError(f"{path}: {error.option_name} {seen}", example_of(ctx))
    if isinstance(error, click.BadParameter) and error.param is not None:
        name = _name(error.param, ctx)
        return UsageError(f"{path}: {name} {error.message}", example_of(ctx))
    return UsageError(f"{path}: {error.format_message()}", see_help(ctx))


def _name(param: click.Parameter, ctx: click.Context) -> str:
    if isinstance(param, click.Argument):
        return param.make_metavar(ctx)
    return max(param.opts, key=len)


def _no_option(name: str, ctx: click.Context, root: LazyGroup, words: Sequence[str]) -> UsageError:
    path = ctx.command_path
    if ctx.parent is None and (late := _behind_the_command(name, root, words)):
        return UsageError(f"{name} belongs after the command", f"such as: {late} {name}")
    params = ctx.command.get_params(ctx)
    known = [each for param in params for each in _names(param)]
    if ctx.parent is None:  # those of the program itself, for which its help has no room
        known = [each for param in params for each in param.opts]
    near = [each for each in known if name.startswith("--") and each.startswith(name)]
    near = near or [each for each in [nearest(name, known)] if each is not None]
    remedy = see_help(ctx)
    elsewhere = [other for other, names in options_of_all(root) if name in names]
    if near:
        names = " or ".join(near[:_SHOWN_OPTIONS])
        others = ", ..." if len(near) > _SHOWN_OPTIONS else ""
        remedy = f"did you mean {names}{others}? {remedy}"
    elif elsewhere:
        remedy = f"{_having(elsewhere)} it; {remedy}"
    return UsageError(f"{path}: unknown option {name}", remedy)


def _names(param: click.Parameter) -> tuple[str, ...]:
    hidden = isinstance(param, Option) and param.hidden
    return () if hidden else (*param.opts, *param.secondary_opts)


def _behind_the_command(name: str, root: LazyGroup, words: Sequence[str]) -> str | None:
    """Return the command in the words that has an option."""
    with root.make_context("aiflux", [], resilient_parsing=True) as ctx:
        for word in words:
            command = root.get_command(ctx, word)
            if command is not None:
                has = any(name in _names(param) for param in command.params)
                return f"aiflux {word}" if has else None
    return None


def _having(commands: Sequence[str]) -> str:
    ranked = sorted(commands, key=lambda path: path != "aiflux run")
    shown = ranked[:_SHOWN_COMMANDS] + (["others"] if len(ranked) > _SHOWN_COMMANDS else [])
    return f"{joined(shown)} {'has' if len(shown) == 1 else 'have'}"


def options_of_all(root: click.Group, path: str = "aiflux") -> Iterator[tuple[str, set[str]]]:
    """Yield every command of a group with the names of its options."""
    with click.Context(root, info_name=path, resilient_parsing=True) as ctx:
        for name in root.list_commands(ctx):
            command = root.get_command(ctx, name)
            if isinstance(command, click.Group):
                yield from options_of_all(command, f"{path} {name}")
            elif command is not None:
                yield f"{path} {name}", {each for param in command.params for each in _names(param)}
