"""The report as one HTML page that needs nothing but itself. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import PurePath

from aiflux.report.data import Report
from aiflux.report.html.format import (
    duration_text,
    moment_text,
    number,
    percent,
    rate,
    seconds_text,
)
from aiflux.report.html.markup import Markup, element, joined
from aiflux.report.html.sections import (
    attempts_section,
    engines_section,
    estimate_section,
    failures_section,
    latency_section,
    shards_section,
    throughput_section,
    what_section,
)
from aiflux.report.methods import methods
from aiflux.util.text import counted

# The page may load nothing, from nowhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report, plots: Mapping[str, Markup], no_plots: str | None = None) -> str:
    """Return the page.

    Args:
        plots: ``throughput`` and ``latency``, as far as they could be drawn.
        no_plots: why there are none.
    """
    title = f"{PurePath(report.what.output).name}: AI-Flux report"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Markup(_style())),
    )
    body = element("body", _header(report), element("main", *_sections(report, plots, no_plots)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _style() -> str:
    return (files("aiflux.report.html") / "report.css").read_text(encoding="utf-8")


def _sections(
    report: Report, plots: Mapping[str, Markup], no_plots: str | None
) -> Iterable[Markup]:
    yield _cards(report)
    if no_plots is not None:
        yield element("p", f"Tables stand in place of plots: {no_plots}", class_="soft")
    yield _section("What ran", what_section(report))
    yield _section("Throughput", throughput_section(report, plots.get("throughput")))
    yield _section("Time per request", latency_section(report, plots.get("latency")))
    yield _section("Attempts", attempts_section(report))
    yield _section("Failures", failures_section(report))
    yield _section("Shards", shards_section(report))
    yield _section("Engines and GPUs", engines_section(report))
    yield _section("Estimate and actual", estimate_section(report))
    yield _section("Methods", _methods(report))
    yield element(
        "footer",
        f"Written by AI-Flux {report.version} at {moment_text(report.written)} from the files in ",
        element("code", report.what.run_dir),
        ". The page holds no prompts and no answers, but ids and error messages of requests that "
        "failed.",
    )


def _section(title: str, *content: Markup) -> Markup:
    if not any(content):
        return Markup("")
    return element("section", element("h2", title), *content)


def _header(report: Report) -> Markup:
    condition = report.condition
    style = "busy" if not condition.ended else "bad"
    if condition.finished and not report.counts.failed:
        style = "good"
    lines = [
        element("h1", PurePath(report.what.output).name),
        element(
            "p",
            element("span", condition.state, class_=f"state {style}"),
            f" as of {moment_text(report.written)}",
        ),
    ]
    if not condition.ended:
        lines.append(element("p", "The run goes on; these figures are of what is done so far."))
    elif condition.next_command:
        lines.append(
            element("p", "What brings it to its end: ", element("code", condition.next_command))
        )
    return element("header", *lines)


def _cards(report: Report) -> Markup:
    counts, use = report.counts, report.use
    done = counts.completed + counts.failed
    cards = [
        (number(counts.completed), f"of {counted(counts.total, 'request')} answered"),
        (number(counts.failed), f"failed ({percent(counts.failed, done)})"),
        *_tokens(report),
        (rate(report.throughput.requests_per_second), "requests/s"),
        (_median(report), "median time per request"),
        (f"{use.gpu_hours:.2f}", "GPU-hours")
        if use.gpu_hours
        else (duration_text(report.times.job_seconds), "time of all jobs"),
    ]
    made = [
        element("div", element("b", figure), element("span", name), class_="card")
        for figure, name in cards
    ]
    return element("div", *made, class_="cards")


def _tokens(report: Report) -> Iterable[tuple[str, str]]:
    told = report.tokens
    if report.counts.completed and not told.prompt and not told.completion:
        return (("not told", "tokens, by the engine"),)
    speed = rate(report.throughput.completion_tokens_per_second)
    return (
        (number(told.prompt), "prompt tokens"),
        (number(told.completion), "answer tokens"),
        (speed, "answer tokens/s"),
    )


def _median(report: Report) -> str:
    told = report.latency
    return seconds_text(told.quantiles["50"]) if told.count else "no answer"


def _methods(report: Report) -> Markup:
    note = "To be pasted into a paper, and looked over before."
    return joined(
        [
            element("p", note, class_="soft leads"),
            element("blockquote", element("p", methods(report))),
        ]
    )
