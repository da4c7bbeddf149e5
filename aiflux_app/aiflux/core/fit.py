"""Whether the models of a run can fit the GPUs that it asks for, told before it is queued."""

from __future__ import annotations

from collections.abc import Iterator

from aiflux.core.catalogue import Catalogue
from aiflux.core.memory import Figures, estimate, gpus_needed
from aiflux.core.modelfacts import known_figures
from aiflux.core.modelname import parse_model_name
from aiflux.core.needs import cache_type, context_length
from aiflux.core.plan import Plan
from aiflux.core.preflight import Finding, size_text


def check_memory(
    plan: Plan, catalogue: Catalogue, capacity: int, kind: str, gpus: int
) -> Iterator[Finding]:
    """Check that the plan's models can fit the GPUs of one engine.

    What is refused needs more than the GPUs have even with one slot (or as many as were asked for)
    and the smallest buffers; of a model whose figures nobody knows there is no finding.

    Args:
        capacity: bytes of one GPU; ``kind``: what it is called.
        gpus: that the job gets.
    """
    options = plan.options
    if options.gpus_per_engine > gpus:
        yield Finding(
            "error",
            f"--gpus-per-engine {options.gpus_per_engine} is more than the job's GPUs ({gpus})",
            f"--gpus-per-node {options.gpus_per_engine}",
        )
    for name in map(parse_model_name, plan.models):
        figures = known_figures(plan.models_dir, name, catalogue)
        if figures is not None:
            yield from _check_fit(plan, name.served, figures, capacity, kind)


def _check_fit(
    plan: Plan, model: str, figures: Figures, capacity: int, kind: str
) -> Iterator[Finding]:
    options, cache = plan.options, cache_type(plan)
    context = context_length(plan, figures.architecture.context)
    slots, each = options.slots or 1, options.gpus_per_engine

    def least(count: int) -> int:
        return estimate(figures, context, count, gpus=each, flash=True, cache_type=cache).total

    room = each * capacity
    if least(slots) <= room:
        return
    fits = [count for count in range(1, slots) if least(count) <= room]
    enough = gpus_needed(figures, context, slots, capacity, cache_type=cache)
    remedies = [f"--slots {fits[-1]} at most"] if fits else []
    if enough is not None:
        remedies.append(
            f"{enough} such GPUs for each engine would do: --gpus-per-engine {enough} "
            f"--gpus-per-node {enough}"
        )
    remedies.append("GPUs with more memory, a smaller model, or a smaller --context-length")
    has = f"{each} such GPUs have {size_text(room)}" if each > 1 else f"it has {size_text(room)}"
    yield Finding(
        "error",
        f"{model} does not fit a GPU {kind!r}: with {slots} slot{'s' * (slots > 1)} of {context} "
        f"tokens it takes at least {size_text(least(slots))}, and {has}",
        "; or ".join(remedies),
    )
