"""The report's sections of the machines: shards, engines and GPUs, estimate and actual. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aiflux.estimates.compare import ComparedFigure
from aiflux.report.data import EngineRow, Report, ShardRow
from aiflux.report.html.format import (
    UNITS,
    duration_text,
    number,
    rate,
    seconds_text,
    share_bar,
)
from aiflux.report.html.markup import Markup, element, facts, joined, table

SHOWN_ROWS = 200


def shards_section(report: Report) -> Markup:
    """Return the table of shards, and why those ended that did not finish."""
    heads = (
        "shard", "state", "answered", "failed", "answer tokens", "time", "GPU-hours",
        "median", "tokens/s", "job", "host",
    )  # fmt: skip
    longest = max((shard.seconds for shard in report.shards), default=0.0)
    rows = [_shard(shard, longest) for shard in report.shards]
    made = _limited("Shards", (*heads, ""), rows, (0, 2, 3, 4, 5, 6, 7, 8))
    ended = [
        element("li", f"shard {shard.index}: {shard.ended}")
        for shard in report.shards
        if shard.ended and not report.condition.finished
    ]
    return joined([made, element("ul", *ended[:SHOWN_ROWS])] if ended else [made])


def _shard(shard: ShardRow, longest: float) -> tuple[object, ...]:
    return (
        shard.index,
        shard.state,
        f"{number(shard.completed)} of {number(shard.total)}",
        number(shard.failed),
        number(shard.completion_tokens),
        duration_text(shard.seconds),
        f"{shard.gpu_hours:.2f}" if shard.gpu_hours else "",
        seconds_text(shard.median_seconds) if shard.median_seconds else "",
        rate(shard.tokens_per_second),
        shard.job or "",
        shard.host or "",
        share_bar(shard.seconds / longest, "bar small") if longest else "",
    )


def _limited(
    name: str, heads: Sequence[str], rows: Sequence[Sequence[object]], numbers: Iterable[int]
) -> Markup:
    """Return a table of the first rows; columns that are empty throughout are left out."""
    right = set(numbers)
    kept = [at for at in range(len(heads)) if any(row[at] != "" for row in rows)]
    made = table(
        name,
        [heads[at] for at in kept],
        [[row[at] for at in kept] for row in rows[:SHOWN_ROWS]],
        [new for new, at in enumerate(kept) if at in right],
    )
    if len(rows) <= SHOWN_ROWS:
        return made
    rest = f"{number(len(rows) - SHOWN_ROWS)} more: aiflux report --json shows them all"
    return joined([made, element("p", rest, class_="soft")])


def engines_section(report: Report) -> Markup:
    """Return how the machines were used, and the table of engines."""
    heads = (
        "shard", "engine", "on", "slots", "results", "failed", "answer tokens", "mean time",
        "in flight",
    )  # fmt: skip
    rows = [_engine(engine) for engine in report.engines]
    made = [_limited("Engines", heads, rows, (0, 1, 3, 4, 5, 6, 7, 8))] if rows else []
    return joined([facts(_use(report)), *made])


def _engine(engine: EngineRow) -> tuple[object, ...]:
    return (
        engine.shard,
        engine.engine,
        engine.where,
        "" if engine.slots is None else engine.slots,
        number(engine.results),
        number(engine.failed),
        number(engine.completion_tokens),
        seconds_text(engine.mean_seconds),
        f"{engine.in_flight:.1f}",
    )


def _use(report: Report) -> Iterable[tuple[str, str]]:
    use = report.use
    if use.gpu_hours:
        yield "GPU-hours", f"{use.gpu_hours:.2f} (GPUs of the jobs times their time)"
    if use.requests_per_gpu_hour is not None:
        tokens = use.completion_tokens_per_gpu_hour or 0
        yield (
            "Per GPU-hour",
            f"{number(use.requests_per_gpu_hour)} requests, {number(tokens)} answer tokens",
        )
    if not report.engines:
        yield "Engines", "none has started yet"
        return
    yield (
        "In flight",
        f"{use.in_flight:.1f} requests per engine, averaged over the jobs' time with loading",
    )
    if use.slot_use is not None and use.slots is not None:
        yield (
            "Slot use",
            f"{use.slot_use:.0%} of {use.slots:g} slots per engine: time of the results over slots "
            "times the jobs' time. It tells how full the engines were kept, not how busy the GPUs "
            "were; above 100 % requests waited in the engines",
        )
    if use.gpu_utilization is not None and use.gpu_memory is not None:
        yield (
            "GPU utilisation",
            f"{use.gpu_utilization['mean']:.0f} % on average, {use.gpu_utilization['highest']:.0f} "
            f"% at most (nvidia-smi, {number(use.gpu_samples)} samples)",
        )
        gib = {name: value / 1024 for name, value in use.gpu_memory.items()}
        yield (
            "GPU memory",
            f"{gib['mean']:.1f} GiB of {gib['whole']:.1f} on average, {gib['highest']:.1f} at most",
        )
    elif use.gpu_hours:
        yield "GPU utilisation", "not known: there are no samples of nvidia-smi"


def estimate_section(report: Report) -> Markup:
    """Return what was estimated beside what came; nothing where there was no estimate."""
    if not report.estimate:
        return Markup("")
    rows = [_estimated(row) for row in report.estimate]
    heads = ("figure", "actual", "estimated", "95 % between", "")
    caption = element("p", "What `aiflux estimate` told of the run before it.", class_="soft")
    return joined([table("Estimate and actual", heads, rows, (1, 2, 3)), caption])


def _estimated(row: ComparedFigure) -> tuple[object, ...]:
    shown = UNITS[row.unit]
    told = row.estimated
    within = row.actual is None or told.low <= row.actual <= told.high
    return (
        row.name,
        "unknown" if row.actual is None else shown(row.actual),
        shown(told.value),
        f"{shown(told.low)} - {shown(told.high)}",
        "" if within else element("span", "outside", class_="bad"),
    )
