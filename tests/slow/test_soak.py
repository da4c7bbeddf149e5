"""Soak tests: repeat interrupted runs a hundred times."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.open import draft_run
from aiflux.engines.kinds import kind_named
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import request_line

REQUESTS = 300


def worker(place: Path, url: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "aiflux.worker", "in.jsonl", "out.json",
               "--engine-url", url, "--concurrency", "16", "--retry-delay", "0.05"]  # fmt: skip
    return subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def next_kill(dice: random.Random, kills: int, engine: FaultyEngine) -> Callable[[], bool]:
    """Return a function that returns whether it is time for the next kill.

    A kill comes after a number of requests, however fast the machine is. Later ones also come by
    time, before the first request or between two requests.
    """
    if kills and dice.random() < 0.4:
        end = time.monotonic() + dice.uniform(0.0, 0.8)
        return lambda: time.monotonic() > end
    count = len(engine.bodies) + dice.randrange(1, REQUESTS // 4)
    return lambda: len(engine.bodies) >= count


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_kill_9_at_any_moment_and_resume(tmp_path: Path, seed: int) -> None:
    """Each of a hundred runs is killed repeatedly and still completes."""
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
            due = next_kill(dice, kills, engine)
            while process.poll() is None and not (kills < 4 and due()):
                time.sleep(0.002)
            if process.poll() is None:
                process.kill()
                kills += 1
            _, printed = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -9, printed.decode()
        assert process.returncode == 0
        often = [prompt for prompt, count in engine.seen.items() if count > 2 + kills]
    assert kills > 0
    entries = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [entry["input"]["custom_id"] for entry in entries] == [f"r{i}" for i in range(REQUESTS)]
    assert all(entry["output"] for entry in entries)
    # A request is only repeated after a fault, or after a kill while it was in flight. With so many
    # faults in a row, each start may also probe whether the engine still answers, with a request
    # that was answered before.
    assert len(often) <= 1 + kills, often


def shard_worker(run: RunDirectory, shard: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "aiflux.worker", "--run-dir", str(run.path),
               "--shard", str(shard)]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_kill_9_of_shards_that_are_resharded(tmp_path: Path, seed: int) -> None:
    """Parallel shards (and the merge) are killed at random, and resharded now and then."""
    dice = random.Random(seed)
    lines = [request_line(f"r{index}") for index in range(REQUESTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kills = rounds = 0
    with FaultyEngine(delay=0.05) as engine:
        options = RunOptions(engine_url=engine.url, concurrency=2)
        while rounds < 30:
            rounds += 1
            opened = draft_run(
                tmp_path / "in.jsonl", tmp_path / "out.json", options, None, kind_named("external"),
                shards=dice.choice([3, 3, 4, 7]),
            ).open()  # fmt: skip
            if opened.finished:
                break
            running = [shard_worker(opened.run, k) for k in opened.open_shards or (0,)]
            limit = 1.5 if kills < 12 else 60.0
            ends = [time.monotonic() + dice.uniform(0.3, limit) for _ in running]
            while any(process.poll() is None for process in running):
                for process, end in zip(running, ends, strict=True):
                    if process.poll() is None and time.monotonic() > end:
                        process.kill()
                        process.wait()
                        kills += 1
                time.sleep(0.01)
            for process in running:
                _, printed = process.communicate()
                assert process.returncode in (0, -9), printed.decode()
        most = max(engine.seen.values())
    assert opened.finished
    assert kills > 0
    entries = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [entry["input"]["custom_id"] for entry in entries] == [f"r{i}" for i in range(REQUESTS)]
    assert most <= 1 + kills
    assert not list(opened.run.path.glob("journal.*"))
