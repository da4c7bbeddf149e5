"""The state of a chain as lines of text: a table of its steps."""

from __future__ import annotations

from rich.text import Text

from aiflux.api.chain import ChainView, StepView
from aiflux.cli.render.run import STYLES, Frame, one_line
from aiflux.util.files import short
from aiflux.util.text import NOT_SHOWN, counted

_HEADER = ("STEP", "STATE", "DONE", "FAILED", "FILTERED", "MODEL")


def chain_lines(view: ChainView, frame: Frame) -> list[Text]:
    """Return the state of a chain, fitted to the width of the frame."""
    title = Text.assemble(
        (one_line(short(view.folder.output)), "bold"),
        "  ",
        (view.state, STYLES.get(view.state, "")),
    )
    rows = [_HEADER, *map(_row, view.steps)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        line = Text("  ".join(cells).rstrip())
        if row is _HEADER:
            line.stylize("dim")
        else:
            start = widths[0] + 2
            line.stylize(STYLES.get(row[1], ""), start, start + len(row[1]))
        lines.append(line)
    texts = {each.record.name: each.record.unusable_text for each in view.steps}
    lines += [Text(one_line(f"  {name}: {text}")) for name, text in texts.items() if text]
    skipped = ((each.record.name, each.run.left_out) for each in view.steps if each.run)
    lines += [
        Text(f"  {name}: {counted(count, 'request')} left out (too long)")
        for name, count in skipped
        if count
    ]
    step = view.unfinished
    if step is not None:
        lines += [Text(f"  {one_line(text)}") for text in _why(step)]
    for line in lines:
        if frame.width is not None:
            line.truncate(frame.width, overflow="ellipsis")
    if view.next_command is not None:  # whole, to be copied
        lines.append(Text(f"  next: {view.next_command}"))
        if NOT_SHOWN in view.next_command:
            lines.append(Text(f"  write the key of the server in place of {NOT_SHOWN}"))
    return lines


def _row(step: StepView) -> tuple[str, ...]:
    total = "" if step.requests is None else f"{step.done}/{step.requests}"
    known = step.requests is not None or step.record.refused
    failed = str(step.failed) if known else ""
    filtered = str(step.record.stopped) if known else ""
    model = str(step.record.answering.get("model") or "")
    return (step.record.name, step.state, total, failed, filtered, one_line(model))


def _why(step: StepView) -> list[str]:
    """Return why a step waits or ended."""
    if step.run is None:
        return [step.reason] if step.reason else []
    reasons = dict.fromkeys(shard.reason for shard in step.run.shards if shard.reason)
    return [*list(reasons)[:3], *([step.run.remedy] if step.run.remedy else [])]
