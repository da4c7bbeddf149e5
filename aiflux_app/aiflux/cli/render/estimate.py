"""An estimate as text of at most 80 columns, alone and next to what a run took."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.text import Text

from aiflux.estimates.estimate import SLURM, ComparedFigure, Estimate, Range
from aiflux.util.times import duration

_WIDTH = 80
_NAME = 24
_FIGURE = 14


def forecast(found: Estimate, command: str) -> list[Text]:
    """Return an estimate as lines."""
    return [
        *_pilot(found),
        Text(""),
        _heading("", "estimate", "95 % between"),
        *(_figure(*row) for row in _figures(found)),
        *_warnings(found),
        Text(""),
        Text(_advice(found), style="bold"),
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


def full_command(given: Mapping[str, Any], slurm: bool, found: Estimate) -> str:
    """Return the command of the full run with the recommended options, quoted for a shell.

    Args:
        given: the user's options by name; None for those that were not given.
        slurm: whether it is a Slurm run.
    """
    wanted = {name: value for name, value in given.items() if value is not None}
    if slurm:
        wanted |= {"shards": found.shards, "time": found.time}
    words = ["aiflux", "run"]
    for name, value in wanted.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [word for each in values for word in (f"--{option}", str(each))]
    return shlex.join(words)


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
    "seconds": lambda seconds: duration(round(seconds)),
    "hours": _hours,
}


def _pilot(found: Estimate) -> list[Text]:
    failed = f", {found.pilot_failures} failed" if found.pilot_failures else ""
    return [
        Text(f"pilot: {found.pilot} of {count(found.requests)} requests finished{failed}"),
        Text(
            f"       {found.in_flight} in flight, {_rate(found.requests_per_second)} requests/s, "
            f"{_rate(found.tokens_per_second)} answer tokens/s"
        ),
    ]


def _figures(found: Estimate) -> list[tuple[str, Range, str]]:
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


def _warnings(found: Estimate) -> list[Text]:
    lines = []
    for warning in found.warnings:
        wrapped = textwrap.wrap(
            warning, _WIDTH, initial_indent="! ", subsequent_indent="  ", break_on_hyphens=False
        )
        lines += [Text(line, style="yellow") for line in wrapped]
    return [Text(""), *lines] if lines else []


def _advice(found: Estimate) -> str:
    if found.where != SLURM:
        return "full run:"
    if found.shards == 1:
        return f"recommended: one job of {found.time}"
    return f"recommended: {found.shards} shards of {found.time}"
