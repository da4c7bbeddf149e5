"""The report as one self-contained HTML page: its tables and texts, and the templates for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aiflux.core.batch.results_file import EMPTY_REASONS, TOOL_CALL
from aiflux.estimates.energy import COUNTED, SAMPLED, kwh_text
from aiflux.estimates.estimate import ComparedFigure
from aiflux.report.data import EngineRow, Report, ShardRow
from aiflux.report.format import (
    FILTERS,
    UNITS,
    duration_text,
    moment_of,
    number,
    percent,
    rate,
    seconds_text,
)
from aiflux.report.journal_summary import MANY_ATTEMPTS
from aiflux.report.methods import methods
from aiflux.util.text import counted

SHOWN_ROWS = 200
_THROUGHPUT_ROWS = 24
_IMAGE_FACTS = ("version", "engine", "python", "os", "base_image", "base_digest", "commit")


@dataclass(frozen=True)
class Share:
    """A cell with a bar as long as a share (0 to 1) of the longest one."""

    share: float
    kind: str = "bar"


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        name: for screen readers.
        heads: "" for a column of bars.
        numbers: indexes of the columns with figures, which are aligned to the right.
        hidden_rows: number of rows that are left out.
    """

    name: str
    heads: Sequence[str]
    rows: Sequence[Sequence[object]]
    numbers: frozenset[int]
    hidden_rows: int = 0


def _table(
    name: str, heads: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int]
) -> Table:
    return Table(name, heads, rows, frozenset(numbers))


def _limited(
    name: str, heads: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int]
) -> Table:
    """Return a table of the first rows, without the columns that are empty in all rows."""
    kept = [at for at in range(len(heads)) if any(row[at] != "" for row in rows)]
    return Table(
        name,
        [heads[at] for at in kept],
        [[row[at] for at in kept] for row in rows[:SHOWN_ROWS]],
        frozenset(new for new, at in enumerate(kept) if at in numbers),
        max(0, len(rows) - SHOWN_ROWS),
    )


def throughput_table(report: Report) -> Table | None:
    """Return results over time, or None if there are none yet."""
    bars = report.throughput.bars
    if not bars:
        return None
    step = -(-len(bars) // _THROUGHPUT_ROWS)
    groups = [bars[at : at + step] for at in range(0, len(bars), step)]
    seconds = [sum(bar.seconds for bar in group) for group in groups]
    results = [sum(bar.results for bar in group) for group in groups]
    fastest = max(count / time for count, time in zip(results, seconds, strict=True))
    rows = [
        (
            moment_of(group[0].start),
            number(count),
            number(sum(bar.failed for bar in group)),
            rate(count / time),
            rate(sum(bar.completion_tokens for bar in group) / time),
            Share(count / time / fastest),
        )
        for group, count, time in zip(groups, results, seconds, strict=True)
    ]
    heads = ("from (UTC)", "results", "failed", "requests/s", "answer tokens/s", "")
    return _table("Throughput", heads, rows, (1, 2, 3, 4))


def latency_table(report: Report) -> Table | None:
    """Return the percentiles of the time per request, or None if there are no answers."""
    latency = report.latency
    if not latency.count:
        return None
    heads = ["fastest", *(f"{name} %" for name in latency.quantiles), "slowest", "mean"]
    figures = [latency.lowest, *latency.quantiles.values(), latency.highest, latency.mean]
    rows = [[seconds_text(figure) for figure in figures]]
    return _table("Time per request", heads, rows, range(len(heads)))


def histogram_table(report: Report) -> Table | None:
    """Return the histogram of the time per request, or None if there are no answers."""
    bars = report.latency.histogram
    most = max((count for _, _, count in bars), default=0)
    rows = [
        (f"{seconds_text(low)} - {seconds_text(high)}", number(count), Share(count / most))
        for low, high, count in bars
        if count
    ]
    return _table("Answers by time", ("time", "answers", ""), rows, (1,)) if rows else None


def attempts_table(report: Report) -> Table | None:
    """Return results by number of attempts, or None if there are none yet."""
    whole = sum(report.attempts.values())
    rows = [
        (
            f"{name}{' or more' if name == str(MANY_ATTEMPTS) else ''}",
            number(count),
            percent(count, whole),
            Share(count / whole),
        )
        for name, count in report.attempts.items()
    ]
    heads = ("attempts", "results", "share", "")
    return _table("Results by number of attempts", heads, rows, (1, 2)) if rows else None


def attempt_notes(report: Report) -> Iterator[tuple[int, str, str]]:
    """Yield the number of remarkable results, what they are, and more words about them."""
    counts = report.counts
    notes = (
        (counts.superseded, "result", "of requests that were tried again; not counted as failed"),
        (counts.unfit_answers, "answer", "did not fit the schema (requested again, or failed)"),
        (
            counts.cut_at_limit,
            "answer",
            "ended at the token limit: raise max_tokens if answers must be complete",
        ),
        (counts.cut_by_filter, "answer", "stopped by a content filter"),
        (
            counts.truncated_prompts,
            "prompt",
            "truncated by the engine: raise --context-length, or shorten them",
        ),
        *(
            (
                counts.empty_answers.get(reason, 0),
                "answer" if reason == TOOL_CALL else "empty answer",
                words,
            )
            for reason, words in EMPTY_REASONS.items()
        ),
    )
    yield from (note for note in notes if note[0])


def shards_table(report: Report) -> Table:
    """Return one row for each shard."""
    heads = (
        "shard", "state", "answered", "failed", "answer tokens", "time", "GPU-hours",
        "median", "tokens/s", "job", "host", "",
    )  # fmt: skip
    longest = max((shard.seconds for shard in report.shards), default=0.0)
    rows = [_shard_row(shard, longest) for shard in report.shards]
    return _limited("Shards", heads, rows, (0, 2, 3, 4, 5, 6, 7, 8))


def _shard_row(shard: ShardRow, longest: float) -> tuple[object, ...]:
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
        Share(shard.seconds / longest, "bar small") if longest else "",
    )


