"""The plan and the status of a run as lines of text; long lines are cut, never wrapped.

A terminal shows the lines in color, fitted to its size; a file or a pipe gets the full plain text.
"""

from __future__ import annotations

import os
import shlex
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from aiflux.core.batch.results_file import TOOL_CALL, answered_words
from aiflux.core.config.settings import settings_texts
from aiflux.core.runs.directory import own_command, user_output
from aiflux.core.runs.plan import Plan
from aiflux.core.runs.status_file import failed_text
from aiflux.slurm.jobs import array_ranges
from aiflux.slurm.run_view import (
    SHARD_ORDER,
    RequestError,
    RunState,
    RunView,
    ShardState,
    ShardView,
    done_text,
    speed_text,
    states_text,
)
from aiflux.util.text import counted, public_url, size_text
from aiflux.util.times import duration

if TYPE_CHECKING:
    from aiflux.core.config.config import SlurmConfig
    from aiflux.slurm.submit import PlannedRun

SHOWN_SHARDS = 20
_WIDE = 100
_MOST_ERRORS = 3
_LEAST_ROWS = 3
STYLES = {
    "waiting": "yellow",
    "running": "cyan",
    "merging": "cyan",
    "stopping": "yellow",
    "done": "green",
    "finished": "bold green",
    "finished with failures": "bold yellow",
    "stopped": "yellow",
    "failed": "bold red",
    "lost": "bold red",
    "not merged": "yellow",
    "output changed": "bold red",
    "not submitted": "dim",
}
_GOING = {ShardState.RUNNING, ShardState.STOPPING}
_QUIET = {ShardState.WAITING, ShardState.DONE, ShardState.NOT_SUBMITTED}


@dataclass(frozen=True)
class Frame:
    """The space that lines are fitted to.

    Attributes:
        width, height: in cells and lines; None means unlimited.
        blocks: whether the terminal can show block characters.
        short: shortens paths.
    """

    width: int | None = None
    height: int | None = None
    blocks: bool = True
    short: Callable[[Path], str] = str


def one_line(text: str) -> str:
    """Return untrusted text as one line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def typed(path: str) -> str:
    """Return a path quoted for a shell; a leading ``~`` keeps its meaning."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)


def overview(view: RunView, frame: Frame) -> list[Text]:
    """Return the whole status of a run, fitted into the frame."""
    head = [*_head(view, frame), *_facts(view, frame)]
    errors, after = _errors(view), _next(view, frame)
    shards = _shards(view, frame, _room(frame, len(head) + len(errors) + len(after)))
    fitted = [*head, *shards, *errors, *([] if frame.height is None else after)]
    for line in fitted:
        if frame.width is not None:
            line.truncate(frame.width, overflow="ellipsis")
    lines = [*head, *shards, *errors, *after]
    return lines if frame.height is None else lines[: frame.height]


def _room(frame: Frame, taken: int) -> int | None:
    return None if frame.height is None else max(_LEAST_ROWS, frame.height - taken)


def _head(view: RunView, frame: Frame) -> list[Text]:
    title = Text(one_line(frame.short(user_output(view.output))), style="bold")
    if frame.width is not None:
        _cut_left(title, frame.width - len(view.state.value) - 2)
    title = Text.assemble(title, "  ", (view.state.value, STYLES[view.state.value]))
    failed = (
        failed_text(view.without_answer, view.left_out),
        "red" if view.failed else "",
    )
    return [title, Text.assemble(_bar(view, frame), f" {done_text(view)}, ", failed)]


def _facts(view: RunView, frame: Frame) -> list[Text]:
    about = [("input", frame.short(view.input)), ("model", ", ".join(view.models))]
    if view.jobs:
        about.append(("job" if len(view.jobs) == 1 else "jobs", ", ".join(view.jobs)))
    lines = [Text("   ").join(_pair(name, value) for name, value in about)]
    if view.engine_settings:
        lines.append(_pair("server", " ".join(settings_texts(view.engine_settings))))
    speed = speed_text(view) if not view.ended else ""
    tuned = [each.advice for each in view.tunings]
    for words in (speed, *tuned, _used(view), _seal(view)):
        if words:
            lines += [Text(part) for part in _wrapped(words, frame)]
    if view.empty_answers:
        style = "yellow" if view.empty_answers.keys() - {TOOL_CALL} else ""
        lines.append(Text(answered_words(view.completed, view.empty_answers), style=style))
    if len(view.shards) == 1:
        lines += _only_shard(view, frame)
    else:
        lines.append(_pair(f"{len(view.shards)} shards", states_text(view.shards)))
    if view.output_change is not None:
        lines += [Text(part, style="red") for part in _wrapped(view.output_change, frame)]
    if view.slurm is not None:
        words = f"from the files alone: {view.slurm}"
        lines += [Text(part, style="yellow") for part in _wrapped(words, frame)]
    return lines


