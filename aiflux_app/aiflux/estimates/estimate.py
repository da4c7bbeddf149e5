"""Extrapolate from a pilot to the full run, store estimates, and compare them with actual figures.

Every figure is a ``Range``: a value with its 95 % interval. docs/estimate.md describes the method.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import Plan, read_plan
from aiflux.core.runs.status_file import StatusFile, Totals
from aiflux.estimates.energy import JOULES_PER_KWH, UNKNOWN_RATES, Rates, mean_watts, sum_of
from aiflux.estimates.pilot import Drawn, Observation, Pilot, pace, start_up
from aiflux.util.files import write_json
from aiflux.util.records import OMITTED, from_json, to_json
from aiflux.util.text import counted
from aiflux.util.times import unix_seconds, utc_now, walltime_seconds, walltime_text

_Z = 1.959964
_BETTER = 0.9
_QUARTERS = 4
_FEWEST_FOR_QUARTERS = 40
SLURM = "slurm"
LOCAL = "local"
SETTLED_DOUBT = 0.1
"""The uncertainty of the pace that no pilot is without: a share of the time."""
_DOUBT_UNFILLED = 0.25
_DOUBT_CLIMBING = 0.5
_SETTLED = 8
_SHARE_OF_WALLTIME = 0.8
_MARGIN = 1.3
_STEP = 300.0
_FIXED_SHARE = 0.2
_MANY_FAILURES = 0.05
_WIDE = 0.3


@dataclass(frozen=True)
class Range:
    """An estimated figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """Return the figure multiplied."""
        return Range(self.value * factor, self.low * factor, self.high * factor)

    def plus(self, other: Range) -> Range:
        """Return the sum; its bounds are the sums of the bounds."""
        return Range(self.value + other.value, self.low + other.low, self.high + other.high)


def rate(amount: float, seconds: Range) -> Range:
    """Return an amount per second; its upper bound is infinite if the time may be 0."""
    high = amount / seconds.low if seconds.low else math.inf
    return Range(amount / seconds.value, amount / seconds.high, high)


