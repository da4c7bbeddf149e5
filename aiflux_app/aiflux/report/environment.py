"""The report's account of what ran: models, engines, image, GPUs and options. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from aiflux.core.config.run_options import RunOptions
from aiflux.core.runs.plan import Plan
from aiflux.report.data import Model, What
from aiflux.report.journal_summary import Tally
from aiflux.report.sources import ReportSources, all_details, engines_of, mapping
from aiflux.util.text import public_url

_SECRET = re.compile(r"key|token|secret|passw", re.IGNORECASE)
_HIDDEN = "(not shown)"
# NAME=VALUE in a line of shell, or in the value of an option.
_SECRET_VALUE = re.compile(
    r"""(\w*(?:key|token|secret|passw)\w*\s*=\s*)("[^"]*"|'[^']*'|[^\s,;]+)""", re.IGNORECASE
)
_OF_THE_INPUT = ("path", "size", "requests", "digest", "endpoints")


def what_ran(sources: ReportSources, whole: Tally) -> What:
    """Return what ran, as far as plan, statuses and journals tell."""
    plan, known = sources.plan, all_details(sources)
    images = [details["image"] for details in known if details.get("image")]
    sealed = [bool(details["sealed"]) for details in known if "sealed" in details]
    versions = Counter(_kind(engine) for details in known for engine in engines_of(details))
    return What(
        run_dir=sources.run_dir,
        output=str(plan.output),
        input={name: plan.input.get(name) for name in _OF_THE_INPUT},
        plan=plan.id,
        models=tuple(_models(plan, whole, known)),
        image_path=sources.condition.image,
        image=images[-1] if images else None,
        engines=dict(versions),
        aiflux=tuple(sorted({str(details.get("version", plan.aiflux)) for details in known})),
        gpus=dict(Counter(name for details in known for name in details.get("gpus") or ())),
        hosts=tuple(sorted({str(details["host"]) for details in known if details.get("host")})),
        sealed=all(sealed) if sealed else None,
        parameters=plan.options.parameters,
        options=_options(plan.options),
        slurm={
            name: without_secrets(value)
            for name, value in (sources.condition.slurm or {}).items()
            if value not in (None, {}, [])
        },
        jobs=sources.condition.jobs,
        shards=len(plan.shards),
    )


def _kind(engine: Mapping[str, Any]) -> str:
    if "url" in engine:
        return f"server at {public_url(str(engine['url']))}"
    return f"Ollama {engine['version']}" if engine.get("version") else "Ollama"


def without_secrets(value: Any) -> Any:
    """Return a setting without the values that names of keys, tokens and passwords are given."""
    if isinstance(value, str):
        return _SECRET_VALUE.sub(rf"\1{_HIDDEN}", value)
    if isinstance(value, Mapping):
        return {
            name: _HIDDEN if _SECRET.search(str(name)) else without_secrets(each)
            for name, each in value.items()
        }
    return [without_secrets(each) for each in value] if isinstance(value, list | tuple) else value


def _models(plan: Plan, whole: Tally, known: Sequence[Mapping[str, Any]]) -> Iterable[Model]:
    for name in plan.models:
        names = {name, plan.served(name)}
        digests = {digest for each in names for digest in whole.digests.get(each, ())}
        for details in known:
            told = mapping(details.get("model_digests"))
            digests |= {str(told[each]) for each in names if told.get(each)}
        results = sum(whole.models[each] for each in names)
        only = whole.results if len(plan.models) == 1 else results
        yield Model(name, only, tuple(sorted(digests)))


def _options(options: RunOptions) -> dict[str, Any]:
    usual = RunOptions()
    given = {
        item.name: getattr(options, item.name)
        for item in fields(options)
        if getattr(options, item.name) != getattr(usual, item.name)
    }
    if options.engine_url is not None:
        given["engine_url"] = public_url(options.engine_url)
    if "engine_env" in given:
        given["engine_env"] = without_secrets(given["engine_env"])
    return given
