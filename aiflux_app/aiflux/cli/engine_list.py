"""``--engine`` with several engines, for the commands that compare them."""

from __future__ import annotations

import os
from typing import Any

from aiflux.core.config.engine_kinds import CHOICES
from aiflux.engines.process import PROGRAM_VARIABLE
from aiflux.errors import UsageError
from aiflux.util.text import suggestion


def given_engines(command: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the settings for each engine in ``--engine KIND[=MODEL],...``.

    Raises:
        UsageError: a kind is unknown or given twice, or a model is missing.
    """
    named = given.pop("engine", ())
    items = [each for text in named for each in _engine_items(text, alone=len(named) == 1)]
    if len(items) < 2 and "=" not in "".join(items):
        return [{**given, **({"engine": items[0]} if items else {})}]
    place = f"aiflux {command}: {' '.join(f'--engine {text}' for text in named)}:"
    engines: dict[str, dict[str, Any]] = {}
    for item in items:
        kind, equals, model = (part.strip() for part in item.partition("="))
        if kind not in CHOICES:
            comma = "=" in "".join(items) and len(named) == 1
            raise UsageError(
                f"{place} unknown engine {kind!r}",
                suggestion(kind, CHOICES)
                + ("; if a path has a comma, give --engine for each engine" if comma else ""),
            )
        if kind in engines:
            raise UsageError(f"{place} {kind} is given twice", "name each engine once")
        if equals and not model:
            raise UsageError(f"{place} no model after '{kind}='", f"{kind}=MODEL, or {kind}")
        engines[kind] = {**given, "engine": kind, **({"model": model} if model else {})}
    return [*engines.values()]


def _engine_items(text: str, *, alone: bool) -> list[str]:
    """Return the engines in one option; a model can contain commas if there are several options."""
    return text.split(",") if alone or "=" not in text else [text]


def refuse_one_program(*, local: bool) -> None:
    """Refuse a setting that names the program of only one engine.

    Raises:
        UsageError: such a setting is in effect.
    """
    program = os.environ.get(PROGRAM_VARIABLE)
    if local and program and not os.environ.get("AIFLUX_ENGINE"):
        raise UsageError(
            f"{PROGRAM_VARIABLE}={program} names one program, but several engines are compared",
            "set AIFLUX_ENGINE to the engine that it belongs to, or unset it",
        )
