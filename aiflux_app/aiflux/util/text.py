"""Text for people and for JSON: counts, lists, sizes, suggestions, and text made safe to show.

JSON can contain half of a surrogate pair (``"\\ud83d"``), which no encoding can write. AI-Flux
handles it in the same way everywhere:

- Journals, results, and files from which a run resumes keep it, as a JSON escape.
- Text for people (status, tables, reports, logs, the terminal) has U+FFFD instead.

Output to a terminal or a log has no control characters either, because they can hide or forge
lines.
"""

from __future__ import annotations

import difflib
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Patterns, because they must also work for invalid URLs.
_USER = re.compile(r"(//)[^/\s]*@")
_WRONG_USER = re.compile(r"^(\w+:/*)?.*@", re.DOTALL)
_QUERY = re.compile(r"[?#].*", re.DOTALL)

REPLACEMENT = "\ufffd"
_HALF = re.compile("[\ud800-\udfff]")
# Colours and similar sequences, which contain no text.
_STYLE = re.compile("\x1b\\[[0-9;:]*m")
# C0 without tab and line feed, DEL, C1, and marks that reorder the surrounding text.
_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_BIDI}]")
_BREAK = re.compile("[\t\r\n\u2028\u2029]")
_NEAR = 8  # similar names of which the one with the fewest typos is suggested
_SHOWN_OPTIONS = 3
_UNSAFE_IN_JSON = re.compile(f"[\x7f-\x9f{_BIDI}\ud800-\udfff]")


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 request``, ``1,200 requests``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def joined(parts: Sequence[str]) -> str:
    """Return an English list."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def public_url(url: str) -> str:
    """Return a URL without user, password, query and fragment, which may contain keys."""
    return _USER.sub(r"\1", _QUERY.sub("", url))


def hidden_url(value: object) -> object:
    """Return an invalid URL without parts that may be a password or key."""
    if not isinstance(value, str):
        return value
    return _WRONG_USER.sub(r"\1...@", _QUERY.sub(lambda match: f"{match[0][0]}...", value))


def size_text(count: float) -> str:
    """Return a number of bytes in readable form."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'bytes' or count >= 10 else 1}f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


_PLAIN: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((RecursionError,), "it is nested too deeply"),
    ((IndexError, struct.error), "it ends too early"),
    ((TypeError, AttributeError), "a value has the wrong type"),
)


def error_text(error: BaseException) -> str:
    """Return the message of an error of Python or a library, without Python's own terms."""
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"byte 0x{byte:02x} at offset {error.start} is not valid {error.encoding.upper()}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    for kinds, text in _PLAIN:
        if isinstance(error, kinds):
            return text
    if "sys.set_int_max_str_digits" in str(error):
        return "a number has too many digits"
    return (isinstance(error, OSError) and error.strerror) or str(error) or "an unknown error"


