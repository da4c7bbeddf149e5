"""The status of a shard, and of a whole run: an object in the form of OpenAI's Batch.

Source of the form: https://platform.openai.com/docs/api-reference/batch/object. Fields
that OpenAI's object does not have are under ``aiflux``. A status is replaced atomically.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.core.batch.results_file import errors_path, output_paths
from aiflux.core.config.settings import SKIP, settings_texts
from aiflux.core.runs.directory import RunDirectory, own_command, user_output
from aiflux.core.runs.plan import Plan
from aiflux.errors import OutputExistsError, TooManyFailuresError, UsageError
from aiflux.util.files import checksum, is_there, write_json
from aiflux.util.records import KEY, OMITTED, from_json, read_record, to_json
from aiflux.util.text import counted, whole

WRITE_INTERVAL = 1.0
_FILLED = 2
_NEARLY = 0.9
_MOMENTS = {
    "in_progress": "in_progress_at",
    "finalizing": "finalizing_at",
    "completed": "completed_at",
    "failed": "failed_at",
    "cancelling": "cancelling_at",
    "cancelled": "cancelled_at",
}


@dataclass(frozen=True)
class Counts:
    """Requests of a shard or a run, and those that have a result so far."""

    total: int
    completed: int
    failed: int


@dataclass(frozen=True)
class FailedRequest:
    """A request that failed; ``param`` is its custom_id (the field that OpenAI's form has)."""

    code: str | None = None
    message: str | None = None
    param: str | None = None


@dataclass(frozen=True)
class FailedRequests:
    """The last requests that failed, oldest first."""

    data: tuple[FailedRequest, ...]
    object: str = "list"


@dataclass(frozen=True)
class SlurmJob:
    """The Slurm job in which a worker runs; empty outside one."""

    job: str = field(default="", metadata={**OMITTED, KEY: "SLURM_JOB_ID"})
    array_job: str = field(default="", metadata={**OMITTED, KEY: "SLURM_ARRAY_JOB_ID"})
    array_task: str = field(default="", metadata={**OMITTED, KEY: "SLURM_ARRAY_TASK_ID"})
    restarts: str = field(default="", metadata={**OMITTED, KEY: "SLURM_RESTART_COUNT"})

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> SlurmJob:
        """Return the job of an environment."""
        return from_json(cls, environ)

    @property
    def task(self) -> str:
        """The job as users see it: ``101``, or ``101_3`` for a task of an array."""
        return f"{self.array_job}_{self.array_task}" if self.array_job else self.job


@dataclass
class EngineFacts:
    """One engine, as the status shows it.

    Attributes:
        devices: its GPUs; None where they are unknown.
        slots: None where they are unknown.
        gpu_bytes: bytes of the model in GPU memory; None where that is unknown.
        nodes: names of its nodes, if there are several.
        url: address of a server that is not started by AI-Flux.
        command: what ``--engine-command`` starts, with its placeholders.
        one_at_a_time: it handles one request at a time, although it has several slots.
    """

    index: int = 0
    devices: tuple[str, ...] | None = field(default=None, metadata=OMITTED)
    version: str | None = field(default=None, metadata=OMITTED)
    slots: int | None = field(default=None, metadata=OMITTED)
    context_length: int | None = field(default=None, metadata=OMITTED)
    size_bytes: int | None = field(default=None, metadata=OMITTED)
    gpu_bytes: int | None = field(default=None, metadata=OMITTED)
    log: str | None = field(default=None, metadata=OMITTED)
    nodes: tuple[str, ...] = field(default=(), metadata=OMITTED)
    url: str | None = field(default=None, metadata=OMITTED)
    command: str | None = field(default=None, metadata=OMITTED)
    one_at_a_time: bool | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class GpuUse:
    """Samples of all GPUs of a shard, added up over all its starts.

    Attributes:
        samples: one for each GPU each time.
        utilization_mean, utilization_max: percent of the time in which a kernel ran; None if
            unknown, as for slices of GPUs (MIG).
        memory_mib_mean, memory_mib_max: in use.
        memory_mib_total: memory of one GPU.
    """

    samples: int = 0
    utilization_mean: float | None = 0.0
    utilization_max: float | None = 0.0
    memory_mib_mean: float = 0.0
    memory_mib_max: float = 0.0
    memory_mib_total: float = 0.0


@dataclass(frozen=True)
class EnergyUse:
    """Energy of the GPUs of a shard, added up over all its starts.

    Attributes:
        counted_gpu_seconds: time of the GPUs in which the driver's energy counter was read.
        sampled_gpu_seconds: the same for GPUs without such a counter: the energy of that time is
            the integral of samples of the power.
    """

    joules: float = 0.0
    counted_gpu_seconds: float = 0.0
    sampled_gpu_seconds: float = 0.0

    @property
    def gpu_seconds(self) -> float:
        """Time of the GPUs that is measured."""
        return self.counted_gpu_seconds + self.sampled_gpu_seconds

    def plus(self, other: EnergyUse) -> EnergyUse:
        """Return the sum, rounded for the status."""
        return EnergyUse(
            *(round(one + more, 3) for one, more in zip(astuple(self), astuple(other), strict=True))
        )


@dataclass(frozen=True)
class Progress:
    """Figures of the current start; the rates are those of the last half minute."""

    elapsed_seconds: float = 0.0
    results_of_this_start: int = 0
    retries: int = 0
    engine_crashes_seen: int = 0
    unfit_answers: int = 0
    empty_answers: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests_per_second: float = 0.0
    tokens_per_second: float = 0.0
    remaining_seconds: float | None = None


@dataclass(frozen=True)
class Totals:
    """Sums over all starts of a shard, also those before the run was planned again.

    Attributes:
        sealed_starts: starts without a network; ``unsealed_starts``: starts with one. Earlier
            versions recorded neither.
        unsealed: why the last of the latter had one.
        results: number of results, also several for one request.
    """

    seconds: float = 0.0
    gpu_seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    starts: int = 0
    sealed_starts: int = 0
    unsealed_starts: int = field(default=0, metadata=OMITTED)
    unsealed: str = field(default="", metadata=OMITTED)
    results: int = 0
    empty_answers: dict[str, int] = field(default_factory=dict)

    def plus(self, other: Totals) -> Totals:
        """Return the sums of both, rounded for the status."""
        return Totals(
            seconds=round(self.seconds + other.seconds, 3),
            gpu_seconds=round(self.gpu_seconds + other.gpu_seconds, 3),
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            starts=self.starts + other.starts,
            sealed_starts=self.sealed_starts + other.sealed_starts,
            unsealed_starts=self.unsealed_starts + other.unsealed_starts,
            unsealed=other.unsealed or self.unsealed,
            results=self.results + other.results,
            empty_answers=dict(Counter(self.empty_answers) + Counter(other.empty_answers)),
        )


@dataclass(frozen=True)
class PointFigures:
    """What one combination of settings yielded, in a benchmark or with ``--tune``.

    Attributes:
        in_flight: requests that were in flight while the engines were as busy as they became.
        requests, failed: number of requests, and how many of them failed.
        seconds: the time in which throughput was measured.
        requests_per_second, tokens_per_second: successful requests, and their answers' tokens.
        prompt_tokens, answer_tokens: means per successful request; ``--tune`` does not count the
            former.
        p50, p99: seconds per successful request.
        engines, slots: number of engines, and slots of the first; None if they are unknown.
        most_in_flight: the largest number in flight, for however short a time.
        reason: the most frequent reason of the failures; None if no request failed.
        margin: half of the 95 % interval of the throughput, as a share of it; None if unknown.
    """

    in_flight: int
    requests: int
    failed: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    prompt_tokens: float = field(default=0.0, metadata=OMITTED)
    answer_tokens: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    engines: int = 1
    slots: int | None = None
    most_in_flight: int = 0
    reason: str | None = None
    margin: float | None = None

    @property
    def answered(self) -> bool:
        """Whether any request succeeded."""
        return self.failed < self.requests

    @property
    def throughput(self) -> float:
        """Answer tokens per second; requests per second if no answer has tokens."""
        return self.tokens_per_second or self.requests_per_second

    @property
    def filled(self) -> bool:
        """Whether there were enough requests for the number in flight."""
        return self.requests >= _FILLED * self.in_flight

    def reached(self, concurrency: int) -> bool:
        """Return whether nearly that many requests per engine were ever in flight.

        The largest number counts: between very short requests, the client is often not fast enough.
        """
        return max(self.in_flight, self.most_in_flight) >= _NEARLY * concurrency * self.engines


@dataclass(frozen=True)
class TunedPoint(PointFigures):
    """Settings that ``--tune`` tried, per engine, and their figures."""

    slots: int = 1
    concurrency: int = 1


@dataclass(frozen=True)
class Tuning:
    """What ``--tune`` tried for a model, and what it chose.

    Attributes:
        gpus, engines, settings: what the figures depend on; elsewhere they are measured again.
        slots, concurrency: per engine, as chosen; None while it continues.
        note: why it ended early; "" if it did not.
    """

    model: str
    gpus: tuple[str, ...] = ()
    engines: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    tried: tuple[TunedPoint, ...] = ()
    slots: int | None = None
    concurrency: int | None = None
    note: str = ""

    @property
    def chosen(self) -> dict[str, int]:
        """The settings to keep; none while it continues."""
        if self.slots is None or self.concurrency is None:
            return {}
        return {"slots": self.slots, "concurrency": self.concurrency}

    @property
    def advice(self) -> str:
        """How to keep what was chosen, and why the search ended early."""
        note = f" ({self.note})" if self.note else ""
        if not self.chosen:
            return f"tuning of {self.model} did not finish{note}; it keeps its default settings"
        lines = ", ".join(f"{name}: {value}" for name, value in self.chosen.items())
        options = " ".join(settings_texts(self.chosen))
        return (
            f"tuned {self.model}{note}; to keep it: {options} instead of --tune, or in "
            f"aiflux.yaml: run: {{{lines}}}"
        )

    def measures_as(self, other: Tuning) -> bool:
        """Return whether the figures of both are comparable."""
        own = (self.model, self.gpus, self.engines, self.settings)
        return own == (other.model, other.gpus, other.engines, other.settings)


@dataclass(frozen=True)
class WrittenFile:
    """A file of the output as it was written; ``modified`` is in nanoseconds."""

    bytes: int
    modified: int
    crc32: int


@dataclass(frozen=True)
class MergeFacts:
    """How the output was written: by which process, and its files by name."""

    seconds: float
    bytes: int
    by: str
    files: dict[str, WrittenFile] = field(default_factory=dict)


@dataclass
class StatusDetails:
    """AI-Flux's own part of a status.

    Attributes:
        plan: id of the plan that the status belongs to.
        planned: when that plan was made.
        shard: None for the whole run.
        updated: Unix time at which the status was written.
        version: of the AI-Flux that runs the shard.
        started: when its last start began.
        pid: of the worker, on ``host``.
        image: content of the image, as it was built (``/opt/aiflux/image.json``).
        sealed: whether the worker has no network; ``unsealed``: why it has one.
        gpus: names of the GPUs.
        requeues: times that the job went back to the queue by itself.
        ended: why the last start ended before it was done; ``remedy``: what to do about it.
        left_out: number of requests that were not sent because their prompts are too long. In
            OpenAI's ``request_counts``, they are failed ones.
        replace: the run may replace an output that exists.
        empty_answers: of the whole run, written with its output.
    """

    plan: str | None = None
    planned: str | None = None
    shard: int | None = None
    updated: float | None = None
    version: str | None = field(default=None, metadata=OMITTED)
    started: str | None = field(default=None, metadata=OMITTED)
    host: str | None = field(default=None, metadata=OMITTED)
    pid: int | None = field(default=None, metadata=OMITTED)
    slurm: SlurmJob = field(default_factory=SlurmJob, metadata=OMITTED)
    image: dict[str, Any] | None = field(default=None, metadata=OMITTED)
    sealed: bool | None = field(default=None, metadata=OMITTED)
    unsealed: str = field(default="", metadata=OMITTED)
    gpus: tuple[str, ...] = field(default=(), metadata=OMITTED)
    models: tuple[str, ...] = field(default=(), metadata=OMITTED)
    gpu_use: GpuUse = field(default_factory=GpuUse, metadata=OMITTED)
    energy: EnergyUse = field(default_factory=EnergyUse, metadata=OMITTED)
    progress: Progress = field(default_factory=Progress, metadata=OMITTED)
    totals: Totals = field(default_factory=Totals, metadata=OMITTED)
    requeues: int = field(default=0, metadata=OMITTED)
    engines: tuple[EngineFacts, ...] = field(default=(), metadata=OMITTED)
    model_digests: dict[str, str] = field(default_factory=dict, metadata=OMITTED)
    tunings: tuple[Tuning, ...] = field(default=(), metadata=OMITTED)
    ended: str | None = field(default=None, metadata=OMITTED)
    remedy: str | None = field(default=None, metadata=OMITTED)
    exit_code: int | None = field(default=None, metadata=OMITTED)
    left_out: int = field(default=0, metadata=OMITTED)
    replace: bool | None = field(default=None, metadata=OMITTED)
    empty_answers: dict[str, int] | None = field(default=None, metadata=OMITTED)
    merge: MergeFacts | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class Seal:
    """Whether every start of a shard had no network; None if that is unknown.

    Attributes:
        why: why it is not true, or is unknown; "" if it is true, or no start recorded it.
    """

    sealed: bool | None
    why: str = ""


UNRECORDED = "some results are from starts without a recorded check of the seal"


def seal_of(details: StatusDetails, done: int = 0) -> Seal:
    """Return whether all starts of a shard were sealed.

    Args:
        done: requests with a result; more than the starts had if others are from an earlier plan.
    """
    totals = details.totals
    if details.sealed is None:
        return Seal(None)
    if details.sealed is False:
        return Seal(False, details.unsealed)
    if totals.unsealed_starts:
        some = f"{totals.unsealed_starts} of {totals.starts} starts had a network"
        return Seal(False, f"{some} ({totals.unsealed or 'reason unknown'})")
    if totals.sealed_starts >= totals.starts > 0:
        return Seal(None, UNRECORDED) if done > totals.results else Seal(True)
    return Seal(None, f"the seal of {totals.sealed_starts} of {totals.starts} starts was recorded")


def whole_seal(details: Iterable[StatusDetails], results: int) -> Seal:
    """Return whether all starts of a run were sealed.

    Args:
        results: in the journals; those of requests that were not sent do not count.
    """
    known = [*details]
    seals = [seal_of(each) for each in known]
    whys = [each.why for each in seals if each.sealed is False]
    if whys:
        return Seal(False, "; ".join(dict.fromkeys(why for why in whys if why)))
    unknown = [each.why for each in seals if each.sealed is None]
    if not seals or unknown:
        return Seal(None, "; ".join(dict.fromkeys(why for why in unknown if why)))
    if results > sum(each.totals.results for each in known):
        return Seal(None, UNRECORDED)
    return Seal(True)


@dataclass(frozen=True)
class StatusFile:
    """A status as it was last written; what OpenAI's object has beyond these fields is constant.

    Attributes:
        state: ``status`` in the file; see ``Status``.
        created_at, ...: Unix times; None before that state.
    """

    state: str = field(metadata={KEY: "status"})
    counts: Counts = field(metadata={KEY: "request_counts"})
    details: StatusDetails = field(metadata={KEY: "aiflux"})
    errors: FailedRequests | None = None
    created_at: float | None = None
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None

    @property
    def completed(self) -> bool:
        """Whether every request has its result, and of a whole run, whether the output exists."""
        return self.state == "completed"

    @property
    def unstarted(self) -> bool:
        """Whether no worker wrote it: it keeps the sums of the starts before the plan changed."""
        return self.state == "validating" and self.details.pid is None

    @property
    def finished_at(self) -> float | None:
        """When it was completed, in parts of a second (``completed_at`` is cut to whole ones)."""
        cut, written = self.completed_at, self.details.updated
        if cut is None or written is None or not cut <= written < cut + 2:
            return cut
        return written

    @property
    def last_errors(self) -> tuple[FailedRequest, ...]:
        """The last requests that failed, oldest first."""
        return () if self.errors is None else self.errors.data

    @property
    def moment(self) -> float | None:
        """When the status was written (Unix time)."""
        moments = (
            self.details.updated,
            self.completed_at,
            self.failed_at,
            self.cancelled_at,
            self.in_progress_at,
            self.created_at,
        )
        return next((float(each) for each in moments if each is not None), None)


@dataclass
class Status:
    """The status of one shard, or of the run. Thread-safe; written at most once a second.

    Attributes:
        shard: None for the whole run.
        state: validating, in_progress, finalizing, completed, failed, cancelling or cancelled
            (``cancelled`` stands for stopped before the end; the run can be resumed).
        errors: the last requests that failed, oldest first.
    """

    path: Path
    plan: Plan
    shard: int | None
    state: str = "validating"
    completed: int = 0
    failed: int = 0
    errors: list[FailedRequest] = field(default_factory=list)
    details: StatusDetails = field(default_factory=StatusDetails)

    def __post_init__(self) -> None:
        self.details.plan, self.details.planned = self.plan.id, self.plan.created
        self.details.shard = self.shard
        self._created = int(time.time())
        self._moments: dict[str, int] = {}
        self._written = 0.0
        self._lock = threading.Lock()

    def enter(self, state: str) -> None:
        """Change the state and write it."""
        self.state = state
        if state in _MOMENTS:
            self._moments[_MOMENTS[state]] = int(time.time())
        self.write(force=True)

    def write(self, force: bool = False) -> None:
        """Write the status, unless that was done less than a second ago.

        Raises:
            StorageError: writing failed.
        """
        with self._lock:
            now = time.monotonic()
            if not force and now - self._written < WRITE_INTERVAL:
                return
            self._written = now
            write_json(self.path, whole(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """Return the status in the form of OpenAI's Batch object."""
        plan, shard = self.plan, self.shard
        total = plan.requests if shard is None else plan.shards[shard].requests
        ended = self.state == "completed"
        errors = errors_path(plan.output)
        has_errors_file = ended and self.failed and plan.output.suffix == ".jsonl"
        self.details.updated = round(time.time(), 3)
        return {
            "id": f"batch_{plan.id}" + ("" if shard is None else f"_{shard:04d}"),
            "object": "batch",
            "endpoint": next(iter(plan.input.endpoints)),
            "errors": to_json(FailedRequests(tuple(self.errors))) if self.errors else None,
            "input_file_id": str(plan.input_path),
            "completion_window": "24h",
            "status": self.state,
            "output_file_id": str(plan.output) if ended else None,
            "error_file_id": str(errors) if has_errors_file else None,
            "created_at": self._created,
            **dict.fromkeys(_MOMENTS.values()),
            **self._moments,
            "expires_at": None,
            "expired_at": None,
            "request_counts": to_json(Counts(total, self.completed, self.failed)),
            "metadata": {},
            "aiflux": to_json(self.details),
        }


def run_status(plan: Plan, run: RunDirectory) -> Status:
    """Return the status of a whole run, not written yet."""
    return Status(run.run_status, plan, None)


def read_status(run: RunDirectory, shard: int, plan: Plan | None = None) -> StatusFile | None:
    """Return a shard's status as it was last written; None where there is none.

    A damaged one counts as none: the journal decides what is done, and the next start of the shard
    writes its status again.

    Args:
        plan: return only a status that belongs to this plan.

    Raises:
        StorageError: it exists and cannot be read.
    """
    return _read(run.status(shard), plan)


def read_statuses(run: RunDirectory) -> dict[int, StatusFile]:
    """Return the statuses of all shards, of whatever plan, by the shards' numbers.

    Raises:
        StorageError: one exists and cannot be read.
    """
    found = {}
    for path in sorted(run.path.glob("status/shard-*.json")):
        number = path.stem.removeprefix("shard-")
        status = read_status(run, int(number)) if number.isdigit() else None
        if status is not None:
            found[int(number)] = status
    return found


def keep_sums(
    plan: Plan,
    run: RunDirectory,
    counts: Counts,
    left_out: int,
    shard: int,
    earlier: Iterable[StatusFile],
) -> None:
    """Replace a shard's status by one with the sums of earlier starts, for the next start.

    Args:
        counts: of the results that are kept; ``left_out``: see ``StatusDetails``.
        earlier: the shard's status, and those of shards that no longer exist.

    Raises:
        StorageError: writing failed.
    """
    status = Status(run.status(shard), plan, shard)
    status.completed, status.failed = counts.completed, counts.failed
    details = status.details
    details.left_out = left_out
    for each in earlier:
        details.totals = details.totals.plus(each.details.totals)
        details.energy = details.energy.plus(each.details.energy)
        if not details.gpu_use.samples:
            details.gpu_use = each.details.gpu_use
    status.write(force=True)


def read_run_status(run: RunDirectory, plan: Plan | None = None) -> StatusFile | None:
    """Return the whole run's status; see ``read_status``."""
    return _read(run.run_status, plan)


def _read(path: Path, plan: Plan | None) -> StatusFile | None:
    try:
        status = read_record(StatusFile, path)
    except ValueError:
        return None
    if status is None or plan is None or status.details.plan == plan.id:
        return status
    return None


def open_shards(plan: Plan, run: RunDirectory) -> tuple[int, ...]:
    """Return the shards that are not known to be done: those to work on."""
    return tuple(shard.index for shard in plan.shards if not _done(plan, run, shard.index))


def _done(plan: Plan, run: RunDirectory, shard: int) -> bool:
    status = read_status(run, shard, plan)
    return status is not None and status.completed


def all_done(plan: Plan, run: RunDirectory) -> bool:
    """Return whether every shard is known to be done."""
    return not open_shards(plan, run)


def may_replace(plan: Plan, run: RunDirectory) -> bool:
    """Return whether an existing output belongs to this plan, or may be replaced by the run.

    It belongs to the plan where a start ended between writing it and recording that, and where the
    run was finished and only a part of its output was removed since.
    """
    status = read_run_status(run, plan)
    if status is None:
        return False
    return status.state in ("finalizing", "completed") or bool(status.details.replace)


def finished_counts(plan: Plan, run: RunDirectory, *, changed_ok: bool = False) -> Counts | None:
    """Return the counts of a finished run; None where it is not finished.

    Args:
        changed_ok: accept an output that was changed after the run wrote it.

    Raises:
        OutputExistsError: the output was changed, and ``changed_ok`` is not given.
    """
    status = read_run_status(run, plan)
    if status is None or not status.completed:
        return None
    if not changed_ok:
        refuse_changed_output(plan.output, status)
    return status.counts if output_there(plan.output, status) else None


def refuse_lost_output(plan: Plan, run: RunDirectory) -> None:
    """Refuse a finished run whose output was removed since.

    Raises:
        UsageError: it is one.
    """
    status = read_run_status(run, plan)
    if status is not None and status.completed and not output_there(plan.output, status):
        raise UsageError(
            f"the run {user_output(plan.output)} is finished, but its output is missing",
            f"write it again from the journal: aiflux merge {quote(str(plan.output))}",
        )


def requests_left(plan: Plan, run: RunDirectory, shards: Iterable[int]) -> int:
    """Return how many requests of some shards have no result yet, according to the statuses."""
    left = 0
    for index in shards:
        status = read_status(run, index, plan)
        done = 0
        if status is not None:
            again = plan.options.retry_failed
            done = status.counts.completed + (0 if again else status.counts.failed)
        left += plan.shards[index].requests - done
    return left


# A file whose time changed is read to find out whether its content changed; to display a run, only
# up to this size.
READ_TO_SHOW = 256 << 20


def written_file(path: Path, crc: int) -> WrittenFile:
    """Return the size, time and checksum of a file that was just written."""
    found = path.stat()
    return WrittenFile(found.st_size, found.st_mtime_ns, crc)


def _written(output: Path, status: StatusFile) -> dict[Path, WrittenFile]:
    """Return the files of a finished run's output as they were written."""
    merge = status.details.merge
    files = {} if merge is None else merge.files
    return {output.with_name(name): written for name, written in files.items()}


def output_there(output: Path, status: StatusFile | None) -> bool:
    """Return whether an output exists, with every file that a finished run wrote."""
    written = () if status is None else _written(output, status)
    return all(map(is_there, (output, *written)))


def output_change(output: Path, status: StatusFile, most: int | None = None) -> str | None:
    """Return what was changed in the output of a finished run since it was written, or None.

    A missing file is not a change: it is written again.

    Args:
        most: read no file that is larger than this.

    Raises:
        StorageError: a file cannot be read.
    """
    written = _written(output, status)
    for path in output_paths(output) if written else ():
        change = file_change(path, written.get(path), most)
        if change is not None:
            return f"{path} {change}"
    return None


def file_change(path: Path, known: WrittenFile | None, most: int | None = None) -> str | None:
    """Return how a file was changed since it was written; None if it was not, or is missing.

    Args:
        known: the file as it was written; None if it was not.
        most: do not read a file that is larger than this.
    """
    if not is_there(path):
        return None
    if known is None:
        return "was not made by the run"
    found = path.stat()
    if found.st_size != known.bytes:
        return (
            f"has {counted(found.st_size, 'byte')} instead of the {known.bytes:,} that were written"
        )
    same = found.st_mtime_ns == known.modified or (most is not None and found.st_size > most)
    if same or checksum(path) == known.crc32:
        return None
    return "was edited after it was written"


def refuse_changed_output(output: Path, status: StatusFile) -> None:
    """Raise OutputExistsError if the output of a finished run was changed."""
    change = output_change(output, status)
    if change is not None:
        raise OutputExistsError(
            f"the run is finished, but its output was changed: {change}",
            f"restore it from the journal: aiflux merge --again {quote(str(output))}; to keep the "
            "changed file, copy it first",
        )


def finished_line(plan: Plan, counts: Counts) -> str:
    """Return the line that is shown for a run that was finished before."""
    failed = failed_text(counts.failed, run_left_out(plan, RunDirectory.of_output(plan.output)))
    return (
        f"{user_output(plan.output)} is already finished: {counts.completed} succeeded, "
        f"{failed}; nothing was sent"
    )


def failed_text(without_answer: int, left_out: int) -> str:
    """Return how many requests failed, and how many were left out."""
    more = f", {left_out} left out (too long)" if left_out else ""
    return f"{without_answer - left_out} failed{more}"


def run_left_out(plan: Plan, run: RunDirectory) -> int:
    """Return how many results of a run are of requests that were left out as too long."""
    status = read_run_status(run, plan)
    if status is not None and status.completed:
        return status.details.left_out
    known = (read_status(run, each.index, plan) for each in plan.shards)
    return sum(each.details.left_out for each in known if each is not None)


def allowed_failures(plan: Plan, run: RunDirectory) -> int:
    """Return how many requests may fail, with those that a plan or a worker left out."""
    known = (read_status(run, each.index, plan) for each in plan.shards)
    return _allowed(plan, (each.details for each in known if each))


def allowed_besides(plan: Plan, details: Iterable[StatusDetails], left_out: int) -> int:
    """Return how many requests may fail in addition to those that were left out.

    Of a start by an earlier version, only the plan has the number of the latter.
    """
    by_user = plan.options.allowed_failures(plan.requests)
    return max(_allowed(plan, details) - left_out, by_user)


def _allowed(plan: Plan, details: Iterable[StatusDetails]) -> int:
    return plan.allowed_failures + left_out_by_workers(plan, details)


def left_out_by_workers(plan: Plan, details: Iterable[StatusDetails]) -> int:
    """Return the number of requests that workers left out as the options of a plan want it.

    They want it only with --too-long skip; and a plan that knows the context decides on them.
    """
    wanted = plan.lengths_at_start and plan.options.too_long == SKIP
    return sum(each.left_out for each in details) if wanted else 0


def refuse_failures(plan: Plan, failed: int) -> None:
    """Raise TooManyFailuresError where more requests of a finished run failed than are allowed.

    Args:
        failed: number of requests without an answer, with those that were left out.
    """
    run = RunDirectory.of_output(plan.output)
    if failed <= allowed_failures(plan, run):
        return
    left_out = min(run_left_out(plan, run), failed)
    again = f"the same `{own_command(plan.output)}` command with --retry-failed"
    verb = "was" if left_out == 1 else "were"
    if failed - left_out <= plan.options.allowed_failures(plan.requests):
        raise TooManyFailuresError(
            f"{left_out} of {counted(plan.requests, 'request')} {verb} left out as too long by an "
            "earlier command, and not with these options",
            f"send them: {again}",
        )
    more = f", and {left_out} {verb} left out as too long" if left_out else ""
    raise TooManyFailuresError(
        f"{failed - left_out} of {counted(plan.requests, 'request')} failed{more}",
        f"try them again: {again}",
    )
