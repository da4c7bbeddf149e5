"""The status of a shard, and of a whole run: an object in the form of OpenAI's Batch.

Source of the form: https://platform.openai.com/docs/api-reference/batch/object. What OpenAI's
object has no field for stands under ``aiflux``. A status is replaced atomically.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.core.batch.results_file import errors_path, output_paths
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import Plan
from aiflux.errors import OutputExistsError, TooManyFailuresError
from aiflux.util.files import checksum, fits, is_there, read_file, write_json
from aiflux.util.unicode import whole

WRITE_INTERVAL = 1.0
_MOMENTS = {
    "in_progress": "in_progress_at",
    "finalizing": "finalizing_at",
    "completed": "completed_at",
    "failed": "failed_at",
    "cancelling": "cancelling_at",
    "cancelled": "cancelled_at",
}


_COUNTS = dict.fromkeys(("total", "completed", "failed"), int)
_FILE = dict.fromkeys(("bytes", "modified", "crc32"), int)
_NUMBER = (Real, type(None))
_TEXT = (str, type(None))
# What readers of a status rely on, where it is there.
_FORM = {
    "status": str,
    "request_counts": _COUNTS,
    "errors": ({"data": [dict]}, type(None)),
    **dict.fromkeys(("created_at", *_MOMENTS.values()), _NUMBER),
    "aiflux": {
        "plan": str,
        "updated": _NUMBER,
        "requeues": int,
        "exit_code": int,
        "version": str,
        "started": str,
        "ended": _TEXT,
        "host": _TEXT,
        "slurm": dict.fromkeys(("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"), str),
        "image": (dict, type(None)),
        "gpus": [str],
        "engines": [
            {
                "index": int,
                "slots": (int, type(None)),
                "devices": (list, type(None)),
                "gpu_bytes": _NUMBER,
                "version": _TEXT,
                "url": str,
            }
        ],
        "model_digests": dict,
        "gpu_use": dict.fromkeys(
            (
                "samples",
                "utilization_mean",
                "utilization_max",
                "memory_mib_mean",
                "memory_mib_max",
                "memory_mib_total",
            ),
            Real,
        ),
        "progress": dict.fromkeys(
            (
                "elapsed_seconds",
                "prompt_tokens",
                "completion_tokens",
                "requests_per_second",
                "tokens_per_second",
                "remaining_seconds",
            ),
            _NUMBER,
        ),
        "totals": dict.fromkeys(
            ("seconds", "gpu_seconds", "prompt_tokens", "completion_tokens", "starts"), Real
        ),
        "merge": {"bytes": int, "files": dict},
    },
}


@dataclass
class Status:
    """The status of one shard, or of the run. Thread-safe; written at most once a second.

    Attributes:
        shard: None for the whole run.
        state: validating, in_progress, finalizing, completed, failed, cancelling or cancelled
            (``cancelled`` stands for stopped before the end; the run can go on).
        details: what stands under ``aiflux``.
    """

    path: Path
    plan: Plan
    shard: int | None
    state: str = "validating"
    completed: int = 0
    failed: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
            StorageError: the disk refused.
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
        errors = errors_path(self.plan.output)
        has_errors_file = ended and self.failed and self.plan.output.suffix == ".jsonl"
        return {
            "id": f"batch_{plan.id}" + ("" if shard is None else f"_{shard:04d}"),
            "object": "batch",
            "endpoint": next(iter(self.plan.input["endpoints"])),
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.plan.input["path"],
            "completion_window": "24h",
            "status": self.state,
            "output_file_id": str(self.plan.output) if ended else None,
            "error_file_id": str(errors) if has_errors_file else None,
            "created_at": self._created,
            **dict.fromkeys(_MOMENTS.values()),
            **self._moments,
            "expires_at": None,
            "expired_at": None,
            "request_counts": {
                "total": total,
                "completed": self.completed,
                "failed": self.failed,
            },
            "metadata": {},
            "aiflux": {
                "plan": plan.id,
                "planned": plan.created,
                "shard": shard,
                "updated": round(time.time(), 3),
                **self.details,
            },
        }


def run_status(plan: Plan, run: RunDirectory) -> Status:
    """Return the status of a whole run, not written yet."""
    return Status(run.run_status, plan, None)


def read_status(run: RunDirectory, shard: int) -> dict[str, Any] | None:
    """Return a shard's status as it was last written; None where there is none.

    One that is damaged counts as none: the journal decides what is done, and the next start of the
    shard writes its status again.

    Raises:
        StorageError: it exists and cannot be read.
    """
    return _read(run.status(shard))


def read_run_status(run: RunDirectory) -> dict[str, Any] | None:
    """Return the whole run's status; see ``read_status``."""
    return _read(run.run_status)


def _read(path: Path) -> dict[str, Any] | None:
    content = read_file(path)
    try:
        status = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    needed = {"status", "request_counts", "aiflux"}
    if not isinstance(status, dict) or not needed <= status.keys() or not fits(status, _FORM):
        return None
    return status if status["request_counts"].keys() >= _COUNTS.keys() else None


