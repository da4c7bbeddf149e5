"""What a shard has cost over all its starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiflux.core.runs.plan import Plan
from aiflux.engines.gpus import visible_devices


@dataclass
class Ledger:
    """Sums of the starts before this one.

    Attributes:
        gpus: GPUs of this start.
        starts: starts before this one.
        requeues: times that this job went back to the queue by itself.
    """

    gpus: int = 0
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    starts: int = 0
    requeues: int = 0
    empty_answers: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, earlier: dict[str, Any] | None, environ: Mapping[str, str]) -> Ledger:
        """Go on from a status that an earlier start of the same plan left."""
        gpus = 0 if plan.options.engine_url else len(visible_devices(environ))
        details = (earlier or {}).get("aiflux", {})
        if details.get("plan") != plan.id:
            return cls(gpus)
        totals = details.get("totals", {})
        same_job = details.get("slurm", {}).get("SLURM_JOB_ID") == environ.get("SLURM_JOB_ID")
        return cls(
            gpus,
            totals.get("seconds", 0.0),
            totals.get("gpu_seconds", 0.0),
            totals.get("prompt_tokens", 0),
            totals.get("completion_tokens", 0),
            totals.get("starts", 0),
            details.get("requeues", 0) if same_job else 0,
            totals.get("empty_answers", {}),
        )

    def totals(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sums with this start's own figures (``Stats.snapshot``) in them."""
        elapsed = progress["elapsed_seconds"]
        return {
            "seconds": round(self.seconds + elapsed, 3),
            "gpu_seconds": round(self.gpu_seconds + elapsed * self.gpus, 3),
            "prompt_tokens": self.prompt_tokens + progress["prompt_tokens"],
            "completion_tokens": self.completion_tokens + progress["completion_tokens"],
            "starts": self.starts + 1,
            "empty_answers": dict(Counter(self.empty_answers) + Counter(progress["empty_answers"])),
        }
