"""Write the methods paragraph for a paper."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from aiflux.core.batch.request import WITHOUT_TEXT
from aiflux.models.name import shown_digest
from aiflux.report.data import Report
from aiflux.util.text import counted, joined

_NAMES = {"top_p": "top-p", "top_k": "top-k"}


def methods(report: Report) -> str:
    """Return the paragraph; it contains only known facts about the run."""
    return " ".join(_sentences(report))


def _sentences(report: Report) -> Iterator[str]:
    yield from _setting(report)
    if not set(report.what.input.get("endpoints") or ("?",)) <= WITHOUT_TEXT:
        yield from _sampling(report)
    if report.what.mixed:
        yield (
            f"{report.what.mixed[0].upper()}{report.what.mixed[1:]}; the parameters are those of "
            "the last start."
        )
    yield from _outcome(report)
    yield from _cost(report)
    for warning in report.warnings:
        yield f"Warning: {warning}."


def _setting(report: Report) -> Iterator[str]:
    what = report.what
    name = PurePath(str(what.input["path"])).name
    verb = _verb(report)
    digest = what.input["digest"]
    with_what = joined([_model(model.name, model.digests) for model in what.models])
    noun = "the model" if len(what.models) == 1 else "the models"
    yield (
        f"{counted(report.counts.total, 'request')} ({name}, BLAKE2b-128 {digest}) {verb} with "
        f"{noun} {with_what}, using AI-Flux {joined(what.aiflux) or report.version}"
        f"{_served(what.engines)}{_hardware(report)}."
    )
    if what.sealed:
        yield "The engines ran in containers without network access."


def _verb(report: Report) -> str:
    one = report.counts.total == 1
    if not report.condition.ended:
        return f"{'is' if one else 'are'} being processed"
    if not report.counts.recorded and not report.condition.finished:
        return f"{'was' if one else 'were'} to be processed"
    partly = "" if report.condition.finished else " in part"
    return f"{'was' if one else 'were'} processed{partly}"


def _model(name: str, digests: Sequence[str]) -> str:
    if not digests:
        return name
    return f"{name} ({joined([shown_digest(digest) for digest in digests])})"


def _served(engines: Mapping[str, int]) -> str:
    if not engines:
        return ""
    names = [f"a {kind}" if kind.startswith("server") else kind for kind in engines]
    return f" and {joined(names)}"


def _hardware(report: Report) -> str:
    what = report.what
    jobs = f" in {what.shards:,} jobs" if what.shards > 1 else ""
    if what.gpus and what.shards > 1:
        return f" on {joined(list(what.gpus))} GPUs{jobs}"
    if what.gpus:
        return f" on {joined([f'{count} x {name}' for name, count in what.gpus.items()])}"
    local = what.engines and not any(kind.startswith("server") for kind in what.engines)
    return f" on CPUs{jobs}" if local and not report.use.gpu_hours else jobs


def _sampling(report: Report) -> Iterator[str]:
    given = report.what.parameters
    advised = report.what.advised
    if given:
        yield f"Where a request did not set them otherwise: {_set_to(given)}."
    else:
        rest = "" if advised else ", else the engine's defaults"
        yield f"Sampling parameters were those of each request{rest}."
    if advised:
        defaults = "; ".join(
            _set_to(values) if len(report.what.models) == 1 else f"{model}: {_set_to(values)}"
            for model, values in advised.items()
        )
        yield (
            f"Other parameters had the default values for the model ({defaults}), or else the "
            "engine's defaults."
        )


def _set_to(parameters: Mapping[str, Any]) -> str:
    return joined([f"{_NAMES.get(n, n)} = {_value(v)}" for n, v in parameters.items()])


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " or ".join(_value(each) for each in value)
    return json.dumps(value, ensure_ascii=False)


def _outcome(report: Report) -> Iterator[str]:
    counts = report.counts
    failed = f"{counts.failed:,} failed"
    kinds = [f"{failure.code}: {failure.count:,}" for failure in report.failures]
    if counts.failed and kinds:
        failed += f" ({', '.join(kinds)})"
    if counts.left_out:
        failed += f"; {counts.left_out:,} with prompts that are too long were not sent"
    left = f", and {counts.left:,} had no result yet" if counts.left else ""
    was = "was" if counts.completed == 1 else "were"
    yield f"{counted(counts.completed, 'request')} {was} answered and {failed}{left}."
    retried = sum(count for number, count in report.attempts.items() if number != "1")
    if retried:
        yield f"{counted(retried, 'result')} took more than one attempt."
    yield from _tokens(report)
    if counts.cut_at_limit:
        yield f"{counted(counts.cut_at_limit, 'answer')} ended at the token limit."
    if counts.cut_by_filter:
        were = "was" if counts.cut_by_filter == 1 else "were"
        yield f"{counted(counts.cut_by_filter, 'answer')} {were} stopped by a content filter."
    if counts.truncated_prompts:
        was = "was" if counts.truncated_prompts == 1 else "were"
        yield (
            f"{counted(counts.truncated_prompts, 'prompt')} {was} truncated to the "
            "context by the engine."
        )


def _tokens(report: Report) -> Iterator[str]:
    prompt, completion = report.tokens.prompt, report.tokens.completion
    if prompt and completion:
        yield (
            f"Prompts and answers came to {prompt:,} and {completion:,} tokens, as counted by the "
            "engine."
        )
    elif prompt:
        yield f"Prompts came to {counted(prompt, 'token')}, as counted by the engine."
    elif completion:
        yield f"Answers came to {counted(completion, 'token')}, as counted by the engine."


def _cost(report: Report) -> Iterator[str]:
    times, use = report.times, report.use
    if times.first_result is None or times.last_result is None:
        return
    hours = f" and took {use.gpu_hours:.2f} GPU-hours" if use.gpu_hours >= 0.005 else ""
    first, last = times.first_result[:10], times.last_result[:10]
    when = f"on {first}" if first == last else f"between {first} and {last}"
    yield f"The work was done {when} (UTC){hours}."
