"""A benchmark as text of at most 80 columns: its points, a plot, and the recommended settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from string import ascii_lowercase

from rich.text import Text

from aiflux.cli.render.estimate import WIDTH, wrapped
from aiflux.core.config.engine_kinds import EXTERNAL
from aiflux.core.runs.status_file import PointFigures
from aiflux.estimates.benchmark import (
    Benchmark,
    Point,
    Series,
    Workload,
    by_series,
    equally_good,
    other_knees,
)
from aiflux.report.format import rate, seconds_text
from aiflux.slurm.config_template import run_settings
from aiflux.util.text import counted, joined

_COLUMNS = (12, 12, 12, 9, 13, 13, 8)
_TITLES = ("in flight", "requests/s", "answer", "+-", "time per", "slowest", "failed")
_SUBTITLES = ("", "", "tokens/s", "", "request", "1 %", "")
_FEW = "too few requests to keep that many in flight"
_FEWER = "fewer requests were in flight than set"
_PLOT_WIDTH, _PLOT_HEIGHT, _AXIS = 60, 12, 9


def benchmark_lines(found: Benchmark, width: int = WIDTH) -> list[Text]:
    """Return a benchmark as lines; sentences have at most ``width`` columns."""
    lines = [*_workload(found.workload, found.points, width)]
    series = by_series(found.points)
    for letter, (each, points) in zip(_letters(len(series)), series.items(), strict=True):
        title = _title(letter, each, points, found.where)
        titles = [title] if len(title) <= width else wrapped(title, width)
        lines += ["", *titles, *_table(points, found, width)]
    lines += _compared(found.points, width)
    plot = _plot(found)
    if plot:
        lines += ["", *plot]
    lines += [line for text in _warnings(found) for line in ("", *wrapped(text, width, "! "))]
    if found.recommended is not None:
        lines += ["", f"recommended: {found.recommended}", *_indented(run_settings(found.settings))]
    return [Text(line, style="bold" if line.startswith("recommended:") else "") for line in lines]


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _letters(count: int) -> list[str]:
    """Return the signs of series; letters, then numbers in brackets."""
    return [*ascii_lowercase, *(f"[{number}]" for number in range(26, count))][:count]


def _workload(workload: Workload, points: Sequence[Point], width: int) -> Iterator[str]:
    what = workload.input or f"the mix {workload.mix}"
    rule = f"{what}, {counted(workload.requests, 'request')} per point, more if many are in flight"
    yield from wrapped(rule, width)
    measured = [point.figures for point in points if point.figures is not None]
    if measured:
        last = measured[-1]
        yield (
            f"tokens per request: {last.prompt_tokens:.0f} of the prompt, "
            f"{last.answer_tokens:.0f} of the answer"
        )


def _title(letter: str, series: Series, points: Sequence[Point], where: str) -> str:
    measured = [point.figures for point in points if point.figures is not None]
    slots = {each.slots for each in measured if each.slots is not None}
    engine = f"server at {where}" if series.engine == EXTERNAL else series.engine
    parts = [f"{engine}  {series.model}".rstrip()]
    if slots:
        parts.append(f"slots: {', '.join(map(str, sorted(slots)))}")
    if series.context_length is not None:
        parts.append(f"context: {series.context_length}")
    if measured and measured[0].engines > 1:
        parts.append(f"engines: {measured[0].engines}")
    return f"{letter}: {', '.join(parts)}"


def _table(points: Sequence[Point], found: Benchmark, width: int) -> Iterator[str]:
    for titles in (_TITLES, _SUBTITLES):
        yield _row(titles)
    for point in points:
        mark = " *" if point.name in found.knees else ""
        if point.figures is None:
            yield from wrapped(f"{point.concurrency}: {point.error}", width, "  ")
        else:
            yield _row(_cells(f"{point.concurrency}{mark}", point.figures))
            if point.figures.reason is not None:
                yield from wrapped(
                    f"{point.figures.failed} failed: {point.figures.reason}", width, "  "
                )


def _cells(name: str, figures: PointFigures) -> Sequence[str]:
    if not figures.answered:
        return (name, "-", "-", "-", "-", "-", f"all {figures.failed}")
    return (
        name,
        rate(figures.requests_per_second),
        rate(figures.tokens_per_second) if figures.tokens_per_second else "-",
        "-" if figures.margin is None else f"{figures.margin:.0%}",
        seconds_text(figures.p50),
        seconds_text(figures.p99),
        str(figures.failed),
    )


def _row(cells: Sequence[str]) -> str:
    return "".join(cell.ljust(width) for cell, width in zip(cells, _COLUMNS, strict=True)).rstrip()


def _compared(points: Sequence[Point], width: int) -> Iterator[str]:
    """Yield what the engines' own tools measured, next to the figures of the same point."""
    for point in points:
        compared = point.compared
        if compared is None or point.figures is None:
            continue
        yield ""
        own = rate(point.figures.tokens_per_second)
        if compared.tokens_per_second is None:
            yield from wrapped(f"{point.name}: {compared.tool} failed: {compared.error}", width)
        else:
            theirs = rate(compared.tokens_per_second)
            share = point.figures.tokens_per_second / compared.tokens_per_second
            yield f"{point.name}, answer tokens/s: {own} here, {theirs} by {compared.tool}"
            yield f"  {share:.0%} of the tool's"
        yield from wrapped(compared.command, width, "  $ ")


