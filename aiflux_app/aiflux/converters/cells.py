"""Values of tables and of JSON as text for a prompt, and as JSON for metadata."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Sequence
from datetime import date, datetime, time
from typing import Any


def names(given: Sequence[str]) -> tuple[str, ...]:
    """Return names; a single text is one name, not as many as it has letters."""
    return (given,) if isinstance(given, str) else tuple(given)


_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant",
}  # fmt: skip


def as_messages(value: Any) -> list[dict[str, Any]] | None:
    """Return a list of messages: with role and content, or as ShareGPT writes it; else None."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return None
    if all(isinstance(turn.get("role"), str) for turn in value):
        # In Parquet every message has all fields that any has.
        return [
            {name: item for name, item in turn.items() if item is not None or name == "content"}
            for turn in value
        ]
    if all({"from", "value"} <= turn.keys() and turn["from"] in _SPEAKERS for turn in value):
        return [{"role": _SPEAKERS[turn["from"]], "content": turn["value"]} for turn in value]
    return None


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
    """Return a value in JSON's own types: dates in ISO form, what JSON has no word for as text.

    Bytes that are no text become Base64, as in most programs that write JSON.
    """
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
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return b64encode(value).decode("ascii")
    return value.isoformat() if isinstance(value, datetime | date | time) else str(value)
