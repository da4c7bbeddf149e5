"""Parse settings from text or YAML values. A ValueError states what the value must be."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiflux.util.files import absolute

Parser = Callable[[Any], Any]

_WALLTIME = re.compile(
    r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}|UNLIMITED|INFINITE)\Z", re.IGNORECASE | re.ASCII
)
_OPTION = re.compile(r"-?[A-Za-z0-9][A-Za-z0-9_.+-]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_GPUS = re.compile(r"([\w.:-]+:)?\d+", re.ASCII)
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\}|\$)", re.ASCII)
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
"""Characters that are not allowed in a single line of text."""
_ENDPOINT = re.compile(
    r"/((v1/)?(chat/completions|completions|embeddings|models|responses)"
    r"|api/(chat|generate|tags|embed|embeddings|show)|health|metrics)\Z"
)
_TRUTH = {"true": True, "yes": True, "1": True, "on": True,
          "false": False, "no": False, "0": False, "off": False}  # fmt: skip


def text(value: Any) -> str:
    """Accept a single line of text that is not empty."""
    if value is None or isinstance(value, bool | dict | list | tuple):
        raise ValueError("a text")
    if str(value).strip() == "":
        raise ValueError("a text that is not empty")
    if CONTROL.search(str(value)):
        raise ValueError("a text of one line, without control characters")
    return str(value)


def integer(low: int, high: int | None = None) -> Callable[[Any], int]:
    """Return a parser for whole numbers in an inclusive range."""
    expected = f"a whole number of at least {low}" + (f" and at most {high}" if high else "")

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not re.fullmatch(r"[+-]?[0-9]+", str(value).strip()):
            raise ValueError(expected)
        number = int(value)
        if number < low or (high is not None and number > high):
            raise ValueError(expected)
        return number

    return parse


def number(low: float, high: float | None = None) -> Callable[[Any], float]:
    """Return a parser for numbers in an inclusive range."""
    expected = f"a number of at least {low:g}" + (f" and at most {high:g}" if high else "")

    def parse(value: Any) -> float:
        try:
            found = float("x" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            raise ValueError(expected) from None
        if not math.isfinite(found) or found < low or (high is not None and found > high):
            raise ValueError(expected)
        return found

    return parse


def boolean(value: Any) -> bool:
    """Accept true and false, and common words for them."""
    word = str(value).strip().lower()
    if word not in _TRUTH:
        raise ValueError("true or false")
    return _TRUTH[word]


def path(value: Any) -> Path:
    """Accept a path; ``~`` is the home directory."""
    try:
        return absolute(Path(text(value)).expanduser())
    except RuntimeError:
        raise ValueError("a path; the home directory for its ~ is unknown") from None


def written_path(value: Any, folder: Path, environ: Mapping[str, str]) -> Any:
    """Return a path from a settings file in absolute form.

    ``$NAME`` and ``${NAME}`` are replaced by variables, ``$$`` by ``$``. Relative paths start from
    ``folder``. Values that are not strings are returned unchanged.

    Raises:
        ValueError: a variable is not set.
    """

    def variable(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name is None:
            return "$"
        if not environ.get(name):
            raise ValueError(f"a path whose variables are set, but ${name} is not")
        return environ[name]

    if not isinstance(value, str) or not value.strip():
        return value
    found = _VARIABLE.sub(variable, value)
    return found if found.startswith("~") else str(folder / found)


SERVE = "serve:"
"""Begins an address that stands for a server by its name."""
SERVED_NAME = r"[a-z0-9][a-z0-9._-]{0,39}"
"""What such a name looks like."""


def url(value: Any) -> str:
    """Accept an http URL, of which a ``/v1`` at its end is removed, or ``serve:NAME``."""
    address = text(value).strip().rstrip("/")
    if address.startswith(SERVE):
        if not re.fullmatch(SERVE + SERVED_NAME, address):
            raise ValueError("serve:NAME with a name that aiflux serve list shows")
        return address
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", address):
        raise ValueError("an address such as http://127.0.0.1:8000")
    if "@" in address.split("/")[2] or re.search(r"//[^?#]*:[^?#]*@", address):
        raise ValueError(
            "an address without user and password, which would be stored with the run: set "
            "AIFLUX_API_KEY='Basic TOKEN', where TOKEN is the output of: printf %s USER:PASSWORD "
            "| base64 -w0"
        )
    if re.search(r"[?#]", address):
        short = re.split(r"[?#]", address)[0].rstrip("/").removesuffix("/v1")
        raise ValueError(f"an address without ? and #: {short}; set a key with AIFLUX_API_KEY")
    try:
        parts = urlsplit(address)
        if not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise ValueError("an address with a host, and a port from 1 to 65535") from None
    endpoint = _ENDPOINT.search(address)
    if endpoint is not None:
        base = address[: endpoint.start()].removesuffix("/v1")
        raise ValueError(f"the server's address, without the endpoint: {base}")
    return address.removesuffix("/v1").rstrip("/")


def walltime(value: Any) -> str:
    """Accept the forms of ``sbatch --time``."""
    time = text(value)
    if not _WALLTIME.match(time):
        raise ValueError("a Slurm time such as 30 (minutes), 04:00:00 or 1-12:00:00")
    return time


def memory(value: Any) -> str:
    """Accept the forms of ``sbatch --mem``, also with a B at the end."""
    size = text(value)
    if not re.fullmatch(r"[0-9]+[KMGTkmgt]?[Bb]?", size):
        raise ValueError("a memory size such as 32G")
    return size.upper().removesuffix("B")


def gpus(value: Any) -> str:
    """Accept the forms of ``sbatch --gpus-per-node``."""
    expected = text(value).strip()
    if not all(_GPUS.fullmatch(part) for part in expected.split(",")):
        raise ValueError("a number of GPUs such as 2, or TYPE:NUMBER such as a100:2; 0 for none")
    return expected


def failures(value: Any) -> str:
    """Accept a count or a percentage."""
    limit = text(value).strip()
    if not re.fullmatch(r"\d+|\d+(\.\d+)?%", limit, re.ASCII):
        raise ValueError("a number of requests such as 10, or a percentage such as 2%")
    return limit


def shards(value: Any) -> int | str:
    """Accept a count or ``auto``."""
    word = str(value).strip().lower()
    if word == "auto":
        return word
    if isinstance(value, bool) or not re.fullmatch(r"[1-9][0-9]*", word):
        raise ValueError("a whole number of at least 1, or auto")
    return int(word)


def pairs(value: Any) -> dict[str, str]:
    """Accept a mapping, ``KEY=VALUE``, or a list of ``KEY=VALUE``; a bare KEY is a flag."""
    if isinstance(value, dict):
        return {text(key): "" if item is None else _pair_value(item) for key, item in value.items()}
    items = value if isinstance(value, list | tuple) else [value]
    split = (text(item).partition("=") for item in items)
    return _once((key.strip().removeprefix("--"), item) for key, _, item in split)


def variables(value: Any) -> dict[str, str]:
    """Accept environment variables as ``pairs`` does, each with a value, which may be empty."""
    expected = "KEY=VALUE, each with the name of a variable as KEY; KEY= sets an empty value"
    if isinstance(value, dict):
        found = {text(key): item for key, item in value.items()}
        if None in found.values():
            raise ValueError('KEY: VALUE lines, each with a VALUE; "" is an empty one')
        found = {key: _pair_value(item) for key, item in found.items()}
    else:
        items = [text(item) for item in (value if isinstance(value, list | tuple) else [value])]
        if not all("=" in item for item in items):
            raise ValueError(expected)
        split = (item.partition("=") for item in items)
        found = _once((key.strip(), item) for key, _, item in split)
    if not all(map(_NAME.fullmatch, found)):
        raise ValueError(expected)
    return found


def _once(given: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return pairs as a mapping; refuse a key that is given twice."""
    found: dict[str, str] = {}
    for key, item in given:
        if key in found:
            raise ValueError(f"given once for each KEY, but {key} is given twice: remove one")
        found[key] = item
    return found


