"""The report of a run: what ran, what came of it, what it took. Pure, and JSON at its edge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from aiflux import __version__
from aiflux.core.advice import advice
from aiflux.core.clock import utc_text
from aiflux.core.compare import Row, compare
from aiflux.core.estimate import Estimate
from aiflux.core.options import RunOptions
from aiflux.core.plan import Plan
from aiflux.core.report_flow import Throughput, throughput
from aiflux.core.tally import EngineTally, Example, Tally

FORM = 1
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_BARS = 40
_SECRET = re.compile(r"key|token|secret|passw", re.IGNORECASE)
_HIDDEN = "(not shown)"


@dataclass(frozen=True)
class Condition:
    """How the run is, in the words of ``aiflux status``.

    Attributes:
        state: e.g. ``running``, ``stopped``, ``finished``.
        ended: nothing works on it, and nothing will without a user.
        finished: the output is written.
        next_command: what brings it to its end; None where nothing is to do.
        shards: the state of each shard.
    """

    state: str
    ended: bool
    finished: bool
    next_command: str | None
    shards: tuple[str, ...]
    submitted: str | None = None
    jobs: tuple[str, ...] = ()
    image: str | None = None
    slurm: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Sources:
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


@dataclass(frozen=True)
class Model:
    """A model of the run, and the digests that its engines gave it (more than one: it changed)."""

    name: str
    results: int
    digests: tuple[str, ...]


@dataclass(frozen=True)
class What:
    """What ran.

    Attributes:
        image: what is inside (``aiflux image info``); None outside an image.
        engines: kind and version of the engines, and how many there are of each.
        gpus, hosts: how many of each (GPUs as the last start of each shard saw them).
        options: those that differ from their defaults.
        slurm: what was asked of Slurm.
        sealed: None where no worker has said so yet.
    """

    run_dir: str
    output: str
    input: Mapping[str, Any]
    plan: str
    models: tuple[Model, ...]
    image_path: str | None
    image: Mapping[str, Any] | None
    engines: Mapping[str, int]
    aiflux: tuple[str, ...]
    gpus: Mapping[str, int]
    hosts: tuple[str, ...]
    sealed: bool | None
    parameters: Mapping[str, Any]
    options: Mapping[str, Any]
    slurm: Mapping[str, Any]
    jobs: tuple[str, ...]
    shards: int


@dataclass(frozen=True)
class Counts:
    """Requests. ``recorded`` counts every result, ``superseded`` those that were tried again."""

    total: int
    completed: int
    failed: int
    left: int
    allowed_failures: int
    recorded: int
    superseded: int
    cut_at_limit: int
    truncated_prompts: int
    unfit_answers: int


@dataclass(frozen=True)
class Times:
    """Moments (UTC), and seconds.

    Attributes:
        span_seconds: from the first to the last result.
        job_seconds: of all jobs together, loading included.
        starts: of workers, all shards together.
    """

    planned: str
    submitted: str | None
    first_result: str | None
    last_result: str | None
    finished: str | None
    span_seconds: float
    job_seconds: float
    starts: int


@dataclass(frozen=True)
class Tokens:
    """Tokens of the recorded results, as the engines counted them."""

    prompt: int
    completion: int
    per_answer: float


@dataclass(frozen=True)
class Latency:
    """Seconds of the attempts that answers came of; ``quantiles`` by percent, right to 1 %."""

    count: int
    mean: float
    lowest: float
    highest: float
    quantiles: Mapping[str, float]
    histogram: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class Failure:
    """One kind of failure."""

    code: str
    count: int
    meaning: str
    remedy: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class ShardRow:
    """One shard."""

    index: int
    state: str
    host: str | None
    job: str | None
    total: int
    completed: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    gpu_hours: float
    starts: int
    tokens_per_second: float
    median_seconds: float
    ended: str | None


@dataclass(frozen=True)
class EngineRow:
    """One engine of one shard; ``in_flight`` is the average over the jobs' whole time."""

    shard: int
    engine: int
    where: str
    slots: int | None
    results: int
    failed: int
    completion_tokens: int
    mean_seconds: float
    in_flight: float


@dataclass(frozen=True)
class Use:
    """How the machines were used.

    Attributes:
        in_flight: requests in flight in an engine, averaged over the jobs' whole time.
        slots: per engine, on average; None where the engines do not tell.
        slot_use: busy time over slots times time; above 1 requests waited in the engines.
        gpu_utilization: mean and highest percent that nvidia-smi told; None without samples.
        gpu_memory: mean, highest and whole MiB of a GPU.
        gpu_samples: how many samples these come from.
    """

    gpu_hours: float
    in_flight: float
    slots: float | None
    slot_use: float | None
    gpu_utilization: Mapping[str, float] | None
    gpu_memory: Mapping[str, float] | None
    gpu_samples: int
    requests_per_gpu_hour: int | None
    completion_tokens_per_gpu_hour: int | None


