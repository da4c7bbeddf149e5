"""The building blocks of commands: commands, groups, options and types of values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from aiflux.core.config.declaration import Setting
from aiflux.core.config.settings import SETTINGS, TITLES
from aiflux.errors import UsageError
from aiflux.util import value_parsers
from aiflux.util.text import suggestion

COMPLETE = "_AIFLUX_COMPLETE"
"""The environment variable with which a shell asks for completion."""

Function = TypeVar("Function", bound=Callable[..., Any])


class Decorator(Protocol):
    """A decorator that adds a parameter."""

    def __call__(self, function: Function, /) -> Function:
        """Return the function."""


@dataclass
class Session:
    """The state of one command line.

    Attributes:
        begin: called with the command's context before the command runs.
        debug: print the traceback of every error.
    """

    begin: Callable[[click.Context], None] = field(default=lambda _: None)
    debug: bool = False


class Option(click.Option):
    """An option.

    Attributes:
        panel: heading of its group in the help; None puts it under "Options".
        rare: listed by ``--help-all`` only.
    """

    def __init__(
        self, *names: Any, panel: str | None = None, rare: bool = False, **more: Any
    ) -> None:
        super().__init__(*names, **more)
        self.panel = panel
        self.rare = rare

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Return the value; refuse the name of an option, which follows a forgotten value."""
        given = value if isinstance(value, tuple | list) else (value,)
        known = {
            name for param in ctx.command.params for name in (*param.opts, *param.secondary_opts)
        }
        if any(isinstance(each, str) and each.startswith("--") and each in known for each in given):
            raise click.BadOptionUsage(max(self.opts, key=len), "", ctx)
        return super().type_cast_value(ctx, value)


class Argument(click.Argument):
    """An argument with a help text."""

    def __init__(self, *names: Any, help: str, **more: Any) -> None:
        super().__init__(*names, **more)
        self.help = help


def option(*names: str, **attributes: Any) -> Decorator:
    """Add an option; see `Option` and `click.option`."""
    return click.option(*names, cls=Option, **attributes)


def argument(*names: str, **attributes: Any) -> Decorator:
    """Add an argument; see `Argument` and `click.argument`."""
    return click.argument(*names, cls=Argument, **attributes)


