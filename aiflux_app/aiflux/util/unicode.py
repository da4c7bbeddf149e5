"""Text that may hold anything: half a character, control characters, escape sequences.

JSON can name half a surrogate pair (``"\\ud83d"``), which no encoding can write. One rule holds for
all that AI-Flux writes:

- Journals, results, and the files that a run resumes from keep it, as the JSON escape.
- What people read (status, tables, reports, logs, the terminal) has U+FFFD in its place.

What goes to a terminal or a log has no control characters either, for these can hide or forge
lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

REPLACEMENT = "\ufffd"
_HALF = re.compile("[\ud800-\udfff]")
# Colours and the like, which carry no text.
_STYLE = re.compile("\x1b\\[[0-9;:]*m")
# C0 without tab and line feed, DEL, C1, and the marks that reorder what stands around them.
_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_BIDI}]")
_BREAK = re.compile("[\t\r\n\u2028\u2029]")
_UNSAFE_IN_JSON = re.compile(f"[\x7f-\x9f{_BIDI}\ud800-\udfff]")


def is_whole(text: str) -> bool:
    """Tell whether a text has no half of a surrogate pair."""
    return text.isascii() or _HALF.search(text) is None


def whole_text(text: str) -> str:
    """Return a text that can be written, with U+FFFD for each half of a surrogate pair."""
    return text if text.isascii() else _HALF.sub(REPLACEMENT, text)


def whole(value: Any) -> Any:
    """Return a JSON value with ``whole_text`` for every text in it, keys included."""
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
    """Return JSON that UTF-8 can write and any terminal can show.

    Nothing is lost: what could not be written, or could steer a terminal, stands there as a
    ``\\u`` escape. Such characters occur inside JSON strings only.

    Args:
        only_ascii: escape every other character too, for a stream in any encoding.
    """
    text = json.dumps(value, ensure_ascii=only_ascii, indent=indent, default=default)
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def terminal_text(text: str) -> str:
    """Return a text that is safe to show: escape sequences and control characters are spelt out.

    Colours are left out. Tabs and line ends stay.
    """
    return _CONTROL.sub(_spelt, whole_text(_STYLE.sub("", text)))


def terminal_line(text: str) -> str:
    """Return a name, or another short text, on one line with nothing left out."""
    return _CONTROL.sub(_spelt, _BREAK.sub(_spelt, whole_text(text)))


def _spelt(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]
