"""The report as one HTML page that needs nothing but itself. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from aiflux.cli.markup import Markup, element, facts, joined, table
from aiflux.cli.views import duration
from aiflux.core.clock import utc_text
from aiflux.core.compare import Row
from aiflux.core.methods import methods
from aiflux.core.report_data import EngineRow, Failure, Model, Report, ShardRow
from aiflux.core.report_flow import Throughput
from aiflux.core.tally import EXAMPLES, MANY_ATTEMPTS

SHOWN_ROWS = 200
_FLOW_ROWS = 24
# The page may load nothing, from nowhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report, plots: Mapping[str, Markup], no_plots: str | None = None) -> str:
    """Return the page.

    Args:
        plots: ``throughput`` and ``latency``, as far as they could be drawn.
        no_plots: why there are none.
    """
    title = f"{PurePath(report.what.output).name}: AI-Flux report"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Markup(_style())),
    )
    body = element("body", _header(report), element("main", *_sections(report, plots, no_plots)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _style() -> str:
    return (files("aiflux.cli") / "report.css").read_text(encoding="utf-8")


def _sections(
    report: Report, plots: Mapping[str, Markup], no_plots: str | None
) -> Iterable[Markup]:
    yield _cards(report)
    if no_plots is not None:
        yield element("p", f"Tables stand in place of plots: {no_plots}", class_="soft")
    yield _section("What ran", _what(report))
    yield _section("Throughput", _throughput(report, plots.get("throughput")))
    yield _section("Time per request", _latency(report, plots.get("latency")))
    yield _section("Attempts", _attempts(report))
    yield _section("Failures", _failures(report))
    yield _section("Shards", _shards(report))
    yield _section("Engines and GPUs", _engines(report))
    yield _section("Estimate and actual", _estimate(report))
    yield _section("Methods", _methods(report))
    yield element(
        "footer",
        f"Written by AI-Flux {report.version} at {_moment(report.written)} from the files in ",
        element("code", report.what.run_dir),
        ". The page holds no prompts and no answers, but ids and error messages of requests that "
        "failed.",
    )


def _section(title: str, *content: Markup) -> Markup:
    if not any(content):
        return Markup("")
    return element("section", element("h2", title), *content)


def _header(report: Report) -> Markup:
    condition = report.condition
    style = "busy" if not condition.ended else "bad"
    if condition.finished and not report.counts.failed:
        style = "good"
    lines = [
        element("h1", PurePath(report.what.output).name),
        element(
            "p",
            element("span", condition.state, class_=f"state {style}"),
            f" as of {_moment(report.written)}",
        ),
    ]
    if not condition.ended:
        lines.append(element("p", "The run goes on; these figures are of what is done so far."))
    elif condition.next_command:
        lines.append(
            element("p", "What brings it to its end: ", element("code", condition.next_command))
        )
    return element("header", *lines)


def _cards(report: Report) -> Markup:
    counts, use = report.counts, report.use
    done = counts.completed + counts.failed
    cards = [
        (number(counts.completed), f"of {number(counts.total)} requests answered"),
        (number(counts.failed), f"failed ({_share(counts.failed, done)})"),
        (number(report.tokens.prompt), "prompt tokens"),
        (number(report.tokens.completion), "answer tokens"),
        (_rate(report.throughput.requests_per_second), "requests/s"),
        (_rate(report.throughput.completion_tokens_per_second), "answer tokens/s"),
        (_seconds(report.latency.quantiles["50"]), "median time per request"),
        (f"{use.gpu_hours:.2f}", "GPU-hours")
        if use.gpu_hours
        else (duration(report.times.job_seconds), "time of all jobs"),
    ]
    made = [
        element("div", element("b", figure), element("span", name), class_="card")
        for figure, name in cards
    ]
    return element("div", *made, class_="cards")


def _what(report: Report) -> Markup:
    what, times = report.what, report.times
    image = what.image or {}
    pairs: list[tuple[str, object]] = [
        ("Input", joined([element("code", what.input["path"]), _input(what.input)])),
        ("Model" if len(what.models) == 1 else "Models", _lines(_model(m) for m in what.models)),
        ("Engine", _counted(what.engines)),
        ("GPUs", _counted(what.gpus)),
        ("Image", element("code", what.image_path) if what.image_path else ""),
        ("In the image", ", ".join(_image_facts(image))),
        ("Sealed", {True: "yes: no network in the container", False: "no", None: ""}[what.sealed]),
        ("AI-Flux", ", ".join(what.aiflux)),
        ("Parameters", _settings(what.parameters) or "those of each request"),
        ("Options", _settings(_without(what.options, what.parameters))),
        ("Slurm", _settings(what.slurm)),
        ("Jobs", ", ".join(what.jobs)),
        ("Hosts", ", ".join(what.hosts)),
        ("Planned", _moment(times.planned)),
        ("Submitted", _moment(times.submitted)),
        ("First result", _moment(times.first_result)),
        ("Last result", _moment(times.last_result)),
        ("Output written", _moment(times.finished)),
        ("Time of all jobs", _job_time(report)),
    ]
    return facts(pairs)


def _input(told: Mapping[str, Any]) -> str:
    size = float(told.get("size") or 0) / 1e6
    return f" ({number(int(told['requests']))} requests, {size:,.1f} MB, digest {told['digest']})"


def _job_time(report: Report) -> str:
    times = report.times
    if not times.job_seconds:
        return ""
    starts = f" in {number(times.starts)} starts" if times.starts > 1 else ""
    return f"{duration(times.job_seconds)}{starts}"


def _model(model: Model) -> Markup:
    parts: list[object] = [element("strong", model.name)]
    if model.results:
        parts.append(f" ({number(model.results)} results)")
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
    left_out = {*other, "model"}
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


def _throughput(report: Report, plot: Markup | None) -> Markup:
    flow = report.throughput
    if not flow.bars:
        return element("p", "No result was recorded yet.")
    caption = f"Results as they were recorded, in steps of {duration(flow.width)}."
    if flow.pauses:
        caption += f" {_pauses(flow)}"
    return joined([plot or _flow_table(flow), element("p", caption, class_="soft")])


def _pauses(flow: Throughput) -> str:
    seconds = duration(sum(end - begin for begin, end in flow.pauses))
    times = "One pause" if len(flow.pauses) == 1 else f"{len(flow.pauses)} pauses"
    return f"{times} without results ({seconds} in all) left out."


def _flow_table(flow: Throughput) -> Markup:
    step = -(-len(flow.bars) // _FLOW_ROWS)
    groups = [flow.bars[at : at + step] for at in range(0, len(flow.bars), step)]
    rows = []
    rates = [sum(b.results for b in group) / sum(b.seconds for b in group) for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        tokens = sum(bar.completion_tokens for bar in group)
        rows.append(
            (
                _moment_of(group[0].start),
                number(sum(bar.results for bar in group)),
                number(sum(bar.failed for bar in group)),
                _rate(rate),
                _rate(tokens / sum(bar.seconds for bar in group)),
                _bar(rate / max(rates)),
            )
        )
    heads = ("from (UTC)", "results", "failed", "requests/s", "answer tokens/s", "")
    return table(heads, rows, (1, 2, 3, 4))


def _bar(share: float, kind: str = "bar") -> Markup:
    return element("span", class_=kind, style=f"--share: {share:.4f}")


def _latency(report: Report, plot: Markup | None) -> Markup:
    told = report.latency
    if not told.count:
        return Markup("")
    heads = ["fastest", *(f"{name} %" for name in told.quantiles), "slowest", "mean"]
    figures = [told.lowest, *told.quantiles.values(), told.highest, told.mean]
    rows = [[_seconds(figure) for figure in figures]]
    caption = (
        "Of the attempt that gave the answer, waiting in the engine included; so many percent of "
        "the answers took no longer. Requests that failed are left out."
    )
    shown = [plot or _histogram(told.histogram), table(heads, rows, range(len(heads)))]
    return joined([*shown, element("p", caption, class_="soft")])


def _histogram(bars: Sequence[tuple[float, float, int]]) -> Markup:
    most = max(count for _, _, count in bars)
    rows = [
        (f"{_seconds(low)} - {_seconds(high)}", number(count), _bar(count / most))
        for low, high, count in bars
        if count
    ]
    return table(("seconds", "answers", ""), rows, (1,))


def _attempts(report: Report) -> Markup:
    whole = sum(report.attempts.values())
    if not whole:
        return Markup("")
    rows = [
        (f"{name}{' or more' if name == str(MANY_ATTEMPTS) else ''}", number(count),
         _share(count, whole), _bar(count / whole))
        for name, count in report.attempts.items()
    ]  # fmt: skip
    notes = _notes(report)
    return joined([table(("attempts", "results", "", ""), rows, (1, 2)), *notes])


def _notes(report: Report) -> Iterable[Markup]:
    counts = report.counts
    told = (
        (counts.superseded, "results were of requests that were tried again, and do not count"),
        (counts.unfit_answers, "answers did not fit their schema (asked again, or failed)"),
        (
            counts.cut_at_limit,
            "answers ended at their limit of tokens: raise max_tokens where they must be whole",
        ),
        (
            counts.truncated_prompts,
            "prompts were cut by the engine: raise --context-length, or shorten them",
        ),
    )
    for count, words in told:
        if count:
            yield element("p", element("strong", number(count)), f" {words}.")


def _failures(report: Report) -> Markup:
    counts = report.counts
    if not report.failures:
        none = "No request failed." if not counts.failed else "The journals name no failures."
        return element("p", none)
    allowed = f"--max-failures allows {number(counts.allowed_failures)}."
    whole = sum(failure.count for failure in report.failures)
    return joined(
        [
            element("p", f"{number(whole)} requests failed; {allowed}"),
            *(_failure(failure, whole) for failure in report.failures),
        ]
    )


def _failure(failure: Failure, whole: int) -> Markup:
    examples = [
        element("li", element("code", example.custom_id), f": {example.message}")
        for example in failure.examples
    ]
    noun = "example" if len(examples) == 1 else "examples"
    head = f"{number(failure.count)} x {failure.code} ({_share(failure.count, whole)})"
    more = f" (the first {EXAMPLES})" if failure.count > EXAMPLES else ""
    return element(
        "div",
        element("h3", head),
        element("p", f"{_sentence(failure.meaning)} ", element("strong", "What to do: "),
                f"{failure.remedy}."),
        element("p", f"{noun}{more}:".capitalize(), class_="soft"),
        element("ul", *examples),
        class_="failure",
    )  # fmt: skip


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _shards(report: Report) -> Markup:
    heads = (
        "shard", "state", "answered", "failed", "answer tokens", "time", "GPU-hours",
        "median", "tokens/s", "job", "host",
    )  # fmt: skip
    longest = max((shard.seconds for shard in report.shards), default=0.0)
    rows = [_shard(shard, longest) for shard in report.shards]
    made = _limited((*heads, "time"), rows, (0, 2, 3, 4, 5, 6, 7, 8))
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
        duration(shard.seconds),
        f"{shard.gpu_hours:.2f}",
        _seconds(shard.median_seconds),
        _rate(shard.tokens_per_second),
        shard.job or "",
        shard.host or "",
        _bar(shard.seconds / longest, "bar small") if longest else "",
    )


def _limited(
    heads: Sequence[str], rows: Sequence[Sequence[object]], numbers: Iterable[int]
) -> Markup:
    made = table(heads, rows[:SHOWN_ROWS], numbers)
    if len(rows) <= SHOWN_ROWS:
        return made
    rest = f"{number(len(rows) - SHOWN_ROWS)} more: aiflux report --json shows them all"
    return joined([made, element("p", rest, class_="soft")])


def _engines(report: Report) -> Markup:
    heads = (
        "shard", "engine", "on", "slots", "results", "failed", "answer tokens", "mean time",
        "in flight",
    )  # fmt: skip
    rows = [_engine(engine) for engine in report.engines]
    made = [_limited(heads, rows, (0, 1, 3, 4, 5, 6, 7, 8))] if rows else []
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
        _seconds(engine.mean_seconds),
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


def _estimate(report: Report) -> Markup:
    if not report.estimate:
        return Markup("")
    rows = [_estimated(row) for row in report.estimate]
    heads = ("", "actual", "estimated", "95 % between", "")
    caption = element("p", "What `aiflux estimate` told of the run before it.", class_="soft")
    return joined([table(heads, rows, (1, 2, 3)), caption])


def _estimated(row: Row) -> tuple[object, ...]:
    shown = _UNITS[row.unit]
    told = row.estimated
    within = row.actual is None or told.low <= row.actual <= told.high
    return (
        row.name,
        "unknown" if row.actual is None else shown(row.actual),
        shown(told.value),
        f"{shown(told.low)} - {shown(told.high)}",
        "" if within else element("span", "outside", class_="bad"),
    )


def _methods(report: Report) -> Markup:
    note = "To be pasted into a paper, and looked over before."
    return joined(
        [element("p", note, class_="soft"), element("blockquote", element("p", methods(report)))]
    )


def number(count: int) -> str:
    """Return a count with its thousands set apart."""
    return f"{count:,}"


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2g} %" if 0 < share < 1 else f"{share:.1f} %"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else duration(seconds)


def _moment(text: str | None) -> str:
    """Return a UTC time as people write it."""
    return "" if text is None else f"{text[:10]} {text[11:19]} UTC"


def _moment_of(seconds: float) -> str:
    return utc_text(seconds)[:19].replace("T", " ")


_UNITS: Mapping[str, Callable[[float], str]] = {
    "count": lambda count: f"{round(count):,}",
    "seconds": lambda seconds: duration(round(seconds)),
    "hours": lambda hours: f"{hours:.2f}",
}
