"""Count the fields of bodies that an engine accepts but ignores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiflux.util.text import counted, joined

SHOWN_LINES = 5


@dataclass(frozen=True)
class FieldRule:
    """A field that an engine ignores.

    Attributes:
        instead: what happens instead.
        harmless: values that request exactly that.
    """

    instead: str
    harmless: tuple[Any, ...] = ()


FieldRules = Mapping[str, FieldRule]


@dataclass(frozen=True)
class IgnoredField:
    """The number of requests that set an ignored field, and the lines of the first ones."""

    requests: int
    lines: tuple[int, ...]


@dataclass
class IgnoredFields:
    """The number of requests with ignored fields, and the offsets of the first ones."""

    counts: Counter[str] = field(default_factory=Counter)
    offsets: dict[str, list[int]] = field(default_factory=dict)

    def add(self, body: Mapping[str, Any], offset: int, rules: FieldRules) -> None:
        """Add the ignored fields of one request, whose line starts at ``offset``."""
        for name in rules.keys() & body.keys():
            if body[name] not in (None, {}, *rules[name].harmless):
                self.counts[name] += 1
                first = self.offsets.setdefault(name, [])
                if len(first) < SHOWN_LINES:
                    first.append(offset)

    def merge(self, other: IgnoredFields) -> None:
        """Add the fields of the following part of the input."""
        self.counts.update(other.counts)
        for name, offsets in other.offsets.items():
            self.offsets[name] = [*self.offsets.get(name, ()), *offsets][:SHOWN_LINES]


def ignored_texts(
    ignored: Mapping[str, IgnoredField], engine: str, rules: FieldRules
) -> Iterator[str]:
    """Yield one warning for each field.

    Args:
        engine: the engine's name in messages.
        rules: of the engine; other fields are skipped.
    """
    for name in sorted(ignored.keys() & rules.keys()):
        lines, requests = ignored[name].lines, ignored[name].requests
        more = ["..."] if requests > len(lines) else []
        where = ", ".join([*map(str, lines), *more]) if more else joined([*map(str, lines)])
        noun = "line" if requests == 1 else "lines"
        yield (
            f"{engine} ignores {name!r} in {counted(requests, 'request')} ({noun} {where}): "
            f"{rules[name].instead}"
        )


FIX = (
    "leave it out (for several answers, write several requests), or use a server that supports it: "
    "--engine-url URL"
)
