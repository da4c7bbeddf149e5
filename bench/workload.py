"""Create inputs and journals for measurements."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path

from aiflux.core.batch.request import request_key
from aiflux.core.runs.journal import NewResult
from aiflux.util.lines import read_lines
from bench.decoding import SEED
from bench.engine import MODEL, answer

_IN_FLIGHT = 64
_WORDS = tuple(string.ascii_lowercase[n:] for n in range(20))


def request_line(number: int, tokens: int, text: str) -> bytes:
    """Return one input line."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    entry = {
        "custom_id": f"request-{number:08d}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    }
    return json.dumps(entry).encode() + b"\n"


def write_input(path: Path, lengths: Sequence[int], size: int = 1024) -> int:
    """Write one request of about ``size`` bytes per length; return the bytes written."""
    source = random.Random(SEED)
    spare = max(8, size - len(request_line(0, 100, "")))
    texts = []
    for _ in range(64):
        words = " ".join(source.choice(_WORDS) for _ in range(spare // 3))
        texts.append(words[:spare])
    written = 0
    with open(path, "wb") as file:
        for number, tokens in enumerate(lengths):
            written += file.write(request_line(number, tokens, texts[number % len(texts)]))
    return written


def write_journal(
    path: Path, input_path: Path, start: int, end: int, size: int | None = None
) -> None:
    """Write a result for each request of a part of an input, with an answer of 1 KB or ``size``.

    They are about as much out of order as concurrent requests would be.
    """
    body = answer(200) if size is None else answer(200, size)
    metadata = {
        "model": MODEL,
        "timestamp": "2026-01-01T00:00:00.000Z",
        "processing_time": 1.2345,
        "attempts": 1,
        "engine": 0,
    }
    source = random.Random(SEED)
    flying: list[bytes] = []
    with open(path, "wb") as file:
        for _, _, line in read_lines(input_path, start, end):
            result = NewResult(
                request_key(line), json.loads(line)["custom_id"], 200, metadata, None, body
            )
            flying.append(result.to_line())
            if len(flying) > _IN_FLIGHT:
                file.write(flying.pop(source.randrange(len(flying))))
        file.writelines(flying)
