"""HTML from Python values: what is not markup already is escaped. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_VOID = {"meta", "br", "hr"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: str | None) -> Markup:
    """Return an element.

    Args:
        children: text, which is escaped, or markup.
        attributes: ``class_`` stands for ``class``, ``aria_label`` for ``aria-label``; None leaves
            one out.
    """
    given = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Markup:
    """Return text and markup one after the other."""
    return Markup(
        "".join(each if isinstance(each, Markup) else escape(str(each)) for each in children)
    )


def table(
    name: str, heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()
) -> Markup:
    """Return a table that scrolls by itself where it is too wide, by the keyboard too.

    Args:
        name: what those hear who do not see it.
        heads: "" over a column that only shows what another one tells.
        numbers: columns that hold figures, and stand to the right.
    """
    right = set(numbers)

    def kind(at: int) -> str | None:
        return "number" if at in right else None

    head = [
        element("th", text, scope="col", class_=kind(at)) if text else element("td")
        for at, text in enumerate(heads)
    ]
    body = [
        element("tr", *(element("td", cell, class_=kind(at)) for at, cell in enumerate(row)))
        for row in rows
    ]
    made = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", made, class_="scroll", role="region", aria_label=name, tabindex="0")


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Return names and what they are, those that are empty left out."""
    parts = [
        element("div", element("dt", name), element("dd", value)) for name, value in pairs if value
    ]
    return element("dl", *parts)
