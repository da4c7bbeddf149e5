"""The plot of a benchmark, as an SVG file: throughput against the time per request."""

from __future__ import annotations

import io
from collections.abc import Sequence

from aiflux.estimates.benchmark import Point, by_series
from aiflux.report.format import seconds_text
from aiflux.report.plots import round_places
from aiflux.util.extras import need

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aiflux",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.2,
}
_SIZE = (7.5, 4.5)
_MOST_TICKS = 8
_MARKERS = "osD^vPX*"
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def benchmark_plot(points: Sequence[Point], knees: Sequence[str]) -> bytes:
    """Return the plot of the measured points; the knees are filled.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    matplotlib = need("matplotlib", "report", "a plot")
    figures = need("matplotlib.figure", "report", "a plot")
    measured = [point for point in points if point.figures is not None and point.figures.p50 > 0]
    tokens = any(point.figures and point.figures.tokens_per_second for point in measured)
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for number, (series, of_series) in enumerate(by_series(measured).items()):
            places = [
                (point.figures.p50, point.figures.throughput)
                for point in of_series
                if point.figures is not None
            ]
            marker, colour = _MARKERS[number % len(_MARKERS)], f"C{number % 10}"
            label = f"{series.name} {series.model}".rstrip()
            axes.plot(*zip(*places, strict=True), color=colour, marker=marker,
                      markerfacecolor="white", label=label)  # fmt: skip
            for point, place in zip(of_series, places, strict=True):
                if point.name in knees:
                    axes.plot(*place, color=colour, marker=marker, markersize=9)
                axes.annotate(str(point.concurrency), place, xytext=(5, 5),
                              textcoords="offset points")  # fmt: skip
        times = [point.figures.p50 for point in measured if point.figures is not None]
        axes.set_xscale("log")
        if times:
            shown = round_places(min(times), max(times), _MOST_TICKS)
            axes.set_xticks(shown, [seconds_text(place) for place in shown])
            axes.minorticks_off()
            axes.legend(frameon=False)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("median time per request (logarithmic)")
        axes.set_ylabel("answer tokens/s" if tokens else "requests/s")
        axes.set_title("Numbers: requests in flight. Filled: the knee.", fontsize=10, loc="left")
        target = io.BytesIO()
        figure.savefig(target, format="svg", metadata=_NO_METADATA)
    return target.getvalue()
