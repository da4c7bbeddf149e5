"""The engine kinds, imported when they are used."""

from __future__ import annotations

from importlib import import_module

from aiflux.core.config.run_options import RunOptions
from aiflux.engines.base import EngineKind

KINDS = {
    "ollama": "aiflux.engines.ollama.kind",
    "external": "aiflux.engines.external.kind",
}
"""For each kind its module, which has it as ``KIND``."""


def engine_kind(options: RunOptions) -> EngineKind:
    """Return the kind of a run's engines."""
    return kind_named("ollama" if options.engine_url is None else "external")


def kind_named(name: str) -> EngineKind:
    """Return a kind by its name."""
    kind: EngineKind = import_module(KINDS[name]).KIND
    return kind
