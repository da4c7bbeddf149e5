"""Create run directories as jobs leave them: a plan, statuses, leases and jobs.json."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aiflux.core.batch.input_file import InputFacts
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import Plan, Shard, write_plan

ELSEWHERE = {"host": "gpu07", "pid": 4711, "started": "1", "namespace": "another", "job": "100"}


@dataclass
class MadeRun:
    """A run of ``shards`` shards with ``each`` requests each."""

    folder: Path
    shards: int = 1
    each: int = 100
    options: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.output = self.folder / "results.json"
        self.run = RunDirectory.of_output(self.output)
        self.plan = Plan(
            input=InputFacts(
                path=self.folder / "prompts.jsonl",
                size=1,
                requests=self.shards * self.each,
                digest="d",
                endpoints={"/v1/chat/completions": self.shards * self.each},
            ),
            output=self.output,
            models=("llama3.2:3b",),
            served_names=("llama3.2:3b",),
            options=replace(self.options, model="llama3.2:3b"),
            shards=tuple(
                Shard(number, number, number + 1, number * self.each, self.each)
                for number in range(self.shards)
            ),
            models_dir=self.folder / "models",
            created="2026-01-02T03:04:05.000Z",
        )
        write_plan(self.plan, self.run)

    def submit(self, job: str = "100", first: int = 0, last: int | None = None) -> None:
        """Record a job; an array for several shards."""
        shards = list(range(first, self.shards if last is None else last + 1))
        entry = {
            "submitted": "2026-01-02T03:04:06.000Z",
            "cluster": None,
            "jobs": [
                {
                    "job_id": job,
                    "array": None if self.shards == 1 else f"0-{len(shards) - 1}",
                    "first": first,
                    "shards": shards,
                }
            ],
            "log": str(self.run.logs),
        }
        content: dict[str, Any] = {"image": "/i.sif", "slurm": {}, "submissions": []}
        if self.run.submissions.exists():
            content = json.loads(self.run.submissions.read_text())
        content["submissions"].append(entry)
        self.run.submissions.write_text(json.dumps(content))

    def status(
        self,
        shard: int = 0,
        state: str = "in_progress",
        completed: int = 0,
        failed: int = 0,
        *,
        lease: bool | None = None,
        age: float = 0.0,
        errors: tuple[tuple[str, str], ...] = (),
        **details: Any,
    ) -> None:
        """Write a shard's status; a running one holds its lease, on another host.

        Args:
            age: seconds since status and lease changed.
            errors: custom ids and messages.
        """
        working = state in ("validating", "in_progress", "finalizing", "cancelling")
        now = time.time() - age
        facts: dict[str, Any] = {
            "plan": self.plan.id,
            "planned": self.plan.created,
            "shard": shard,
            "host": "gpu07",
            "pid": 4711,
            "slurm": {},
            "gpus": ["NVIDIA A100-SXM4-40GB"],
            "updated": now,
            "progress": {"requests_per_second": 2.0, "tokens_per_second": 300.0} if working else {},
            "totals": {
                "prompt_tokens": 10,
                "completion_tokens": 20,
                "gpu_seconds": 36,
                "starts": 1,
            },
            **details,
        }
        listed = [{"code": "http_400", "message": text, "param": name} for name, text in errors]
        self._write(
            self.run.status(shard),
            {
                "status": state,
                "created_at": int(now),
                "request_counts": {"total": self.each, "completed": completed, "failed": failed},
                "errors": {"object": "list", "data": listed} if listed else None,
                "aiflux": facts,
            },
            now,
        )
        if working if lease is None else lease:
            self.hold(self.run.lease(shard), age)

    def hold(self, lease: Path, age: float = 0.0) -> None:
        """Create a lease held by a process on another machine."""
        lease.write_bytes(b"0" * 12 + b" " + json.dumps(ELSEWHERE).encode() + b"\n")
        os.utime(lease, (time.time() - age,) * 2)

    def whole(self, state: str, completed: int, failed: int = 0, *, age: float = 0.0) -> None:
        """Write the run's status; a completed run also gets its output."""
        now = time.time() - age
        counts = {"total": self.plan.requests, "completed": completed, "failed": failed}
        facts = {"plan": self.plan.id, "updated": now}
        content = {"status": state, "request_counts": counts, "aiflux": facts}
        self._write(self.run.run_status, content, now)
        if state == "completed":
            self.output.write_text("[]")

    def log(self, name: str, text: str) -> Path:
        """Write a log."""
        path = self.run.logs / name
        path.write_text(text)
        return path

    def _write(self, path: Path, content: dict[str, Any], moment: float) -> None:
        path.write_text(json.dumps(content))
        os.utime(path, (moment, moment))
