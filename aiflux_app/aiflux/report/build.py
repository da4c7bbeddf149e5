"""Build the report of a run: its environment, its results and its cost."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from aiflux import __version__
from aiflux.core.batch.prompt_lengths import TOO_LONG
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan
from aiflux.core.runs.status_file import (
    Counts,
    EngineFacts,
    StatusDetails,
    StatusFile,
    allowed_besides,
    whole_seal,
)
from aiflux.engines.kinds import engine_kind
from aiflux.estimates.energy import UNKNOWN_RATES, Rates, SlurmEnergy, energy_figures
from aiflux.estimates.estimate import ComparedFigure, Estimate, compare
from aiflux.estimates.verification import ModelResults, mixed_words
from aiflux.report.data import (
    FORM,
    Condition,
    EngineRow,
    Failure,
    Latency,
    Model,
    Report,
    RequestCounts,
    ShardRow,
    Times,
    Tokens,
    TunedRow,
    Use,
    What,
)
from aiflux.report.journal_summary import EngineTally, Tally, throughput
from aiflux.util.records import to_json
from aiflux.util.text import counted, joined, public_url, without_secrets
from aiflux.util.times import utc_text

_RETRY = "aiflux run ... --retry-failed tries them again"
_LOG = "see the engine's log (aiflux logs --engine; with --engine-url, the log of that server)"


@dataclass(frozen=True)
class ReportSources:
    """The input of a report.

    Attributes:
        statuses: of each shard; None if it has none for this plan.
        whole: the status of the whole run.
        tallies: of each shard's journal.
        now: Unix time.
        rates: of the site.
        slurm_energy: None if Slurm was not asked.
        damaged: number of damaged lines in the journals.
    """

    plan: Plan
    run_dir: str
    condition: Condition
    statuses: tuple[StatusFile | None, ...]
    whole: StatusFile | None
    tallies: tuple[Tally, ...]
    estimate: Estimate | None
    now: float
    rates: Rates = UNKNOWN_RATES
    slurm_energy: SlurmEnergy | None = None
    damaged: int = 0


def all_details(sources: ReportSources) -> list[StatusDetails]:
    """Return the details of all shards that have a status."""
    return [status.details for status in sources.statuses if status is not None]


def _details(status: StatusFile | None) -> StatusDetails:
    return StatusDetails() if status is None else status.details


def shard_rows(sources: ReportSources) -> Iterable[ShardRow]:
    """Yield one row for each shard."""
    reasons = sources.condition.reasons or ("",) * len(sources.plan.shards)
    rows = zip(
        sources.plan.shards,
        sources.condition.shards,
        reasons,
        sources.statuses,
        sources.tallies,
        strict=True,
    )
    for shard, state, reason, status, tally in rows:
        details = _details(status)
        counts = Counts(shard.requests, 0, 0) if status is None else status.counts
        totals, seconds = details.totals, details.totals.seconds
        yield ShardRow(
            index=shard.index,
            state=state,
            host=details.host,
            job=details.slurm.task or None,
            total=shard.requests,
            completed=counts.completed,
            failed=counts.failed - min(details.left_out, counts.failed),
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            seconds=round(seconds, 1),
            gpu_hours=round(totals.gpu_seconds / 3600, 4),
            starts=totals.starts,
            tokens_per_second=round(tally.completion_tokens / seconds, 2) if seconds else 0.0,
            median_seconds=round(tally.latency.quantile(0.5), 3),
            ended=details.ended or reason or None,
        )


def engine_rows(sources: ReportSources) -> Iterable[EngineRow]:
    """Yield one row for each engine of each shard."""
    for shard, status, tally in zip(
        sources.plan.shards, sources.statuses, sources.tallies, strict=True
    ):
        details = _details(status)
        known = {engine.index: engine for engine in details.engines}
        seconds = details.totals.seconds
        for number in sorted({*tally.engines, *known}):
            engine, did = known.get(number), tally.engines.get(number, EngineTally())
            yield EngineRow(
                shard=shard.index,
                engine=number,
                where=_place(engine),
                slots=None if engine is None else engine.slots,
                results=did.results,
                failed=did.failed,
                completion_tokens=did.completion_tokens,
                mean_seconds=round(did.seconds / max(did.results, 1), 3),
                in_flight=round(did.seconds / seconds, 2) if seconds else 0.0,
            )


def _place(engine: EngineFacts | None) -> str:
    if engine is None:
        return ""
    if engine.url is not None:
        return public_url(engine.url)
    on_gpu = engine.devices and engine.gpu_bytes != 0
    nodes = f" of {joined(engine.nodes)}" if engine.nodes else ""
    return (f"GPU {','.join(engine.devices or ())}" if on_gpu else "CPU") + nodes


def machine_use(sources: ReportSources, whole: Tally) -> Use:
    """Return the utilisation of the machines."""
    engine_seconds = slot_seconds = counted = busy = gpu_seconds = 0.0
    for status, tally in zip(sources.statuses, sources.tallies, strict=True):
        details = _details(status)
        engines, seconds = details.engines, details.totals.seconds
        gpu_seconds += details.totals.gpu_seconds
        engine_seconds += seconds * max(1, len(engines))
        for engine in engines:
            if engine.slots:
                room = seconds * engine.slots
                slot_seconds, counted = slot_seconds + room, counted + seconds
                # A result's time includes its wait in the engine, where it used no slot.
                busy += min(tally.engines.get(engine.index, EngineTally()).seconds, room)
    hours = gpu_seconds / 3600
    utilization, memory, samples = _gpu_use(sources)
    return Use(
        gpu_hours=round(hours, 4),
        in_flight=round(whole.seconds / engine_seconds, 2) if engine_seconds else 0.0,
        slots=round(slot_seconds / counted, 2) if counted else None,
        slot_use=round(busy / slot_seconds, 4) if slot_seconds else None,
        gpu_utilization=utilization,
        gpu_memory=memory,
        gpu_samples=samples,
        requests_per_gpu_hour=round(whole.results / hours) if hours else None,
        completion_tokens_per_gpu_hour=round(whole.completion_tokens / hours) if hours else None,
    )


def _gpu_use(
    sources: ReportSources,
) -> tuple[Mapping[str, float] | None, Mapping[str, float] | None, int]:
    """Return the samples of all shards, each weighted by its number."""
    uses = [details.gpu_use for details in all_details(sources) if details.gpu_use.samples]
    samples = sum(use.samples for use in uses)
    if not samples:
        return None, None, 0

    def figures(name: str) -> dict[str, float] | None:
        if any(getattr(use, f"{name}_mean") is None for use in uses):
            return None
        mean = sum(getattr(use, f"{name}_mean") * use.samples for use in uses) / samples
        highest = max(getattr(use, f"{name}_max") for use in uses)
        return {"mean": round(mean, 1), "highest": highest}

    memory = figures("memory_mib") or {}
    memory["whole"] = max(use.memory_mib_total for use in uses)
    return figures("utilization"), memory, samples


_OF_THE_INPUT = ("path", "size", "requests", "digest", "endpoints")


def what_ran(sources: ReportSources, whole: Tally) -> What:
    """Return the setup of the run, from plan, statuses and journals."""
    plan, known = sources.plan, all_details(sources)
    title = engine_kind(plan.options).title
    images = [details.image for details in known if details.image]
    seal = whole_seal(known, whole.results - whole.unsent)
    models = _models(plan, whole, known)
    versions = Counter(_kind(engine, title) for details in known for engine in details.engines)
    return What(
        run_dir=sources.run_dir,
        output=str(plan.output),
        input={name: to_json(plan.input)[name] for name in _OF_THE_INPUT}
        | {"path": str(plan.input.named)},
        plan=plan.id,
        models=tuple(models),
        image_path=sources.condition.image,
        image=images[-1] if images else None,
        engines=dict(versions),
        aiflux=tuple(sorted({details.version or plan.aiflux for details in known})),
        gpus=dict(Counter(name for details in known for name in details.gpus)),
        hosts=tuple(sorted({details.host for details in known if details.host})),
        sealed=seal.sealed,
        unsealed=seal.why,
        parameters=plan.options.parameters,
        options=_options(plan.options),
        slurm={
            name: without_secrets(value)
            for name, value in (sources.condition.slurm or {}).items()
            if value not in (None, {}, [])
        },
        jobs=sources.condition.jobs,
        shards=len(plan.shards),
        mixed=mixed_words(plan, _by_model(plan, whole)),
        earlier=earlier_settings(plan),
    )


def earlier_settings(plan: Plan) -> tuple[dict[str, Any], ...]:
    """Return the settings of earlier starts that the results may be of, without secrets."""
    return tuple(
        {
            **to_json(each),
            "identity": _identity(each.identity),
            "engine_url": None if each.engine_url is None else public_url(each.engine_url),
        }
        for each in plan.earlier
    )


def _identity(identity: Mapping[str, Any]) -> Any:
    """Return what answers depend on, without secrets: options of a command, too."""
    command = identity.get("command")
    words = {} if command is None else {"command": shlex.join(command)}
    return without_secrets({**identity, **words})


def _kind(engine: EngineFacts, title: str) -> str:
    if engine.url is not None:
        return f"server at {public_url(engine.url)}"
    if engine.command is not None:
        version = f" (version {engine.version})" if engine.version else ""
        return f"{without_secrets(engine.command)}{version}"
    return f"{title} {engine.version}" if engine.version else title


def _by_model(plan: Plan, whole: Tally) -> list[ModelResults]:
    """Return the results of each model: first those of the plan, then those of earlier starts."""
    accepts = engine_kind(plan.options).input_rules.accepts_model
    found: dict[str, tuple[int, set[str]]] = {name: (0, set()) for name in plan.models}
    for asked, count in whole.models.items():
        if asked not in plan.adapter_digests:
            name = plan.model_of(asked, accepts) or asked
            results, digests = found.get(name, (0, set()))
            found[name] = (results + count, digests | whole.digests.get(asked, set()))
    return [
        ModelResults(name, results, tuple(sorted(digests)))
        for name, (results, digests) in found.items()
    ]


def _models(plan: Plan, whole: Tally, known: Sequence[StatusDetails]) -> Iterable[Model]:
    for each in _by_model(plan, whole):
        digests = {*each.digests}
        if each.name in plan.models:
            names = {each.name, plan.served(each.name)}
            for details in known:
                digests |= {
                    details.model_digests[one] for one in names & details.model_digests.keys()
                }
        yield Model(each.name, each.results, tuple(sorted(digests)))
    for adapter in plan.adapters:
        title = f"{adapter.name} (LoRA adapter of {plan.served_names[0]})"
        yield Model(title, whole.models[adapter.name], (adapter.digest,))


def _options(options: RunOptions) -> dict[str, Any]:
    usual = RunOptions()
    given = {
        item.name: getattr(options, item.name)
        for item in fields(options)
        if getattr(options, item.name) != getattr(usual, item.name)
    }
    if options.engine_url is not None:
        given["engine_url"] = public_url(options.engine_url)
    for name in {"engine_env", "engine_arg", "engine_command"} & given.keys():
        given[name] = without_secrets(given[name])
    return given


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
    TOO_LONG: Advice(
        "the prompt, or the prompt and its answer, is longer than the context",
        "set a smaller max_tokens or a longer context (--context-length, or the server's), or "
        f"send them in parts (--too-long chunk); {_RETRY}",
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
    timeline, counts = whole.timeline, _counts(sources, whole)
    energy = energy_figures(
        all_details(sources), counts.completed, sources.rates, sources.slurm_energy
    )
    return Report(
        form=FORM,
        written=utc_text(sources.now),
        version=__version__,
        condition=sources.condition,
        what=what_ran(sources, whole),
        counts=counts,
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
        tunings=tuple(
            TunedRow(shard.index, each)
            for shard, status in zip(sources.plan.shards, sources.statuses, strict=True)
            for each in _details(status).tunings
        ),
        estimate=_compared(sources),
        use=machine_use(sources, whole),
        energy=energy,
        warnings=tuple(_warnings(sources)),
    )


def _warnings(sources: ReportSources) -> Iterable[str]:
    """Yield why the figures are not of all results that the statuses count."""
    if not sources.condition.ended:
        return  # a worker may write a result at the moment
    lost = 0
    for status, found in zip(sources.statuses, sources.tallies, strict=True):
        counts = Counts(0, 0, 0) if status is None else status.counts
        done = found.completed + found.failed + found.left_out
        lost += max(0, counts.completed + counts.failed - done)
    if lost:
        yield (
            f"{counted(lost, 'result')} that the run counted {'is' if lost == 1 else 'are'} not in "
            "the journals: models, tokens, times and failures are those of the others"
        )
    if sources.damaged:
        yield f"the journals have {counted(sources.damaged, 'damaged line')} that cannot count"


def _counts(sources: ReportSources, whole: Tally) -> RequestCounts:
    plan = sources.plan
    statuses = [status for status in sources.statuses if status is not None]
    if sources.condition.finished and sources.whole is not None:
        statuses = [sources.whole]
    completed = sum(status.counts.completed for status in statuses)
    without_answer = sum(status.counts.failed for status in statuses)
    left_out = min(sum(status.details.left_out for status in statuses), without_answer)
    return RequestCounts(
        total=plan.requests,
        completed=completed,
        failed=without_answer - left_out,
        left_out=left_out,
        left=max(0, plan.requests - completed - without_answer),
        allowed_failures=allowed_besides(plan, all_details(sources), left_out),
        recorded=whole.results,
        superseded=whole.superseded,
        cut_at_limit=whole.cut,
        cut_by_filter=whole.filtered,
        truncated_prompts=whole.truncated,
        unfit_answers=whole.unfit,
        empty_answers=dict(whole.empty),
    )


def _times(sources: ReportSources, whole: Tally) -> Times:
    timeline, known = whole.timeline, [details.totals for details in all_details(sources)]
    ended = sources.whole.finished_at if sources.whole is not None else None
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