def _pair(name: str, value: str) -> Text:
    return Text.assemble((name, "dim"), " ", one_line(value))


def _only_shard(view: RunView, frame: Frame) -> list[Text]:
    (shard,) = view.shards
    words = _note(shard)
    if shard.gpus and shard.state is ShardState.RUNNING:
        words += f", {_gpus(shard.gpus)}"
    if view.state in (RunState.FINISHED, RunState.WITH_FAILURES) or not words:
        return []
    state = shard.state.value
    first, *more = _wrapped(words, frame, len(state) + 1)
    return [Text.assemble((state, STYLES[state]), " ", first), *map(Text, more)]


def _gpus(names: Sequence[str]) -> str:
    return ", ".join(f"{count} x {one_line(name)}" for name, count in Counter(names).items())


def _used(view: RunView) -> str:
    parts = []
    if view.prompt_tokens + view.completion_tokens:
        parts.append(f"tokens: {view.prompt_tokens} in, {view.completion_tokens} out")
    if view.gpu_seconds:
        parts.append(f"{view.gpu_seconds / 3600:.2f} GPU-hours")
    if view.restarts:
        parts.append(_times(view.restarts, "restart"))
    return ", ".join(parts)


def _seal(view: RunView) -> str:
    """Return whether the shards were sealed, or why not; "" before the first one started."""
    known = [shard for shard in view.shards if shard.sealed is not None or shard.unsealed]
    if known and not any(shard.sealed is False for shard in known):
        unknown = next((shard.unsealed for shard in known if shard.unsealed), None)
        if unknown is not None:
            return f"unknown whether it was always sealed: {one_line(unknown)}"
    reasons = Counter(shard.unsealed for shard in known if shard.sealed is False)
    if not known or not reasons:
        return "sealed: no network access" if known else ""
    why = "; ".join(one_line(reason) or "reason unknown" for reason, _ in reasons.most_common())
    count = sum(reasons.values())
    some = f" in {count} of {len(view.shards)} shards" if count < len(view.shards) else ""
    return f"not sealed{some}: {why}"