class Command(click.Command):
    """A command with examples.

    Attributes:
        examples: command lines that work.
        exclusive: groups of parameters of which only one may be given.
        note: a paragraph at the end of the help; of the long one, if there are two.
    """

    def __init__(
        self,
        *arguments: Any,
        examples: Sequence[str] = (),
        exclusive: Sequence[tuple[str, ...]] = (),
        note: str = "",
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self.examples = examples
        self.exclusive = exclusive
        self.note = note
        # `parse_args` reports unexpected arguments itself.
        self.context_settings["allow_extra_args"] = True

    @property
    def rare_params(self) -> list[click.Parameter]:
        """The options that ``--help`` does not list."""
        return [param for param in self.params if isinstance(param, Option) and param.rare]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return all parameters, including those that every command has."""
        whole = [_help_all()] if self.rare_params else []
        return [*super().get_params(ctx), *whole, debug_option()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; refuse unexpected arguments, and exclusive parameters given together."""
        given = [*args]
        try:
            rest = super().parse_args(ctx, args)
        except click.BadOptionUsage as error:
            error.ctx = ctx
            raise
        if ctx.resilient_parsing:
            return rest
        if rest:
            words = ", ".join(map(repr, rest))
            noun = "argument" if len(rest) == 1 else "arguments"
            remedy = f"{self._one_dash(ctx, given)}{see_help(ctx)}"
            raise UsageError(f"{ctx.command_path}: unexpected {noun} {words}", remedy)
        for names in self.exclusive:
            refuse_several(ctx, names)
        return rest

    def _one_dash(self, ctx: click.Context, words: Sequence[str]) -> str:
        """Return a hint for ``-model NAME``, which is ``-m odel`` and an argument."""
        known = {name for param in self.get_params(ctx) for name in param.opts}
        meant = [f"-{word}" for word in words if f"-{word}".startswith("--")]
        near = next((word for word in meant if word in known), None)
        return "" if near is None else f"did you mean {near}? "

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the option ``--help``."""
        return _help_option(super().get_help_option(ctx))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; return its exit code."""
        session = ctx.find_object(Session)
        if session is not None:
            session.begin(ctx)
        return super().invoke(ctx)

    def get_help(self, ctx: click.Context) -> str:
        """Return the help, colored for a terminal."""
        from aiflux.cli.help import command_help

        return command_help(ctx, self.examples, "" if self.rare_params else self.note)


def refuse_several(ctx: click.Context, names: Sequence[str]) -> None:
    """Refuse a command line that gives more than one of several parameters.

    Raises:
        UsageError: more than one is given.
    """
    given = [
        param.make_metavar(ctx).strip("[].")
        if isinstance(param, Argument)
        else max(param.opts, key=len)
        for param in ctx.command.params
        if param.name in names
        and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
    ]
    if len(given) > 1:
        raise UsageError(
            f"{ctx.command_path}: {' and '.join(given)} cannot be combined",
            f"give one of them; {see_help(ctx)}",
        )


class CommandGroup(click.Group):
    """A command with subcommands."""

    command_class = Command

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.no_args_is_help = False
        self.examples = examples

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the subcommand that the words name."""
        command = self.get_command(ctx, args[0])
        if command is None and not ctx.resilient_parsing:
            raise UsageError(
                f"unknown command '{ctx.command_path} {args[0]}'",
                suggestion(args[0], self.list_commands(ctx)),
            )
        return args[0], command, args[1:]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        if not (ctx._protected_args or ctx.args or self.invoke_without_command):
            raise UsageError(f"{ctx.command_path} needs a subcommand", example_of(ctx))
        return super().invoke(ctx)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return all parameters, including those that every command has."""
        return [*super().get_params(ctx), debug_option()]

    def get_help(self, ctx: click.Context) -> str:
        """Return the help, colored for a terminal."""
        from aiflux.cli.help import group_help

        return group_help(ctx, {"Commands": self.listed()}, self.examples)

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the option ``--help``."""
        return _help_option(super().get_help_option(ctx))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands, in the order of the code."""
        return [*self.commands]

    def listed(self) -> dict[str, str]:
        """Return the subcommands with their short help texts."""
        return {
            name: each.get_short_help_str(80).removesuffix(".")
            for name, each in self.commands.items()
        }


class LazyGroup(CommandGroup):
    """The program, which imports a command only when it is used.

    Attributes:
        panels: the groups of commands: title, then names and help texts.
        modules: the module of each command, which has an object of the command's name.
    """

    def __init__(
        self, panels: Mapping[str, Mapping[str, str]], modules: Mapping[str, str], **more: Any
    ) -> None:
        super().__init__(invoke_without_command=True, **more)
        self.panels = panels
        self.modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return [name for group in self.panels.values() for name in group]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if the name is unknown."""
        if cmd_name not in self.modules:
            return None
        found: click.Command = getattr(
            import_module(self.modules[cmd_name]), cmd_name.replace("-", "_")
        )
        return found

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return all parameters."""
        return click.Group.get_params(self, ctx)

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the option ``--help``, without which the list of commands fits a screen."""
        found = super().get_help_option(ctx)
        if found is not None:
            found.hidden = True
        return found

    def get_help(self, ctx: click.Context) -> str:
        """Return the help; no command is imported for it."""
        from aiflux.cli.help import group_help

        return group_help(ctx, self.panels, self.examples)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """Return matching commands and options; no command is imported."""
        texts = {name: text for group in self.panels.values() for name, text in group.items()}
        items = [
            CompletionItem(name, help=text)
            for name, text in texts.items()
            if name.startswith(incomplete)
        ]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]


def command(name: str, **attributes: Any) -> Callable[[Callable[..., int]], Command]:
    """Make a command of a function; its docstring is the help text. See `Command`."""
    return click.command(name, cls=Command, **attributes)


def group(name: str, **attributes: Any) -> Callable[[Callable[..., None]], CommandGroup]:
    """Make a group of a function; its docstring is the help text. See `CommandGroup`."""
    return click.group(name, cls=CommandGroup, **attributes)


def _help_option(option: click.Option | None) -> click.Option | None:
    """Have click's option print the help with colors."""
    if option is not None:
        option.help = "Show this help"
        option.callback = _show_help
    return option


def _show_help(ctx: click.Context, option: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        from aiflux.cli.help import command_help, print_help

        whole = "--help-all" in option.opts
        command = ctx.command
        if whole and isinstance(command, Command):
            print_help(command_help(ctx, command.examples, command.note, whole=True))
        else:
            print_help(ctx.get_help())
        ctx.exit()


def see_help(ctx: click.Context) -> str:
    """Return a hint to a command's help."""
    whole = isinstance(ctx.command, Command) and ctx.command.rare_params
    return f"see {ctx.command_path} {'--help-all' if whole else '--help'}"


def example_of(ctx: click.Context) -> str:
    """Return a remedy with an example of a command."""
    examples: Sequence[str] = getattr(ctx.command, "examples", ())
    return f"such as: {examples[0]}; {see_help(ctx)}" if examples else see_help(ctx)


def debug_option() -> Option:
    """Return the option that shows tracebacks; every command accepts it, and no help lists it."""

    def set_debug(ctx: click.Context, _: click.Parameter, given: bool) -> None:
        session = ctx.find_object(Session)
        if session is not None and given:
            session.debug = True

    return Option(
        ["-v", "--verbose", "--debug"], is_flag=True, expose_value=False, callback=set_debug,
        hidden=True, help="Show the traceback of an error",
    )  # fmt: skip


def _help_all() -> Option:
    return Option(
        ["--help-all"], is_flag=True, expose_value=False, is_eager=True, callback=_show_help,
        help="Show all options",
    )  # fmt: skip


# --- types of values --------------------------------------------------------------------------


class WholeNumber(click.ParamType[int]):
    """A whole number of at least ``least``, and at most ``most``."""

    name = "whole number"

    def __init__(self, least: int = 0, most: int | None = None) -> None:
        self.least = least
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        if isinstance(value, int):
            return value
        if not value.isascii() or not value.isdigit() or int(value) < self.least:
            negative = value.removeprefix("-").isdigit()
            least = f" of at least {self.least}" if self.least or negative else ""
            self.fail(f"{value!r} is not a whole number{least}", param, ctx)
        if self.most is not None and int(value) > self.most:
            self.fail(f"{value} is more than {self.most}", param, ctx)
        return int(value)


class Number(click.ParamType[float]):
    """A number."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number."""
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)


class Choice(click.Choice[str]):
    """One of several words."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the word."""
        if value not in self.choices:
            place = "" if ctx is None else f"{ctx.command_path}: "
            if isinstance(param, click.Option):
                seen = f"{max(param.opts, key=len)} cannot be {value!r}"
            else:
                seen = f"{value!r} is not a possible {'value' if param is None else param.metavar}"
            raise UsageError(f"{place}{seen}", suggestion(str(value), self.choices))
        return str(value)


FILE = click.Path()
"""A file, which the shell completes."""


class FolderType(click.ParamType[str]):
    """A directory, which the shell completes."""

    name = "directory"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """Let the shell complete directories."""
        return [CompletionItem(incomplete, type="dir")]


FOLDER = FolderType()


class ModelType(click.ParamType[str]):
    """A model; completes those of the models directory and of the catalog."""

    name = "model"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """Return matching models."""
        from aiflux.cli.completion import model_names

        return [CompletionItem(name) for name in model_names() if name.startswith(incomplete)]


MODEL = ModelType()


class RunType(click.ParamType[str]):
    """A run; completes the user's runs and their jobs, or files."""

    name = "run"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """Return matching runs; files if there are none."""
        from aiflux.cli.completion import run_names

        found = [
            CompletionItem(name, help=text)
            for name, text in run_names().items()
            if name.startswith(incomplete)
        ]
        return found or [CompletionItem(incomplete, type="file")]


RUN = RunType()


# --- parameters that several commands have ----------------------------------------------------


def parameters(*decorators: Decorator) -> Decorator:
    """Add parameters in their order."""

    def decorate(function: Function) -> Function:
        for add in reversed(decorators):
            function = add(function)
        return function

    return decorate


def settings_options(
    *sections: str,
    repeatable: Sequence[str] = (),
    rare: Sequence[str] = (),
    without: Collection[str] = (),
    helps: Mapping[str, str] | None = None,
) -> Decorator:
    """Add an option for each setting of the sections; values stay texts, None means not given.

    Args:
        repeatable: settings whose option this command accepts several times, as a tuple of values.
        rare: common settings that this command lists with ``--help-all`` only.
        without: settings to leave out.
        helps: help texts of settings that this command has another default for.
    """

    def decorate(function: Function) -> Function:
        for setting in reversed(SETTINGS):
            if setting.section in sections and setting.name not in without:
                several = setting.repeatable or setting.name in repeatable
                common = setting.common and setting.name not in rare
                help = (helps or {}).get(setting.name) or setting_help(setting)
                function = _setting_option(setting, several, common, help)(function)
        return function

    return decorate


def _setting_option(setting: Setting, several: bool, common: bool, help: str) -> Decorator:
    more: dict[str, Any] = {
        "panel": TITLES[setting.section],
        "rare": not common,
        "hidden": not setting.offered,
        "default": None,
        "help": help,
    }
    if isinstance(setting.default, bool):
        name = setting.name.replace("_", "-")
        return option(f"--{name}/--no-{name}", setting.name, **more)
    kind = MODEL if setting.name == "model" else FILE if _is_path(setting) else click.STRING
    return option(
        *setting.options,
        setting.name,
        metavar=setting.metavar,
        multiple=several,
        type=kind,
        **more,
    )


def _is_path(setting: Setting) -> bool:
    return setting.parse is value_parsers.path


def setting_help(setting: Setting) -> str:
    """Return a setting's help text with its default."""
    if isinstance(setting.default, bool) or setting.default in (None, {}, ()):
        return setting.help
    return f"{setting.help} (default: {setting.default})"


def input_parameters(help: str, *, metavar: str = "INPUT", rare: bool = False) -> Decorator:
    """Add an input, as an argument and as ``--input``; see `the_input`.

    Args:
        rare: list ``--input`` with ``--help-all`` only.
    """

    def decorate(function: Function) -> Function:
        function = option(
            "-i",
            "--input",
            "input_option",
            metavar="FILE",
            type=FILE,
            rare=rare,
            help=f"Another way to give {metavar}",
        )(function)
        return argument("input_argument", required=False, metavar=metavar, type=FILE, help=help)(
            function
        )

    return decorate


def the_input(argument: str | None, option: str | None) -> str:
    """Return the input of `input_parameters`.

    Raises:
        UsageError: none is given, or two.
    """
    ctx = click.get_current_context()
    refuse_several(ctx, ("input_argument", "input_option"))
    given = argument or option
    if given is None:
        raise UsageError(f"{ctx.command_path} needs an input", example_of(ctx))
    return given
