"""The paragraph for a paper's methods: what was done, with what, and what came of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from aiflux.core.report_data import Report

_NAMES = {"max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top-p"}


def methods(report: Report) -> str:
    """Return the paragraph; it says only what is known of the run."""
    return " ".join(_sentences(report))


def _sentences(report: Report) -> Iterator[str]:
    yield from _setting(report)
    yield _sampling(report.what.parameters)
    yield from _outcome(report)
    yield from _cost(report)


def _setting(report: Report) -> Iterator[str]:
    what = report.what
    name = PurePath(str(what.input["path"])).name
    verb = _verb(report)
    digest = what.input["digest"]
    with_what = joined([_model(model.name, model.digests) for model in what.models])
    noun = "the model" if len(what.models) == 1 else "the models"
    yield (
        f"{report.counts.total:,} requests ({name}, BLAKE2b-128 {digest}) {verb} with "
        f"{noun} {with_what}, using AI-Flux {joined(what.aiflux) or report.version}"
        f"{_served(what.engines)}{_hardware(report)}."
    )
    if what.sealed:
        yield "The engines ran in containers without network access."


def _verb(report: Report) -> str:
    if report.condition.finished:
        return "were processed"
    return "were processed in part" if report.condition.ended else "are being processed"


def _model(name: str, digests: Sequence[str]) -> str:
    if not digests:
        return name
    shown = joined([f"sha256:{digest}" if ":" not in digest else digest for digest in digests])
    return f"{name} ({'digest' if len(digests) == 1 else 'digests'} {shown})"


def _served(engines: Mapping[str, int]) -> str:
    if not engines:
        return ""
    names = [f"a {kind}" if kind.startswith("server") else kind for kind in engines]
    return f" and {joined(names)}"


def _hardware(report: Report) -> str:
    what = report.what
    jobs = f", divided into {what.shards} jobs" if what.shards > 1 else ""
    if what.gpus and what.shards > 1:
        return f" on {joined(list(what.gpus))} GPUs{jobs}"
    if what.gpus:
        return f" on {joined([f'{count} x {name}' for name, count in what.gpus.items()])}"
    local = what.engines and not any(kind.startswith("server") for kind in what.engines)
    return f" on CPUs{jobs}" if local and not report.use.gpu_hours else jobs


def _sampling(parameters: Mapping[str, Any]) -> str:
    if not parameters:
        return "Sampling parameters were those of each request, else the engine's defaults."
    told = joined([f"{_NAMES.get(name, name)} = {value}" for name, value in parameters.items()])
    return f"Where a request did not set them otherwise: {told}."


def _outcome(report: Report) -> Iterator[str]:
    counts, tokens = report.counts, report.tokens
    failed = f"{counts.failed:,} failed"
    kinds = [f"{failure.code}: {failure.count:,}" for failure in report.failures]
    if counts.failed and kinds:
        failed += f" ({', '.join(kinds)})"
    left = f", and {counts.left:,} had no result yet" if counts.left else ""
    yield f"{counts.completed:,} requests were answered and {failed}{left}."
    retried = sum(count for number, count in report.attempts.items() if number != "1")
    if retried:
        yield f"{retried:,} results took more than one attempt."
    if tokens.prompt or tokens.completion:
        yield (
            f"Prompts and answers came to {tokens.prompt:,} and {tokens.completion:,} tokens, as "
            "counted by the engine."
        )
    if counts.cut_at_limit:
        yield f"{counts.cut_at_limit:,} answers ended at their limit of tokens."
    if counts.truncated_prompts:
        yield f"{counts.truncated_prompts:,} prompts were cut to the context by the engine."


def _cost(report: Report) -> Iterator[str]:
    times, use = report.times, report.use
    if times.first_result is None or times.last_result is None:
        return
    hours = f" and took {use.gpu_hours:.2f} GPU-hours" if use.gpu_hours else ""
    first, last = times.first_result[:10], times.last_result[:10]
    when = f"on {first}" if first == last else f"between {first} and {last}"
    yield f"The work was done {when} (UTC){hours}."


def joined(parts: Sequence[str]) -> str:
    """Return an English list."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
