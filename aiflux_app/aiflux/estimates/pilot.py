"""A pilot: some of a run's requests, spread over its whole input, done first to tell the rest."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from aiflux.core.batch.input_file import InputSummary
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import all_done
from aiflux.util.files import atomic_write, storage_error, write_json
from aiflux.util.lease import refuse_living
from aiflux.util.lines import read_lines

REQUESTS = 100
FEWEST = 2  # one does not tell how requests differ
_SEED = 4
_FEW_STRATA = 10


@dataclass(frozen=True)
class Pilot:
    """The files of a pilot; ``folder`` is ``<output>.pilot``. It is an ordinary run in there."""

    folder: Path

    @classmethod
    def of_output(cls, output: Path) -> Pilot:
        """Return the pilot that belongs to the output of the whole run."""
        return cls(output.with_name(output.name + ".pilot"))

    @property
    def input(self) -> Path:
        """The requests that were drawn."""
        return self.folder / "input.jsonl"

    @property
    def output(self) -> Path:
        """The pilot's own output."""
        return self.folder / "results.json"

    @property
    def run(self) -> RunDirectory:
        """The pilot's own run directory."""
        return RunDirectory.of_output(self.output)

    @property
    def record(self) -> Path:
        """What the pilot was made of."""
        return self.folder / "pilot.json"

    @property
    def estimate(self) -> Path:
        """What it said the whole would take."""
        return self.folder / "estimate.json"

    def drawn(self, settings: dict[str, Any]) -> Drawn | None:
        """Return what was drawn for a pilot of these very settings; None where it was not."""
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
            drawn = Drawn(**content["drawn"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return drawn if content["settings"] == json.loads(json.dumps(settings)) else None

    def done(self) -> bool:
        """Tell whether every request of the pilot has its result."""
        return self.run.plan.exists() and all_done(read_plan(self.run), self.run)

    def begin(self, summary: InputSummary, count: int, settings: dict[str, Any]) -> Drawn:
        """Throw away what an earlier pilot left, draw requests and write them down.

        Raises:
            RunConflictError: a process works on the earlier pilot.
            StorageError: the folder cannot be written.
        """
        refuse_living([*self.run.path.glob(".*.lease")], f"the pilot {self.folder}")
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if self.run.path.exists():
                shutil.rmtree(self.run.path)
            for path in (self.record, self.output, self.estimate):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self.folder) from error
        drawn = _draw(summary, count, self.input)
        write_json(self.record, {"settings": settings, "drawn": vars(drawn)})
        return drawn


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
        requests: how many requests the pilot has.
        bytes: size of all request lines of the whole input.
    """

    requests: int
    bytes: int


def chosen(requests: int, count: int) -> list[int]:
    """Return the indexes of the requests to draw, in order; the same ones every time.

    One is drawn at random from each of ``count`` parts of equal length, so that every stretch of
    the input has its share; where the parts would be short, their lengths would differ too much
    for equal chances, and all are drawn from the whole.
    """
    source = Random(_SEED)
    if requests < _FEW_STRATA * count:
        return sorted(source.sample(range(requests), min(count, requests)))
    edges = [requests * number // count for number in range(count + 1)]
    return [source.randrange(low, high) for low, high in pairwise(edges)]


def _draw(summary: InputSummary, count: int, target: Path) -> Drawn:
    """Copy the chosen lines byte for byte, in one pass over the input."""
    wanted = iter(chosen(summary.requests, count))
    following = next(wanted, None)
    drawn = size = 0
    with atomic_write(target, 0o600) as file:
        for index, (_, _, line) in enumerate(read_lines(summary.path)):
            size += len(line)
            if index == following:
                file.write(line + b"\n")
                drawn += 1
                following = next(wanted, None)
    return Drawn(drawn, size)
