"""The form of a run's report: everything that the page shows, and ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aiflux.core.config.run_options import left_open
from aiflux.estimates.estimate import ComparedFigure
from aiflux.report.journal_summary import Example
from aiflux.report.throughput import Throughput

FORM = 1


@dataclass(frozen=True)
class Condition:
    """How the run is, in the words of ``aiflux status``.

    Attributes:
        state: e.g. ``running``, ``stopped``, ``finished``.
        ended: nothing works on it, and nothing will without a user.
        finished: the output is written.
        next_command: what brings it to its end; None where nothing is to do.
        shards: the state of each shard.
        reasons: why each shard is not done, as far as that is known; "" where it is.
    """

    state: str
    ended: bool
    finished: bool
    next_command: str | None
    shards: tuple[str, ...]
    reasons: tuple[str, ...] = ()
    submitted: str | None = None
    jobs: tuple[str, ...] = ()
    image: str | None = None
    slurm: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Model:
    """A model of the run, and the digests that its engines gave it (more than one: it changed)."""

    name: str
    results: int
    digests: tuple[str, ...]


@dataclass(frozen=True)
class What:
    """What ran.

    Attributes:
        image: what is inside (``aiflux image info``); None outside an image.
        engines: kind and version of the engines, and how many there are of each.
        gpus, hosts: how many of each (GPUs as the last start of each shard saw them).
        options: those that differ from their defaults.
        slurm: what was asked of Slurm.
        sealed: None where no worker has said so yet.
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

    @property
    def advised(self) -> dict[str, dict[str, Any]]:
        """What was filled in for each model where neither a request nor the run set it."""
        return left_open(self.options.get("model_defaults") or {}, self.parameters)


@dataclass(frozen=True)
class RequestCounts:
    """Requests. ``recorded`` counts every result, ``superseded`` those that were tried again."""

    total: int
    completed: int
    failed: int
    left: int
    allowed_failures: int
    recorded: int
    superseded: int
    cut_at_limit: int
    truncated_prompts: int
    unfit_answers: int
    empty_answers: Mapping[str, int]


@dataclass(frozen=True)
class Times:
    """Moments (UTC), and seconds.

    Attributes:
        span_seconds: from the first to the last result.
        job_seconds: of all jobs together, loading included.
        starts: of workers, all shards together.
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
    """Tokens of the recorded results, as the engines counted them."""

    prompt: int
    completion: int
    per_answer: float


@dataclass(frozen=True)
class Latency:
    """Seconds of the attempts that answers came of; ``quantiles`` by percent, right to 1 %."""

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
    """One engine of one shard; ``in_flight`` is the average over the jobs' whole time."""

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
class Use:
    """How the machines were used.

    Attributes:
        in_flight: requests in flight in an engine, averaged over the jobs' whole time.
        slots: per engine, on average; None where they are unknown.
        slot_use: time of the results over slots times the jobs' time, at most 1 for each engine.
        gpu_utilization: mean and highest percent that nvidia-smi told; None without samples.
        gpu_memory: mean, highest and whole MiB of a GPU.
        gpu_samples: how many samples these come from.
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
    """Everything the page shows; ``to_json`` is what ``--json`` prints."""

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
    estimate: tuple[ComparedFigure, ...]
    use: Use

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return asdict(self)
