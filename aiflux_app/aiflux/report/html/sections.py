"""The sections of the report page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aiflux.core.batch.results_file import EMPTY_REASONS
from aiflux.estimates.estimate import ComparedFigure
from aiflux.report.data import EngineRow, Failure, Model, Report, ShardRow
from aiflux.report.html.format import (
    UNITS,
    cut_text,
    duration_text,
    moment_of,
    moment_text,
    number,
    percent,
    rate,
    seconds_text,
    sentence,
    share_bar,
)
from aiflux.report.html.markup import Markup, element, facts, joined, table
from aiflux.report.journal_summary import EXAMPLES, MANY_ATTEMPTS
from aiflux.report.throughput import Throughput
from aiflux.util.text import counted, size_text


def what_section(report: Report) -> Markup:
    """Return what ran, as names and values."""
    what, times = report.what, report.times
    image = what.image or {}
    pairs: list[tuple[str, object]] = [
        ("Input", joined([element("code", what.input["path"]), _input(what.input)])),
        ("Endpoints", _endpoints(what.input.get("endpoints") or {})),
        ("Model" if len(what.models) == 1 else "Models", _lines(_model(m) for m in what.models)),
        ("Engine", _counted(what.engines)),
        ("GPUs", _counted(what.gpus)),
        ("Image", element("code", what.image_path) if what.image_path else ""),
        ("In the image", ", ".join(_image_facts(image))),
        ("Sealed", {True: "yes: no network in the container", False: "no", None: ""}[what.sealed]),
        ("AI-Flux", ", ".join(what.aiflux)),
        ("Parameters", _settings(what.parameters) or "those of each request"),
        ("Else, as advised", _lines(_advised(what.advised))),
        ("Options", _settings(_without(what.options, what.parameters))),
        ("Slurm", _settings(what.slurm)),
        ("Jobs", ", ".join(what.jobs)),
        ("Hosts", ", ".join(what.hosts)),
        ("Planned", moment_text(times.planned)),
        ("Submitted", moment_text(times.submitted)),
        ("First result", moment_text(times.first_result)),
        ("Last result", moment_text(times.last_result)),
        ("Output written", moment_text(times.finished)),
        ("Time of all jobs", _job_time(report)),
    ]
    return facts(pairs)


def _input(told: Mapping[str, Any]) -> str:
    size = size_text(float(told.get("size") or 0))
    return f" ({counted(int(told['requests']), 'request')}, {size}, digest {told['digest']})"


def _endpoints(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return "".join(counts)
    return ", ".join(f"{url} ({counted(count, 'request')})" for url, count in counts.items())


def _advised(advised: Mapping[str, Mapping[str, Any]]) -> Iterable[Markup]:
    for model, values in advised.items():
        yield joined([f"{model}: ", _settings(values)])


def _job_time(report: Report) -> str:
    times = report.times
    if not times.job_seconds:
        return ""
    starts = f" in {number(times.starts)} starts" if times.starts > 1 else ""
    return f"{duration_text(times.job_seconds)}{starts}"


def _model(model: Model) -> Markup:
    parts: list[object] = [element("strong", model.name)]
    if model.results:
        parts.append(f" ({counted(model.results, 'result')})")
    for digest in model.digests:
        parts += [element("br"), element("code", digest)]
    if len(model.digests) > 1:
        parts += [element("br"), "The model changed during the run: results come of both."]
    return joined(parts)


def _image_facts(image: Mapping[str, Any]) -> Iterable[str]:
    for name in ("version", "ollama", "python", "os", "base_image", "base_digest", "commit"):
        if image.get(name) not in (None, "", "none", "unknown"):
            yield f"{name.replace('_', ' ')} {image[name]}"


def _without(given: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    left_out = {*other, "model", "model_defaults"}
    return {name: value for name, value in given.items() if name not in left_out}


def _settings(given: Mapping[str, Any]) -> Markup | str:
    if not given:
        return ""
    shown = (
        element("code", f"{name}={_value(value)}", class_="setting")
        for name, value in given.items()
    )
    return joined(part for each in shown for part in (each, " "))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={each}" for name, each in value.items())
    return " ".join(str(each) for each in value) if isinstance(value, list) else str(value)


def _lines(parts: Iterable[object]) -> Markup:
    listed = list(parts)
    return joined(
        part
        for at, each in enumerate(listed)
        for part in ((each, element("br")) if at + 1 < len(listed) else (each,))
    )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


_FLOW_ROWS = 24
_LONGEST_ID = 120


def throughput_section(report: Report, plot: Markup | None) -> Markup:
    """Return what came when, as a plot or a table."""
    flow = report.throughput
    if not flow.bars:
        return element("p", "No result was recorded yet.")
    caption = f"Results as they were recorded, in steps of {duration_text(flow.width)}."
    if flow.pauses:
        caption += f" {_pauses(flow)}"
    figures = _flow_table(flow)
    if plot is None:
        return joined([figures, element("p", caption, class_="soft")])
    more = element("details", element("summary", "The same as a table"), figures)
    return joined([plot, element("p", caption, class_="soft"), more])


def _pauses(flow: Throughput) -> str:
    seconds = duration_text(sum(end - begin for begin, end in flow.pauses))
    times = "One pause" if len(flow.pauses) == 1 else f"{len(flow.pauses)} pauses"
    return f"{times} without results ({seconds} in all) left out."


def _flow_table(flow: Throughput) -> Markup:
    step = -(-len(flow.bars) // _FLOW_ROWS)
    groups = [flow.bars[at : at + step] for at in range(0, len(flow.bars), step)]
    rows = []
    rates = [sum(b.results for b in group) / sum(b.seconds for b in group) for group in groups]
    for group, speed in zip(groups, rates, strict=True):
        tokens = sum(bar.completion_tokens for bar in group)
        rows.append(
            (
                moment_of(group[0].start),
                number(sum(bar.results for bar in group)),
                number(sum(bar.failed for bar in group)),
                rate(speed),
                rate(tokens / sum(bar.seconds for bar in group)),
                share_bar(speed / max(rates)),
            )
        )
    heads = ("from (UTC)", "results", "failed", "requests/s", "answer tokens/s", "")
    return table("Throughput", heads, rows, (1, 2, 3, 4))


def latency_section(report: Report, plot: Markup | None) -> Markup:
    """Return how long answers took; nothing where there are none."""
    told = report.latency
    if not told.count:
        return Markup("")
    heads = ["fastest", *(f"{name} %" for name in told.quantiles), "slowest", "mean"]
    figures = [told.lowest, *told.quantiles.values(), told.highest, told.mean]
    rows = [[seconds_text(figure) for figure in figures]]
    caption = (
        "Of the attempt that gave the answer, waiting in the engine included; so many percent of "
        "the answers took no longer. Requests that failed are left out."
    )
    shown = [
        plot or _histogram(told.histogram),
        table("Time per request", heads, rows, range(len(heads))),
    ]
    return joined([*shown, element("p", caption, class_="soft")])


def _histogram(bars: Sequence[tuple[float, float, int]]) -> Markup:
    most = max(count for _, _, count in bars)
    rows = [
        (f"{seconds_text(low)} - {seconds_text(high)}", number(count), share_bar(count / most))
        for low, high, count in bars
        if count
    ]
    return table("Answers by their time", ("time", "answers", ""), rows, (1,))


def attempts_section(report: Report) -> Markup:
    """Return results by their attempts, and what is to be noted of answers."""
    whole = sum(report.attempts.values())
    if not whole:
        return Markup("")
    rows = [
        (f"{name}{' or more' if name == str(MANY_ATTEMPTS) else ''}", number(count),
         percent(count, whole), share_bar(count / whole))
        for name, count in report.attempts.items()
    ]  # fmt: skip
    notes = _notes(report)
    heads = ("attempts", "results", "share", "")
    return joined([table("Results by their attempts", heads, rows, (1, 2)), *notes])


def _notes(report: Report) -> Iterable[Markup]:
    counts = report.counts
    told = (
        (counts.superseded, "result", "of requests that were tried again: not counted as failed"),
        (counts.unfit_answers, "answer", "outside the schema (asked again, or failed)"),
        (
            counts.cut_at_limit,
            "answer",
            "ended at the limit of tokens: raise max_tokens where answers must be whole",
        ),
        (
            counts.truncated_prompts,
            "prompt",
            "cut by the engine: raise --context-length, or shorten them",
        ),
    )
    empty = (
        (counts.empty_answers.get(reason, 0), "empty answer", words)
        for reason, words in EMPTY_REASONS.items()
    )
    for count, noun, words in (*told, *empty):
        if count:
            yield element("p", element("strong", counted(count, noun)), f" {words}.")


def failures_section(report: Report) -> Markup:
    """Return what failed, by kind, with examples and what to do."""
    counts = report.counts
    if not report.failures:
        none = "No request failed." if not counts.failed else "The journals name no failures."
        return element("p", none)
    allowed = f"--max-failures allows {number(counts.allowed_failures)}."
    whole = sum(failure.count for failure in report.failures)
    return joined(
        [
            element("p", f"{counted(whole, 'request')} failed; {allowed}"),
            *(_failure(failure, whole) for failure in report.failures),
        ]
    )


def _failure(failure: Failure, whole: int) -> Markup:
    examples = [
        element(
            "li",
            element("code", cut_text(example.custom_id, _LONGEST_ID)),
            element("span", f": {example.message}", class_="foreign"),
        )
        for example in failure.examples
    ]
    noun = "example" if len(examples) == 1 else "examples"
    head = f"{number(failure.count)} x {failure.code} ({percent(failure.count, whole)})"
    more = f" (the first {EXAMPLES})" if failure.count > EXAMPLES else ""
    return element(
        "div",
        element("h3", head),
        element("p", f"{sentence(failure.meaning)} ", element("strong", "What to do: "),
                f"{failure.remedy}."),
        element("p", f"{noun}{more}:".capitalize(), class_="soft"),
        element("ul", *examples),
        class_="failure",
    )  # fmt: skip


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