@dataclass(frozen=True)
class Report:
    """Everything the page shows; ``to_json`` is what ``--json`` prints."""

    form: int
    written: str
    version: str
    condition: Condition
    what: What
    counts: Counts
    times: Times
    tokens: Tokens
    throughput: Throughput
    latency: Latency
    attempts: Mapping[str, int]
    failures: tuple[Failure, ...]
    shards: tuple[ShardRow, ...]
    engines: tuple[EngineRow, ...]
    estimate: tuple[Row, ...]
    use: Use

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return asdict(self)


def make_report(sources: Sources) -> Report:
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
        what=_what(sources, whole),
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
        shards=tuple(_shard_rows(sources)),
        engines=tuple(_engine_rows(sources)),
        estimate=_compared(sources),
        use=_use(sources, whole),
    )


def _details(status: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return _mapping((status or {}).get("aiflux"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _all_details(sources: Sources) -> list[Mapping[str, Any]]:
    return [_details(status) for status in sources.statuses if status is not None]


def _totals(details: Mapping[str, Any]) -> Mapping[str, Any]:
    return _mapping(details.get("totals"))


def _engines(details: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [_mapping(engine) for engine in details.get("engines") or ()]


def _what(sources: Sources, whole: Tally) -> What:
    plan, known = sources.plan, _all_details(sources)
    images = [details["image"] for details in known if details.get("image")]
    sealed = [bool(details["sealed"]) for details in known if "sealed" in details]
    versions = Counter(_kind(engine) for details in known for engine in _engines(details))
    return What(
        run_dir=sources.run_dir,
        output=str(plan.output),
        input={name: plan.input.get(name) for name in ("path", "size", "requests", "digest")},
        plan=plan.id,
        models=tuple(_models(plan, whole, known)),
        image_path=sources.condition.image,
        image=images[-1] if images else None,
        engines=dict(versions),
        aiflux=tuple(sorted({str(details.get("version", plan.aiflux)) for details in known})),
        gpus=dict(Counter(name for details in known for name in details.get("gpus") or ())),
        hosts=tuple(sorted({str(details["host"]) for details in known if details.get("host")})),
        sealed=all(sealed) if sealed else None,
        parameters=plan.options.parameters,
        options=_options(plan.options),
        slurm={k: v for k, v in (sources.condition.slurm or {}).items() if v not in (None, {}, [])},
        jobs=sources.condition.jobs,
        shards=len(plan.shards),
    )


def _kind(engine: Mapping[str, Any]) -> str:
    if "url" in engine:
        return f"server at {without_password(str(engine['url']))}"
    return f"Ollama {engine['version']}" if engine.get("version") else "Ollama"


def without_password(url: str) -> str:
    """Return an address without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _models(plan: Plan, whole: Tally, known: Sequence[Mapping[str, Any]]) -> Iterable[Model]:
    for name in plan.models:
        names = {name, plan.served(name)}
        digests = {digest for each in names for digest in whole.digests.get(each, ())}
        for details in known:
            told = _mapping(details.get("model_digests"))
            digests |= {str(told[each]) for each in names if told.get(each)}
        results = sum(whole.models[each] for each in names)
        only = whole.results if len(plan.models) == 1 else results
        yield Model(name, only, tuple(sorted(digests)))


def _options(options: RunOptions) -> dict[str, Any]:
    usual = RunOptions()
    given = {
        item.name: getattr(options, item.name)
        for item in fields(options)
        if getattr(options, item.name) != getattr(usual, item.name)
    }
    if options.engine_url is not None:
        given["engine_url"] = without_password(options.engine_url)
    if "engine_env" in given:
        environment = given["engine_env"]
        given["engine_env"] = {
            name: _HIDDEN if _SECRET.search(name) else value for name, value in environment.items()
        }
    return given


def _counts(sources: Sources, whole: Tally) -> Counts:
    plan = sources.plan
    told = [status for status in sources.statuses if status is not None]
    if sources.condition.finished and sources.whole is not None:
        told = [sources.whole]
    completed, failed = (
        sum(int(status["request_counts"][name]) for status in told)
        for name in ("completed", "failed")
    )
    return Counts(
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
    )


def _times(sources: Sources, whole: Tally) -> Times:
    timeline, known = whole.timeline, [_totals(details) for details in _all_details(sources)]
    ended = sources.whole.get("completed_at") if sources.whole is not None else None
    some = bool(whole.results)
    return Times(
        planned=sources.plan.created,
        submitted=sources.condition.submitted,
        first_result=utc_text(timeline.first) if some else None,
        last_result=utc_text(timeline.last) if some else None,
        finished=utc_text(ended) if sources.condition.finished and ended else None,
        span_seconds=round(timeline.last - timeline.first, 3) if some else 0.0,
        job_seconds=round(sum(float(totals.get("seconds", 0)) for totals in known), 1),
        starts=sum(int(totals.get("starts", 0)) for totals in known),
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


def _shard_rows(sources: Sources) -> Iterable[ShardRow]:
    rows = zip(
        sources.plan.shards,
        sources.condition.shards,
        sources.statuses,
        sources.tallies,
        strict=True,
    )
    for shard, state, status, tally in rows:
        details = _details(status)
        totals, counts = _totals(details), _mapping((status or {}).get("request_counts"))
        seconds = float(totals.get("seconds", 0))
        slurm = _mapping(details.get("slurm"))
        yield ShardRow(
            index=shard.index,
            state=state,
            host=details.get("host"),
            job=slurm.get("SLURM_JOB_ID"),
            total=shard.requests,
            completed=int(counts.get("completed", 0)),
            failed=int(counts.get("failed", 0)),
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            seconds=round(seconds, 1),
            gpu_hours=round(float(totals.get("gpu_seconds", 0)) / 3600, 4),
            starts=int(totals.get("starts", 0)),
            tokens_per_second=round(tally.completion_tokens / seconds, 2) if seconds else 0.0,
            median_seconds=round(tally.latency.quantile(0.5), 3),
            ended=details.get("ended"),
        )


def _engine_rows(sources: Sources) -> Iterable[EngineRow]:
    for shard, status, tally in zip(
        sources.plan.shards, sources.statuses, sources.tallies, strict=True
    ):
        details = _details(status)
        known = {int(engine.get("index", 0)): engine for engine in _engines(details)}
        seconds = float(_totals(details).get("seconds", 0))
        for number in sorted({*tally.engines, *known}):
            engine, did = known.get(number, {}), tally.engines.get(number, EngineTally())
            yield EngineRow(
                shard=shard.index,
                engine=number,
                where=_place(engine),
                slots=engine.get("slots"),
                results=did.results,
                failed=did.failed,
                completion_tokens=did.completion_tokens,
                mean_seconds=round(did.seconds / max(did.results, 1), 3),
                in_flight=round(did.seconds / seconds, 2) if seconds else 0.0,
            )


def _place(engine: Mapping[str, Any]) -> str:
    if "url" in engine:
        return without_password(str(engine["url"]))
    devices = ",".join(str(each) for each in engine.get("devices") or ())
    if not engine:
        return ""
    on_gpu = devices and engine.get("gpu_bytes", 1)
    return f"GPU {devices}" if on_gpu else "CPU"


def _compared(sources: Sources) -> tuple[Row, ...]:
    known = [status for status in sources.statuses if status is not None]
    complete = sources.condition.finished and len(known) == len(sources.statuses)
    if sources.estimate is None or sources.whole is None or not complete:
        return ()
    return compare(sources.estimate, known, sources.whole)


def _use(sources: Sources, whole: Tally) -> Use:
    engine_seconds = slot_seconds = counted = busy = gpu_seconds = 0.0
    for status, tally in zip(sources.statuses, sources.tallies, strict=True):
        details = _details(status)
        totals, engines = _totals(details), _engines(details)
        seconds = float(totals.get("seconds", 0))
        gpu_seconds += float(totals.get("gpu_seconds", 0))
        engine_seconds += seconds * max(1, len(engines))
        slots = [int(engine["slots"]) for engine in engines if engine.get("slots")]
        if slots:
            slot_seconds += seconds * sum(slots)
            counted += seconds * len(slots)
            busy += tally.seconds
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
    sources: Sources,
) -> tuple[Mapping[str, float] | None, Mapping[str, float] | None, int]:
    """Average what the shards' samples say, each by their number."""
    told = [_mapping(details.get("gpu_use")) for details in _all_details(sources)]
    told = [use for use in told if use.get("samples")]
    samples = sum(int(use["samples"]) for use in told)
    if not samples:
        return None, None, 0

    def figures(name: str) -> dict[str, float]:
        mean = sum(use[f"{name}_mean"] * use["samples"] for use in told) / samples
        return {"mean": round(mean, 1), "highest": max(use[f"{name}_max"] for use in told)}

    memory = figures("memory_mib")
    memory["whole"] = max(use["memory_mib_total"] for use in told)
    return figures("utilization"), memory, samples
