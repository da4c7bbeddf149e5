"""A pilot run: a sample of a run's requests, spread over the input, and its throughput.

The throughput is measured from the end times and durations in the journal.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from pathlib import Path
from random import Random
from typing import Any

from aiflux.core.batch.input_file import InputSummary, digest_of_lines
from aiflux.core.batch.results_file import token_counts
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import CUT, RawResult, missing_results
from aiflux.core.runs.output import iterate_results
from aiflux.core.runs.plan import Plan, read_plan
from aiflux.core.runs.status_file import all_done
from aiflux.errors import InputError
from aiflux.util.files import atomic_write, storage_error, write_json
from aiflux.util.lease import refuse_living
from aiflux.util.lines import read_lines
from aiflux.util.times import unix_seconds

REQUESTS = 100
FEWEST = 2  # a single request shows no variation
_SEED = 4
_FEW_STRATA = 10
# Prompts are processed many tokens at a time. The figure only weighs requests relatively.
_PROMPT_TOKENS_PER_ANSWER_TOKEN = 20
_SHORTEST = 1e-3
_FULL_SHARE = 0.1
_NEARLY = 0.9


@dataclass(frozen=True)
class Pilot:
    """Files of a pilot. Inside ``folder``, the pilot is an ordinary run.

    The folder is ``<output>.pilot``, or ``<output>.pilot-KIND`` for one of several engines.
    """

    folder: Path

    @classmethod
    def of_output(cls, output: Path, engine: str | None = None) -> Pilot:
        """Return the pilot for the output of a full run.

        Args:
            engine: its kind, if several engines are compared.
        """
        return cls(output.with_name(output.name + (f".pilot-{engine}" if engine else ".pilot")))

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

    def digest(self) -> str:
        """Return the digest of the sampled requests.

        Raises:
            InputError: the sample cannot be read.
        """
        return digest_of_lines(self.input).hexdigest()

    def done(self) -> bool:
        """Return whether the pilot is recorded as finished."""
        return self.run.plan.exists() and all_done(read_plan(self.run), self.run)

    def whole(self) -> bool:
        """Return whether the journals have a result for every request; reads them."""
        try:
            return not missing_results(read_plan(self.run), self.run)
        except InputError:
            return False

    def begin(
        self,
        summary: InputSummary,
        count: int,
        settings: dict[str, Any],
        same: tuple[Pilot, Drawn] | None = None,
    ) -> Drawn:
        """Remove an earlier pilot, draw a new sample and store it.

        Args:
            same: a pilot whose sample was just drawn from the same input, to be copied.

        Raises:
            RunConflictError: a process is still working on the earlier pilot.
            StorageError: the directory cannot be written.
        """

        def draw(target: Path) -> Drawn:
            if same is not None:
                return _copy(*same, target)
            return draw_requests(summary.path, summary.requests, count, target)

        return self.begin_with(settings, draw)

    def begin_with(self, settings: dict[str, Any], draw: Callable[[Path], Drawn]) -> Drawn:
        """Remove an earlier pilot, write a new sample and store it; see ``begin``.

        Args:
            draw: writes the sample to a file.
        """
        refuse_living([*self.run.path.glob(".*.lease")], f"the sample in {self.folder}")
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if self.run.path.exists():
                shutil.rmtree(self.run.path)
            for path in (self.record, self.output, self.estimate):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self.folder) from error
        drawn = draw(self.input)
        write_json(self.record, {"settings": settings, "drawn": vars(drawn)})
        return drawn


@dataclass(frozen=True)
class Drawn:
    """A sample of the input.

    Attributes:
        requests: number of requests in the sample.
        bytes: total size of the request lines of the full input.
        whole: number of requests of the full input; 0 if the plan of the full run has it.
    """

    requests: int
    bytes: int
    whole: int = 0


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


def draw_requests(path: Path, requests: int, count: int, target: Path) -> Drawn:
    """Copy the sampled lines unchanged, in one pass over the input.

    Args:
        requests: number of lines of the input.
    """
    wanted = iter(chosen(requests, count))
    following = next(wanted, None)
    drawn = size = 0
    with atomic_write(target, 0o600) as file:
        for index, (_, _, line) in enumerate(read_lines(path)):
            size += len(line)
            if index == following:
                file.write(line + b"\n")
                drawn += 1
                following = next(wanted, None)
    return Drawn(drawn, size)


def _copy(pilot: Pilot, drawn: Drawn, target: Path) -> Drawn:
    with open(pilot.input, "rb") as source, atomic_write(target, 0o600) as file:
        shutil.copyfileobj(source, file)
    return drawn


@dataclass(frozen=True)
class Observation:
    """A pilot request and its result.

    Attributes:
        began, ended: Unix time of its last attempt.
        size: bytes of the request's line.
        error: code and message; None for success.
        cut: the answer reached the token limit.
        filtered: a content filter stopped the answer.
        truncated: the engine cut the prompt.
    """

    model: str
    began: float
    ended: float
    prompt_tokens: int
    completion_tokens: int
    size: int
    error: str | None = None
    cut: bool = False
    filtered: bool = False
    truncated: bool = False

    @property
    def seconds(self) -> float:
        """Duration of the last attempt."""
        return self.ended - self.began

    @property
    def work(self) -> float:
        """Its share of the engine's work, in generated tokens."""
        return self.completion_tokens + self.prompt_tokens / _PROMPT_TOKENS_PER_ANSWER_TOKEN


