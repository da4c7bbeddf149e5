"""The table of engine kinds: what ``--engine`` may name, and which module implements it."""

from __future__ import annotations

KINDS = {
    "ollama": "aiflux.engines.ollama.kind",
    "llamacpp": "aiflux.engines.llamacpp.kind",
    "vllm": "aiflux.engines.vllm.kind",
    "command": "aiflux.engines.command.kind",
    "external": "aiflux.engines.external.kind",
}
"""For each kind its module, which has it as ``KIND``; `aiflux.engines.kinds` imports it on use."""

EXTERNAL = "external"
"""The kind of a server at ``--engine-url``; no other option names it."""

COMMAND = "command"
"""The kind of a server that ``--engine-command`` starts."""

WITHOUT_TOP_K = frozenset({"ollama"})
"""Kinds for which the top_k of an earlier version's model file is left out: they do not obey it."""

CHOICES = tuple(name for name in KINDS if name not in (COMMAND, EXTERNAL))


def kind_name(engine: str, engine_url: str | None, engine_command: str | None) -> str:
    """Return the kind of a run's engines: an address or a command wins over the engine's name."""
    if engine_url is not None:
        return EXTERNAL
    return engine if engine_command is None else COMMAND
