"""Summarise a journal in one pass: 1,000,000 results take some seconds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from aiflux.core.batch.request import load_json
from aiflux.core.runs.journal import CUT, EMPTY, split_line
from aiflux.report.throughput import Histogram, Timeline
from aiflux.util.times import unix_seconds

EXAMPLES = 3
MANY_ATTEMPTS = 20
_LONGEST_MESSAGE = 300
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_PROMPT = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
_COMPLETION = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')


@dataclass(frozen=True)
class Example:
    """One request that failed."""

    custom_id: str
    status: int | None
    message: str


@dataclass
class Failures:
    """Requests that failed in one way."""

    count: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass
class EngineTally:
    """The results of one engine."""

    results: int = 0
    failed: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Tally:
    """The sums over the results of a shard or a run.

    Attributes:
        results: recorded results, also several for one request.
        superseded: results that a later one replaced.
        seconds: total time of the attempts that gave the results; ``latency``: of each answer.
        attempts: results by number of attempts; ``MANY_ATTEMPTS`` stands for more, too.
        failures: requests that failed, by code; the last result of a request counts.
        cut: answers that ended at their token limit; ``filtered``: that a content filter stopped.
        truncated: answers to prompts that the engine truncated.
        unfit: answers that did not fit their schema.
        empty: answers without a text, by their reason (``EMPTY_REASONS``).
        models: results by requested model; ``digests``: its digests according to the engines.
        engines: by the number of the engine.
    """

    results: int = 0
    superseded: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: int = 0
    filtered: int = 0
    truncated: int = 0
    unfit: int = 0
    empty: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    latency: Histogram = field(default_factory=Histogram)
    timeline: Timeline = field(default_factory=Timeline)
    attempts: Counter[int] = field(default_factory=Counter)
    failures: dict[str, Failures] = field(default_factory=dict)
    models: Counter[str] = field(default_factory=Counter)
    digests: dict[str, set[str]] = field(default_factory=dict)
    engines: dict[int, EngineTally] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Requests whose last result is a failure."""
        return sum(kind.count for kind in self.failures.values())

    @property
    def completed(self) -> int:
        """Requests whose last result is an answer."""
        return self.results - self.superseded - self.failed

    def merge(self, other: Tally) -> None:
        """Add another shard's results, except for its engines."""
        for name in (
            "results",
            "superseded",
            "prompt_tokens",
            "completion_tokens",
            "cut",
            "filtered",
            "truncated",
            "unfit",
            "seconds",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latency.merge(other.latency)
        self.timeline.merge(other.timeline)
        self.empty.update(other.empty)
        self.attempts.update(other.attempts)
        self.models.update(other.models)
        for model, digests in other.digests.items():
            self.digests.setdefault(model, set()).update(digests)
        for code, kind in other.failures.items():
            own = self.failures.setdefault(code, Failures())
            own.count += kind.count
            own.examples = (own.examples + kind.examples)[:EXAMPLES]


def tally(lines: Iterable[tuple[bytes, bytes]]) -> Tally:
    """Summarise the results of one journal.

    Memory grows only with the requests that failed, by 150 bytes each.

    Args:
        lines: key and line of each result, in the order in which they were written.
    """
    reader = _JournalReader()
    for key, line in lines:
        reader.read(key, line)
    return reader.tally


class _JournalReader:
    def __init__(self) -> None:
        self.tally = Tally()
        self._failed: dict[bytes, str] = {}
        self._minute = ("", 0.0)

    def read(self, key: bytes, line: bytes) -> None:
        result = split_line(line)
        metadata = load_json(result.metadata)
        failed = result.failed
        prompt, completion = _usage(result.body)
        seconds = float(metadata["processing_time"])
        sums = self.tally
        sums.results += 1
        sums.prompt_tokens += prompt
        sums.completion_tokens += completion
        sums.seconds += seconds
        if not failed:
            sums.latency.add(seconds)
        sums.timeline.add(self._moment(metadata["timestamp"]), failed, prompt, completion)
        self._note(metadata, failed, seconds, prompt, completion)
        earlier = self._failed.pop(key, None) if self._failed else None
        if earlier is not None:
            sums.superseded += 1
            sums.failures[earlier].count -= 1
        if failed:
            self._fail(key, result.custom_id, result.error)

    def _note(
        self, metadata: dict[str, Any], failed: bool, seconds: float, prompt: int, completion: int
    ) -> None:
        sums = self.tally
        sums.attempts[min(int(metadata.get("attempts", 1)), MANY_ATTEMPTS)] += 1
        model = str(metadata.get("model", ""))
        sums.models[model] += 1
        if "model_digest" in metadata:
            sums.digests.setdefault(model, set()).add(str(metadata["model_digest"]))
        sums.cut += CUT["length"] in metadata
        sums.filtered += CUT["content_filter"] in metadata
        sums.truncated += "truncated_prompt" in metadata
        sums.unfit += int(metadata.get("unfit_answers", 0))
        if EMPTY in metadata and not failed:
            sums.empty[str(metadata[EMPTY])] += 1
        number = int(metadata.get("engine", 0))
        engine = sums.engines.get(number)
        if engine is None:
            engine = sums.engines.setdefault(number, EngineTally())
        engine.results += 1
        engine.failed += failed
        engine.seconds += seconds
        engine.prompt_tokens += prompt
        engine.completion_tokens += completion

    def _fail(self, key: bytes, custom_id: bytes, error: bytes) -> None:
        content = load_json(error)
        code = str(content.get("code"))
        kind = self.tally.failures.setdefault(code, Failures())
        kind.count += 1
        if len(kind.examples) < EXAMPLES:
            message = str(content.get("message"))[:_LONGEST_MESSAGE]
            name = str(load_json(custom_id))
            kind.examples.append(Example(name, content.get("status"), message))
        self._failed[key] = code

    def _moment(self, text: str) -> float:
        """Return Unix time; the last minute is cached, as the next result is probably from it."""
        minute, known = self._minute
        if text[:17] != minute:
            known = unix_seconds(text[:17] + "00Z")
            self._minute = (text[:17], known)
        return known + float(text[17:-1])


def _usage(body: bytes) -> tuple[int, int]:
    """Return the numbers of prompt and answer tokens in an answer; 0 if it has none.

    A string contains no unescaped quote, and ``usage`` is near the end of an answer: the body is
    decoded only if the last ``"usage"`` is not an object.
    """
    at = body.rfind(b'"usage"')
    if at < 0:
        return 0, 0
    if _USAGE.match(body, at):
        prompt, completion = _PROMPT.search(body, at), _COMPLETION.search(body, at)
        return int(prompt[1]) if prompt else 0, int(completion[1]) if completion else 0
    content = load_json(body)
    usage = content.get("usage") if isinstance(content, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