def _of_plan(status: dict[str, Any] | None, plan: Plan) -> bool:
    return status is not None and status.get("aiflux", {}).get("plan") == plan.id


def open_shards(plan: Plan, run: RunDirectory) -> tuple[int, ...]:
    """Return the shards that are not known to be done: those that a start has to look at."""
    return tuple(
        shard.index
        for shard in plan.shards
        if not is_completed(read_status(run, shard.index), plan)
    )


def all_done(plan: Plan, run: RunDirectory) -> bool:
    """Tell whether every shard is known to be done."""
    return not open_shards(plan, run)


def is_completed(status: dict[str, Any] | None, plan: Plan) -> bool:
    """Tell whether a status says that this very plan is done."""
    return status is not None and status.get("status") == "completed" and _of_plan(status, plan)


def may_replace(plan: Plan, run: RunDirectory) -> bool:
    """Tell whether an output that is there is this very plan's own, or was allowed to be replaced.

    It is the plan's own where a start ended between writing it and saying so, and where the run was
    finished and only a part of its output was removed since.
    """
    status = read_run_status(run)
    if status is None or not _of_plan(status, plan):
        return False
    own = status.get("status") in ("finalizing", "completed")
    return own or bool(status["aiflux"].get("replace"))


def finished_counts(
    plan: Plan, run: RunDirectory, *, changed_ok: bool = False
) -> dict[str, int] | None:
    """Return total, completed and failed of a run that is finished; None where it is not.

    Args:
        changed_ok: the output may be another than the one that the run wrote.

    Raises:
        OutputExistsError: it is, and may not.
    """
    status = read_run_status(run)
    if not is_completed(status, plan) or status is None:
        return None
    if not changed_ok:
        refuse_changed_output(plan.output, status)
    if not output_there(plan.output, status):
        return None
    return {name: int(count) for name, count in status["request_counts"].items()}


# A file whose time changed is read, to know whether its content did; to show how a run is, only up
# to this size.
READ_TO_SHOW = 256 << 20


def written_file(path: Path, crc: int) -> dict[str, int]:
    """Return what a file that was written can be known by."""
    found = path.stat()
    return {"bytes": found.st_size, "modified": found.st_mtime_ns, "crc32": crc}


def _written(output: Path, status: Mapping[str, Any]) -> dict[Path, Mapping[str, int]]:
    """Return what is known of each file of a finished run's output."""
    files = status["aiflux"].get("merge", {}).get("files", {})
    return {output.with_name(name): known for name, known in files.items() if fits(known, _FILE)}


def output_there(output: Path, status: Mapping[str, Any] | None) -> bool:
    """Tell whether an output is there, with every file that a finished run wrote."""
    written = () if status is None else _written(output, status)
    return all(map(is_there, (output, *written)))


def output_change(output: Path, status: Mapping[str, Any], most: int | None = None) -> str | None:
    """Return what was changed in the output of a finished run since it was written, or None.

    A file that is missing is no change: it is written again.

    Args:
        most: read no file that is larger than this.

    Raises:
        StorageError: a file cannot be read.
    """
    written = _written(output, status)
    for path in output_paths(output) if written else ():
        change = _change(path, written.get(path), most)
        if change is not None:
            return f"{path} {change}"
    return None


def _change(path: Path, known: Mapping[str, int] | None, most: int | None) -> str | None:
    if not is_there(path):
        return None
    if known is None:
        return "was not made by the run"
    found = path.stat()
    if found.st_size != known["bytes"]:
        return f"has {found.st_size:,} bytes instead of the {known['bytes']:,} that were written"
    same = found.st_mtime_ns == known["modified"] or (most is not None and found.st_size > most)
    if same or checksum(path) == known["crc32"]:
        return None
    return "was edited after it was written"


def refuse_changed_output(output: Path, status: Mapping[str, Any]) -> None:
    """Raise OutputExistsError where the output of a finished run was changed since."""
    change = output_change(output, status)
    if change is not None:
        raise OutputExistsError(
            f"the run is finished, but its output was changed: {change}",
            f"aiflux merge --again {quote(str(output))} writes it again from the journal; to keep "
            "the changed file, copy it first",
        )


def finished_line(plan: Plan, counts: dict[str, int]) -> str:
    """Return what is said of a run that was finished before."""
    return (
        f"{plan.output} is finished already: {counts['completed']} succeeded, "
        f"{counts['failed']} failed; nothing was sent"
    )


def refuse_failures(plan: Plan, counts: dict[str, int]) -> None:
    """Raise TooManyFailuresError where a run that was finished before had too many failures."""
    failed, total = counts["failed"], counts["total"]
    if failed > plan.options.allowed_failures(total):
        raise TooManyFailuresError(
            f"{failed} of {total} requests failed", "--retry-failed tries them again"
        )
