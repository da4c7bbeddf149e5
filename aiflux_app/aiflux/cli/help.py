"""Help texts, made with rich-click; imported only when one is shown."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import click
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich_click.rich_help_configuration import RichHelpConfiguration
from rich_click.rich_help_formatter import RichHelpFormatter
from rich_click.rich_help_rendering import get_rich_usage
from rich_click.rich_panel import RichCommandPanel, RichOptionPanel, RichPanel

from aiflux.worker.console import TerminalConsole

if TYPE_CHECKING:
    from rich_click import RichCommand, RichContext

WIDEST = 100
_HEADING = "bold green"
_NAME = "bold cyan"
_INDENT = (0, 0, 0, 2)
_TRAILING = re.compile(r" +((?:\x1b\[[0-9;]*m)*)$", re.MULTILINE)


def print_help(text: str) -> None:
    """Print a help text to stdout, where only a console can write colors."""
    TerminalConsole(highlight=False).print(Text.from_ansi(text), soft_wrap=True)


def command_help(
    ctx: click.Context, examples: Sequence[str], note: str = "", *, whole: bool = False
) -> str:
    """Return a command's help.

    Args:
        examples: command lines.
        note: a paragraph at the end.
        whole: with the options that are rarely needed.
    """
    command = ctx.command
    params = [
        _shown_param(param, ctx, whole=whole)
        for param in command.get_params(ctx)
        if not getattr(param, "hidden", False) and (whole or not getattr(param, "rare", False))
    ]
    shown = click.Command(command.name, params=params, help=command.help, add_help_option=False)
    titles: dict[str, list[str]] = {"Arguments": [], "Options": []}
    for param in params:
        title = "Arguments" if isinstance(param, click.Argument) else "Options"
        titles.setdefault(getattr(param, "panel", None) or title, []).append(param.opts[0])
    panels = [
        RichOptionPanel(
            title, names, column_types=["opt_long", "help"] if title == "Arguments" else None
        )
        for title, names in titles.items()
    ]
    return _help(shown, ctx, panels, examples, note)


def group_help(
    ctx: click.Context,
    panels: Mapping[str, Mapping[str, str]],
    examples: Sequence[str],
) -> str:
    """Return the help of a command with subcommands.

    Args:
        panels: the subcommands: title, then name and text.
        examples: command lines.
    """
    group = ctx.command
    params = [param for param in group.get_params(ctx) if not getattr(param, "hidden", False)]
    commands = {
        name: click.Command(name, help=text)
        for texts in panels.values()
        for name, text in texts.items()
    }
    shown = click.Group(
        group.name, commands=commands, params=params, help=group.help, add_help_option=False
    )
    tables: list[RichPanel[Any, Any]] = [
        RichCommandPanel(title, [*texts]) for title, texts in panels.items()
    ]
    tables.append(RichOptionPanel("Options", [param.opts[0] for param in params]))
    return _help(shown, ctx, tables, examples)


def _shown_param(param: click.Parameter, ctx: click.Context, *, whole: bool) -> click.Parameter:
    """Return a parameter as the help shows it; the short help omits ``--no-x`` of ``--x``."""
    shown = copy.copy(param)
    if isinstance(param, click.Argument):
        shown.opts = [param.make_metavar(ctx).strip("[].")]
    elif not whole:
        shown.secondary_opts = []
    return shown


def _help(
    shown: click.Command,
    ctx: click.Context,
    panels: Sequence[RichPanel[Any, Any]],
    examples: Sequence[str],
    note: str = "",
) -> str:
    view = click.Context(shown, info_name=ctx.info_name, parent=ctx.parent)
    formatter = RichHelpFormatter(config=_configuration())
    get_rich_usage(formatter, view.command_path, " ".join(ctx.command.collect_usage_pieces(ctx)))
    for paragraph in _paragraphs(shown.help or ""):
        formatter.write(Text(paragraph))
        formatter.write("")
    # rich-click asks for its own classes; of these it uses what click's have.
    command, context = cast("RichCommand", shown), cast("RichContext", view)
    tables = [(panel, panel.get_table(command, context, formatter)) for panel in panels]
    for kind in (RichCommandPanel, RichOptionPanel):
        _align([table for panel, table in tables if isinstance(panel, kind) and table.row_count])
    for panel, table in tables:
        if table.row_count:
            formatter.write(Text(f"{panel.name}:", style=_HEADING))
            formatter.write(Padding(table, _INDENT))
            formatter.write("")
    if isinstance(ctx.command, click.Group) and len(examples) == 1:  # the lists are long
        formatter.write(Text.assemble(("Example:", _HEADING), f" {examples[0]}"), soft_wrap=True)
    elif examples:
        formatter.write(Text("Examples:", style=_HEADING))
        for line in examples:
            formatter.write(Text(f"  {line}"), soft_wrap=True)
    if note:
        formatter.write("")
        formatter.write(Text(note))
    return _TRAILING.sub(r"\1", formatter.getvalue()).rstrip("\n")


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        yield " ".join(paragraph.split())


def _align(tables: Sequence[Table]) -> None:
    """Give the first columns of tables the same width."""
    names = [cast(Text, cell) for table in tables for cell in table.columns[0].cells]
    for table in tables:
        table.columns[0].min_width = max(name.cell_len for name in names)


def _configuration() -> RichHelpConfiguration:
    return RichHelpConfiguration(
        theme="slim",
        enable_theme_env_var=False,
        max_width=WIDEST,
        options_table_column_types=["opt_all_metavar", "help"],
        options_table_help_sections=["help"],
        append_metavars_help_string="{}",
        style_usage=_HEADING,
        style_usage_command="bold",
        style_option=_NAME,
        style_switch=_NAME,
        style_command=_NAME,
        style_argument=_NAME,
        style_metavar="cyan",
        style_metavar_append="cyan",
    )
