"""The problems of an input: bad lines by number, equal problems grouped."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from aiflux.errors import InputError
from aiflux.util.lines import line_numbers
from aiflux.util.text import joined

SHOWN_PROBLEMS = 20
_SHOWN_LINES = 20
# Files that hold data rather than requests, and the converter that reads them.
_CONVERTED = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json"}


@dataclass
class Group:
    """The lines that have one problem.

    Attributes:
        count: how many lines.
        offsets: byte offsets of the first ``_SHOWN_LINES`` of them.
    """

    count: int = 0
    offsets: list[int] = field(default_factory=list)

    def add(self, count: int, offsets: list[int]) -> None:
        """Add further lines with the same problem."""
        self.count += count
        self.offsets = sorted([*self.offsets, *offsets])[:_SHOWN_LINES]


@dataclass
class Problems:
    """Bad lines: the first ``SHOWN_PROBLEMS`` different problems in full, the rest as a count.

    Memory stays bounded however many lines are bad: problems that come late are only counted.
    """

    lines: int = 0
    _groups: dict[str, Group] = field(default_factory=dict)

    def add(self, offset: int, problem: str) -> None:
        """Record a problem of the line that starts at byte ``offset``."""
        self._add(problem, 1, [offset])

    def merge(self, other: Problems) -> None:
        """Add the bad lines of another part of the same input."""
        for problem, group in other._groups.items():
            self._add(problem, group.count, group.offsets)
        self.lines += other.lines - sum(group.count for group in other._groups.values())

    def error(self, path: Path) -> InputError:
        """Return the error that names the lines.

        Raises:
            OSError: the input cannot be read.
        """
        self._trim()
        offsets = sorted({offset for group in self._groups.values() for offset in group.offsets})
        numbers = dict(zip(offsets, line_numbers(path, offsets), strict=True))
        texts = [f"{_where(group, numbers)}: {text}" for text, group in self._groups.items()]
        rest = self.lines - sum(group.count for group in self._groups.values())
        if rest:
            texts.append(f"... and {rest} more")
        noun = "line is" if self.lines == 1 else "lines are"
        return InputError(
            f"{self.lines} {noun} wrong in {str(path)!r}; nothing was sent",
            _remedy(path),
            tuple(texts),
        )

    def _add(self, problem: str, count: int, offsets: list[int]) -> None:
        self.lines += count
        self._groups.setdefault(problem, Group()).add(count, offsets)
        if len(self._groups) > 8 * SHOWN_PROBLEMS:
            self._trim()

    def _trim(self) -> None:
        ranked = sorted(self._groups.items(), key=lambda item: item[1].offsets)
        self._groups = dict(ranked[:SHOWN_PROBLEMS])


def _remedy(path: Path) -> str:
    kind = _CONVERTED.get(path.suffix.lower())
    if kind is None:
        return "correct the input and run the same command again"
    return f"turn it into requests first: aiflux convert {kind} --input {shlex.quote(str(path))}"


def _where(group: Group, numbers: dict[int, int]) -> str:
    """Return the lines of a group: ``line 3``, ``lines 1 and 4``, ``lines 1, 2 and 998 more``."""
    shown = [f"{numbers[offset]:,}" for offset in group.offsets]
    more = group.count - len(shown)
    listed = joined([*shown, f"{more:,} more"] if more else shown)
    return f"{'line' if group.count == 1 else 'lines'} {listed}"
