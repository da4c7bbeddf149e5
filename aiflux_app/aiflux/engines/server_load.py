"""Read a server's load: its slots, and the number of running and waiting requests."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiflux.engines.http import Client, ExchangeError
from aiflux.errors import StoppedError
from aiflux.util.process_limits import start_thread

MOST_SLOTS = 4096
"""As many requests in flight as `--concurrency` allows; a server that reports more is wrong."""
Get = Callable[[str], bytes | None]
"""Returns the answer of a path; see ``get``."""

_TIMEOUT = 5.0
_OFTEN, _SELDOM = 0.5, 5.0
_REPORTS_OFTEN = 60
# Metrics of running and waiting requests in Prometheus' text format: vLLM
# (docs/usage/metrics.md), llama-server (tools/server/README.md, with --metrics), SGLang
# (docs/references/production_metrics.md).
_METRICS = (
    ("vllm:num_requests_running", "vllm:num_requests_waiting"),
    ("llamacpp:requests_processing", "llamacpp:requests_deferred"),
    ("sglang:num_running_reqs", "sglang:num_queue_reqs"),
)
# Tokens of prompts and answers since the server started.
_TOKENS = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "llamacpp:prompt_tokens_total",
    "llamacpp:tokens_predicted_total",
)
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^\n]*\})? ([-+.\deE]+)(?: \d+)?$", re.MULTILINE)


def get(client: Client, path: str) -> bytes | None:
    """Return a server's answer with status 200; None for any other outcome.

    Servers need not report anything, so no outcome is an error.
    """
    try:
        answer = client.get(path, _TIMEOUT)
    except (ExchangeError, StoppedError):  # a lack of files or memory: requests report it
        return None
    return answer.body if answer.status == 200 else None


@dataclass(frozen=True)
class Load:
    """Running and waiting requests of a server, of all users."""

    running: int
    waiting: int


def reported(fetch: Get, path: str) -> dict[str, Any]:
    """Return the JSON object that a server reports at a path; {} for any other outcome."""
    return json_object(fetch(path) or b"null")


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in an answer; {} for any other content."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def total_slots(fetch: Get) -> int | None:
    """Return the slots of a llama-server, or None if the server reports none."""
    slots = reported(fetch, "/props").get("total_slots")
    return slots if isinstance(slots, int) and 0 < slots <= MOST_SLOTS else None


def _sums(text: str) -> dict[str, float]:
    """Return the sum of each metric's samples."""
    sums: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        try:
            sums[name] = sums.get(name, 0.0) + float(value)
        except ValueError:
            continue  # another kind of value, which is not needed
    return sums


def parse_tokens(text: str) -> int:
    """Return the tokens that a server has processed, according to its metrics."""
    sums = _sums(text)
    return int(sum(sums.get(name, 0.0) for name in _TOKENS))


def parse_load(text: str) -> Load | None:
    """Return the load in a server's metrics, or None."""
    sums = _sums(text)
    for running, waiting in _METRICS:
        if running in sums and waiting in sums:
            return Load(int(sums[running]), int(sums[waiting]))
    return None


class LoadWatch:
    """Queries a server's load in a separate thread, initially every half second.

    Ends by itself if the first answer shows no load.
    """

    def __init__(self, fetch: Get, note: Callable[[int, int], None]) -> None:
        self._fetch = fetch
        self._note = note
        self._closing = threading.Event()

    def start(self) -> None:
        """Start querying."""
        start_thread(self._watch, "load-watch")

    def close(self) -> None:
        """Stop querying."""
        self._closing.set()

    def _watch(self) -> None:
        reports = 0
        while not self._closing.wait(_OFTEN if reports < _REPORTS_OFTEN else _SELDOM):
            load = parse_load((self._fetch("/metrics") or b"").decode("utf-8", "replace"))
            if load is not None:
                reports += 1
                self._note(load.running, load.waiting)
            elif not reports:
                return
