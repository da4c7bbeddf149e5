"""The page of a chain: the main figures of its steps, with links to their reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from aiflux.report.data import Report
from aiflux.report.format import duration_text, number
from aiflux.report.page import Table, environment
from aiflux.util.times import utc_now

_HEADS = (
    "Step", "State", "Requests", "Answered", "Failed", "Unusable", "Filtered",
    "Prompt tokens", "Answer tokens", "Time of jobs", "GPU-hours",
)  # fmt: skip


@dataclass(frozen=True)
class StepFigures:
    """A step of a chain.

    Attributes:
        filtered: rows or samples that its filter stopped.
        unusable: rows or samples that ended without a usable answer.
        note: how many of them there are, and why; "" without any.
        link: the address of its report.
        report: None if it has not begun.
    """

    name: str
    state: str
    filtered: int
    unusable: int
    note: str
    link: str
    report: Report | None


def page_of_chain(
    output: str, state: str, steps: Sequence[StepFigures], next_command: str | None
) -> str:
    """Return the page.

    Args:
        output: the path of the chain's table.
        next_command: completes the chain, if there is anything to do.
    """
    table = Table("Steps", _HEADS, [_row(step) for step in steps], frozenset(range(2, len(_HEADS))))
    return (
        environment()
        .get_template("chain.html.j2")
        .render(
            output=output,
            state=state,
            steps=table,
            notes=[f"{step.name}: {step.note}" for step in steps if step.note],
            next_command=next_command,
            written=utc_now(),
        )
    )


def _row(step: StepFigures) -> tuple[object, ...]:
    report = step.report
    if report is None:
        return (step.name, step.state, *[""] * (len(_HEADS) - 2))
    counts, tokens = report.counts, report.tokens
    return (
        Markup('<a href="{}">{}</a>').format(step.link, step.name),
        step.state,
        number(counts.total),
        number(counts.completed),
        number(counts.failed),
        number(step.unusable),
        number(step.filtered),
        number(tokens.prompt),
        number(tokens.completion),
        duration_text(report.times.job_seconds),
        f"{report.use.gpu_hours:.2f}",
    )
