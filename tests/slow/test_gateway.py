"""The gateway with a large batch: its memory does not grow with the number of requests."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.gateway.running_gateway import ENDED, RunningGateway
from tests.unit.helpers import request_line

REQUESTS = 200_000
MOST_GROWTH = 16 << 20


@pytest.fixture
def engine() -> Iterator[str]:
    """An engine that answers at once."""
    command = [sys.executable, "-m", "bench.engine"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = process.stdout.readline().split()[-1]
        yield f"http://127.0.0.1:{port.rpartition(':')[2]}"
        process.terminate()


@pytest.mark.slow
def test_200_000_requests_do_not_fill_the_gateway(tmp_path: Path, engine: str) -> None:
    source = tmp_path / "in.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for number in range(REQUESTS):
            messages = [{"role": "user", "content": f"question {number} " + "x" * 400}]
            body = {"model": "m:1", "messages": messages}
            file.write(request_line(f"r{number}", body=body) + "\n")
    with RunningGateway(tmp_path, ["--engine-url", engine]) as running, running.client() as client:
        client.files.list()
        before = running.memory()
        stored = client.files.create(file=source, purpose="batch")
        assert stored.bytes == source.stat().st_size
        batch = client.batches.create(
            input_file_id=stored.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while batch.status not in ENDED:
            time.sleep(0.1)
            batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed", batch
        assert batch.output_file_id is not None
        seen = set()
        with client.files.with_streaming_response.content(batch.output_file_id) as answer:
            for line in answer.iter_lines():
                seen.add(json.loads(line)["custom_id"])
        assert len(seen) == REQUESTS
        grown = running.memory() - before
        print(
            f"input {stored.bytes >> 20} MiB; memory {before >> 20} MiB, grown by {grown >> 10} KiB"
        )
        assert grown < MOST_GROWTH
