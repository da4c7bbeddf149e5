"""What is said of a command line that is wrong: what was seen, and what to type instead.

argparse tells of errors in sentences of its own; they are read here and told in the one form.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterator, Sequence

from aiflux.cli.parser import Parser, WrongUsageError
from aiflux.errors import UsageError
from aiflux.util.text import joined, suggestion

_SHOWN_COMMANDS = 3
_CHOICE = re.compile(r"argument [^:]+: invalid choice: '?(?P<given>.*?)'? \(choose from")
_VALUE = re.compile(r"argument (?P<name>[^:]+): invalid (?P<kind>\w+) value: (?P<given>.*)")
_NO_VALUE = re.compile(r"argument (?P<name>[^:]+): expected (one|at least one) argument")
_EXCLUDED = re.compile(r"argument (?P<name>[^:]+): not allowed with argument (?P<other>.*)")
_MISSING = re.compile(r"the following arguments are required: (?P<names>.*)")
_KINDS = {"int": "a whole number", "float": "a number"}

MakeParser = Callable[[], Parser]


def parse(parser: Parser, words: Sequence[str], every_command: MakeParser) -> argparse.Namespace:
    """Return the options that a command line gives.

    Args:
        every_command: makes a parser of all commands; called for an option that is not known.

    Raises:
        UsageError: the command line is wrong.
    """
    command = _named(parser, words)
    stray = _no_command(command, words)
    if stray is not None:
        raise _no_choice(command, stray)
    unknown = next(_unknown_options(command, words), None)
    if unknown is not None:
        raise _no_option(command, unknown, every_command())
    try:
        arguments, rest = parser.parse_known_args(words)
    except WrongUsageError as wrong:
        raise _told(wrong.parser, wrong.message) from None
    if rest:
        raise _left_over(command, rest)
    return arguments


def _left_over(command: Parser, rest: Sequence[str]) -> UsageError:
    first = rest[0]
    if first.partition("=")[0] in command.option_names():
        return UsageError(
            f"{first} stands before the command", f"put it behind: {command.prog} {first}"
        )
    left = joined([repr(word) for word in rest])
    return UsageError(f"{command.prog} has no use for {left}", _help(command))


def _named(parser: Parser, words: Sequence[str]) -> Parser:
    """Return the parser of the command that words name, as far as they do."""
    for word in words:
        below = {command.prog.split()[-1]: command for command, _ in parser.commands()}
        if word in below:
            parser = below[word]
    return parser


def _no_command(command: Parser, words: Sequence[str]) -> str | None:
    """Return the word that stands where a command below this one is due, and is none."""
    if not command.commands():
        return None
    names = command.prog.split()[1:]
    rest = [word for word in words if not word.startswith("-")][len(names) :]
    return rest[0] if rest else None


def _unknown_options(command: Parser, words: Sequence[str]) -> Iterator[str]:
    """Yield the long options that a command does not have, nor any that begins so."""
    known = command.option_names()
    for word in words:
        if word == "--":
            return
        name = word.partition("=")[0]
        is_option = word.startswith("--") and " " not in word
        if is_option and not any(option.startswith(name) for option in known):
            yield name


def _no_option(command: Parser, name: str, every: Parser) -> UsageError:
    near = difflib.get_close_matches(name, command.option_names(), n=1)
    elsewhere = [other.prog for other in _every(every) if name in other.option_names()]
    remedy = _help(command)
    if elsewhere:
        remedy = f"{_having(elsewhere)} it; {remedy}"
    elif near:
        remedy = f"did you mean {near[0]}? {remedy}"
    return UsageError(f"{command.prog} has no option {name}", remedy)


def _having(commands: Sequence[str]) -> str:
    ranked = sorted(commands, key=lambda prog: prog != "aiflux run")
    shown = ranked[:_SHOWN_COMMANDS] + (["others"] if len(ranked) > _SHOWN_COMMANDS else [])
    return f"{joined(shown)} {'has' if len(shown) == 1 else 'have'}"


def _every(parser: Parser) -> Iterator[Parser]:
    for command, _ in parser.commands():
        yield command
        yield from _every(command)


def _help(command: Parser) -> str:
    whole = "--help-all" if "--help-all" in command.option_names() else "--help"
    return f"{command.prog} {whole} lists what it takes"


def _told(parser: Parser, message: str) -> UsageError:
    """Return an error of argparse's in the one form."""
    if match := _CHOICE.match(message):
        return _no_choice(parser, match["given"])
    if match := _EXCLUDED.match(message):
        both = f"{match['name']} and {match['other']}"
        remedy = f"give one of them; {_help(parser)}"
        return UsageError(f"{parser.prog}: {both} exclude each other", remedy)
    if match := _MISSING.match(message):
        names = joined(match["names"].split(", "))
        return UsageError(f"{parser.prog} needs {names}", _example(parser))
    return UsageError(f"{parser.prog}: {_seen(message)}", _example(parser))


def _seen(message: str) -> str:
    if match := _NO_VALUE.match(message):
        return f"{match['name']} has no value"
    if (match := _VALUE.match(message)) and match["kind"] in _KINDS:
        return f"{match['name']} {match['given']} is not {_KINDS[match['kind']]}"
    return message.removeprefix("argument ")


def _no_choice(parser: Parser, given: str) -> UsageError:
    """Return the error of a word that is none of those that may stand in its place."""
    choosing = [action for action in parser._actions if action.choices is not None]
    for action in sorted(choosing, key=lambda action: bool(action.option_strings)):
        names = [str(choice) for choice in action.choices or ()]
        if given in names:
            continue
        if action.option_strings:
            seen = f"{parser.prog}: {action.option_strings[0]} cannot be {given!r}"
        else:
            seen = f"{given!r} is no {str(action.metavar or action.dest).lower()} of {parser.prog}"
        return UsageError(seen, suggestion(given, names))
    return UsageError(f"{parser.prog}: {given!r} cannot stand there", _help(parser))


def _example(parser: Parser) -> str:
    """Return the first example of a command's help."""
    lines = [line.strip() for line in (parser.epilog or "").splitlines()]
    typed = [line.removeprefix("example:").strip() for line in lines]
    example = next((line for line in typed if line.startswith("aiflux ")), None)
    return _help(parser) if example is None else f"such as: {example}; {_help(parser)}"
