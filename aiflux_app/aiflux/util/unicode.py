"""Handle text that may contain half a character, control characters or escape sequences.

JSON can contain half of a surrogate pair (``"\\ud83d"``), which no encoding can write. AI-Flux
handles it in the same way everywhere:

- Journals, results, and files from which a run resumes keep it, as a JSON escape.
- Text for people (status, tables, reports, logs, the terminal) has U+FFFD instead.

Output to a terminal or a log has no control characters either, because they can hide or forge
lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

REPLACEMENT = "\ufffd"
_HALF = re.compile("[\ud800-\udfff]")
# Colours and similar sequences, which contain no text.
_STYLE = re.compile("\x1b\\[[0-9;:]*m")
# C0 without tab and line feed, DEL, C1, and marks that reorder the surrounding text.
_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_BIDI}]")
_BREAK = re.compile("[\t\r\n\u2028\u2029]")
_UNSAFE_IN_JSON = re.compile(f"[\x7f-\x9f{_BIDI}\ud800-\udfff]")


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
