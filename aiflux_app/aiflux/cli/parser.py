"""The command line parser: short help with examples, and the types of numbers."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from aiflux.core.config.settings import BY_NAME

_WIDEST = 100
_MANY = 8
_RARE = {"force_resume", "no_preflight"}
_WHOLE = "--help-all"


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps sentences; keeps lines that are indented, and examples."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, _WIDEST) - 1
        super().__init__(prog, max_help_position=28, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(line for part in text.splitlines() for line in _lines(part, width))


def _lines(text: str, width: int) -> list[str]:
    if len(text) <= width or text.startswith((" ", "example")):
        return [text]
    return textwrap.wrap(text, width)


def is_setting(action: argparse.Action) -> bool:
    """Tell whether an option sets one of the settings; some commands have others of that name."""
    return action.dest in BY_NAME and action.default is None


def _is_common(action: argparse.Action) -> bool:
    """Tell whether --help shows an option; of two opposites it shows the first."""
    return BY_NAME[action.dest].common and BY_NAME[action.dest].option in action.option_strings


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', ')')) else '.'}"


class WrongUsageError(Exception):
    """A command line is wrong; ``message`` is argparse's."""

    def __init__(self, parser: Parser, message: str) -> None:
        super().__init__(message)
        self.parser = parser
        self.message = message


class Parser(argparse.ArgumentParser):
    """A parser whose help is short.

    Attributes:
        lists_commands: whether the epilog lists the commands and options: nothing else is shown.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        named["formatter_class"] = Formatter
        super().__init__(*arguments, **named)
        self.lists_commands = False

    def error(self, message: str) -> NoReturn:
        """Raise WrongUsageError: ``cli.usage`` tells it as every other error is told."""
        raise WrongUsageError(self, message)

    def option_names(self) -> list[str]:
        """Return every name of an option of this command."""
        return list(self._option_string_actions)

    def finish(self) -> None:
        """Shorten and complete the help of this command and of those below it.

        To be called when everything is added.
        """
        example = EXAMPLES.get(self.prog)
        if example and "example" not in (self.epilog or ""):
            self.epilog = "\n\n".join(filter(None, (f"example: {example}", self.epilog)))
        if self._rare():
            self.add_argument(
                _WHOLE, action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help="all options"
            )
        if self.usage is None and len(self._actions) > _MANY and not self.commands():
            self.usage = self._short_usage()
        for command, text in self.commands():
            command.description = _sentence(command.description or text)
            command.finish()

    def format_help(self) -> str:
        """Return the help without what is rarely needed."""
        with _without(self._actions if self.lists_commands else self._rare()):
            return super().format_help()

    def format_whole_help(self) -> str:
        """Return the help with every option."""
        return super().format_help()

    def _rare(self) -> list[argparse.Action]:
        return [
            action
            for action in self._actions
            if action.dest in _RARE or (is_setting(action) and not _is_common(action))
        ]

    def commands(self) -> list[tuple[Parser, str]]:
        """Return the commands below this one, each with what the list of them says of it."""
        return [
            (command, str(listed.help))
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for command, listed in zip(
                action.choices.values(), action._choices_actions, strict=True
            )
        ]

    def _short_usage(self) -> str:
        parts = [self.prog]
        for action in self._actions:
            value = str(action.metavar or action.dest)
            if not action.option_strings:
                parts.append(f"[{value}]" if action.nargs in ("?", "*") else value)
            elif action.required:
                parts.append(f"{action.option_strings[0]} {value}")
        return " ".join([*parts, "[options]"])


class _HelpAll(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, Parser)  # noqa: S101
        print(parser.format_whole_help(), end="")
        parser.exit()


@contextmanager
def _without(actions: Sequence[argparse.Action]) -> Iterator[None]:
    """Leave actions out of the help for a while; completion scripts still have theirs."""
    texts = [action.help for action in actions]
    for action in actions:
        action.help = argparse.SUPPRESS
    try:
        yield
    finally:
        for action, text in zip(actions, texts, strict=True):
            action.help = text


EXAMPLES = {
    "aiflux doctor": "aiflux doctor --json",
    "aiflux config": "aiflux config show",
    "aiflux config show": "aiflux config show --json",
    "aiflux config init": "aiflux config init --user",
    "aiflux image": "aiflux image info",
    "aiflux image build": "aiflux image build --base docker --output aiflux.sif",
    "aiflux image sign": "aiflux image sign aiflux.sif",
    "aiflux image info": "aiflux image info aiflux.sif",
    "aiflux models": "aiflux models pull llama3.2:3b",
    "aiflux models list": "aiflux models list --fits 40GB",
    "aiflux models show": "aiflux models show llama3.3:70b --slots 16",
    "aiflux models pull": "aiflux models pull llama3.2:3b",
    "aiflux models verify": "aiflux models verify llama3.2:3b",
    "aiflux models export": "aiflux models export llama3.2:3b llama.tar",
    "aiflux models import": "aiflux models import llama.tar",
    "aiflux models remove": "aiflux models remove llama3.2:3b",
    "aiflux bundle": "aiflux bundle create --model llama3.2:3b -o bundle.tar",
    "aiflux bundle create": "aiflux bundle create --model llama3.2:3b -o bundle.tar",
    "aiflux bundle install": "aiflux bundle install bundle.tar --prefix /sw/aiflux",
    "aiflux bundle verify": "aiflux bundle verify bundle.tar",
    "aiflux jobs": "aiflux jobs --all",
    "aiflux results show": "aiflux results show results.json --failed",
}


def whole_number(least: int) -> Callable[[str], int]:
    """Return the type of an option that takes a whole number of at least ``least``."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse
