"""The command of ``--engine-command``: its words, and the placeholders in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from aiflux.util.text import NOT_SHOWN, suggestion
from aiflux.util.value_parsers import text

PLACEHOLDERS = {
    "model": "the model's name, as in the requests",
    "socket": "path of the Unix socket to listen on",
    "port": "port to listen on",
    "host": "address to listen on, 127.0.0.1",
    "slots": "sequences to decode in parallel (`--slots`)",
    "context": "tokens of context for each slot (`--context-length`)",
    "gpus": "number of the server's GPUs, at least 1 (`--gpus-per-engine`)",
    "log": "path of the server's log",
}
"""What stands for each of them in the command."""

# {{name}} stands for {name}; other braces, such as those of JSON, are left alone.
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{([A-Za-z_]\w*)\}", re.ASCII)
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=", re.ASCII)
_SHELL = frozenset({"|", "||", "&", "&&", ";", "<", ">", ">>", "2>&1"})


def command_words(command: str) -> list[str]:
    """Return the words of a command, quoted as for a shell; placeholders are not replaced."""
    return shlex.split(command)


def placeholders_of(command: str) -> frozenset[str]:
    """Return the names of the placeholders in a command."""
    found = (match[2] for match in _PLACEHOLDER.finditer(" ".join(command_words(command))))
    return frozenset(filter(None, found))


def filled_words(command: str, values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command with values for its placeholders.

    A value stays within its word, whatever it contains.
    """

    def value(match: re.Match[str]) -> str:
        return f"{{{match[1]}}}" if match[1] else str(values[match[2]])

    return [_PLACEHOLDER.sub(value, word) for word in command_words(command)]


def engine_command(value: Any) -> str:
    """Accept a command that makes a server listen where AI-Flux wants it to."""
    command = text(value)
    try:
        words = command_words(command)
    except ValueError as error:
        raise ValueError(f"a command whose quotes are closed ({error})") from None
    if not words or not words[0]:
        raise ValueError("a command")
    if NOT_SHOWN in command:
        raise ValueError(f"a command with its keys: write them in place of {NOT_SHOWN!r}")
    if "/" in words[0] and not words[0].startswith("/"):
        raise ValueError(
            "a command whose program is on the job's PATH or has an absolute path; "
            f"{words[0]!r} depends on the current directory"
        )
    if _ASSIGNMENT.match(words[0]):
        raise ValueError(
            f"a command without the assignment {words[0]!r}, as no shell runs it: use "
            f"--engine-env {shlex.quote(words[0])}, or begin with env {shlex.quote(words[0])}"
        )
    shell = next((word for word in words if word in _SHELL), None)
    if shell is not None:
        raise ValueError(
            f"a command without {shell!r}, as no shell runs it: use a script, or bash -c '...'"
        )
    named = placeholders_of(command)
    for name in sorted(named - PLACEHOLDERS.keys()):
        raise ValueError(
            f"a command with known placeholders; {{{name}}} is unknown: "
            f"{suggestion(name, PLACEHOLDERS)} (write {{{{{name}}}}} for the text itself)"
        )
    if not {"socket", "port"} & named:
        raise ValueError(
            "a command with {socket} or {port}, which is where the server listens, such as "
            "'vllm serve {model} --uds {socket}'"
        )
    return command
