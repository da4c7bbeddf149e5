"""The kind of a server that ``--engine-command`` starts, of which only the command is known."""

from __future__ import annotations

from aiflux.engines.base import (
    Engine,
    EngineKind,
    EngineSpec,
    ForeignModelsKind,
    HttpFactory,
    SlotLimits,
)


class CommandKind(ForeignModelsKind):
    """A server of the site or the user. It and the worker run on the node, without an image."""

    name = "command"
    title = "server of --engine-command"
    # What {slots} stands for unless the run sets it: less than vLLM's own 256, as others divide
    # their context among the slots.
    slot_limits = SlotLimits(gpu=64)
    worker_in_image = False
    options_place = "write them into --engine-command"

    def make_engine(self, spec: EngineSpec, make_client: HttpFactory) -> Engine:
        """Return a server on the spec's GPUs."""
        from aiflux.engines.command.engine import CommandEngine

        return CommandEngine(self, spec, make_client)


KIND: EngineKind = CommandKind()
