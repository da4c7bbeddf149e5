"""What is wrong in an input, line by line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from aiflux.core.lines import line_numbers
from aiflux.errors import InputError

SHOWN_PROBLEMS = 20


@dataclass
class Problems:
    """Bad lines: the first ``SHOWN_PROBLEMS`` in full, the rest as a count."""

    lines: int = 0
    _shown: list[tuple[int, str]] = field(default_factory=list)

    def add(self, offset: int, problem: str) -> None:
        """Note what is wrong with the line that starts at ``offset``."""
        self.lines += 1
        self._shown.append((offset, problem))
        if len(self._shown) > 8 * SHOWN_PROBLEMS:
            self._trim()

    def merge(self, other: Problems) -> None:
        """Add the bad lines of another part of the same input."""
        self.lines += other.lines
        self._shown += other._shown
        self._trim()

    def error(self, path: Path) -> InputError:
        """Return the error that tells them.

        Raises:
            OSError: the input cannot be read.
        """
        self._trim()
        numbers = line_numbers(path, [offset for offset, _ in self._shown])
        shown = zip(numbers, self._shown, strict=True)
        texts = [f"line {number}: {problem}" for number, (_, problem) in shown]
        if self.lines > len(texts):
            texts.append(f"... and {self.lines - len(texts)} more")
        noun = "line is" if self.lines == 1 else "lines are"
        return InputError(
            f"{self.lines} {noun} wrong in {str(path)!r}; nothing was sent",
            f"correct the input, then try it with: aiflux check {str(path)!r}",
            tuple(texts),
        )

    def _trim(self) -> None:
        self._shown = sorted(self._shown)[:SHOWN_PROBLEMS]
