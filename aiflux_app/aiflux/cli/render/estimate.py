"""Estimates as text of at most 80 columns: alone, of several engines, next to what a run took."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from aiflux.core.config.settings import option_words, section_settings
from aiflux.estimates.chain import ChainEstimate
from aiflux.estimates.energy import UNKNOWN_RATES, Rates, kwh_text
from aiflux.estimates.estimate import SLURM, ComparedFigure, Estimate, Range
from aiflux.estimates.recommendation import Recommendation, counts_gpus
from aiflux.util.text import joined
from aiflux.util.times import duration

WIDTH = 80
_NAME = 24
_FIGURE = 14
_LABEL = 20
_CELL = 20
_DAY = 86_400
_FEW_SECONDS = 9.5


def forecast(
    found: Estimate,
    command: str,
    rates: Rates = UNKNOWN_RATES,
    wait: float | None = None,
    width: int = WIDTH,
) -> list[Text]:
    """Return an estimate as lines.

    Args:
        wait: seconds until Slurm expects the jobs to start, if known.
        width: of sentences; figures and commands are not wrapped.
    """
    return [
        *_pilot(found),
        Text(""),
        _line("", "estimate", "95 % between", style="dim"),
        *(_figure(*row) for row in _figures(found, rates)),
        *_warning_lines(found.warnings, width),
        Text(""),
        Text(_advice(found), style="bold"),
        Text(f"  {command}"),
        *([] if wait is None else [Text(f"start, if submitted now: {_start(wait)}", style="dim")]),
    ]


def chain_forecast(
    found: ChainEstimate, command: str, rates: Rates = UNKNOWN_RATES, width: int = WIDTH
) -> list[Text]:
    """Return the estimate of a chain: each step, then their sum."""
    lines = [Text(f"pilot: {found.pilot} of {_of(found.rows, 'row')}")]
    slurm = False
    for step in found.steps:
        lines += [Text(""), Text(f"step {step.name}", style="bold")]
        each = step.estimate
        if each is None:
            lines.append(_figure("requests", step.requests, "count"))
            continue
        slurm = each.where == SLURM
        lines += [*_pilot(each), _line("", "estimate", "95 % between", style="dim")]
        rows = [("requests", step.requests, "count"), *_figures(each, rates)]
        lines += [*(_figure(*row) for row in rows), *_warning_lines(each.warnings, width)]
        if slurm:
            lines.append(Text(f"{_advice(each)}"))
    lines += [Text(""), Text("all steps, one after the other", style="bold")]
    lines += [_figure(*row) for row in _summed(found, rates)]
    lines += [*_warning_lines(found.warnings, width), Text("")]
    where = ", with shards and time of each step in its file" if slurm else ""
    return [*lines, Text(f"full chain{where}:", style="bold"), Text(f"  {command}")]


def _summed(found: ChainEstimate, rates: Rates) -> Iterator[tuple[str, Range, str]]:
    costs = found.costs(rates)
    rows = [
        ("prompt tokens", found.sum(lambda each: each.prompt_tokens), "count"),
        ("answer tokens", found.sum(lambda each: each.completion_tokens), "count"),
        ("failed requests", found.sum(lambda each: each.failures), "count"),
        ("time", found.seconds, "seconds"),
        ("GPU-hours", found.gpu_hours if found.gpus else None, "hours"),
        *((name, getattr(costs, field), unit) for name, field, unit in _COSTS if found.gpus),
    ]
    yield from ((name, figure, unit) for name, figure, unit in rows if figure is not None)


def _start(wait: float) -> str:
    if wait < 60:
        return "at once"
    return f"expected in {duration(round(wait))} (sbatch --test-only)"


def engines_forecast(
    found: Mapping[str, Estimate],
    models: Mapping[str, str],
    commands: Mapping[str, str],
    choice: Recommendation | None,
    rates: Rates = UNKNOWN_RATES,
    width: int = WIDTH,
) -> list[Text]:
    """Return the estimates of several engines side by side.

    Args:
        found: the estimates by engine.
        models, commands: each engine's models, and its command of the full run.
        choice: None if there is only one estimate.
        width: of sentences.
    """
    first = next(iter(found.values()))
    best = next(iter(found)) if choice is None else choice.best
    lines = [Text(f"pilot: the same {first.pilot} of {_of(first.requests, 'request')}"), Text("")]
    lines += [_row(name, [models[name]]) for name in found]
    lines += [Text(""), _row("", [*found], style="dim")]
    for name, figures, shown in _engine_figures([*found.values()], rates):
        lines.append(_row(name, [shown(figure.value) for figure in figures]))
        bounds = [_bounds(figure, shown) for figure in figures]
        lines.append(_row("  95 % between", bounds, style="dim"))
    lines.append(_row("requests in flight", [str(each.in_flight) for each in found.values()]))
    lines.append(_row("failed in the pilot", [str(each.pilot_failures) for each in found.values()]))
    named = [f"{name}: {text}" for name, each in found.items() for text in each.warnings]
    lines += [*_warning_lines(named, width), Text("")]
    if choice is not None:
        lines += [Text(line) for line in wrapped(_verdict(choice, found), width)]
    decided = choice is not None and choice.decided
    advice = f"recommended: {best}" if decided else f"full run with {best}"
    jobs = "" if first.where != SLURM else f", {_jobs(found[best])}"
    return [*lines, Text(advice + jobs, style="bold"), Text(f"  {commands[best]}")]


def _engine_figures(
    found: Sequence[Estimate], rates: Rates
) -> Iterator[tuple[str, list[Range], Callable[[float], str]]]:
    """Yield the figures of engines: name, value and interval for each, and how they are shown."""
    slurm = found[0].where == SLURM
    yield "answer tokens/s", [each.tokens_rate for each in found], _rate
    yield "requests/s", [each.requests_rate for each in found], _rate
    times = [each.seconds_of_shard(1) for each in found]
    yield "time in one job" if slurm else "time", times, _time
    if any(each.gpus for each in found):
        hours = [each.gpu_hours(each.shards if slurm else 1) for each in found]
        yield "GPU-hours", hours, _hours
    costs = [each.costs(rates, each.shards if slurm else 1) for each in found]
    for name, field, unit in _COSTS:
        figures = [getattr(each, field) for each in costs]
        if None not in figures:
            yield name, figures, _SHOWN[unit]
    yield "failed requests", [each.failures for each in found], count


def _time(seconds: float) -> str:
    return _seconds(seconds) if seconds < _DAY - 1 else f"{_rate(seconds / _DAY)} d"


def _seconds(seconds: float) -> str:
    """Return a time as H:MM:SS, or with a fraction where that would show nothing."""
    return f"{seconds:.2g} s" if seconds < _FEW_SECONDS else duration(round(seconds))


def _row(name: str, cells: Sequence[str], style: str = "") -> Text:
    return _line(name, *cells, style=style, widths=(_LABEL, _CELL))


def _verdict(choice: Recommendation, found: Mapping[str, Estimate]) -> str:
    """Return what the pilots show, in words."""
    compared = [each for name, each in found.items() if name not in choice.failing]
    cost = "GPU-hours" if counts_gpus(compared) else "time"
    parts = [f"{name} clearly fails more requests." for name in choice.failing]
    if choice.overlapping:
        overlapping = joined([choice.best, *choice.overlapping])
        parts.append(f"The pilot does not decide: the intervals of {overlapping} overlap ({cost}).")
        if choice.requests is None:
            parts.append("No larger sample would: a pilot is not that exact.")
        else:
            parts.append(f"A sample of about {choice.requests} would: --requests {choice.requests}")
    elif len(compared) > 1:
        parts.append(f"Clearly the lowest {cost}: {choice.best}.")
    return " ".join(parts)


def comparison(rows: Sequence[ComparedFigure]) -> list[Text]:
    """Return estimated and actual figures as lines."""
    lines = [Text(""), _line("", "actual", "estimated", "95 % between", style="dim")]
    for row in rows:
        shown = _SHOWN[row.unit]
        actual = "unknown" if row.actual is None else shown(row.actual)
        within = row.actual is None or row.estimated.low <= row.actual <= row.estimated.high
        line = _line(row.name, actual, shown(row.estimated.value), _bounds(row.estimated, shown))
        if not within:
            line.stylize("yellow", _NAME, _NAME + _FIGURE)
        lines.append(line)
    return lines


def full_command(
    given: Mapping[str, Any], slurm: bool, found: Estimate | None, command: str = "run"
) -> str:
    """Return the command of the full run with the recommended options, quoted for a shell.

    Args:
        given: the user's options by name; None for those that were not given.
        slurm: whether it is a Slurm run.
        found: None for a chain, whose steps differ in what is recommended.
    """
    wanted = {
        name: value
        for name, value in given.items()
        if value is not None and name not in section_settings("accounting")
    }
    if slurm and found is not None:
        wanted |= {"shards": found.shards, "time": found.time}
    return shlex.join(["aiflux", command, *option_words(wanted)])


def _of(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def count(number: float) -> str:
    """Return a count in a short form."""
    if number < 10_000:
        return f"{number:.0f}"
    for scale, unit in ((1e3, "k"), (1e6, "M"), (1e9, "G")):
        if number < 999.5 * scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number / 1e12:.3g} T"


def _hours(number: float) -> str:
    return f"{number:.2f}" if number < 100 else count(number)


def _rate(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else count(number)


_SHOWN: Mapping[str, Callable[[float], str]] = {
    "count": count,
    "seconds": _seconds,
    "hours": _hours,
    "kwh": kwh_text,
}


def _pilot(found: Estimate) -> list[Text]:
    failed = f", {found.pilot_failures} failed" if found.pilot_failures else ""
    return [
        Text(f"pilot: {found.pilot} of {_of(found.requests, 'request')} finished{failed}"),
        Text(
            f"       {found.in_flight} in flight, {_rate(found.requests_rate.value)} requests/s, "
            f"{_rate(found.tokens_rate.value)} answer tokens/s"
        ),
    ]


_COSTS = (
    ("energy of the GPUs", "gpu_kwh", "kwh"),
    ("J per 1,000 answers", "joules_per_1000_answers", "count"),
    ("CO2 in grams", "co2_grams", "count"),
    ("billing units", "billing_units", "hours"),
)


def _figures(found: Estimate, rates: Rates) -> list[tuple[str, Range, str]]:
    rows = [
        ("prompt tokens", found.prompt_tokens, "count"),
        ("answer tokens", found.completion_tokens, "count"),
        ("failed requests", found.failures, "count"),
        (
            "time in one job" if found.where == SLURM else "time",
            found.seconds_of_shard(1),
            "seconds",
        ),
    ]
    if found.shards > 1 and found.where == SLURM:
        rows.append((f"in {count(found.shards)} shards, each", found.shard_seconds, "seconds"))
    if found.gpus:
        shards = found.shards if found.where == SLURM else 1
        rows.append(("GPU-hours", found.gpu_hours(shards), "hours"))
        costs = found.costs(rates, shards)
        for name, field, unit in _COSTS:
            figure: Range | None = getattr(costs, field)
            if figure is not None:
                rows.append((name, figure, unit))
    return rows


def _figure(name: str, figure: Range, unit: str) -> Text:
    shown = _SHOWN[unit]
    return _line(name, shown(figure.value), _bounds(figure, shown))


def _bounds(figure: Range, shown: Callable[[float], str]) -> str:
    if math.isinf(figure.high):
        return f"{shown(figure.low)} or more"
    return f"{shown(figure.low)} - {shown(figure.high)}"


def _line(
    name: str, *cells: str, style: str = "", widths: tuple[int, int] = (_NAME, _FIGURE)
) -> Text:
    first, other = widths
    text = name.ljust(first) + "".join(cell.ljust(other) for cell in cells)
    return Text(text.rstrip(), style=style)


def _warning_lines(warnings: Sequence[str], width: int) -> list[Text]:
    lines = []
    for warning in warnings:
        lines += [Text(line, style="yellow") for line in wrapped(warning, width, "! ")]
    return [Text(""), *lines] if lines else []


def wrapped(text: str, width: int, lead: str = "") -> list[str]:
    """Return a text as lines, wrapped at spaces only; a lead is in front of the first."""
    return textwrap.wrap(
        " ".join(text.split()), width, initial_indent=lead, subsequent_indent=" " * len(lead),
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip


def _advice(found: Estimate) -> str:
    if found.where != SLURM:
        return "full run:"
    return f"recommended: {_jobs(found)}"


def _jobs(found: Estimate) -> str:
    if found.shards == 1:
        return f"one job of {found.time}"
    return f"{found.shards} shards of {found.time}"
