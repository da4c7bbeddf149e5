"""The plot of a benchmark: every measured point with its number, each series once."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from aiflux.core.runs.status_file import PointFigures
from aiflux.estimates.benchmark import Point, Series
from aiflux.report.benchmark_plot import benchmark_plot


def point(engine: str, concurrency: int, rate: float, p50: float) -> Point:
    figures = PointFigures(concurrency, 100, 0, 1.0, rate / 10, rate, 20, 10, p50, 2 * p50)
    return Point(Series(engine, "m<1>"), concurrency, figures)


def test_every_measured_point_has_its_number() -> None:
    pytest.importorskip("matplotlib")
    points = [
        point("ollama", 17, 100, 1.0),
        point("ollama", 34, 150, 2.0),
        point("vllm", 51, 400, 0.5),
        Point(Series("vllm", "m<1>"), 68, error="no"),
    ]
    drawn = benchmark_plot(points, ["ollama-c34"])
    assert drawn == benchmark_plot(points, ["ollama-c34"])
    root = ElementTree.fromstring(drawn)  # noqa: S314 - our own
    texts = ["".join(each.itertext()) for each in root.iter()]
    shown = {text.strip() for text in texts}
    assert {"17", "34", "51", "ollama m<1>", "vllm m<1>"} <= shown
    assert "68" not in shown
    assert "answer tokens/s" in shown
    assert not re.search(rb"https?://(?!www\.w3\.org|matplotlib)[a-z]+", drawn.split(b"<svg")[1])


def test_a_single_point_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    assert benchmark_plot([point("ollama", 1, 0.0, 1.0)], []).count(b"<svg") == 1
