"""Making the report of a run: what ran, what came of it, what it took. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from aiflux import __version__
from aiflux.estimates.estimate import ComparedFigure, compare
from aiflux.report.advice import advice
from aiflux.report.data import FORM, Failure, Latency, Report, RequestCounts, Times, Tokens
from aiflux.report.journal_summary import Tally
from aiflux.report.machines import (
    ReportSources,
    all_details,
    engine_rows,
    machine_use,
    shard_rows,
    what_ran,
)
from aiflux.report.throughput import throughput
from aiflux.util.times import utc_text

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_BARS = 40


def make_report(sources: ReportSources) -> Report:
    """Add up a run."""
    whole = Tally()
    for each in sources.tallies:
        whole.merge(each)
    timeline = whole.timeline
    return Report(
        form=FORM,
        written=utc_text(sources.now),
        version=__version__,
        condition=sources.condition,
        what=what_ran(sources, whole),
        counts=_counts(sources, whole),
        times=_times(sources, whole),
        tokens=Tokens(
            whole.prompt_tokens,
            whole.completion_tokens,
            round(whole.completion_tokens / max(whole.completed, 1), 2),
        ),
        throughput=throughput(timeline),
        latency=_latency(whole),
        attempts={str(number): count for number, count in sorted(whole.attempts.items())},
        failures=tuple(_failures(whole)),
        shards=tuple(shard_rows(sources)),
        engines=tuple(engine_rows(sources)),
        estimate=_compared(sources),
        use=machine_use(sources, whole),
    )


def _counts(sources: ReportSources, whole: Tally) -> RequestCounts:
    plan = sources.plan
    statuses = [status for status in sources.statuses if status is not None]
    if sources.condition.finished and sources.whole is not None:
        statuses = [sources.whole]
    completed = sum(status.counts.completed for status in statuses)
    failed = sum(status.counts.failed for status in statuses)
    return RequestCounts(
        total=plan.requests,
        completed=completed,
        failed=failed,
        left=max(0, plan.requests - completed - failed),
        allowed_failures=plan.options.allowed_failures(plan.requests),
        recorded=whole.results,
        superseded=whole.superseded,
        cut_at_limit=whole.cut,
        truncated_prompts=whole.truncated,
        unfit_answers=whole.unfit,
        empty_answers=dict(whole.empty),
    )


def _times(sources: ReportSources, whole: Tally) -> Times:
    timeline, known = whole.timeline, [details.totals for details in all_details(sources)]
    ended = sources.whole.completed_at if sources.whole is not None else None
    some = bool(whole.results)
    return Times(
        planned=sources.plan.created,
        submitted=sources.condition.submitted,
        first_result=utc_text(timeline.first) if some else None,
        last_result=utc_text(timeline.last) if some else None,
        finished=utc_text(ended) if sources.condition.finished and ended else None,
        span_seconds=round(timeline.last - timeline.first, 3) if some else 0.0,
        job_seconds=round(sum(totals.seconds for totals in known), 1),
        starts=sum(totals.starts for totals in known),
    )


def _latency(whole: Tally) -> Latency:
    told = whole.latency
    return Latency(
        count=told.count,
        mean=round(told.mean, 4),
        lowest=told.lowest if told.count else 0.0,
        highest=told.highest,
        quantiles={f"{share:.0%}"[:-1]: round(told.quantile(share), 4) for share in _QUANTILES},
        histogram=tuple(told.bars(_BARS)),
    )


def _failures(whole: Tally) -> Iterable[Failure]:
    ranked = sorted(whole.failures.items(), key=lambda item: (-item[1].count, item[0]))
    for code, kind in ranked:
        if kind.count:
            told = advice(code)
            yield Failure(code, kind.count, told.meaning, told.remedy, tuple(kind.examples))


def _compared(sources: ReportSources) -> tuple[ComparedFigure, ...]:
    known = [status for status in sources.statuses if status is not None]
    complete = sources.condition.finished and len(known) == len(sources.statuses)
    if sources.estimate is None or sources.whole is None or not complete:
        return ()
    return compare(sources.estimate, known, sources.whole)
