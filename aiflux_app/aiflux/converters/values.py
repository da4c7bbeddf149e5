"""Values of tables and of JSON as text for a prompt, and as JSON for metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import date, datetime, time
from typing import Any


def names(given: Sequence[str]) -> tuple[str, ...]:
    """Return names; a single text is one name, not as many as it has letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def as_text(value: Any) -> str:
    """Return a value as a prompt shows it: text as it is, null as nothing, the rest as JSON.

    Raises:
        ValueError: it is bytes that are no text.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"holds {len(value)} bytes that are no text") from None
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    plain = as_json(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def as_json(value: Any) -> Any:
    """Return a value in JSON's own types: dates in ISO form, what JSON has no word for as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return _as_words(value)


def _as_words(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.isoformat() if isinstance(value, datetime | date | time) else str(value)
