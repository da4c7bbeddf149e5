"""What a run was estimated to take, and beside it what it took. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiflux.estimates.estimate import Estimate
from aiflux.estimates.intervals import Range
from aiflux.util.timestamps import unix_seconds


@dataclass(frozen=True)
class ComparedFigure:
    """One figure, estimated and actual.

    Attributes:
        unit: ``count``, ``seconds`` or ``hours``.
        actual: None where it is not known.
    """

    name: str
    unit: str
    estimated: Range
    actual: float | None


def compare(
    told: Estimate, shards: Iterable[Mapping[str, Any]], whole: Mapping[str, Any]
) -> tuple[ComparedFigure, ...]:
    """Return estimated and actual figures of a finished run side by side.

    Args:
        shards: the status of every shard.
        whole: the status of the whole run.
    """
    statuses = list(shards)
    count = max(1, len(statuses))
    totals = [status["aiflux"].get("totals") or {} for status in statuses]

    def summed(name: str) -> float:
        return float(sum(each.get(name, 0) for each in totals))

    rows = [
        ComparedFigure("prompt tokens", "count", told.prompt_tokens, summed("prompt_tokens")),
        ComparedFigure(
            "answer tokens", "count", told.completion_tokens, summed("completion_tokens")
        ),
        ComparedFigure(
            "failed requests", "count", told.failures, whole["request_counts"]["failed"]
        ),
        ComparedFigure(
            "time of all jobs", "seconds", told.seconds_of_jobs(count), summed("seconds")
        ),
        ComparedFigure(
            "start to output", "seconds", told.seconds_of_shard(count), _span(statuses, whole)
        ),
    ]
    if told.gpus:
        hours = summed("gpu_seconds") / 3600
        rows.append(ComparedFigure("GPU-hours", "hours", told.gpu_hours(count), hours))
    return tuple(rows)


def _span(statuses: Iterable[Mapping[str, Any]], whole: Mapping[str, Any]) -> float | None:
    """Return the seconds from the first start of a shard to the output, as far as that is known:
    a status tells when its last start began, and how long all starts took.
    """
    begun = [min(_started(status), _at_least_since(status)) for status in statuses]
    ended = whole.get("completed_at")
    return max(0.0, ended - min(begun)) if begun and ended else None


def _started(status: Mapping[str, Any]) -> float:
    return unix_seconds(str(status["aiflux"].get("started", ""))) or math.inf


def _at_least_since(status: Mapping[str, Any]) -> float:
    details = status["aiflux"]
    seconds = (details.get("totals") or {}).get("seconds", 0.0)
    return float(details.get("updated") or math.inf) - float(seconds)
