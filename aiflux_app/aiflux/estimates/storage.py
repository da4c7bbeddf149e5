"""Store estimates next to their pilot and in the run directory."""

from __future__ import annotations

import json
from pathlib import Path

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import Plan
from aiflux.estimates.estimate import Estimate
from aiflux.estimates.pilot import Pilot
from aiflux.util.files import write_json
from aiflux.util.records import from_json


def read_estimate(path: Path, plan: Plan) -> Estimate | None:
    """Return the estimate in a file, or None if there is none for this plan."""
    try:
        estimate = from_json(Estimate, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None
    return estimate if estimate.plan == plan.id else None


def known_estimate(plan: Plan) -> Estimate | None:
    """Return the estimate that a pilot made for a run to be planned."""
    return read_estimate(Pilot.of_output(plan.output).estimate, plan)


def keep_estimate(estimate: Estimate, plan: Plan) -> None:
    """Store an estimate next to its pilot, and in the run directory if it already exists.

    Raises:
        StorageError: the file cannot be written.
    """
    write_json(Pilot.of_output(plan.output).estimate, estimate.to_json())
    run = RunDirectory.of_output(plan.output)
    if run.plan.exists():
        write_json(run.estimate, estimate.to_json())


def carry_estimate(plan: Plan, run: RunDirectory) -> None:
    """Copy a pilot's estimate to the run directory.

    Raises:
        StorageError: the file cannot be written.
    """
    estimate = known_estimate(plan)
    if estimate is not None:
        write_json(run.estimate, estimate.to_json())