@dataclass(frozen=True)
class Pace:
    """Throughput of one model while the engines were as busy as they became.

    Attributes:
        in_flight: number of requests in flight in that time.
        costs: seconds of the job that each request accounts for, in request order.
    """

    in_flight: int
    costs: tuple[float, ...]


def observe(plan: Plan, run: RunDirectory) -> tuple[Observation, ...]:
    """Read the results of a run so far, in input order."""
    found = iterate_results(plan, run, partial=True)
    return tuple(_observation(len(raw), result) for raw, result in found)


def _observation(size: int, result: RawResult) -> Observation:
    metadata = json.loads(result.metadata)
    prompt_tokens, completion_tokens = _tokens(result.body)
    ended = unix_seconds(metadata["timestamp"])
    error = json.loads(result.error)
    return Observation(
        model=metadata["model"],
        began=ended - max(float(metadata["processing_time"]), _SHORTEST),
        ended=ended,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        size=size,
        error=None if error is None else f"{error['code']}: {error['message']}",
        cut=bool(metadata.get(CUT["length"])),
        filtered=bool(metadata.get(CUT["content_filter"])),
        truncated=bool(metadata.get("truncated_prompt")),
    )


def _tokens(body: bytes) -> tuple[int, int]:
    try:
        content = json.loads(body)
    except ValueError:
        return 0, 0
    return token_counts(content.get("usage")) if isinstance(content, dict) else (0, 0)


def start_up(observations: Sequence[Observation], started: float) -> float:
    """Return the startup seconds in which nothing was in flight.

    These are the times before the first request, and between the models of a run.

    Args:
        started: Unix time of the start.
    """
    own = [item for item in observations if item.began >= started]
    if not own:
        return 0.0
    first = min(item.began for item in own)
    several = len({item.model for item in own}) > 1
    idle = sum(end - begin for begin, end, count in _levels(own) if count == 0)
    return first - started + (idle if several else 0.0)


def pace(observations: Sequence[Observation]) -> Pace:
    """Return the throughput of the requests of one model.

    A request's work is spread evenly over its time in flight. The speed is the work done between
    the first and the last moment at which the engines were full. So neither draining at the end nor
    the mix of long and short requests in the pilot distorts it. Pauses with nothing in flight
    (requeued job, restarted engine) are excluded.
    """
    levels = [level for level in _levels(observations) if level[2]]
    full = _full(levels)
    low = min(begin for begin, _, count in levels if count >= _NEARLY * full)
    high = max(end for _, end, count in levels if count >= _NEARLY * full)
    seconds = sum(_overlap(begin, end, low, high) for begin, end, _ in levels)
    shares = [_overlap(item.began, item.ended, low, high) / item.seconds for item in observations]
    works = [item.work for item in observations]
    done = sum(map(mul, works, shares))
    if not done:  # no tokens are reported, or only failed requests filled the engines
        works = [1.0] * len(works)
        done = sum(shares)
    return Pace(full, tuple(work * seconds / done for work in works))


@dataclass(frozen=True)
class SteadyRates:
    """Throughput while a constant number of requests was in flight.

    Attributes:
        seconds: the time that is measured.
        requests, tokens: per second.
    """

    seconds: float
    requests: float
    tokens: float


def steady_rates(observations: Sequence[Observation], in_flight: int) -> SteadyRates | None:
    """Return the throughput between the first turnover and the last request that was sent.

    All requests of the first turnover start together, so the engine's queue is not as it is later.
    After it, what is in flight at the start and at the end of the time is alike, however long
    requests wait in the engine before it processes them. Pauses are left out.

    Returns:
        None if there are too few requests.
    """
    ends = sorted(item.ended for item in observations)
    low, high = ends[min(in_flight, len(ends)) - 1], max(item.began for item in observations)
    seconds = sum(
        _overlap(begin, end, low, high) for begin, end, count in _levels(observations) if count
    )
    if seconds <= 0:
        return None
    shares = [_overlap(item.began, item.ended, low, high) / item.seconds for item in observations]
    tokens = sum(
        item.completion_tokens * share for item, share in zip(observations, shares, strict=True)
    )
    return SteadyRates(seconds, sum(shares) / seconds, tokens / seconds)


def _overlap(begin: float, end: float, low: float, high: float) -> float:
    return max(0.0, min(end, high) - max(begin, low))


def _levels(observations: Iterable[Observation]) -> Iterator[tuple[float, float, int]]:
    """Yield time spans with the number of requests in flight in them."""
    events = [(item.began, 1) for item in observations]
    events += [(item.ended, -1) for item in observations]
    events.sort()
    count = 0
    for (moment, change), (following, _) in pairwise(events):
        count += change
        if following > moment:
            yield moment, following, count


def most_in_flight(observations: Iterable[Observation]) -> int:
    """Return the largest number of requests in flight."""
    return max((count for _, _, count in _levels(observations)), default=0)


def _full(levels: Sequence[tuple[float, float, int]]) -> int:
    """Return the number of requests in flight for at least a tenth of the time.

    The maximum is no measure: times are rounded, so a request may seem to start before its
    predecessor ended.
    """
    left = _FULL_SHARE * sum(end - begin for begin, end, _ in levels)
    ranked = sorted(levels, key=lambda level: -level[2])
    for begin, end, count in ranked:
        left -= end - begin
        if left <= 0:
            return count
    return ranked[-1][2]
