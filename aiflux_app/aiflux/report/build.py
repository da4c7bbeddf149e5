"""Making the report of a run: what ran, what came of it, what it took. Pure."""

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
_LOG = "see the engine's log (aiflux logs --engine, of one at --engine-url its own)"


@dataclass(frozen=True)
class Advice:
    """What a code means, and what to do."""

    meaning: str
    remedy: str


_KNOWN = {
    "http_400": Advice(
        "the engine refused the request as malformed",
        "read the message, correct these requests in the input and run the same command again: "
        "only the lines that changed are sent",
    ),
    "http_401": Advice("the engine asks for a key", f"set AIFLUX_API_KEY; {_RETRY}"),
    "http_403": Advice("the engine forbids the request", f"look at the key's rights; {_RETRY}"),
    "http_404": Advice(
        "the engine does not know the model or the address",
        "look at the model's name in the requests and at the endpoint",
    ),
    "http_408": Advice(
        "the engine, or what stands before it, gave up waiting, again and again",
        f"lower --concurrency; {_RETRY}",
    ),
    "http_413": Advice("the request is too large", "shorten the prompt, or cut it into chunks"),
    "http_422": Advice(
        "the engine understood the request and refused it",
        "read the message and correct these requests in the input",
    ),
    "http_425": Advice("the engine asked to try later, again and again", _RETRY),
    "http_501": Advice(
        "the engine cannot do what the request asks for",
        "look at the endpoint and at the fields of these requests",
    ),
    "http_429": Advice(
        "the engine was asked for too much at once, again and again",
        f"lower --concurrency or raise --max-retries; {_RETRY}",
    ),
    "timeout": Advice(
        "no whole answer came in time",
        "set max_tokens, raise --request-timeout, or lower --concurrency",
    ),
    "connection": Advice(
        "the connection to the engine broke, again and again",
        f"{_LOG}; {_RETRY}",
    ),
    "engine_crashed": Advice(
        "the engine died each time it had this request",
        f"{_LOG}; often memory: a smaller --context-length or fewer --slots, or the "
        "request itself (an image, a very long prompt)",
    ),
    "empty_answer": Advice(
        "the engine answered with nothing, again and again",
        f"look at the prompt and at stop words; {_RETRY}",
    ),
    "not_json": Advice(
        "what came back was no answer of an OpenAI API",
        "look at --engine-url, and at what stands between here and the engine",
    ),
    "internal_error": Advice(
        "a bug in AI-Flux stopped the request",
        f"report the trace in the log (aiflux logs); after an update, {_RETRY}",
    ),
    "memory": Advice(
        "there was not enough memory for the answer, again and again",
        f"lower --concurrency, or allow more memory; {_RETRY}",
    ),
    "error_in_answer": Advice(
        "the engine said that it failed", f"read the message and the engine's log; {_RETRY}"
    ),
}
_SERVER = Advice("the engine failed, again and again", f"{_LOG}; {_RETRY}")
_REFUSED = Advice("the engine refused the request", "read the message and correct the requests")
_SCHEMA = Advice(
    "the answer did not fit the schema that the request asks for",
    "raise max_tokens, --revalidate-attempts or the model's size, or simplify the schema",
)
_OTHER = Advice("the request failed", f"read the message; {_RETRY}")


def advice(code: str) -> Advice:
    """Return what a failure's code means and what to do; something general of unknown codes."""
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
