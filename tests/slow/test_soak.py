"""Soak tests: what must hold a hundred times over."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import request_line

REQUESTS = 300


def worker(place: Path, url: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "aiflux.worker", "in.jsonl", "out.json",
               "--engine-url", url, "--concurrency", "16", "--retry-delay", "0.05"]  # fmt: skip
    return subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_kill_9_at_any_moment_and_resume(tmp_path: Path, seed: int) -> None:
    """Each of a hundred runs is killed again and again, and ends whole."""
    dice = random.Random(seed)
    faults = ["", "500*1 ", "reset*1 ", "cut*1 ", "429*1 "]
    prompts = [f"{dice.choice(faults)}p{index}" for index in range(REQUESTS)]
    bodies = [{"model": "m:1", "messages": [{"role": "user", "content": p}]} for p in prompts]
    lines = [request_line(f"r{i}", body=body) for i, body in enumerate(bodies)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kills = 0
    with FaultyEngine(delay=0.02) as engine:
        for _ in range(20):
            process = worker(tmp_path, engine.url)
            deadline = time.monotonic() + dice.uniform(0.3, 1.2)
            while process.poll() is None and (time.monotonic() < deadline or kills >= 4):
                time.sleep(0.01)
            if process.poll() is None:
                process.kill()
                kills += 1
            _, told = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -9, told.decode()
        assert process.returncode == 0
        most = max(engine.seen.values())
    assert kills > 0
    entries = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [entry["input"]["custom_id"] for entry in entries] == [f"r{i}" for i in range(REQUESTS)]
    assert all(entry["output"] for entry in entries)
    # A request is sent again only for a fault, or for a kill while it was in flight.
    assert most <= 2 + kills