def _times(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _bar(view: RunView, frame: Frame) -> Text:
    width = 40 if frame.width is None else max(10, min(40, frame.width - 44))
    full, empty = ("█", "░") if frame.blocks else ("#", "-")
    done = width * view.done // max(view.total, 1)
    bad = min(done, -(-width * view.failed // max(view.total, 1)))
    return Text.assemble(
        (full * (done - bad), "green"), (full * bad, "red"), (empty * (width - done), "dim")
    )


def _shards(view: RunView, frame: Frame, room: int | None) -> list[Text]:
    """Return the table of shards, the most important ones first, in at most ``room`` lines."""
    if len(view.shards) == 1 or view.finished:
        return []
    ranked = sorted(view.shards, key=lambda shard: (SHARD_ORDER.index(shard.state), shard.index))
    most = SHOWN_SHARDS if room is None else room - 3  # the heading, the sum and a blank
    if len(ranked) > most + 1:
        ranked = _choose(ranked, max(most, 0))
    if not ranked:
        return []
    lines = [Text(""), *_table(ranked, frame)]
    shown = {shard.index for shard in ranked}
    rest = [shard for shard in view.shards if shard.index not in shown]
    if rest:
        lines.append(Text(f"       and {len(rest)} more: {states_text(rest)}", style="dim"))
    return lines


def _choose(ranked: list[ShardView], most: int) -> list[ShardView]:
    """Return the shards to show; failed ones get a third of the lines, however many run."""
    interesting = [shard for shard in ranked if shard.state not in _QUIET]
    going = [shard for shard in interesting if shard.state in _GOING]
    broken = interesting[len(going) :]
    shown = going[: most - min(len(broken), most // 3)]
    return [*shown, *broken[: most - len(shown)]] or ranked[:most]


def _table(shards: Sequence[ShardView], frame: Frame) -> list[Text]:
    wide = frame.width is None or frame.width >= _WIDE
    names = ["SHARD", "STATE", "DONE", "FAILED", "REQ/S", "TOK/S", "ETA", "JOB", ""]
    rows = [_row(shard) for shard in shards]
    dropped = set() if wide else {"REQ/S", "JOB"}
    below = _long_notes(shards, rows, names, dropped, frame)
    kept = [
        at
        for at, name in enumerate(names)
        if name not in dropped and (not name or any(row[at] for row in rows))
    ]
    widths = {at: max(len(names[at]), *(len(row[at]) for row in rows)) for at in kept}
    heading = Text(_aligned(names, kept, widths), style="dim")
    lines = [heading]
    for shard, row in zip(shards, rows, strict=True):
        line = Text(_aligned(row, kept, widths))
        start = widths[0] + 2
        line.stylize(STYLES[shard.state.value], start, start + len(shard.state.value))
        lines.append(line)
    return [*lines, *below]


def _long_notes(
    shards: Sequence[ShardView],
    rows: Sequence[list[str]],
    names: Sequence[str],
    dropped: Set[str],
    frame: Frame,
) -> list[Text]:
    """Move notes that do not fit out of the rows; return each once, with its shards.

    A display of fixed height has no lines for them: there, they are cut.
    """
    if frame.width is None or frame.height is not None:
        return []
    columns = [
        max(len(name), *(len(row[at]) for row in rows))
        for at, name in enumerate(names[:-1])
        if name not in dropped and any(row[at] for row in rows)
    ]
    room = frame.width - sum(columns) - 2 * len(columns)
    found: dict[str, list[int]] = {}
    for shard, row in zip(shards, rows, strict=True):
        if len(row[-1]) > room:
            found.setdefault(row[-1], []).append(shard.index)
            row[-1] = ""
    lines = []
    for note, indexes in found.items():
        label = f"  {'shard' if len(indexes) == 1 else 'shards'} {array_ranges(indexes)}: "
        lines += _labelled(label, note, frame)
    return lines


_LEFT = {1, 7, 8}


def _aligned(row: Sequence[str], kept: Sequence[int], widths: dict[int, int]) -> str:
    cells = (row[at].ljust(widths[at]) if at in _LEFT else row[at].rjust(widths[at]) for at in kept)
    return "  ".join(cells).rstrip()


def _row(shard: ShardView) -> list[str]:
    remaining = shard.remaining_seconds
    return [
        str(shard.index),
        shard.state.value,
        f"{shard.done}/{shard.total}",
        str(shard.failed),
        f"{shard.requests_per_second:.1f}" if shard.requests_per_second else "",
        f"{shard.tokens_per_second:.0f}" if shard.tokens_per_second else "",
        "" if remaining is None else duration(remaining),
        shard.job or "",
        _note(shard),
    ]


def _note(shard: ShardView) -> str:
    """Return where a shard runs, or why it does not run."""
    parts = []
    if shard.reason:  # first, as the state is in front of it
        parts.append(one_line(shard.reason).removeprefix(f"{shard.state.value} "))
    if shard.exit_code and "exit code" not in shard.reason:
        parts.append(f"exit code {shard.exit_code}")
    if shard.host and shard.state in _GOING:
        parts.append(f"on {shard.host}")
    if shard.restarts:
        parts.append(_times(shard.restarts, "restart"))
    if shard.left_out:
        parts.append(f"{shard.left_out} left out (too long)")
    return ", ".join(parts)


def _errors(view: RunView) -> list[Text]:
    if not view.errors or view.state is RunState.FINISHED:
        return []
    several = len(view.shards) > 1
    heading = [Text(""), Text("last failed requests", style="dim")]
    return [*heading, *(_error(error, several) for error in view.errors[:_MOST_ERRORS])]


def _error(error: RequestError, several: bool) -> Text:
    where = f" (shard {error.shard})" if several else ""
    return Text.assemble(
        "  ",
        (one_line(error.custom_id), "bold"),
        where,
        ": ",
        (one_line(error.code), "red"),
        f" {one_line(error.message)}",
    )


def _next(view: RunView, frame: Frame) -> list[Text]:
    return [*_fix(view, frame), *_continue(view, frame)]


def _fix(view: RunView, frame: Frame) -> list[Text]:
    if not view.remedy:
        return []
    return [Text(""), *_labelled("fix: ", view.remedy, frame)]


def _labelled(label: str, text: str, frame: Frame) -> list[Text]:
    """Return a label and a text, wrapped at words and never cut."""
    first, *more = _wrapped(text, frame, len(label)) or [""]
    indent = " " * len(label)
    return [Text.assemble((label, "dim"), first), *(Text(f"{indent}{part}") for part in more)]


def _wrapped(text: str, frame: Frame, indent: int = 0) -> list[str]:
    text = one_line(text)
    if frame.width is None:
        return [text]
    # A long word, such as a path, is left to the terminal unless the lines have to fit a screen.
    return textwrap.wrap(
        text, max(20, frame.width - indent), break_on_hyphens=False,
        break_long_words=frame.height is not None,
    )  # fmt: skip


def _continue(view: RunView, frame: Frame) -> list[Text]:
    if view.next_command is not None:
        *command, _ = shlex.split(view.next_command)
        words = f"{shlex.join(command)} {typed(frame.short(user_output(view.output)))}"
        return [Text(""), *_labelled("continue: ", words, frame)]
    table = user_output(view.output)
    if view.finished and not os.path.lexists(table):  # of `aiflux ask`, whose run was resumed
        words = f"write {frame.short(table)}: run the same `aiflux ask` command again"
        return [Text(""), *(Text(line, style="dim") for line in _wrapped(words, frame))]
    if view.state is RunState.WITH_FAILURES:
        own = own_command(view.output)
        words = f"the output has the reasons; to retry: the same `{own}` with --retry-failed"
        return [Text(""), *(Text(line, style="dim") for line in _wrapped(words, frame))]
    return []


def _cut_left(text: Text, width: int) -> None:
    """Cut a path at its beginning: its end is more informative."""
    if text.cell_len > width > 1:
        text.plain = "…" + text.plain[-(width - 1) :]


def moment(seconds: float | None) -> str:
    """Return Unix time as local date and time; "" for None."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def dry_run_summary(plan: Plan, planned: PlannedRun | None) -> Iterator[str]:
    """Yield what a dry run shows.

    Args:
        planned: how it would be submitted; None for a run in the foreground.
    """
    yield f"dry run: {counted(plan.requests, 'request')}, nothing was started"
    for key, value in _plan_facts(plan, planned):
        yield f"  {key:<11}{value}"
    if planned is not None:
        yield "  --show-script prints the batch script, --json the whole plan"


def _plan_facts(plan: Plan, planned: PlannedRun | None) -> Iterator[tuple[str, str]]:
    options = plan.options
    yield "input", f"{plan.input.named} ({size_text(plan.input.size)})"
    yield "output", str(plan.output)
    yield "model", ", ".join(plan.models)
    if options.parameters:
        yield "parameters", ", ".join(f"{key} {value}" for key, value in options.parameters.items())
    if options.engine_url is not None:
        yield "engine", public_url(options.engine_url)
    if options.engine_command is not None:
        yield "engine", options.engine_command
    if plan.engine_settings:
        yield "server", " ".join(settings_texts(plan.engine_settings))
    if options.tune:
        yield "tuning", "the first requests try several numbers of slots and requests in flight"
    if planned is None:
        yield "where", "on this machine, in the foreground"
        return
    if planned.image is not None:
        yield "image", str(planned.image)
    yield "jobs", _jobs(planned)
    resources, nodes = ", ".join(_resources(planned.slurm)), options.nodes_per_engine
    yield "each job", resources if nodes == 1 else f"{nodes} nodes, each with {resources}"
    yield "logs", str(planned.logs)


def _jobs(planned: PlannedRun) -> str:
    shards, left = len(planned.opened.plan.shards), len(planned.opened.open_shards)
    if planned.opened.finished:
        return "none: the run is finished"
    if shards == 1:
        return "1"
    rest = "" if left == shards else f", {left} of them unfinished"
    running = planned.slurm.max_running
    limit = "" if running is None else f", {running} at the same time"
    return f"{shards} shards{rest}{limit}"


def _resources(slurm: SlurmConfig) -> Iterator[str]:
    if slurm.partition:
        yield f"partition {slurm.partition}"
    if slurm.account:
        yield f"account {slurm.account}"
    if slurm.gres:
        yield f"gres {slurm.gres}"
    elif slurm.gpus_per_node != "0":
        yield f"GPUs {slurm.gpus_per_node}"
    if slurm.cpus_per_task:
        yield counted(slurm.cpus_per_task, "CPU core")
    if slurm.mem:
        yield f"memory {slurm.mem}"
    if slurm.time:
        yield f"time limit {slurm.time}"