def _warnings(found: Benchmark) -> Iterator[str]:
    points = found.points
    alike = [point.name for point in equally_good(points)]
    if len(alike) > 1:
        yield f"{joined(alike)} are about equally good: the first is recommended"
    for each in by_series(points).values():
        others = [point.name for point in other_knees(each)]
        if others:
            yield (
                f"the knee may also be {joined(others)}: the intervals of the throughput overlap, "
                "which more --requests make narrower"
            )
    for point in points:
        lost = point.figures
        if point.name == found.recommended and lost is not None and lost.failed:
            yield (
                f"{lost.failed} of {counted(lost.requests, 'request')} failed at the recommended "
                "point: the throughput is that of the others"
            )
    reasons: dict[str, list[str]] = {}
    for point in points:
        if point.figures is not None and not point.full:
            reason = _FEWER if point.figures.filled else _FEW
            reasons.setdefault(reason, []).append(f"{point.name}: {point.figures.in_flight}")
    for reason, names in reasons.items():
        yield (
            f"{reason} ({', '.join(names)}): the throughput is a lower bound, and the point is "
            "not recommended"
        )
    empty = [
        point.name
        for point in points
        if point.figures is not None
        and point.figures.answered
        and not point.figures.tokens_per_second
    ]
    if empty:
        yield f"the answers report no tokens ({', '.join(empty)}): requests/s are compared"


def _plot(found: Benchmark) -> list[str]:
    """Return throughput against the time per request; empty for fewer than two points."""
    shown = [
        (f"{letter}{point.concurrency}" + ("*" if point.name in found.knees else ""), point.figures)
        for letter, points in zip(
            _letters(len(found.points)), by_series(found.points).values(), strict=False
        )
        for point in points
        if point.figures is not None and point.figures.p50 > 0
    ]
    if len(shown) < 2:
        return []
    low = math.log(min(figures.p50 for _, figures in shown))
    high = math.log(max(figures.p50 for _, figures in shown))
    top = max(figures.throughput for _, figures in shown)
    rows = [[" "] * _PLOT_WIDTH for _ in range(_PLOT_HEIGHT)]
    for label, figures in shown:
        across = (math.log(figures.p50) - low) / (high - low) if high > low else 0.5
        column = round(across * (_PLOT_WIDTH - len(label)))
        row = round((1 - figures.throughput / top) * (_PLOT_HEIGHT - 1))
        rows[row][column : column + len(label)] = label
    unit = "answer tokens/s" if any(each.tokens_per_second for _, each in shown) else "requests/s"
    lines = [f"{unit} (letter: series, number: requests in flight, *: knee)"]
    for at, line in enumerate(rows):
        mark = rate(top) if at == 0 else "0" if at == _PLOT_HEIGHT - 1 else ""
        lines.append(f"{mark:>{_AXIS - 2}} |{''.join(line)}".rstrip())
    ends = seconds_text(math.exp(low)), seconds_text(math.exp(high))
    gap = _PLOT_WIDTH - len(ends[0]) - len(ends[1])
    middle = "median time per request, log"
    lines.append(" " * (_AXIS - 1) + "+" + "-" * (_PLOT_WIDTH - 1))
    lines.append(" " * _AXIS + ends[0] + middle.center(gap) + ends[1])
    return lines
