"""What a run needs of an engine, as far as its plan tells. Pure."""

from __future__ import annotations

from aiflux.core.runs.plan import Plan

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
    longest = int(plan.input["longest_tokens"])
    needed = longest if longest <= _GENEROUS else int(plan.input["context_tokens"])
    rounded = max(MIN_CONTEXT, -(-needed // CONTEXT_STEP) * CONTEXT_STEP)
    return min(rounded, trained or rounded)


def cache_type(plan: Plan) -> str:
    """Return the type of the cache's numbers that the engine is told to use."""
    return plan.options.engine_env.get("OLLAMA_KV_CACHE_TYPE") or "f16"
