"""The report as one self-contained HTML page, from the templates next to this module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aiflux.report.data import Report
from aiflux.report.html import sections
from aiflux.report.html.format import (
    FILTERS,
    duration_text,
    number,
    percent,
    rate,
    seconds_text,
)
from aiflux.report.methods import methods
from aiflux.util.text import counted

_IMAGE_FACTS = ("version", "engine", "python", "os", "base_image", "base_digest", "commit")


def page(report: Report, plots: Mapping[str, Markup], no_plots: str | None = None) -> str:
    """Return the page.

    Args:
        plots: ``throughput`` and ``latency``, where they could be drawn.
        no_plots: why there are none.
    """
    what = report.what
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            plots={"throughput": None, "latency": None, **plots},
            no_plots=no_plots,
            style=Markup((files("aiflux.report.html") / "report.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
            tone=_tone(report),
            cards=list(_cards(report)),
            endpoints=_endpoints(what.input["endpoints"]),
            image_facts=", ".join(_image_facts(what.image or {})),
            options={
                name: value
                for name, value in what.options.items()
                if name not in {*what.parameters, "model", "model_defaults"}
            },
            throughput=sections.throughput_table(report),
            histogram=sections.histogram_table(report),
            latency=sections.latency_table(report),
            attempts=sections.attempts_table(report),
            notes=list(sections.attempt_notes(report)),
            shards=sections.shards_table(report),
            unfinished=sections.unfinished_shards(report),
            slot_use=sections.slot_use_text(report),
            engines=sections.engines_table(report),
            estimate=sections.estimate_table(report),
            methods=methods(report),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("aiflux.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    environment.tests["share"] = lambda cell: isinstance(cell, sections.Share)
    return environment


def _tone(report: Report) -> str:
    """Return the class of the state's colour: red only where more failed than is allowed."""
    counts, condition = report.counts, report.condition
    if not condition.ended:
        return "busy"
    if not condition.finished or counts.failed > counts.allowed_failures:
        return "bad"
    return "soft" if counts.failed else "good"


def _cards(report: Report) -> Iterator[tuple[str, str]]:
    counts, use, latency = report.counts, report.use, report.latency
    yield number(counts.completed), f"of {counted(counts.total, 'request')} answered"
    yield (
        number(counts.failed),
        f"failed ({percent(counts.failed, counts.completed + counts.failed)})",
    )
    yield from _token_cards(report)
    yield rate(report.throughput.requests_per_second), "requests/s"
    median = seconds_text(latency.quantiles["50"]) if latency.count else "no answer"
    yield median, "median time per request"
    if use.gpu_hours:
        yield f"{use.gpu_hours:.2f}", "GPU-hours"
    else:
        yield duration_text(report.times.job_seconds), "time of all jobs"


def _token_cards(report: Report) -> Iterator[tuple[str, str]]:
    tokens = report.tokens
    if report.counts.completed and not tokens.prompt and not tokens.completion:
        yield "unknown", "tokens: the engine does not count them"
        return
    yield number(tokens.prompt), "prompt tokens"
    yield number(tokens.completion), "answer tokens"
    yield rate(report.throughput.completion_tokens_per_second), "answer tokens/s"


def _endpoints(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return "".join(counts)
    return ", ".join(f"{url} ({counted(count, 'request')})" for url, count in counts.items())


def _image_facts(image: Mapping[str, object]) -> Iterator[str]:
    if "engine_version" in image:
        image = {**image, "engine": f"{image.get('engine')} {image['engine_version']}"}
    for name in _IMAGE_FACTS:
        if image.get(name) not in (None, "", "none", "unknown"):
            yield f"{name.replace('_', ' ')} {image[name]}"