def unfinished_shards(report: Report) -> list[ShardRow]:
    """Return the shards of an unfinished run that ended, for their reasons."""
    if report.condition.finished:
        return []
    return [shard for shard in report.shards if shard.ended][:SHOWN_ROWS]


def engines_table(report: Report) -> Table | None:
    """Return one row for each engine, or None if none has started yet."""
    heads = (
        "shard", "engine", "on", "slots", "results", "failed", "answer tokens", "mean time",
        "in flight",
    )  # fmt: skip
    rows = [_engine_row(engine) for engine in report.engines]
    return _limited("Engines", heads, rows, (0, 1, 3, 4, 5, 6, 7, 8)) if rows else None


def _engine_row(engine: EngineRow) -> tuple[object, ...]:
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


def tuning_table(report: Report) -> Table | None:
    """Return one row for each setting that ``--tune`` tried, or None if there is none."""
    heads = (
        "shard", "model", "slots", "in flight", "requests", "failed", "requests/s",
        "answer tokens/s", "median", "",
    )  # fmt: skip
    rows = [
        (
            row.shard,
            row.tuning.model,
            tried.slots,
            tried.concurrency,
            number(tried.requests),
            number(tried.failed),
            rate(tried.requests_per_second),
            rate(tried.tokens_per_second),
            seconds_text(tried.p50),
            "chosen"
            if row.tuning.chosen == {"slots": tried.slots, "concurrency": tried.concurrency}
            else "",
        )
        for row in report.tunings
        for tried in row.tuning.tried
    ]
    return _limited("Tuning", heads, rows, (0, 2, 3, 4, 5, 6, 7, 8)) if rows else None


def slot_use_text(report: Report) -> str:
    """Return how full the engines' slots were; "" if the slots are unknown."""
    use = report.use
    if use.slot_use is None or use.slots is None:
        return ""
    return (
        f"{use.slot_use:.0%} of {use.slots:g} slots per engine: how full the engines were during "
        "the jobs, not how busy the GPUs were"
    )


def estimate_table(report: Report) -> Table | None:
    """Return estimated and actual figures, or None if there was no estimate."""
    if not report.estimate:
        return None
    rows = [_estimate_row(row) for row in report.estimate]
    heads = ("figure", "actual", "estimated", "95 % interval", "actual figure")
    return _table("Estimate and actual", heads, rows, (1, 2, 3))


def _estimate_row(row: ComparedFigure) -> tuple[object, ...]:
    text, estimated = UNITS[row.unit], row.estimated
    place = ""
    if row.actual is not None:
        place = "within" if estimated.low <= row.actual <= estimated.high else "outside"
    return (
        row.name,
        "unknown" if row.actual is None else text(row.actual),
        text(estimated.value),
        f"{text(estimated.low)} - {text(estimated.high)}",
        place,
    )


