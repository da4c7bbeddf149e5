"""The status of a shard: an object in the form of OpenAI's Batch, replaced atomically.

Source of the form: https://platform.openai.com/docs/api-reference/batch/object. What OpenAI's
object has no field for stands under ``aiflux``.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiflux.core.files import write_json
from aiflux.core.plan import Plan
from aiflux.core.rundir import RunDirectory, errors_path
from aiflux.errors import TooManyFailuresError

WRITE_INTERVAL = 1.0
_MOMENTS = {
    "in_progress": "in_progress_at",
    "finalizing": "finalizing_at",
    "completed": "completed_at",
    "failed": "failed_at",
    "cancelling": "cancelling_at",
    "cancelled": "cancelled_at",
}


@dataclass
class Status:
    """The status of one shard. Thread-safe; written at most once a second unless forced.

    Attributes:
        state: validating, in_progress, finalizing, completed, failed, cancelling or cancelled
            (``cancelled`` stands for stopped before the end; the run can go on).
        details: what stands under ``aiflux``.
    """

    path: Path
    plan: Plan
    shard: int
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
            write_json(self.path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the status in the form of OpenAI's Batch object."""
        total = self.plan.shards[self.shard].requests
        ended = self.state == "completed"
        errors = errors_path(self.plan.output)
        has_errors_file = ended and self.failed and self.plan.output.suffix == ".jsonl"
        return {
            "id": f"batch_{self.plan.id}_{self.shard:04d}",
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
            "aiflux": {"plan": self.plan.id, "shard": self.shard, **self.details},
        }


def read_status(run: RunDirectory, shard: int) -> dict[str, Any] | None:
    """Return a shard's status as it was last written; None where there is none to read."""
    try:
        content = json.loads(run.status(shard).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def was_finalising(plan: Plan, run: RunDirectory) -> bool:
    """Tell whether a start of this very plan ended while it wrote the output."""
    statuses = (read_status(run, shard.index) or {} for shard in plan.shards)
    return any(
        status.get("status") == "finalizing" and status.get("aiflux", {}).get("plan") == plan.id
        for status in statuses
    )


def finished_counts(plan: Plan, run: RunDirectory) -> dict[str, int] | None:
    """Return total, completed and failed of a run that is finished; None where it is not."""
    counts = {"total": 0, "completed": 0, "failed": 0}
    if not plan.output.exists():
        return None
    for shard in plan.shards:
        status = read_status(run, shard.index)
        if status is None or status.get("status") != "completed":
            return None
        if status.get("aiflux", {}).get("plan") != plan.id:
            return None
        for name in counts:
            counts[name] += status["request_counts"][name]
    return counts


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
