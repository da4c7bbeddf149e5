"""The outcome of asking a sample again, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from aiflux.cli.render.run import one_line
from aiflux.estimates.verification import Agreement, Verification, Versions
from aiflux.models.name import shown_digest
from aiflux.util.text import counted, joined


def verification_lines(found: Verification, answers: int, seed: int) -> Iterator[Text]:
    """Yield the lines.

    Args:
        answers: number of the run's answers, of which the sample was drawn with ``seed``.
    """
    yield Text(f"asked {found.requests:,} of {counted(answers, 'answer')} again (seed {seed})")
    if found.fixed.compared:
        style = "green" if found.fixed.identical == found.fixed.compared else "yellow"
        yield Text(f"identical: {_counts(found.fixed)}", style=style)
    if found.sampled.compared:
        yield Text(f"sampled without a seed: {_counts(found.sampled)} identical; these may differ")
    if found.failed:
        yield Text(f"failed this time: {counted(found.failed, 'request')}", style="red")
    for model in found.models:
        yield _model(model)
    yield _engine(found.engine)
    for each in found.differences:
        yield Text(f"{one_line(each.custom_id)} differs at {one_line(each.place)}")
        yield Text(f"  before: {one_line(each.before)}")
        yield Text(f"  now:    {one_line(each.now)}")


def _counts(found: Agreement) -> str:
    return f"{found.identical:,} of {found.compared:,} ({100 * (found.share or 0):.4g} %)"


def _model(found: Versions) -> Text:
    if found.same:
        digests = joined([shown_digest(digest) for digest in found.now])
        return Text(f"model {found.name}: the same ({digests})")
    return Text(f"model {found.name}: unknown whether it is the same", style="yellow")


def _engine(found: Versions) -> Text:
    if found.same is None:
        return Text("engine: unknown whether it is the same version", style="yellow")
    if found.same:
        return Text(f"engine: the same version ({joined(found.now)})")
    return Text(
        f"engine: version {joined(found.before)} before, {joined(found.now)} now; another version "
        "can give other answers",
        style="yellow",
    )