def context(error: BaseException) -> BaseException | None:
    """Return the error that was being handled where this one was raised, if it is a part of it.

    Python also records here what a caller of the failed code was handling, which explains nothing:
    such an error was caught in a frame that this one has not passed.
    """
    other = error.__context__
    if other is None or other.__traceback__ is None:
        return other
    passed, caught_in = error.__traceback__, other.__traceback__.tb_frame
    while passed is not None and passed.tb_frame is not caught_in:
        passed = passed.tb_next
    return None if passed is None else other


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that an unknown one is probably a misspelling of, or None.

    Args:
        cutoff: least similarity of two names, from 0 to 1.
    """
    names = sorted({*known})
    for each in names:
        if each.casefold() == name.casefold():
            return each
    # By similarity alone, ``--modle`` would be ``--modules``.
    near = difflib.get_close_matches(name, names, n=_NEAR, cutoff=cutoff)
    # With as many typos, the same letters are likelier: ``--tuen`` is ``--tune``, not ``--turn``.
    return min(
        near, key=lambda each: (_typos(name, each), sorted(each) != sorted(name)), default=None
    )


def _typos(name: str, meant: str) -> int:
    """Return how many letters were added, left out, replaced or swapped with their neighbour."""
    rows: list[list[int]] = [[*range(len(meant) + 1)]]
    for i, letter in enumerate(name, start=1):
        row = [i]
        for j, wanted in enumerate(meant, start=1):
            row.append(min(row[-1] + 1, rows[-1][j] + 1, rows[-1][j - 1] + (letter != wanted)))
            if i > 1 and j > 1 and letter == meant[j - 2] and name[i - 2] == wanted:
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


def ranges(numbers: Iterable[int]) -> list[str]:
    """Return ascending numbers as texts; three or more in a row become one, such as ``4-9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts: list[str] = []
    for run in runs:
        ends = [f"{number:,}" for number in run]
        texts += [f"{ends[0]}-{ends[-1]}"] if len(ends) > 2 else ends
    return texts


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a "did you mean" hint for an unknown name."""
    names = sorted({*known})
    near = nearest(name, names)
    meant = "" if near is None else f"did you mean {near!r}? "
    return f"{meant}use one of: {', '.join(names)}"


def named_options(names: Sequence[str]) -> str:
    """Return options by their names: ``--a``, ``--a and --b``, ``--a, --b, --c and 3 others``."""
    shown = [f"--{name}" for name in names[:_SHOWN_OPTIONS]]
    more = len(names) - len(shown)
    others = [f"{more} other{'s' * (more > 1)}"] if more else []
    return joined([*shown, *others])


def is_whole(text: str) -> bool:
    """Return whether a text has no lone surrogate."""
    return text.isascii() or _HALF.search(text) is None


def whole_text(text: str) -> str:
    """Return a writable text, with U+FFFD for each lone surrogate."""
    return text if text.isascii() else _HALF.sub(REPLACEMENT, text)


def whole(value: Any) -> Any:
    """Apply ``whole_text`` to all strings in a JSON value, including keys."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, dict):
        return {whole(key): whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [whole(item) for item in value]
    return value


def json_text(
    value: Any,
    *,
    indent: int | None = None,
    default: Callable[[Any], Any] | None = None,
    only_ascii: bool = False,
) -> str:
    """Return JSON that UTF-8 can encode and any terminal can show.

    Nothing is lost: characters that cannot be written, or that control a terminal, become ``\\u``
    escapes. Such characters only occur inside JSON strings.

    Args:
        only_ascii: also escape all other characters outside ASCII, for streams in any encoding.
    """
    text = json.dumps(value, ensure_ascii=only_ascii, indent=indent, default=default)
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def terminal_text(text: str) -> str:
    """Return a text that is safe to show: escape sequences and control characters are escaped.

    Colours are removed. Tabs and line ends stay.
    """
    return _CONTROL.sub(_spelt, whole_text(_STYLE.sub("", text)))


def terminal_line(text: str) -> str:
    """Return a name or another short text on one line, with control characters escaped."""
    return _CONTROL.sub(_spelt, _BREAK.sub(_spelt, whole_text(text)))


def _spelt(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


_SECRET = re.compile(r"key|token|secret|passw", re.IGNORECASE)
NOT_SHOWN = "(not shown)"
"""In place of a secret."""
# NAME=VALUE in a line of shell, or in the value of an option.
_SECRET_VALUE = re.compile(
    r"""(\w*(?:key|token|secret|passw)\w*\s*=\s*)("[^"]*"|'[^']*'|[^\s,;]+)""", re.IGNORECASE
)
# An option of a command with its value, such as --api-key VALUE.
_SECRET_OPTION = re.compile(
    r"""(--?[\w-]*(?:key|token|secret|passw\w*)\s+)("[^"]*"|'[^']*'|\S+)""", re.IGNORECASE
)


def without_secrets(value: Any) -> Any:
    """Return a setting without the values of keys, tokens and passwords."""
    if isinstance(value, str):
        return _SECRET_OPTION.sub(rf"\1{NOT_SHOWN}", _SECRET_VALUE.sub(rf"\1{NOT_SHOWN}", value))
    if isinstance(value, Mapping):
        return {
            name: NOT_SHOWN if _SECRET.search(str(name)) else without_secrets(each)
            for name, each in value.items()
        }
    return [without_secrets(each) for each in value] if isinstance(value, list | tuple) else value
