"""The values of rows: how they are found, and how they become text or JSON."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any

from aiflux.util.text import counted


class BadRowError(ValueError):
    """A row that cannot become a request; the message says why."""


def cell(cells: Mapping[str, Any], name: str) -> Any:
    """Return a cell, or a field inside it (``meta.source``, ``answers.0``); None if it is empty.

    Raises:
        KeyError: there is no such cell or field.
    """
    if name in cells:
        return cells[name]
    value: Any = cells
    for step in name.split("."):
        if isinstance(value, list | tuple) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, Mapping) and step in value:
            value = value[step]
        elif value is not None:
            raise KeyError(name)
    return value


_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant",
}  # fmt: skip


def as_messages(value: Any) -> list[dict[str, Any]] | None:
    """Return a list of messages (role and content, or ShareGPT form), else None."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return None
    if all(isinstance(turn.get("role"), str) for turn in value):
        # In Parquet, every message has the union of all fields.
        return [
            {name: item for name, item in turn.items() if item is not None or name == "content"}
            for turn in value
        ]
    if all({"from", "value"} <= turn.keys() and turn["from"] in _SPEAKERS for turn in value):
        return [{"role": _SPEAKERS[turn["from"]], "content": turn["value"]} for turn in value]
    return None


def as_text(value: Any) -> str:
    """Return a value as prompt text: strings unchanged, null as "", the rest as JSON.

    Raises:
        ValueError: the value is binary.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"contains {counted(len(value), 'byte')} of binary data") from None
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    plain = as_json(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def as_json(value: Any) -> Any:
    """Return a value as JSON types: dates in ISO form, types without a JSON equivalent as text.

    Binary data becomes Base64, as in most JSON writers.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return as_words(value)


def as_words(value: Any) -> str:
    """Return a value that JSON does not have as text."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return b64encode(value).decode("ascii")
    return value.isoformat() if isinstance(value, datetime | date | time) else str(value)
