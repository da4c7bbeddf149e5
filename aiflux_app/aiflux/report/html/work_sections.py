"""The report's sections of the work: throughput, time per request, attempts, failures. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aiflux.core.batch.results_file import EMPTY_REASONS
from aiflux.report.data import Failure, Report
from aiflux.report.html.format import (
    cut_text,
    duration_text,
    moment_of,
    number,
    percent,
    rate,
    seconds_text,
    sentence,
    share_bar,
)
from aiflux.report.html.markup import Markup, element, joined, table
from aiflux.report.journal_summary import EXAMPLES, MANY_ATTEMPTS
from aiflux.report.throughput import Throughput
from aiflux.util.text import counted

_FLOW_ROWS = 24
_LONGEST_ID = 120


def throughput_section(report: Report, plot: Markup | None) -> Markup:
    """Return what came when, as a plot or a table."""
    flow = report.throughput
    if not flow.bars:
        return element("p", "No result was recorded yet.")
    caption = f"Results as they were recorded, in steps of {duration_text(flow.width)}."
    if flow.pauses:
        caption += f" {_pauses(flow)}"
    figures = _flow_table(flow)
    if plot is None:
        return joined([figures, element("p", caption, class_="soft")])
    more = element("details", element("summary", "The same as a table"), figures)
    return joined([plot, element("p", caption, class_="soft"), more])


def _pauses(flow: Throughput) -> str:
    seconds = duration_text(sum(end - begin for begin, end in flow.pauses))
    times = "One pause" if len(flow.pauses) == 1 else f"{len(flow.pauses)} pauses"
    return f"{times} without results ({seconds} in all) left out."


def _flow_table(flow: Throughput) -> Markup:
    step = -(-len(flow.bars) // _FLOW_ROWS)
    groups = [flow.bars[at : at + step] for at in range(0, len(flow.bars), step)]
    rows = []
    rates = [sum(b.results for b in group) / sum(b.seconds for b in group) for group in groups]
    for group, speed in zip(groups, rates, strict=True):
        tokens = sum(bar.completion_tokens for bar in group)
        rows.append(
            (
                moment_of(group[0].start),
                number(sum(bar.results for bar in group)),
                number(sum(bar.failed for bar in group)),
                rate(speed),
                rate(tokens / sum(bar.seconds for bar in group)),
                share_bar(speed / max(rates)),
            )
        )
    heads = ("from (UTC)", "results", "failed", "requests/s", "answer tokens/s", "")
    return table("Throughput", heads, rows, (1, 2, 3, 4))


def latency_section(report: Report, plot: Markup | None) -> Markup:
    """Return how long answers took; nothing where there are none."""
    told = report.latency
    if not told.count:
        return Markup("")
    heads = ["fastest", *(f"{name} %" for name in told.quantiles), "slowest", "mean"]
    figures = [told.lowest, *told.quantiles.values(), told.highest, told.mean]
    rows = [[seconds_text(figure) for figure in figures]]
    caption = (
        "Of the attempt that gave the answer, waiting in the engine included; so many percent of "
        "the answers took no longer. Requests that failed are left out."
    )
    shown = [
        plot or _histogram(told.histogram),
        table("Time per request", heads, rows, range(len(heads))),
    ]
    return joined([*shown, element("p", caption, class_="soft")])


def _histogram(bars: Sequence[tuple[float, float, int]]) -> Markup:
    most = max(count for _, _, count in bars)
    rows = [
        (f"{seconds_text(low)} - {seconds_text(high)}", number(count), share_bar(count / most))
        for low, high, count in bars
        if count
    ]
    return table("Answers by their time", ("time", "answers", ""), rows, (1,))


def attempts_section(report: Report) -> Markup:
    """Return results by their attempts, and what is to be noted of answers."""
    whole = sum(report.attempts.values())
    if not whole:
        return Markup("")
    rows = [
        (f"{name}{' or more' if name == str(MANY_ATTEMPTS) else ''}", number(count),
         percent(count, whole), share_bar(count / whole))
        for name, count in report.attempts.items()
    ]  # fmt: skip
    notes = _notes(report)
    heads = ("attempts", "results", "share", "")
    return joined([table("Results by their attempts", heads, rows, (1, 2)), *notes])


def _notes(report: Report) -> Iterable[Markup]:
    counts = report.counts
    told = (
        (counts.superseded, "result", "of requests that were tried again: not counted as failed"),
        (counts.unfit_answers, "answer", "outside the schema (asked again, or failed)"),
        (
            counts.cut_at_limit,
            "answer",
            "ended at the limit of tokens: raise max_tokens where answers must be whole",
        ),
        (
            counts.truncated_prompts,
            "prompt",
            "cut by the engine: raise --context-length, or shorten them",
        ),
    )
    empty = (
        (counts.empty_answers.get(reason, 0), "empty answer", words)
        for reason, words in EMPTY_REASONS.items()
    )
    for count, noun, words in (*told, *empty):
        if count:
            yield element("p", element("strong", counted(count, noun)), f" {words}.")


def failures_section(report: Report) -> Markup:
    """Return what failed, by kind, with examples and what to do."""
    counts = report.counts
    if not report.failures:
        none = "No request failed." if not counts.failed else "The journals name no failures."
        return element("p", none)
    allowed = f"--max-failures allows {number(counts.allowed_failures)}."
    whole = sum(failure.count for failure in report.failures)
    return joined(
        [
            element("p", f"{counted(whole, 'request')} failed; {allowed}"),
            *(_failure(failure, whole) for failure in report.failures),
        ]
    )


def _failure(failure: Failure, whole: int) -> Markup:
    examples = [
        element(
            "li",
            element("code", cut_text(example.custom_id, _LONGEST_ID)),
            element("span", f": {example.message}", class_="foreign"),
        )
        for example in failure.examples
    ]
    noun = "example" if len(examples) == 1 else "examples"
    head = f"{number(failure.count)} x {failure.code} ({percent(failure.count, whole)})"
    more = f" (the first {EXAMPLES})" if failure.count > EXAMPLES else ""
    return element(
        "div",
        element("h3", head),
        element("p", f"{sentence(failure.meaning)} ", element("strong", "What to do: "),
                f"{failure.remedy}."),
        element("p", f"{noun}{more}:".capitalize(), class_="soft"),
        element("ul", *examples),
        class_="failure",
    )  # fmt: skip
