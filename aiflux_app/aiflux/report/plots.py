"""The report's plots, drawn by matplotlib as SVG with the colours of the page's style sheet.

Each plot comes in two widths, of which the style sheet shows one. Text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from aiflux.report.data import Latency
from aiflux.report.format import rate, seconds_text
from aiflux.report.journal_summary import Bar, Throughput
from aiflux.util.extras import need
from aiflux.util.times import utc_text

# Placeholders for variables of the style sheet while matplotlib draws.
_INK, _FAINT, _FIRST, _SECOND, _THIRD = "#a00001", "#a00002", "#a00003", "#a00004", "#a00005"
_PAPER = "#a00006"
_VARIABLES = {
    _INK: "--ink",
    _FAINT: "--faint",
    _FIRST: "--plot-1",
    _SECOND: "--plot-2",
    _THIRD: "--plot-3",
    _PAPER: "--paper",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aiflux",
    "font.size": 10,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.alpha": 0.5,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 1.2,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}
# Marks in a decade of a logarithmic axis, coarsest first.
_FACTORS: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (1.0, 2.0, 5.0),
    *(
        tuple(step * number / 100 for number in range(100 // step, 1000 // step))
        for step in (100, 50, 20, 10, 5, 2, 1)
    ),
)
_FEWEST_MARKS = 3
_SIZES = {"wide": (8.2, 1.9), "narrow": (4.0, 1.9)}
_DIVISION = Markup('<div class="{}" role="img" aria-label="{}">{}</div>')
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_DAY = 86400
# Seconds between two marks of a time axis.
_STEPS = (
    *(1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1800),
    *(3600, 7200, 10800, 21600, 43200),
    *(_DAY, 2 * _DAY, 5 * _DAY, 10 * _DAY, 20 * _DAY, 50 * _DAY, 100 * _DAY),
)

Draw = Callable[[Any, str], None]


def throughput_plot(flow: Throughput) -> Markup:
    """Return results and answer tokens per second over time.

    Raises:
        ConfigError: matplotlib is not installed.
    """

    tokens = any(bar.completion_tokens for bar in flow.bars)

    def draw(figure: Any, width: str) -> None:
        axes = figure.subplots(2 if tokens else 1, sharex=True, squeeze=False)[:, 0]
        edges = _edges(flow.bars)
        rates = [bar.results / bar.seconds for bar in flow.bars]
        failed = [bar.failed / bar.seconds for bar in flow.bars]
        axes[0].stairs(rates, edges, fill=True, color=_FIRST, label="results")
        if any(failed):
            # Hatched: in grey, the two colours are much the same.
            axes[0].stairs(
                failed,
                edges,
                fill=True,
                facecolor=_SECOND,
                edgecolor=_PAPER,
                linewidth=0,
                hatch="////",
                label="failed",
            )
            axes[0].legend(frameon=False, loc="lower right", ncols=2, bbox_to_anchor=(1, 0.95))
        axes[0].set_ylabel("requests/s")
        if tokens:
            speeds = [bar.completion_tokens / bar.seconds for bar in flow.bars]
            axes[1].stairs(speeds, edges, fill=True, color=_THIRD)
            axes[1].set_ylabel("answer tokens/s")
        figure.align_ylabels(axes)
        _mark_time(axes, flow, edges, 4 if width == "narrow" else 8)

    title = (
        "Requests and answer tokens per second over time: on average "
        f"{rate(flow.requests_per_second)} requests and "
        f"{rate(flow.completion_tokens_per_second)} answer tokens per second"
    )
    return _plot("throughput", title, draw, rows=2 if tokens else 1.2)


def latency_plot(latency: Latency) -> Markup:
    """Return the histogram of the time per request.

    Raises:
        ConfigError: matplotlib is not installed.
    """

    def draw(figure: Any, width: str) -> None:
        axes = figure.subplots()
        edges = [latency.histogram[0][0], *(bar[1] for bar in latency.histogram)]
        axes.stairs([bar[2] for bar in latency.histogram], edges, fill=True, color=_FIRST)
        axes.set_xscale("log")
        axes.set_ylabel("number of answers")
        axes.set_xlabel("time per request (seconds, logarithmic)")
        _plain_ticks(axes, edges[0], edges[-1], 4 if width == "narrow" else 8)
        for name, place in (("50", "right"), ("95", "left")):
            at = latency.quantiles[name]
            axes.axvline(at, color=_INK, linewidth=1, linestyle=(0, (4, 2)))
            axes.annotate(
                f"{name} %: {seconds_text(at)}",
                (at, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(-5 if place == "right" else 5, 3),
                textcoords="offset points",
                ha=place,
                va="bottom",
            )

    percentiles = ", ".join(
        f"{name} % {seconds_text(at)}" for name, at in latency.quantiles.items()
    )
    return _plot("latency", f"Histogram of the time per request: {percentiles}", draw, rows=1.3)


def _plain_ticks(axes: Any, lowest: float, highest: float, most: int) -> None:
    """Label a logarithmic axis with plain, round numbers."""
    shown = round_places(lowest, highest, most)
    axes.set_xticks(shown, [f"{place:.4g}" for place in shown])
    axes.minorticks_off()


def round_places(lowest: float, highest: float, most: int) -> list[float]:
    """Return three to ``most`` round numbers in a range, or its ends if it has fewer."""
    for factors in _FACTORS:
        every = (factor * 10.0**power for power in range(-5, 9) for factor in factors)
        seen = [place for place in every if lowest <= place <= highest]
        if len(seen) >= _FEWEST_MARKS:
            return seen[:: -(-len(seen) // most)]
    return [lowest, highest]


def _edges(bars: Sequence[Bar]) -> list[float]:
    """Return the edges of bars in seconds, without the pauses."""
    edges = [0.0]
    for bar in bars:
        edges.append(edges[-1] + bar.seconds)
    return edges


def _mark_time(axes: Any, flow: Throughput, edges: Sequence[float], most: int) -> None:
    """Label the lowest axis with times of day, and mark the pauses in all axes."""
    begins = [end for _, end in flow.pauses]
    places = [edges[at] for at, bar in enumerate(flow.bars) if bar.start in begins]
    for each in axes:
        each.set_xlim(edges[0], edges[-1])
        each.margins(y=0.08)
        for place in places:
            each.axvline(place, color=_INK, linewidth=1, linestyle=(0, (2, 2)))
    marks = time_marks(flow.bars, edges, most)
    several_days = flow.bars[-1].start // _DAY != flow.bars[0].start // _DAY
    seconds = any(moment % 60 for _, moment in marks)
    axes[-1].set_xticks(
        [place for place, _ in marks],
        [_time_of(moment, several_days, seconds) for _, moment in marks],
    )
    axes[-1].set_xlabel("time (UTC)" + (", pauses omitted at the dashed lines" if places else ""))


def time_marks(bars: Sequence[Bar], edges: Sequence[float], most: int) -> list[tuple[float, float]]:
    """Return round times of day: their place on the axis, and their Unix time.

    The axis omits pauses. A mark that would be close to the one before a pause is omitted too.
    """
    whole = edges[-1] - edges[0]
    step = next((step for step in _STEPS if whole / step <= most), _STEPS[-1])
    marks: list[tuple[float, float]] = []
    for bar, edge in zip(bars, edges, strict=False):
        first = -(-int(bar.start) // step) * step
        for moment in range(first, math.ceil(bar.start + bar.seconds), step):
            place = edge + moment - bar.start
            if not marks or place - marks[-1][0] >= 0.8 * whole / most:
                marks.append((place, float(moment)))
    return marks or [(edges[0], bars[0].start)]


def _time_of(moment: float, day: bool, seconds: bool) -> str:
    text = utc_text(moment)
    time = text[11:19] if seconds and not day else text[11:16]
    return f"{text[5:10]}\n{time}" if day else time


def _plot(name: str, title: str, draw: Draw, rows: float) -> Markup:
    matplotlib = need("matplotlib", "report", "a plot")
    figures = need("matplotlib.figure", "report", "a plot")
    drawn = []
    for width, (inches, height) in _SIZES.items():
        with matplotlib.rc_context(_STYLE):
            figure = figures.Figure(figsize=(inches, height * rows), layout="constrained")
            draw(figure, width)
            target = io.BytesIO()
            figure.savefig(target, format="svg", transparent=True, metadata=_NO_METADATA)
        svg = _inline(target.getvalue().decode(), f"{name}-{width}")
        plot = Markup('<div class="{}" role="img" aria-label="{}">{}</div>').format(
            width, title, svg
        )
        drawn.append(plot)
    return Markup().join(drawn)


def _inline(svg: str, name: str) -> Markup:
    """Return an SVG document as an element of a page, with unique ids and the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' id="', f' id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)  # noqa: S704 - matplotlib escapes the text in it
