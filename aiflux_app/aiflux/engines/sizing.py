"""Slots, context length and requests in flight, where the user leaves them open."""

from __future__ import annotations

import os
from collections.abc import Callable

from aiflux.core.runs.plan import Plan
from aiflux.engines.base import EngineKind, EngineSpec
from aiflux.engines.gpus import free_memory
from aiflux.models.figures import Figures

_SPARE = 2**30
"""Bytes of each GPU that are left free; llama.cpp's own fitting leaves as much."""
_SHARE = 0.97


def engine_slots(kind: EngineKind, spec: EngineSpec) -> int:
    """Return the sequences that an engine decodes in parallel, by the memory that is free now."""
    cores = len(os.sched_getaffinity(0))
    return slots(
        kind, spec.plan, spec.devices, cores, _figures(kind, spec), free_memory(spec.devices)
    )


def engine_context(kind: EngineKind, spec: EngineSpec) -> int:
    """Return the tokens of context for each slot of an engine."""
    figures = _figures(kind, spec)
    return context_length(spec.plan, figures.architecture.context if figures else 0)


def _figures(kind: EngineKind, spec: EngineSpec) -> Figures | None:
    return kind.figures(spec.plan.models_dir, spec.model, None)


def slots(
    kind: EngineKind,
    plan: Plan,
    devices: tuple[str, ...],
    cores: int,
    figures: Figures | None = None,
    free: tuple[int, ...] = (),
) -> int:
    """Return the sequences that an engine decodes in parallel.

    Args:
        devices: the engine's GPUs.
        figures: of the model; None where they are not known.
        free: bytes of memory that are free on each of the GPUs; empty where they are not known.
    """
    if plan.options.slots is not None:
        return plan.options.slots
    if figures is not None and kind.one_slot(figures):
        return 1
    limits = kind.slot_limits
    if not devices:
        most = min(limits.cpu, limits.per_core * cores)
    elif figures is None or not free:
        return limits.gpu
    else:
        most = _most_that_fit(kind, plan, figures, free)
    return max(1, min(most, plan.requests))


def _most_that_fit(kind: EngineKind, plan: Plan, figures: Figures, free: tuple[int, ...]) -> int:
    context = context_length(plan, figures.architecture.context)
    room = len(free) * (_SHARE * min(free) - _SPARE)
    for count in kind.slot_limits.ladder:
        if kind.memory_needed(figures, context, count, len(free), plan.options) <= room:
            return count
    return 1


def gpus_needed(
    needed: Callable[[int], int | None], figures: Figures, capacity: int, most: int = 16
) -> int | None:
    """Return the least GPUs of ``capacity`` bytes that a model needs; None above ``most``.

    Args:
        needed: bytes that it needs on a number of GPUs together; None where these cannot share it.
    """
    for gpus in range(1, min(most, figures.architecture.layers + 1) + 1):
        size = needed(gpus)
        if size is not None and size <= gpus * capacity:
            return gpus
    return None


def in_flight(engine_slots: int) -> int:
    """Return the requests that keep slots busy: as many, and a few that wait at the door."""
    return engine_slots + max(2, engine_slots // 4)


MIN_CONTEXT = 2048
CONTEXT_STEP = 512
_GENEROUS = 8192


def context_length(plan: Plan, trained: int = 0) -> int:
    """Return the tokens of context for each slot.

    From the options, else what the longest request needs; where that is much, what 99 % of the
    requests stay under (a prompt that is cut is marked in its result).

    Args:
        trained: tokens that the model was trained for, which is the most; 0 where unknown.
    """
    if plan.options.context_length is not None:
        return plan.options.context_length
    longest = plan.input.longest_tokens
    needed = longest if longest <= _GENEROUS else plan.input.context_tokens
    rounded = max(MIN_CONTEXT, -(-needed // CONTEXT_STEP) * CONTEXT_STEP)
    return min(rounded, trained or rounded)
