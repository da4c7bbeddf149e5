"""What is said of a name that is not known: the nearest that is, and all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return the remedy for a name that is none of ``known``."""
    names = sorted({*known})
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}known are: {', '.join(names)}"
