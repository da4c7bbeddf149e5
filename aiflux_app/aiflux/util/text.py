"""Text helpers: counts, lists, sizes and suggestions for misspelt names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

# Patterns, because they must also work for invalid URLs.
_USER = re.compile(r"(//)[^/\s]*@")
_WRONG_USER = re.compile(r"^(\w+:/*)?.*@", re.DOTALL)
_QUERY = re.compile(r"[?#].*", re.DOTALL)


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


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a "did you mean" hint for an unknown name."""
    names = sorted({*known})
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}use one of: {', '.join(names)}"
