"""The first answers of a run as they come, one line each: for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

from rich.text import Text

from aiflux.converters.results.answers import prompt_text
from aiflux.core.batch.request import parse_json
from aiflux.core.batch.results_file import Result
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import RawResult, is_part, split_line, valid_line
from aiflux.util.lines import read_lines
from aiflux.util.text import terminal_line
from aiflux.worker.progress import TerminalReporter
from aiflux.worker.stats import Stats

_MOST = 5
_REQUESTS = 200  # the first answers are to some of the first requests
_ID_WIDTH = 16
_KEPT = 500  # characters, more than a line of a terminal has


class FirstAnswers:
    """Reads the first answers of a run from its journals.

    Args:
        requests: the input of the run.
        prefix: beginning of all prompts, which is not shown.
    """

    def __init__(self, run: RunDirectory, requests: Path, prefix: str = "") -> None:
        self._run = run
        self._requests = requests
        self._prefix = prefix
        self._prompts: dict[str, str] | None = None
        self._read: dict[Path, int] = {}
        self._found: list[tuple[str, str, Result]] = []

    def lines(self, width: int) -> list[Text]:
        """Return the lines of the answers so far, below a heading; nothing if there are none."""
        self.look()
        rows = [self.line(at, width) for at in range(len(self._found))]
        return [Text(""), Text("first answers", style="dim"), *rows] if rows else []

    def look(self) -> int:
        """Read what was added to the journals; return the number of answers to show."""
        if len(self._found) < _MOST:
            for journal in sorted(self._run.path.glob("journal/shard-*.jsonl")):
                for result in islice(self._added(journal), _MOST - len(self._found)):
                    self._found.append(self._entry(result))
        return len(self._found)

    def _added(self, journal: Path) -> Iterator[RawResult]:
        with open(journal, "rb") as file:
            file.seek(self._read.get(journal, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is being written
                self._read[journal] = self._read.get(journal, 0) + len(line)
                if valid_line(line) and not is_part(line):
                    yield split_line(line)

    def _entry(self, result: RawResult) -> tuple[str, str, Result]:
        name = json.loads(result.custom_id)
        error = json.loads(result.error)
        body = None if error else json.loads(result.body)
        return name, self._prompt(name), Result(name, None, body, error)

    def _prompt(self, name: str) -> str:
        if self._prompts is None:
            first = islice(read_lines(self._requests), _REQUESTS)
            requests = [parse_json(raw.decode("utf-8")) for _, _, raw in first]
            self._prompts = {
                each["custom_id"]: self._shortened(prompt_text(each["body"])) for each in requests
            }
        return self._prompts.get(name, "")

    def _shortened(self, prompt: str) -> str:
        text = prompt.removeprefix(self._prefix) or prompt
        return " ".join(text[:_KEPT].split())

    def line(self, at: int, width: int) -> Text:
        """Return one answer as a line: custom_id, prompt, answer."""
        name, prompt, entry = self._found[at]
        text = entry.failure if entry.error else entry.text
        ids = min(_ID_WIDTH, max(len(each[0]) for each in self._found))
        rest = max(20, width - ids - 7)
        parts = (
            (name, "cyan", ids),
            (prompt, "dim", rest * 2 // 5),
            (text, "red" if entry.error else "", rest - rest * 2 // 5),
        )
        line = Text("  ")
        for words, style, space in parts:
            part = Text(terminal_line(" ".join(words[:_KEPT].split())), style=style)
            part.truncate(space, overflow="ellipsis", pad=True)
            line.append_text(part).append("  ")
        line.rstrip()
        return line


class AnswersReporter(TerminalReporter):
    """Shows the first answers above the progress bar."""

    def __init__(self, stream: TextIO, first: FirstAnswers) -> None:
        super().__init__(stream)
        self._first = first
        self._printed = 0

    def show(self, stats: Stats, *, final: bool = False) -> None:
        """Print the answers that came since, and update the bar."""
        for at in range(self._printed, self._first.look()):
            if not at:
                self._console.print("first answers", style="dim")
            self._console.print(self._first.line(at, self._console.width), soft_wrap=True)
            self._printed = at + 1
        super().show(stats, final=final)
