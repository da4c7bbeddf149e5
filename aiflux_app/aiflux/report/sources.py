"""What a report is made of, and the parts of its statuses. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiflux.core.runs.plan import Plan
from aiflux.estimates.estimate import Estimate
from aiflux.report.data import Condition
from aiflux.report.journal_summary import Tally


@dataclass(frozen=True)
class ReportSources:
    """What a report is made of.

    Attributes:
        statuses: of each shard; None where none was written for this plan.
        whole: the status of the whole run.
        tallies: of each shard's journal.
        now: Unix time.
    """

    plan: Plan
    run_dir: str
    condition: Condition
    statuses: tuple[Mapping[str, Any] | None, ...]
    whole: Mapping[str, Any] | None
    tallies: tuple[Tally, ...]
    estimate: Estimate | None
    now: float


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a value of JSON that should be an object; an empty one where it is none."""
    return value if isinstance(value, dict) else {}


def details_of(status: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the part of a status that is AI-Flux's own."""
    return mapping((status or {}).get("aiflux"))


def all_details(sources: ReportSources) -> list[Mapping[str, Any]]:
    """Return the details of all shards that have a status."""
    return [details_of(status) for status in sources.statuses if status is not None]


def totals_of(details: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what all starts of a shard come to."""
    return mapping(details.get("totals"))


def engines_of(details: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the engines of a shard's last start."""
    return [mapping(engine) for engine in details.get("engines") or ()]
