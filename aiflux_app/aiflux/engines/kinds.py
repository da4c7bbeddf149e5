"""The kind of a run's engines, imported when it is used."""

from __future__ import annotations

from importlib import import_module

from aiflux.core.config.engine_kinds import KINDS
from aiflux.core.config.run_options import RunOptions
from aiflux.engines.base import EngineKind


def engine_kind(options: RunOptions) -> EngineKind:
    """Return the kind of a run's engines."""
    return kind_named(options.engine)


def kind_named(name: str) -> EngineKind:
    """Return a kind of the table by its name."""
    kind: EngineKind = import_module(KINDS[name]).KIND
    return kind
