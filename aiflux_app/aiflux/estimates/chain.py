"""The estimate of a chain: of each step, from the pilots of all, and their sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from aiflux.estimates.energy import UNKNOWN_RATES, Rates
from aiflux.estimates.estimate import SLURM, Costs, Estimate, Range, SampledRows, share_of
from aiflux.util.records import to_json

_NOTHING = Range(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class StepEstimate:
    """The estimate of a step.

    Attributes:
        requests: of the full step.
        estimate: None if no row of the sample reached the step.
    """

    name: str
    requests: Range
    estimate: Estimate | None


@dataclass(frozen=True)
class ChainEstimate:
    """The estimates of all steps.

    Attributes:
        rows: that the first step asks about.
        pilot: number of them in the sample.
    """

    rows: int
    pilot: int
    steps: tuple[StepEstimate, ...]
    size_option: str = "--requests"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the sum leaves out."""
        names = [step.name for step in self.steps if step.estimate is None]
        if not names:
            return ()
        few = f"no row of the sample reached the step {', '.join(names)}, which the sum leaves out"
        larger = min(4 * self.pilot, self.rows)
        return (few + (f": {self.size_option} {larger}" if larger > self.pilot else ""),)

    def sum(self, figure: Callable[[Estimate], Range | None]) -> Range | None:
        """Return the sum of a figure over the steps; None if it is unknown for a step.

        Its bounds are the sums of the bounds: all steps see the same rows, so they may all be
        cheaper or all be dearer than expected.
        """
        found = [figure(step.estimate) for step in self.steps if step.estimate is not None]
        known = [each for each in found if each is not None]
        return reduce(Range.plus, known, _NOTHING) if len(known) == len(found) else None

    def costs(self, rates: Rates) -> Costs:
        """Return energy, CO2 and billing units of all steps."""

        def summed(name: str) -> Range | None:
            return self.sum(lambda each: getattr(each.costs(rates, jobs_of(each)), name))

        return Costs(summed("gpu_kwh"), None, summed("co2_grams"), summed("billing_units"))

    @property
    def seconds(self) -> Range | None:
        """The time of the steps, one after the other, each in its recommended jobs."""
        return self.sum(lambda each: each.seconds_of_shard(jobs_of(each)))

    @property
    def gpu_hours(self) -> Range | None:
        """The GPU-hours of all steps."""
        return self.sum(lambda each: each.gpu_hours(jobs_of(each)))

    @property
    def gpus(self) -> bool:
        """Whether a step has GPUs."""
        return any(step.estimate is not None and step.estimate.gpus for step in self.steps)

    def to_json(self, rates: Rates = UNKNOWN_RATES) -> dict[str, Any]:
        """Return the estimates and their sum as JSON."""
        steps = [
            {
                "name": step.name,
                "requests": to_json(step.requests),
                "estimate": None if step.estimate is None else step.estimate.to_json(rates),
            }
            for step in self.steps
        ]
        summed = {
            "requests": to_json(reduce(Range.plus, (step.requests for step in self.steps))),
            "prompt_tokens": _json(self.sum(lambda each: each.prompt_tokens)),
            "completion_tokens": _json(self.sum(lambda each: each.completion_tokens)),
            "failures": _json(self.sum(lambda each: each.failures)),
            "seconds": _json(self.seconds),
            "gpu_hours": _json(self.gpu_hours) if self.gpus else None,
            "costs": to_json(self.costs(rates)),
        }
        return {
            "rows": self.rows,
            "pilot": self.pilot,
            "steps": steps,
            "sum": summed,
            "warnings": list(self.warnings),
        }


def _json(figure: Range | None) -> Any:
    return None if figure is None else to_json(figure)


def jobs_of(found: Estimate) -> int:
    """Return the number of jobs of a step."""
    return found.shards if found.where == SLURM else 1


def step_requests(rows: SampledRows, *, first: bool) -> Range:
    """Return the number of requests of a step over all rows.

    Args:
        first: the step is the first one, whose requests the rows were drawn from.
    """
    asked = rows.sums([1.0] * len(rows.places))
    numbers = {*asked} - {0.0}
    if first or len(numbers) > 1:
        return rows.total([1.0] * len(rows.places))
    # Some rows passed, each with as many samples: the interval is that of a share. Student's would
    # have no width if all passed, or none.
    reached = sum(count > 0 for count in asked)
    return share_of(reached, len(asked), rows.count).times(max(numbers, default=1.0))