def total(values: Sequence[float], sizes: Sequence[int], requests: int, size: int) -> Range:
    """Extrapolate the sum over all requests from a sample.

    The estimate is the sample mean times the number of requests. If the values clearly correlate
    with the line sizes, it is their ratio times the total size (W. G. Cochran, Sampling Techniques,
    chapter 6). The interval is Student's, with the finite population correction: it has no width
    once all requests were observed. The sample is spread evenly over the input, so the interval is
    rather too wide than too narrow.

    Args:
        values, sizes: values and line sizes of the sample.
        requests, size: number of all requests, and the total size of their lines.
    """
    seen = len(values)
    value, spread = requests * fmean(values), _deviation(values)
    ratio = sum(values) / sum(sizes)
    rest = _deviation([one - ratio * other for one, other in zip(values, sizes, strict=True)])
    if seen > 2 and rest < _BETTER * spread:
        value, spread = ratio * size, rest
    finite = math.sqrt(max(0.0, 1 - seen / requests))
    half = _student(seen - 1) * requests * spread / math.sqrt(seen) * finite
    return Range(value, max(sum(values), value - half), value + half)


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else abs(values[0])


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's distribution, using the Cornish-Fisher expansion."""
    if freedom < 3:
        return (12.706, 12.706, 4.303)[freedom]
    z, n = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def share_of(some: int, seen: int, requests: int) -> Range:
    """Extrapolate how many requests share a property of ``some`` of the ``seen`` ones (Wilson)."""
    share = some / seen
    if seen >= requests:
        return Range(some, some, some)
    scale = 1 + _Z**2 / seen
    middle = (share + _Z**2 / (2 * seen)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / seen + _Z**2 / (4 * seen**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Range(share * requests, (low if some else 0.0) * requests, high * requests)


def unevenness(costs: Sequence[float]) -> float:
    """Return how much more than the average the most expensive quarter of the input costs.

    Returns 1 if the difference may be due to chance.
    """
    if len(costs) < _FEWEST_FOR_QUARTERS:
        return 1.0
    mean = fmean(costs)
    edges = [len(costs) * number // _QUARTERS for number in range(_QUARTERS + 1)]
    parts = [costs[low:high] for low, high in pairwise(edges)]
    dearest = max(parts, key=fmean)
    doubt = 2.5 * stdev(dearest) / math.sqrt(len(dearest))
    return fmean(dearest) / mean if fmean(dearest) - doubt > mean else 1.0


@dataclass(frozen=True)
class SampledRows:
    """What was drawn for a pilot. Each row has one request, or in a chain any number of them.

    Attributes:
        sizes: line sizes of their first requests.
        count, bytes: of the full input: number of rows, and the total size of these lines.
        places: of each request of the pilot, its row in the sample.
    """

    sizes: Sequence[int]
    count: int
    bytes: int
    places: Sequence[int]

    @property
    def complete(self) -> bool:
        """Whether the sample is the whole input."""
        return len(self.sizes) >= self.count

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums of the requests' values by row."""
        found = [0.0] * len(self.sizes)
        for place, value in zip(self.places, values, strict=True):
            found[place] += value
        return found

    def total(self, values: Iterable[float]) -> Range:
        """Extrapolate the sum over the requests of all rows."""
        return total(self.sums([*values]), self.sizes, self.count, self.bytes)


@dataclass(frozen=True)
class Costs:
    """What a run costs in addition to time; None is unknown.

    Attributes:
        gpu_kwh: energy of the GPUs.
        joules_per_1000_answers, co2_grams: of that energy.
        billing_units: of the GPU-hours, at the site's rate.
    """

    gpu_kwh: Range | None
    joules_per_1000_answers: Range | None
    co2_grams: Range | None
    billing_units: Range | None


@dataclass(frozen=True)
class Estimate:
    """Estimated figures of a run.

    Attributes:
        plan: plan id of the full run; ties the estimate to input, model and parameters.
        where: the pilot's engine: ``slurm``, ``local``, or its address.
        requests, pilot: number of requests of the full run, and of the pilot.
        prompt_tokens, completion_tokens: of the full run.
        in_flight: requests in flight while the pilot's engines were fully used.
        work_seconds: time of one job for all requests with fully used engines.
        fixed_seconds: additional time of each job: startup, and draining at the end.
        uneven: how much more than the average the most expensive part of the input takes.
        gpus: of the pilot's job; 0 if there were none, or the engine is external.
        failures: requests that will fail.
        walltime: time limit of one job in seconds; None for no limit.
        shards: recommended number of shards.
        time_seconds: recommended ``--time`` for each shard.
        gpu_watts: mean power of a GPU in the pilot's job; None if it was not measured.
    """

    plan: str
    where: str
    created: str
    requests: int
    pilot: int
    pilot_failures: int
    prompt_tokens: Range
    completion_tokens: Range
    in_flight: int
    work_seconds: Range
    fixed_seconds: Range
    uneven: float
    gpus: int
    failures: Range
    walltime: float | None = None
    shards: int = 1
    time_seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    gpu_watts: float | None = field(default=None, metadata=OMITTED)

    @property
    def time(self) -> str:
        """The recommended ``--time``, in Slurm's format."""
        return walltime_text(self.time_seconds)

    @property
    def shard_seconds(self) -> Range:
        """Time of one of the recommended shards."""
        return self.seconds_of_shard(self.shards)

    def seconds_of_shard(self, shards: int) -> Range:
        """Return the time of one job if the input is split into ``shards``.

        The upper bound is the time of the longest shard.
        """
        share = -(-self.requests // shards) / self.requests
        own = self.work_seconds.times(share)
        highest = self.work_seconds.high * min(1.0, share * self.uneven)
        return self.fixed_seconds.plus(Range(own.value, own.low, highest))

    @property
    def requests_rate(self) -> Range:
        """Requests per second of one job with fully used engines."""
        return rate(self.requests, self.work_seconds)

    @property
    def tokens_rate(self) -> Range:
        """Generated tokens per second of one job with fully used engines."""
        return rate(self.completion_tokens.value, self.work_seconds)

    def seconds_of_jobs(self, shards: int) -> Range:
        """Return the time of all jobs together."""
        return self.work_seconds.plus(self.fixed_seconds.times(shards))

    def gpu_hours(self, shards: int) -> Range:
        """Return the GPU-hours of all jobs together."""
        return self.seconds_of_jobs(shards).times(self.gpus / 3600)

    def kwh(self, shards: int) -> Range | None:
        """Return the energy of the GPUs of all jobs together, if they use the pilot's power."""
        if self.gpu_watts is None:
            return None
        return self.gpu_hours(shards).times(self.gpu_watts / 1000)

    def recommended(self, time: str | None) -> Estimate:
        """Return the estimate with the recommendation for a job that may take ``time``.

        More time is recommended if a job could not finish a single request within it.
        """
        walltime = walltime_seconds(time)
        shards = self._fewest(walltime)
        most = walltime
        if shards is None:
            most = math.inf
            enough = self.fixed_seconds.high / (_FIXED_SHARE * _SHARE_OF_WALLTIME)
            shards = self._fewest(enough) or self.requests
        fitting = replace(self, walltime=None if math.isinf(walltime) else walltime)
        return replace(fitting, shards=shards, time_seconds=min(self._time_for(shards), most))

    def in_shards(self, shards: int) -> Estimate:
        """Return the estimate with another number of shards, and the time that they need."""
        most = math.inf if self.walltime is None else self.walltime
        return replace(self, shards=shards, time_seconds=min(self._time_for(shards), most))

    def _time_for(self, shards: int) -> float:
        return math.ceil(self.seconds_of_shard(shards).high * _MARGIN / _STEP) * _STEP

    def _fewest(self, walltime: float) -> int | None:
        """Return the smallest number of shards that fits the time limit, or None."""

        def fits(shards: int) -> bool:
            return self.seconds_of_shard(shards).high <= _SHARE_OF_WALLTIME * walltime

        found = bisect_left(range(1, self.requests + 1), True, key=fits) + 1
        return found if found <= self.requests else None

    def costs(self, rates: Rates, shards: int) -> Costs:
        """Return energy, CO2 and billing units of all jobs together."""
        kwh = self.kwh(shards)
        answers = self.requests - self.failures.value
        per_hour, co2 = rates.billing_per_gpu_hour, rates.co2_per_kwh
        return Costs(
            kwh,
            None if kwh is None or answers < 1 else kwh.times(1000 * JOULES_PER_KWH / answers),
            None if kwh is None or co2 is None else kwh.times(co2),
            self.gpu_hours(shards).times(per_hour) if per_hour is not None and self.gpus else None,
        )

    def to_json(self, rates: Rates = UNKNOWN_RATES) -> dict[str, Any]:
        """Return the estimate and its derived figures as JSON."""
        return {
            **to_json(self),
            "time": self.time,
            "shard_seconds": to_json(self.shard_seconds),
            "gpu_hours": to_json(self.gpu_hours(self.shards)) if self.gpus else None,
            "costs": to_json(self.costs(rates, self.shards)),
            "requests_per_second": round(self.requests_rate.value, 3),
            "tokens_per_second": round(self.tokens_rate.value, 3),
        }


def estimate(
    whole: Plan,
    drawn: Drawn,
    observations: Sequence[Observation],
    status: StatusFile,
    time: str | None,
    where: str = SLURM,
    size_option: str = "--requests",
    rows: SampledRows | None = None,
) -> Estimate:
    """Estimate the full run.

    Args:
        whole: the plan of the full run.
        drawn: the pilot's sample of the input.
        observations: at least one, in input order.
        status: status of the pilot's only shard.
        time: time limit of one job in Slurm's format; None for no limit.
        where: see ``Estimate``.
        size_option: the option that sets the size of the pilot.
        rows: that the requests are of, if the number of requests of the full run is not known.
    """
    full, costs = _costs(observations)
    seen = len(observations)
    if rows is None:
        sizes = [item.size for item in observations]
        rows = SampledRows(sizes, whole.requests, drawn.bytes, range(seen))
    requests = round(rows.total([1.0] * seen).value)
    doubt = _doubt(seen, full, _lanes(whole, status))
    details = status.details
    work = _doubted(rows.total(costs), doubt)
    failed = sum(item.error is not None for item in observations)
    result = Estimate(
        plan=whole.id,
        where=where,
        created=utc_now(),
        requests=requests,
        pilot=seen,
        pilot_failures=failed,
        prompt_tokens=rows.total(item.prompt_tokens for item in observations),
        completion_tokens=rows.total(item.completion_tokens for item in observations),
        in_flight=full,
        work_seconds=work,
        fixed_seconds=_fixed(observations, unix_seconds(details.started or "")),
        uneven=1.0 if rows.complete else unevenness(rows.sums(costs)),
        gpus=_gpus(details.totals),
        failures=share_of(failed, seen, requests),
        gpu_watts=mean_watts(details.energy),
    ).recommended(time)
    warnings = [
        *_warn_of_size(result, rows, doubt, size_option),
        *_warn_of_results(observations, whole, requests),
        *_warn_of_shards(result, time),
    ]
    return replace(result, warnings=tuple(warnings))


def _costs(observations: Sequence[Observation]) -> tuple[int, list[float]]:
    """Return the number of requests in flight, and each request's share of the job's time.

    The models of a run are processed one after the other, so each has its own pace.
    """
    costs: dict[int, float] = {}
    full = 0
    for model in dict.fromkeys(item.model for item in observations):
        places = [at for at, item in enumerate(observations) if item.model == model]
        of_model = pace([observations[at] for at in places])
        full = max(full, of_model.in_flight)
        costs.update(zip(places, of_model.costs, strict=True))
    return full, [costs[at] for at in range(len(observations))]


@dataclass(frozen=True)
class _Doubt:
    """How much less or more time the full run may take at another pace than the pilot's."""

    below: float
    above: float
    unfilled: bool


def _doubt(seen: int, full: int, lanes: int | None) -> _Doubt:
    """Return the uncertainty of the pace.

    Args:
        lanes: requests that the engines process at once; None if the worker finds the limit while
            running (``worker.concurrency``).
    """
    if lanes is None and seen < _SETTLED * full:
        return _Doubt(_DOUBT_CLIMBING, _DOUBT_UNFILLED, True)
    if lanes is not None and seen < 2 * max(full, lanes):
        return _Doubt(max(_DOUBT_UNFILLED, 1 - full / lanes), _DOUBT_UNFILLED, True)
    return _Doubt(SETTLED_DOUBT, SETTLED_DOUBT, False)


def _lanes(plan: Plan, status: StatusFile) -> int | None:
    """Return the requests in flight that the engines take; None while that is unknown."""
    engines = status.details.engines
    if plan.options.concurrency is not None:
        return max(1, len(engines)) * plan.options.concurrency
    return sum(engine.slots or 0 for engine in engines) or None


def _gpus(totals: Totals) -> int:
    return round(totals.gpu_seconds / max(totals.seconds, 1e-3))


def _fixed(observations: Sequence[Observation], started: float) -> Range:
    """Return a job's startup time and the time in which the engines drain at the end.

    Draining takes no longer than the longest request.
    """
    start = start_up(observations, started)
    longest = max(item.seconds for item in observations)
    return Range(start + longest / 2, start, start + longest)


def _doubted(figure: Range, doubt: _Doubt) -> Range:
    """Widen a time by the uncertainty of the pace."""
    below = math.hypot(figure.value - figure.low, figure.value * doubt.below)
    above = math.hypot(figure.high - figure.value, figure.value * doubt.above)
    return Range(figure.value, max(0.0, figure.value - below), figure.value + above)


def _warn_of_size(result: Estimate, rows: SampledRows, doubt: _Doubt, option: str) -> Iterator[str]:
    seen, work = len(rows.sizes), result.work_seconds
    if rows.complete:
        return
    size = min((5 if doubt.unfilled else 4) * seen, rows.count)
    larger = f"{option} {size}" + (" (all requests)" if size == rows.count else "")
    if doubt.unfilled:
        yield (
            "the pilot is too small to fill the engines "
            f"({counted(result.in_flight, 'request')} in flight): the full run may have another "
            f"pace; {larger} is more reliable"
        )
    elif work.high > (1 + doubt.above + _WIDE) * work.value:
        yield (
            f"the requests vary too much for a reliable time: {larger} at least halves the interval"
            if size < 4 * seen
            else f"the requests vary too much for a reliable time: {larger} about halves the "
            "interval"
        )


def _warn_of_results(
    observations: Sequence[Observation], whole: Plan, requests: int
) -> Iterator[str]:
    seen = len(observations)
    errors = Counter(item.error for item in observations if item.error is not None)
    failed = errors.total()
    expected = failed * requests / seen
    allowed = whole.options.allowed_failures(requests) + whole.left_out
    if failed and (failed >= _MANY_FAILURES * seen or expected > allowed):
        (most, _), *_ = errors.most_common(1)
        yield f"{failed} of {counted(seen, 'request')} failed, most often with {most}"
    cut = sum(item.cut for item in observations)
    if cut:
        answers = f"{cut} of {counted(seen, 'answer')}"
        yield f"{answers} reached the token limit (max_tokens or the context)"
    filtered = sum(item.filtered for item in observations)
    if filtered:
        yield f"a content filter stopped {filtered} of {counted(seen, 'answer')}"
    truncated = sum(item.truncated for item in observations)
    if truncated:
        prompts = f"{truncated} of {counted(seen, 'prompt')}"
        yield f"the engine truncated {prompts}; increase --context-length"


def _warn_of_shards(result: Estimate, time: str | None) -> Iterator[str]:
    if result.uneven > 1:
        yield (
            f"part of the input takes {result.uneven:.1f} times the average: shards differ, and "
            "the recommendation fits the longest"
        )
    if result.walltime is not None and result.time_seconds > result.walltime:
        yield f"--time {time} is barely enough for a job to start; request more"


@dataclass(frozen=True)
class ComparedFigure:
    """One figure, estimated and actual.

    Attributes:
        unit: ``count``, ``seconds``, ``hours`` or ``kwh``.
        actual: None if unknown.
    """

    name: str
    unit: str
    estimated: Range
    actual: float | None


def compare(
    result: Estimate, statuses: Sequence[StatusFile], whole: StatusFile
) -> tuple[ComparedFigure, ...]:
    """Return estimated and actual figures of a finished run side by side.

    Args:
        statuses: of every shard.
        whole: the status of the whole run.
    """
    count = max(1, len(statuses))

    def summed(name: str) -> float:
        return float(sum(getattr(status.details.totals, name) for status in statuses))

    rows = [
        ComparedFigure("prompt tokens", "count", result.prompt_tokens, summed("prompt_tokens")),
        ComparedFigure(
            "answer tokens", "count", result.completion_tokens, summed("completion_tokens")
        ),
        ComparedFigure("failed requests", "count", result.failures, whole.counts.failed),
        ComparedFigure(
            "time of all jobs", "seconds", result.seconds_of_jobs(count), summed("seconds")
        ),
        ComparedFigure(
            "start to output", "seconds", result.seconds_of_shard(count), _span(statuses, whole)
        ),
    ]
    if result.gpus:
        hours = summed("gpu_seconds") / 3600
        rows.append(ComparedFigure("GPU-hours", "hours", result.gpu_hours(count), hours))
    energy, actual = result.kwh(count), sum_of(status.details.energy for status in statuses)
    if energy is not None:
        measured = actual.joules / JOULES_PER_KWH if actual.gpu_seconds else None
        rows.append(ComparedFigure("energy of the GPUs", "kwh", energy, measured))
    return tuple(rows)


def _span(statuses: Iterable[StatusFile], whole: StatusFile) -> float | None:
    """Return the seconds from the first start of a shard to the output; None where unknown.

    A status has the time at which its last start began, and the duration of all its starts.
    """
    begun = [min(_started(status), _at_least_since(status)) for status in statuses]
    ended = whole.completed_at
    return max(0.0, ended - min(begun)) if begun and ended else None


def _started(status: StatusFile) -> float:
    return unix_seconds(status.details.started or "") or math.inf


def _at_least_since(status: StatusFile) -> float:
    details = status.details
    return (details.updated or math.inf) - details.totals.seconds


def read_estimate(path: Path, plan: Plan) -> Estimate | None:
    """Return the estimate in a file, or None if there is none for this plan."""
    try:
        estimate = from_json(Estimate, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None
    return estimate if estimate.plan == plan.id else None


def known_estimate(plan: Plan, where: str | None = None) -> Estimate | None:
    """Return the newest estimate that a pilot made for a run to be planned.

    It may be from a pilot of the run's engine alone, or of several engines.

    Args:
        where: return only an estimate that was made there.
    """
    pilots = [Pilot.of_output(plan.output, engine) for engine in (None, plan.options.engine)]
    found = [read_estimate(pilot.estimate, plan) for pilot in pilots]
    fitting = [each for each in found if each and where in (None, each.where)]
    return max(fitting, key=lambda each: each.created, default=None)


def keep_estimate(estimate: Estimate, plan: Plan, pilot: Pilot) -> None:
    """Store an estimate next to its pilot, and in the run directory if it is of this run.

    Raises:
        StorageError: the file cannot be written.
        RunConflictError: the run directory has a plan that cannot be read.
    """
    write_json(pilot.estimate, estimate.to_json())
    run = RunDirectory.of_output(plan.output)
    if run.plan.exists() and read_plan(run).id == plan.id:
        write_json(run.estimate, estimate.to_json())


def carry_estimate(plan: Plan, run: RunDirectory) -> None:
    """Copy a pilot's estimate to the run directory.

    Raises:
        StorageError: the file cannot be written.
    """
    estimate = known_estimate(plan)
    if estimate is not None:
        write_json(run.estimate, estimate.to_json())