def options(value: Any) -> dict[str, str]:
    """Accept options of a program, as ``pairs`` does; ``_`` in a name is ``-``.

    A text is split like a command line: ``KEY=VALUE KEY``.
    """
    named = pairs(_words(value) if isinstance(value, str) else value)
    if not all(map(_OPTION.fullmatch, named)):
        raise ValueError("KEY=VALUE, or KEY alone, with the name of an option as KEY")
    return _once((_dashed(key), item) for key, item in named.items())


def named_paths(value: Any, one: Parser = path) -> dict[str, str]:
    """Accept a mapping, ``NAME=PATH`` or a list of them; a text is split like a command line.

    Args:
        one: parser of each path.
    """
    named = pairs(_words(value) if isinstance(value, str) else value)
    if not all(name and item for name, item in named.items()):
        raise ValueError("NAME=PATH")
    return {name: str(one(item)) for name, item in named.items()}


def _dashed(key: str) -> str:
    name, dot, rest = key.partition(".")
    return name.replace("_", "-") + dot + rest


def _words(value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError:
        raise ValueError("words whose quotes are closed") from None


def _pair_value(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        raise ValueError("KEY: VALUE lines, each VALUE a text or a number")
    if CONTROL.search(str(value)):
        raise ValueError("KEY: VALUE lines, each VALUE without line breaks or control characters")
    return str(value)


def lines(value: Any) -> tuple[str, ...]:
    """Accept a single line of text, or a list of them."""
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(text(item) for item in items)


def texts(value: Any) -> tuple[str, ...]:
    """Accept a text, or a list of them, with any characters."""
    items = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, str) and item for item in items):
        raise ValueError("a text or a list of texts")
    return tuple(items)


def choice(*names: str) -> Callable[[Any], str]:
    """Accept one of a few names."""

    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}" if len(names) > 1 else names[0])
        return str(value)

    return parse


def level(value: Any) -> str:
    """Accept the name of a log level."""
    name = str(value).upper()
    if name not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError("DEBUG, INFO, WARNING or ERROR")
    return name
