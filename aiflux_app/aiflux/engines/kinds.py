"""The kind of a run's engines, imported when it is used."""

from __future__ import annotations

from importlib import import_module

from aiflux.core.config.engine_kinds import KINDS
from aiflux.core.config.settings import RunOptions
from aiflux.engines.base import EngineKind


def engine_kind(options: RunOptions) -> EngineKind:
    """Return the kind of a run's engines."""
    return kind_named(options.engine)


def storing_kind(model: str) -> EngineKind:
    """Return the kind that pulls and stores a model, by its name; most are Ollama's."""
    for name in KINDS:
        kind = kind_named(name)
        if kind.store is not None and model.lower().startswith(kind.store.prefix):
            return kind
    return kind_named("ollama")


def kind_named(name: str) -> EngineKind:
    """Return a kind of the table by its name."""
    kind: EngineKind = import_module(KINDS[name]).KIND
    return kind
