"""How an estimate looks, alone and beside what a run took. Pure; at most 80 columns."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.text import Text

from aiflux.core.config.settings import BY_NAME
from aiflux.estimates.estimate import SLURM, ComparedFigure, Estimate
from aiflux.estimates.intervals import Range
from aiflux.util.times import duration

_WIDTH = 80
_NAME = 24
_FIGURE = 14


def forecast(told: Estimate, command: str) -> list[Text]:
    """Return an estimate as lines."""
    return [
        *_pilot(told),
        Text(""),
        _heading("", "estimate", "95 % between"),
        *(_figure(*row) for row in _figures(told)),
        *_warnings(told),
        Text(""),
        Text(_advice(told), style="bold"),
        Text(f"  {command}"),
    ]


def comparison(rows: Sequence[ComparedFigure]) -> list[Text]:
    """Return estimated and actual figures as lines."""
    lines = [Text(""), _heading("", "actual", "estimated", "95 % between")]
    for row in rows:
        shown = _SHOWN[row.unit]
        actual = "unknown" if row.actual is None else shown(row.actual)
        within = row.actual is None or row.estimated.low <= row.actual <= row.estimated.high
        line = _line(row.name, actual, shown(row.estimated.value), _bounds(row.estimated, shown))
        if not within:
            line.stylize("yellow", _NAME, _NAME + _FIGURE)
        lines.append(line)
    return lines


def full_command(given: Mapping[str, Any], slurm: bool, told: Estimate) -> str:
    """Return the command that runs the whole as the estimate recommends, ready to be typed.

    Args:
        given: the user's options by name; None for those that were not given.
        slurm: whether it is to be submitted.
    """
    wanted = {name: value for name, value in given.items() if value is not None}
    if slurm:
        wanted |= {"shards": told.shards, "time": told.time}
    words = ["aiflux", "run"]
    for name, value in wanted.items():
        option = BY_NAME[name].option if name in BY_NAME else f"--{name}"
        if value is True:
            words.append(option)
        else:
            values = value if isinstance(value, list) else [value]
            words += [word for each in values for word in (option, str(each))]
    return shlex.join(words)


def count(number: float) -> str:
    """Return a count that can be read at a glance."""
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
    "seconds": lambda seconds: duration(round(seconds)),
    "hours": _hours,
}


def _pilot(told: Estimate) -> list[Text]:
    failed = f", {told.pilot_failures} failed" if told.pilot_failures else ""
    return [
        Text(f"pilot: {told.pilot} of {count(told.requests)} requests done{failed}"),
        Text(
            f"       {told.in_flight} in flight, {_rate(told.requests_per_second)} requests/s, "
            f"{_rate(told.tokens_per_second)} answer tokens/s"
        ),
    ]


def _figures(told: Estimate) -> list[tuple[str, Range, str]]:
    rows = [
        ("prompt tokens", told.prompt_tokens, "count"),
        ("answer tokens", told.completion_tokens, "count"),
        ("failed requests", told.failures, "count"),
        ("time in one job" if told.where == SLURM else "time", told.seconds_of_shard(1), "seconds"),
    ]
    if told.shards > 1 and told.where == SLURM:
        rows.append((f"in {count(told.shards)} shards, each", told.shard_seconds, "seconds"))
    if told.gpus:
        shards = told.shards if told.where == SLURM else 1
        rows.append(("GPU-hours", told.gpu_hours(shards), "hours"))
    return rows


def _figure(name: str, figure: Range, unit: str) -> Text:
    shown = _SHOWN[unit]
    return _line(name, shown(figure.value), _bounds(figure, shown))


def _bounds(figure: Range, shown: Callable[[float], str]) -> str:
    return f"{shown(figure.low)} - {shown(figure.high)}"


def _heading(*cells: str) -> Text:
    return Text(_line(*cells).plain, style="dim")


def _line(name: str, *cells: str) -> Text:
    *figures, last = cells
    text = name.ljust(_NAME) + "".join(figure.ljust(_FIGURE) for figure in figures) + last
    return Text(text.rstrip())


def _warnings(told: Estimate) -> list[Text]:
    lines = []
    for warning in told.warnings:
        wrapped = textwrap.wrap(
            warning, _WIDTH, initial_indent="! ", subsequent_indent="  ", break_on_hyphens=False
        )
        lines += [Text(line, style="yellow") for line in wrapped]
    return [Text(""), *lines] if lines else []


def _advice(told: Estimate) -> str:
    if told.where != SLURM:
        return "to do them all:"
    if told.shards == 1:
        return f"recommended: one job of {told.time}"
    return f"recommended: {told.shards} shards of {told.time}"
