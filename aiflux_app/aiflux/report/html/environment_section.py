"""The report's section of what ran. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from aiflux.report.data import Model, Report
from aiflux.report.html.format import duration_text, moment_text, number
from aiflux.report.html.markup import Markup, element, facts, joined
from aiflux.util.text import counted, size_text


def what_section(report: Report) -> Markup:
    """Return what ran, as names and values."""
    what, times = report.what, report.times
    image = what.image or {}
    pairs: list[tuple[str, object]] = [
        ("Input", joined([element("code", what.input["path"]), _input(what.input)])),
        ("Endpoints", _endpoints(what.input.get("endpoints") or {})),
        ("Model" if len(what.models) == 1 else "Models", _lines(_model(m) for m in what.models)),
        ("Engine", _counted(what.engines)),
        ("GPUs", _counted(what.gpus)),
        ("Image", element("code", what.image_path) if what.image_path else ""),
        ("In the image", ", ".join(_image_facts(image))),
        ("Sealed", {True: "yes: no network in the container", False: "no", None: ""}[what.sealed]),
        ("AI-Flux", ", ".join(what.aiflux)),
        ("Parameters", _settings(what.parameters) or "those of each request"),
        ("Else, as advised", _lines(_advised(what.advised))),
        ("Options", _settings(_without(what.options, what.parameters))),
        ("Slurm", _settings(what.slurm)),
        ("Jobs", ", ".join(what.jobs)),
        ("Hosts", ", ".join(what.hosts)),
        ("Planned", moment_text(times.planned)),
        ("Submitted", moment_text(times.submitted)),
        ("First result", moment_text(times.first_result)),
        ("Last result", moment_text(times.last_result)),
        ("Output written", moment_text(times.finished)),
        ("Time of all jobs", _job_time(report)),
    ]
    return facts(pairs)


def _input(told: Mapping[str, Any]) -> str:
    size = size_text(float(told.get("size") or 0))
    return f" ({counted(int(told['requests']), 'request')}, {size}, digest {told['digest']})"


def _endpoints(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return "".join(counts)
    return ", ".join(f"{url} ({counted(count, 'request')})" for url, count in counts.items())


def _advised(advised: Mapping[str, Mapping[str, Any]]) -> Iterable[Markup]:
    for model, values in advised.items():
        yield joined([f"{model}: ", _settings(values)])


def _job_time(report: Report) -> str:
    times = report.times
    if not times.job_seconds:
        return ""
    starts = f" in {number(times.starts)} starts" if times.starts > 1 else ""
    return f"{duration_text(times.job_seconds)}{starts}"


def _model(model: Model) -> Markup:
    parts: list[object] = [element("strong", model.name)]
    if model.results:
        parts.append(f" ({counted(model.results, 'result')})")
    for digest in model.digests:
        parts += [element("br"), element("code", digest)]
    if len(model.digests) > 1:
        parts += [element("br"), "The model changed during the run: results come of both."]
    return joined(parts)


def _image_facts(image: Mapping[str, Any]) -> Iterable[str]:
    for name in ("version", "ollama", "python", "os", "base_image", "base_digest", "commit"):
        if image.get(name) not in (None, "", "none", "unknown"):
            yield f"{name.replace('_', ' ')} {image[name]}"


def _without(given: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    left_out = {*other, "model", "model_defaults"}
    return {name: value for name, value in given.items() if name not in left_out}


def _settings(given: Mapping[str, Any]) -> Markup | str:
    if not given:
        return ""
    shown = (
        element("code", f"{name}={_value(value)}", class_="setting")
        for name, value in given.items()
    )
    return joined(part for each in shown for part in (each, " "))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={each}" for name, each in value.items())
    return " ".join(str(each) for each in value) if isinstance(value, list) else str(value)


def _lines(parts: Iterable[object]) -> Markup:
    listed = list(parts)
    return joined(
        part
        for at, each in enumerate(listed)
        for part in ((each, element("br")) if at + 1 < len(listed) else (each,))
    )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items())
