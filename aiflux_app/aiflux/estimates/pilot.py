"""A pilot run: a sample of a run's requests, spread over the input and processed first."""

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
FEWEST = 2  # a single request shows no variation
_SEED = 4
_FEW_STRATA = 10


@dataclass(frozen=True)
class Pilot:
    """Files of a pilot; ``folder`` is ``<output>.pilot``. Inside, the pilot is an ordinary run."""

    folder: Path

    @classmethod
    def of_output(cls, output: Path) -> Pilot:
        """Return the pilot for the output of a full run."""
        return cls(output.with_name(output.name + ".pilot"))

    @property
    def input(self) -> Path:
        """The sampled requests."""
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
        """The settings and sample of the pilot."""
        return self.folder / "pilot.json"

    @property
    def estimate(self) -> Path:
        """The estimate made from the pilot."""
        return self.folder / "estimate.json"

    def drawn(self, settings: dict[str, Any]) -> Drawn | None:
        """Return the sample of a pilot with exactly these settings, or None."""
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
            drawn = Drawn(**content["drawn"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return drawn if content["settings"] == json.loads(json.dumps(settings)) else None

    def done(self) -> bool:
        """Return whether every request of the pilot has a result."""
        return self.run.plan.exists() and all_done(read_plan(self.run), self.run)

    def begin(self, summary: InputSummary, count: int, settings: dict[str, Any]) -> Drawn:
        """Remove an earlier pilot, draw a new sample and store it.

        Raises:
            RunConflictError: a process is still working on the earlier pilot.
            StorageError: the directory cannot be written.
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
    """A sample of the input.

    Attributes:
        requests: number of requests in the sample.
        bytes: total size of the request lines of the full input.
    """

    requests: int
    bytes: int


def chosen(requests: int, count: int) -> list[int]:
    """Return the indexes of the requests to sample, in order and reproducibly.

    One request is drawn at random from each of ``count`` parts of equal length, so that every part
    of the input is represented. Very short parts would differ too much in length for equal chances;
    then all requests are drawn from the whole input.
    """
    source = Random(_SEED)
    if requests < _FEW_STRATA * count:
        return sorted(source.sample(range(requests), min(count, requests)))
    edges = [requests * number // count for number in range(count + 1)]
    return [source.randrange(low, high) for low, high in pairwise(edges)]


def _draw(summary: InputSummary, count: int, target: Path) -> Drawn:
    """Copy the sampled lines unchanged, in one pass over the input."""
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