def page(report: Report, plots: Mapping[str, Markup], no_plots: str | None = None) -> str:
    """Return the page.

    Args:
        plots: ``throughput`` and ``latency``, where they could be drawn.
        no_plots: why there are none.
    """
    what = report.what
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            plots={"throughput": None, "latency": None, **plots},
            no_plots=no_plots,
            tone=_tone(report),
            cards=list(_cards(report)),
            endpoints=_endpoints(what.input["endpoints"]),
            image_facts=", ".join(_image_facts(what.image or {})),
            options={
                name: value
                for name, value in what.options.items()
                if name not in {*what.parameters, "model", "model_defaults", "samples"}
            },
            throughput=throughput_table(report),
            histogram=histogram_table(report),
            latency=latency_table(report),
            attempts=attempts_table(report),
            notes=list(attempt_notes(report)),
            shards=shards_table(report),
            unfinished=unfinished_shards(report),
            slot_use=slot_use_text(report),
            engines=engines_table(report),
            tuning=tuning_table(report),
            energy=list(energy_facts(report)),
            estimate=estimate_table(report),
            methods=methods(report),
        )
    )


def environment() -> Environment:
    """Return the environment of the pages' templates."""
    made = Environment(
        loader=PackageLoader("aiflux.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(FILTERS)
    made.tests["share"] = lambda cell: isinstance(cell, Share)
    made.globals["style"] = Markup((files("aiflux.report") / "report.css").read_text("utf-8"))  # noqa: S704 - our own file
    return made


def _tone(report: Report) -> str:
    """Return the class of the state's colour: red only where more failed than is allowed."""
    counts, condition = report.counts, report.condition
    if not condition.ended:
        return "busy"
    if not condition.finished or counts.failed > counts.allowed_failures:
        return "bad"
    return "soft" if counts.failed else "good"


def _cards(report: Report) -> Iterator[tuple[str, str]]:
    counts, use, latency = report.counts, report.use, report.latency
    yield number(counts.completed), f"of {counted(counts.total, 'request')} answered"
    yield (
        number(counts.failed),
        f"failed ({percent(counts.failed, counts.completed + counts.failed)})",
    )
    if counts.left_out:
        yield number(counts.left_out), "left out (too long)"
    yield from _token_cards(report)
    yield rate(report.throughput.requests_per_second), "requests/s"
    median = seconds_text(latency.quantiles["50"]) if latency.count else "no answer"
    yield median, "median time per request"
    if use.gpu_hours:
        yield f"{use.gpu_hours:.2f}", "GPU-hours"
    else:
        yield duration_text(report.times.job_seconds), "time of all jobs"


def _token_cards(report: Report) -> Iterator[tuple[str, str]]:
    tokens = report.tokens
    if report.counts.completed and not tokens.prompt and not tokens.completion:
        yield "unknown", "tokens: the engine does not count them"
        return
    yield number(tokens.prompt), "prompt tokens"
    yield number(tokens.completion), "answer tokens"
    yield rate(report.throughput.completion_tokens_per_second), "answer tokens/s"


def energy_facts(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the known figures of the energy, with what they are about."""
    found = report.energy
    if found.gpu_kwh is not None:
        how = {COUNTED: "the driver's counter", SAMPLED: "samples of the power"}
        method = how.get(found.method or "", "the driver's counter, and samples of the power")
        share = f", in {100 * (found.measured_share or 0):.0f} % of the GPU-hours"
        yield "GPUs", f"{kwh_text(found.gpu_kwh)} (measured by {method}{share})"
    if found.slurm_kwh is not None:
        jobs = counted(found.slurm_jobs, "job")
        yield (
            "Slurm",
            f"{kwh_text(found.slurm_kwh)} (whole nodes; kept for {found.slurm_jobs_kept} of "
            f"{jobs})",
        )
    of = {"gpus": "the GPUs' energy", "slurm": "Slurm's figure"}.get(found.source or "", "")
    if found.joules_per_1000_answers is not None:
        yield "Per 1,000 answers", f"{found.joules_per_1000_answers:,.0f} J ({of})"
    if found.co2_grams is not None:
        yield "CO2", f"{found.co2_grams:,.3g} g ({of}, {found.co2_per_kwh:g} g/kWh)"
    if found.billing_units is not None:
        per = found.billing_per_gpu_hour
        yield "Billing", f"{found.billing_units:,.2f} units ({per:g} for a GPU-hour)"


def _endpoints(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return "".join(counts)
    return ", ".join(f"{url} ({counted(count, 'request')})" for url, count in counts.items())


def _image_facts(image: Mapping[str, object]) -> Iterator[str]:
    if "engine_version" in image:
        image = {**image, "engine": f"{image.get('engine')} {image['engine_version']}"}
    for name in _IMAGE_FACTS:
        if image.get(name) not in (None, "", "none", "unknown"):
            yield f"{name.replace('_', ' ')} {image[name]}"
