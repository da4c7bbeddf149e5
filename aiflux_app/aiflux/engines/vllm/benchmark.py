"""``vllm bench``: vLLM's own measurement, of a model or of a running server.

Source: vLLM, ``vllm/benchmarks/throughput.py`` and ``serve.py``; checked with 0.32.0.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping

from aiflux.engines.own_benchmark import BenchmarkLoad
from aiflux.engines.vllm.hub import parse_hub_model, stored_snapshot

_SPECIAL_TOKENS = 16  # that the tokenizer adds, at most
_THROUGHPUT = re.compile(r"([0-9][0-9.]*) output tokens/s")
_SERVE = re.compile(r"Output token throughput \(tok/s\):\s*([0-9][0-9.]*)")


class ThroughputBench:
    """``vllm bench throughput``, which loads the model itself."""

    tool = "vllm bench throughput"

    def find(self, server: str | None, environ: Mapping[str, str]) -> str | None:
        """Return vLLM's program."""
        return server

    def words(self, load: BenchmarkLoad) -> list[str]:
        """Return the arguments for random prompts of the same length.

        Raises:
            ModelError: the model is not stored.
        """
        snapshot = stored_snapshot(load.models_dir, parse_hub_model(load.model))
        return [
            "bench", "throughput", "--model", str(snapshot), *_lengths(load),
            "--max-num-seqs", str(load.in_flight),
            "--max-model-len", str(load.prompt_tokens + load.answer_tokens + _SPECIAL_TOKENS),
            *([] if load.on_gpus else ["--enforce-eager"]),  # as in a run
        ]  # fmt: skip

    def tokens_per_second(self, printed: str) -> float | None:
        """Return the answer tokens per second."""
        return _found(_THROUGHPUT, printed)


class ServeBench:
    """``vllm bench serve``, which sends requests to a running server."""

    tool = "vllm bench serve"

    def find(self, server: str | None, environ: Mapping[str, str]) -> str | None:
        """Return vLLM's program on PATH."""
        return shutil.which("vllm", path=environ.get("PATH"))

    def words(self, load: BenchmarkLoad) -> list[str]:
        """Return the arguments for random prompts of the same length.

        They go to /v1/completions: in a chat, the server would add the tokens of its template,
        which the point's lengths contain already.
        """
        return [
            "bench", "serve", "--backend", "openai", "--base-url", load.url or "",
            "--endpoint", "/v1/completions", "--model", load.model, *_lengths(load),
            "--max-concurrency", str(load.in_flight),
        ]  # fmt: skip

    def tokens_per_second(self, printed: str) -> float | None:
        """Return the answer tokens per second."""
        return _found(_SERVE, printed)


def _lengths(load: BenchmarkLoad) -> list[str]:
    return [
        "--dataset-name", "random", "--num-prompts", str(load.requests),
        "--random-input-len", str(load.prompt_tokens),
        "--random-output-len", str(load.answer_tokens),
    ]  # fmt: skip


def _found(pattern: re.Pattern[str], printed: str) -> float | None:
    found = pattern.search(printed)
    return None if found is None else float(found[1])
