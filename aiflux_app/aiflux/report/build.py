"""Build the report of a run: its setup, its results and its cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from aiflux import __version__
from aiflux.estimates.estimate import ComparedFigure, compare
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

_RETRY = "aiflux run ... --retry-failed tries them again"
_LOG = "see the engine's log (aiflux logs --engine; with --engine-url, the log of that server)"


@dataclass(frozen=True)
class Advice:
    """The meaning of an error code, and its remedy."""

    meaning: str
    remedy: str


_KNOWN = {
    "http_400": Advice(
        "the engine refused the request as malformed",
        "read the message, correct these requests in the input and run the same command again: "
        "only the lines that changed are sent",
    ),
    "http_401": Advice("the engine requires a key", f"set AIFLUX_API_KEY; {_RETRY}"),
    "http_403": Advice(
        "the engine forbids the request", f"check the permissions of the key; {_RETRY}"
    ),
    "http_404": Advice(
        "the engine does not know the model or the address",
        "check the model name and the endpoint in the requests",
    ),
    "http_408": Advice(
        "the engine or a proxy timed out repeatedly",
        f"lower --concurrency; {_RETRY}",
    ),
    "http_413": Advice("the request is too large", "shorten the prompt, or split it into chunks"),
    "http_422": Advice(
        "the engine understood the request and refused it",
        "read the message and correct these requests in the input",
    ),
    "http_425": Advice("the engine repeatedly asked to try later", _RETRY),
    "http_501": Advice(
        "the engine does not support the request",
        "check the endpoint and the fields of these requests",
    ),
    "http_429": Advice(
        "the engine repeatedly received too many requests at once",
        f"lower --concurrency or raise --max-retries; {_RETRY}",
    ),
    "timeout": Advice(
        "no complete answer arrived in time",
        "set max_tokens, raise --request-timeout, or lower --concurrency",
    ),
    "connection": Advice(
        "the connection to the engine broke repeatedly",
        f"{_LOG}; {_RETRY}",
    ),
    "engine_crashed": Advice(
        "the engine crashed each time it had this request",
        f"{_LOG}; a frequent cause is memory: use a smaller --context-length or fewer "
        "--slots, or check the request (an image, a very long prompt)",
    ),
    "empty_answer": Advice(
        "the engine repeatedly gave an empty answer",
        f"check the prompt and the stop words; {_RETRY}",
    ),
    "not_json": Advice(
        "the answer is not in the form of the OpenAI API",
        "check --engine-url, and any proxy in between",
    ),
    "internal_error": Advice(
        "a bug in AI-Flux stopped the request",
        f"report the trace in the log (aiflux logs); after an update, {_RETRY}",
    ),
    "memory": Advice(
        "memory was repeatedly too small for the answer",
        f"lower --concurrency, or allow more memory; {_RETRY}",
    ),
    "error_in_answer": Advice(
        "the engine reported a failure", f"read the message and the engine's log; {_RETRY}"
    ),
}
_SERVER = Advice("the engine failed repeatedly", f"{_LOG}; {_RETRY}")
_REFUSED = Advice("the engine refused the request", "read the message and correct the requests")
_SCHEMA = Advice(
    "the answer did not fit the schema of the request",
    "raise max_tokens, --revalidate-attempts or the model's size, or simplify the schema",
)
_OTHER = Advice("the request failed", f"read the message; {_RETRY}")


def advice(code: str) -> Advice:
    """Return the meaning and the remedy of an error code; unknown codes have a general one."""
    if code in _KNOWN:
        return _KNOWN[code]
    if code.startswith("http_5"):
        return _SERVER
    if code.startswith("http_"):
        return _REFUSED
    return _SCHEMA if "schema" in code or "unfit" in code else _OTHER


_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_BARS = 40


def make_report(sources: ReportSources) -> Report:
    """Return the report of a run."""
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
    latency = whole.latency
    return Latency(
        count=latency.count,
        mean=round(latency.mean, 4),
        lowest=latency.lowest if latency.count else 0.0,
        highest=latency.highest,
        quantiles={f"{share:.0%}"[:-1]: round(latency.quantile(share), 4) for share in _QUANTILES},
        histogram=tuple(latency.bars(_BARS)),
    )


def _failures(whole: Tally) -> Iterable[Failure]:
    ranked = sorted(whole.failures.items(), key=lambda item: (-item[1].count, item[0]))
    for code, kind in ranked:
        if kind.count:
            known = advice(code)
            yield Failure(code, kind.count, known.meaning, known.remedy, tuple(kind.examples))


def _compared(sources: ReportSources) -> tuple[ComparedFigure, ...]:
    known = [status for status in sources.statuses if status is not None]
    complete = sources.condition.finished and len(known) == len(sources.statuses)
    if sources.estimate is None or sources.whole is None or not complete:
        return ()
    return compare(sources.estimate, known, sources.whole)
