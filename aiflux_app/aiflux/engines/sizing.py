"""Choose slots, context length and requests in flight if the user sets none."""

from __future__ import annotations

from collections.abc import Callable

from aiflux.core.batch.prompt_lengths import PromptLimit
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan
from aiflux.engines.base import EngineKind, EngineSpec
from aiflux.engines.gpus import free_memory
from aiflux.models.figures import Figures
from aiflux.models.tokenizer import ModelTokenizer

_SPARE = 2**30
"""Bytes to leave free on each GPU, as llama.cpp's own fitting does."""
_SHARE = 0.97
_QUEUED = 2


def engine_slots(kind: EngineKind, spec: EngineSpec, figures: Figures | None) -> int:
    """Return the number of parallel sequences of an engine, by the memory that is free now."""
    # The GPUs of the other nodes are taken to have as much free memory as those of this one.
    free = free_memory(spec.devices, spec.environ) * spec.plan.options.nodes_per_engine
    return slots(kind, spec.plan, spec.devices, spec.cpus, figures, free)


def slots(
    kind: EngineKind,
    plan: Plan,
    devices: tuple[str, ...],
    cores: int,
    figures: Figures | None = None,
    free: tuple[int, ...] = (),
) -> int:
    """Return the number of parallel sequences of an engine.

    Args:
        devices: the engine's GPUs.
        figures: figures of the model; None if unknown.
        free: free bytes of each GPU; empty if unknown.
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
    """Return the smallest number of GPUs of ``capacity`` bytes for a model; None if above ``most``.

    Args:
        needed: returns the bytes needed on a number of GPUs; None if these cannot share the model.
    """
    for gpus in range(1, min(most, figures.architecture.layers + 1) + 1):
        size = needed(gpus)
        if size is not None and size <= gpus * capacity:
            return gpus
    return None


def smaller_division(divides: Callable[[int], bool], options: RunOptions, gpus: int) -> str:
    """Return a remedy for a model that cannot be divided as the options ask for.

    Args:
        divides: whether a number of GPUs can share the model.
        gpus: GPUs of each node; 0 for none.
    """
    nodes = options.nodes_per_engine
    # On one node, an engine uses one GPU by default.
    each, counts = max(1, gpus), range(1 if gpus < 2 else 2, nodes)
    if nodes == 1:
        each, counts = 1, range(1, gpus)
    fits = [str(count) for count in counts if divides(count * each)]
    if not fits:
        return "request another number of GPUs on each node: --gpus-per-node"
    return f"--{'gpus' if nodes == 1 else 'nodes'}-per-engine {' or '.join(fits)}"


def in_flight(engine_slots: int) -> int:
    """Return the requests that keep slots busy: one per slot, and a few in the queue."""
    return engine_slots + max(_QUEUED, engine_slots // 4)


def in_flight_at(server_slots: int) -> int:
    """Return the same for a llama-server whose options are not ours.

    By default, it has a thread for each of its slots and two more (later builds: four), and a
    connection keeps its thread: a request on one more would wait until another connection closes.
    """
    return server_slots + _QUEUED


MIN_CONTEXT = 2048
CONTEXT_STEP = 512
_GENEROUS = 8192


def context_length(plan: Plan, trained: int = 0) -> int:
    """Return the tokens of context for each slot.

    The value comes from the options, or else from the longest request. If that needs much, 99 % of
    the requests fit (truncated prompts are marked in their results).

    Args:
        trained: tokens of the training context, which is the maximum; 0 if unknown.
    """
    if plan.options.context_length is not None:
        return plan.options.context_length
    longest = plan.input.longest_tokens
    needed = longest if longest <= _GENEROUS else plan.input.context_tokens
    rounded = max(MIN_CONTEXT, -(-needed // CONTEXT_STEP) * CONTEXT_STEP)
    return min(rounded, trained or rounded)


def prompt_limit(
    plan: Plan,
    model: str,
    figures: Figures | None,
    open_tokenizer: Callable[[], ModelTokenizer],
    *,
    own: int = 0,
    reduced: bool = True,
) -> PromptLimit:
    """Return the context of a model in a run.

    Args:
        own: context that the model's files or the engine's variables set; 0 for none.
        reduced: the engine reduces a longer context to the training context.
    """
    trained = figures.architecture.context if figures else 0
    context = own or context_length(plan, trained)
    if reduced and trained:
        context = min(context, trained)
    answer = plan.options.parameters_of(plan.served(model)).get("max_tokens")
    return PromptLimit(context, trained, answer or 0, open_tokenizer)
