"""Slots, context and requests in flight, where the user leaves them open. Pure."""

from __future__ import annotations

from aiflux.core.plan import Plan

GPU_SLOTS = 16
CPU_SLOTS = 4
MIN_CONTEXT = 2048
CONTEXT_STEP = 512
_GENEROUS = 8192


def context_length(plan: Plan) -> int:
    """Return the tokens of context for each slot.

    From the options, else what the longest request needs; where that is much, what 99 % of the
    requests stay under (a prompt that is cut is marked in its result).
    """
    if plan.options.context_length is not None:
        return plan.options.context_length
    longest = int(plan.input["longest_tokens"])
    needed = longest if longest <= _GENEROUS else int(plan.input["context_tokens"])
    return max(MIN_CONTEXT, -(-needed // CONTEXT_STEP) * CONTEXT_STEP)


def slots(plan: Plan, devices: tuple[str, ...], cores: int) -> int:
    """Return the sequences that an engine decodes in parallel."""
    if plan.options.slots is not None:
        return plan.options.slots
    return GPU_SLOTS if devices else max(1, min(CPU_SLOTS, cores))


def concurrency(plan: Plan, engine_slots: int) -> int:
    """Return the requests in flight for an engine: its slots and a few that wait at its door."""
    if plan.options.concurrency is not None:
        return plan.options.concurrency
    return engine_slots + max(2, engine_slots // 4)
