"""Fields of a body that Ollama's OpenAI API accepts without a word and does not obey."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiflux.util.text import counted, joined

SHOWN_LINES = 5
# Fields that the OpenAI API of Ollama 0.33 does not read, and what happens instead.
_INSTEAD = {
    "n": "each gets one answer",
    "tool_choice": "the model decides whether it calls a tool",
    "logit_bias": "tokens keep their probabilities",
    "top_k": "the model's own value is used",
    "user": "it has no effect",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {"n": (1,), "tool_choice": ("auto",)}
_NAMES = _INSTEAD.keys()


@dataclass(frozen=True)
class IgnoredField:
    """The number of requests that set a field which is ignored, and the lines of the first ones."""

    requests: int
    lines: tuple[int, ...]


@dataclass
class IgnoredFields:
    """How many requests set such a field, and where the first ones start in the input."""

    counts: Counter[str] = field(default_factory=Counter)
    offsets: dict[str, list[int]] = field(default_factory=dict)

    def add(self, body: Mapping[str, Any], offset: int) -> None:
        """Note those of one request, whose line starts at ``offset``."""
        for name in _NAMES & body.keys():
            value = body[name]
            if value not in (None, {}, *_HARMLESS.get(name, ())):
                self.counts[name] += 1
                first = self.offsets.setdefault(name, [])
                if len(first) < SHOWN_LINES:
                    first.append(offset)

    def merge(self, other: IgnoredFields) -> None:
        """Add those of the part of the input that follows."""
        self.counts.update(other.counts)
        for name, offsets in other.offsets.items():
            self.offsets[name] = [*self.offsets.get(name, ()), *offsets][:SHOWN_LINES]


def ignored_texts(ignored: Mapping[str, IgnoredField]) -> Iterator[str]:
    """Yield one warning for each field."""
    for name, found in sorted(ignored.items()):
        lines, requests = found.lines, found.requests
        more = ["..."] if requests > len(lines) else []
        where = ", ".join([*map(str, lines), *more]) if more else joined([*map(str, lines)])
        noun = "line" if requests == 1 else "lines"
        yield (
            f"Ollama ignores {name!r} in {counted(requests, 'request')} ({noun} {where}): "
            f"{_INSTEAD.get(name, 'it has no effect')}"
        )


FIX = (
    "leave it out (for several answers, write several requests), or use a server that obeys it: "
    "--engine-url URL"
)
