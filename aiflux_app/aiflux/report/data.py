"""The data of a report: what the page shows and ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aiflux.core.config.settings import left_open
from aiflux.core.runs.status_file import Tuning
from aiflux.estimates.energy import EnergyFigures
from aiflux.estimates.estimate import ComparedFigure
from aiflux.report.journal_summary import Example, Throughput

FORM = 1


@dataclass(frozen=True)
class Condition:
    """The state of the run, in the words of ``aiflux status``.

    Attributes:
        state: e.g. ``running``, ``stopped``, ``finished``.
        ended: nothing works on it, and nothing will without the user.
        finished: the output is written.
        next_command: command that completes the run; None if there is nothing to do, or an option
            has to be corrected first.
        remedy: what to do about a failure; "" if there is none, or nothing is known.
        shards: the state of each shard.
        reasons: why each shard is not done; "" if it is, or if the reason is unknown.
    """

    state: str
    ended: bool
    finished: bool
    next_command: str | None
    shards: tuple[str, ...]
    reasons: tuple[str, ...] = ()
    remedy: str = ""
    submitted: str | None = None
    jobs: tuple[str, ...] = ()
    image: str | None = None
    slurm: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Model:
    """A model of the run, and its digests according to the engines (several if it changed).

    After ``--force-resume``, also one that only earlier starts used.
    """

    name: str
    results: int
    digests: tuple[str, ...]


@dataclass(frozen=True)
class What:
    """The setup of the run.

    Attributes:
        image: content of the image (``aiflux image info``); None outside an image.
        engines: kind and version of the engines, with the number of each.
        gpus: names, with the number of each at the last start of each shard.
        options: those that differ from their defaults.
        slurm: the Slurm options.
        mixed: what is mixed in the results of several starts, e.g. models; "" if nothing is.
        earlier: settings of earlier starts that differ; see ``EarlierPlan``.
        sealed: whether all starts had no network; None if that is unknown, as before the first.
        unsealed: why it is not true.
    """

    run_dir: str
    output: str
    input: Mapping[str, Any]
    plan: str
    models: tuple[Model, ...]
    image_path: str | None
    image: Mapping[str, Any] | None
    engines: Mapping[str, int]
    aiflux: tuple[str, ...]
    gpus: Mapping[str, int]
    hosts: tuple[str, ...]
    sealed: bool | None
    parameters: Mapping[str, Any]
    options: Mapping[str, Any]
    slurm: Mapping[str, Any]
    jobs: tuple[str, ...]
    shards: int
    unsealed: str = ""
    mixed: str = ""
    earlier: tuple[Mapping[str, Any], ...] = ()

    @property
    def advised(self) -> dict[str, dict[str, Any]]:
        """The default parameters of each model that the run leaves open."""
        return left_open(self.options.get("model_defaults") or {}, self.parameters)


@dataclass(frozen=True)
class RequestCounts:
    """Numbers of requests.

    Attributes:
        left_out: those that were not sent because their prompts are too long.
        recorded: all results; ``superseded``: those that were retried.
    """

    total: int
    completed: int
    failed: int
    left_out: int
    left: int
    allowed_failures: int
    recorded: int
    superseded: int
    cut_at_limit: int
    cut_by_filter: int
    truncated_prompts: int
    unfit_answers: int
    empty_answers: Mapping[str, int]


@dataclass(frozen=True)
class Times:
    """Times (UTC), and durations in seconds.

    Attributes:
        span_seconds: from the first to the last result.
        job_seconds: of all jobs together, loading included.
        starts: of the workers of all shards.
    """

    planned: str
    submitted: str | None
    first_result: str | None
    last_result: str | None
    finished: str | None
    span_seconds: float
    job_seconds: float
    starts: int


@dataclass(frozen=True)
class Tokens:
    """Tokens of the recorded results, as counted by the engines."""

    prompt: int
    completion: int
    per_answer: float


@dataclass(frozen=True)
class Latency:
    """Seconds of the attempts that gave the answers; ``quantiles`` are accurate to 1 %."""

    count: int
    mean: float
    lowest: float
    highest: float
    quantiles: Mapping[str, float]
    histogram: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class Failure:
    """One kind of failure."""

    code: str
    count: int
    meaning: str
    remedy: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class ShardRow:
    """One shard."""

    index: int
    state: str
    host: str | None
    job: str | None
    total: int
    completed: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    gpu_hours: float
    starts: int
    tokens_per_second: float
    median_seconds: float
    ended: str | None


@dataclass(frozen=True)
class EngineRow:
    """One engine of a shard; ``in_flight`` is the average over the time of the jobs."""

    shard: int
    engine: int
    where: str
    slots: int | None
    results: int
    failed: int
    completion_tokens: int
    mean_seconds: float
    in_flight: float


@dataclass(frozen=True)
class TunedRow:
    """What ``--tune`` tried and chose for a model in a shard."""

    shard: int
    tuning: Tuning


@dataclass(frozen=True)
class Use:
    """The utilisation of the machines.

    Attributes:
        in_flight: requests in flight in an engine, averaged over the time of the jobs.
        slots: per engine, on average; None where they are unknown.
        slot_use: time of the results over slots times the jobs' time, at most 1 for each engine.
        gpu_utilization: mean and highest percent; None if unknown.
        gpu_memory: mean, highest and total MiB of a GPU.
        gpu_samples: number of samples.
    """

    gpu_hours: float
    in_flight: float
    slots: float | None
    slot_use: float | None
    gpu_utilization: Mapping[str, float] | None
    gpu_memory: Mapping[str, float] | None
    gpu_samples: int
    requests_per_gpu_hour: int | None
    completion_tokens_per_gpu_hour: int | None


@dataclass(frozen=True)
class Report:
    """Everything the page shows; ``to_json`` is what ``--json`` prints.

    Attributes:
        warnings: why figures are incomplete.
    """

    form: int
    written: str
    version: str
    condition: Condition
    what: What
    counts: RequestCounts
    times: Times
    tokens: Tokens
    throughput: Throughput
    latency: Latency
    attempts: Mapping[str, int]
    failures: tuple[Failure, ...]
    shards: tuple[ShardRow, ...]
    engines: tuple[EngineRow, ...]
    tunings: tuple[TunedRow, ...]
    estimate: tuple[ComparedFigure, ...]
    use: Use
    energy: EnergyFigures
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return asdict(self)
