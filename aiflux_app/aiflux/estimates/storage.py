"""Estimates on disk: beside the pilot that told them, and in the run directory they are about."""

from __future__ import annotations

import json
from pathlib import Path

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import Plan
from aiflux.estimates.estimate import Estimate
from aiflux.estimates.pilot import Pilot
from aiflux.util.files import write_json


def read_estimate(path: Path, plan: Plan) -> Estimate | None:
    """Return the estimate in a file; None where there is none for this very plan."""
    try:
        told = Estimate.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return told if told.plan == plan.id else None


def known_estimate(plan: Plan) -> Estimate | None:
    """Return what a pilot told of a run that is to be planned."""
    return read_estimate(Pilot.of_output(plan.output).estimate, plan)


def keep_estimate(told: Estimate, plan: Plan) -> None:
    """Write an estimate down beside its pilot, and where the run is planned already, there too.

    Raises:
        StorageError: the disk refused.
    """
    write_json(Pilot.of_output(plan.output).estimate, told.to_json())
    run = RunDirectory.of_output(plan.output)
    if run.plan.exists():
        write_json(run.estimate, told.to_json())


def carry_estimate(plan: Plan, run: RunDirectory) -> None:
    """Copy what a pilot told of a run into its directory.

    Raises:
        StorageError: the disk refused.
    """
    told = known_estimate(plan)
    if told is not None:
        write_json(run.estimate, told.to_json())
