"""The report's account of shards, engines and GPUs: what each did, and how busy it was. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from aiflux.report.data import EngineRow, ShardRow, Use
from aiflux.report.journal_summary import EngineTally, Tally
from aiflux.report.sources import (
    ReportSources,
    all_details,
    details_of,
    engines_of,
    mapping,
    totals_of,
)
from aiflux.util.text import public_url


def shard_rows(sources: ReportSources) -> Iterable[ShardRow]:
    """Yield what each shard did."""
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
        details = details_of(status)
        totals, counts = totals_of(details), mapping((status or {}).get("request_counts"))
        seconds = float(totals.get("seconds", 0))
        slurm = mapping(details.get("slurm"))
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
            ended=details.get("ended") or reason or None,
        )


def engine_rows(sources: ReportSources) -> Iterable[EngineRow]:
    """Yield what each engine of each shard did."""
    for shard, status, tally in zip(
        sources.plan.shards, sources.statuses, sources.tallies, strict=True
    ):
        details = details_of(status)
        known = {int(engine.get("index", 0)): engine for engine in engines_of(details)}
        seconds = float(totals_of(details).get("seconds", 0))
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
        return public_url(str(engine["url"]))
    devices = ",".join(str(each) for each in engine.get("devices") or ())
    if not engine:
        return ""
    on_gpu = devices and engine.get("gpu_bytes", 1)
    return f"GPU {devices}" if on_gpu else "CPU"


def machine_use(sources: ReportSources, whole: Tally) -> Use:
    """Return how the machines were used."""
    engine_seconds = slot_seconds = counted = busy = gpu_seconds = 0.0
    for status, tally in zip(sources.statuses, sources.tallies, strict=True):
        details = details_of(status)
        totals, engines = totals_of(details), engines_of(details)
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
    sources: ReportSources,
) -> tuple[Mapping[str, float] | None, Mapping[str, float] | None, int]:
    """Average what the shards' samples say, each by their number."""
    told = [mapping(details.get("gpu_use")) for details in all_details(sources)]
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
