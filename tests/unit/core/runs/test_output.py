"""The output: the journals' results in input order."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.core.batch.request import request_key
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.journal import (
    MISSING,
    JournalReader,
    NewResult,
    find_places,
    journal_lines,
    scan_journal,
    split_line,
)
from aiflux.core.runs.open import OpenedRun, draft_run
from aiflux.core.runs.output import array_entry, batch_line, finalise
from aiflux.engines.kinds import kind_named
from aiflux.errors import StoppedError
from tests.unit.helpers import request_line

OPTIONS = RunOptions(engine_url="http://127.0.0.1:1")


def opened(place: Path, requests: int, shards: int, name: str = "out.json") -> OpenedRun:
    lines = []
    for number in range(requests):
        more = {"metadata": {"mine": number}} if number % 3 == 0 else {}
        lines.append(request_line(f"r{number}", **more))
    (place / "in.jsonl").write_text("\r\n\n".join(lines) + "\n", encoding="utf-8")
    return draft_run(
        place / "in.jsonl", place / name, OPTIONS, None, kind_named("external"), shards=shards
    ).open()


def line_of(raw: bytes, attempt: int) -> bytes:
    error = {"code": "x", "message": "é", "status": 400} if attempt == 1 else None
    body = b"null" if error else json.dumps({"n": attempt, "of": raw.decode()[-30:]}).encode()
    name = json.loads(raw)["custom_id"]
    metadata = {"model": "m:1", "attempts": attempt}
    return NewResult(request_key(raw), name, 200, metadata, error, body).to_line()


def write_journals(run: OpenedRun, attempts: Sequence[int], seed: int) -> dict[bytes, bytes]:
    """Journal the attempts of each request in any order; return the last line of each."""
    requests = [line for line in run.plan.input_path.read_bytes().splitlines() if line]
    last = {}
    for shard in run.plan.shards:
        mine = range(shard.first, shard.first + shard.requests)
        todo = [(at, number) for at in mine for number in range(1, attempts[at] + 1)]
        random.Random(seed).shuffle(todo)
        lines = [line_of(requests[at], number) for at, number in todo]
        last.update({requests[at]: line for (at, _), line in zip(todo, lines, strict=True)})
        run.run.journal(shard.index).write_bytes(b"".join(lines) + b'{"crc":"torn')
    return {raw: last[raw] for raw in requests if raw in last}


@settings(max_examples=40)
@given(
    attempts=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    shards=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_the_output_holds_the_last_result_of_each_request(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[int], shards: int, seed: int
) -> None:
    run = opened(tmp_path_factory.mktemp("out"), len(attempts), shards)
    last = write_journals(run, attempts, seed)
    results = [(raw, split_line(line)) for raw, line in last.items()]
    entries = b",\n".join(array_entry(raw, result) for raw, result in results)
    partial = run.plan.output.with_suffix(".partial.json")
    counts = finalise(run.plan, run.run, partial)
    assert (counts.total, counts.failed) == (len(last), sum(r.failed for _, r in results))
    assert partial.read_bytes() == (b"[\n" + entries + b"\n]\n" if entries else b"[]\n")
    batch = run.plan.output.with_suffix(".jsonl")
    finalise(run.plan, run.run, batch)
    answered = [batch_line(result) for _, result in results if not result.failed]
    assert batch.read_bytes() == b"".join(answered)
    if 0 in attempts:
        with pytest.raises(StoppedError):
            finalise(run.plan, run.run)
    assert not run.plan.output.exists()


@given(
    attempts=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    shards=st.integers(1, 4),
    part_bytes=st.integers(1, 5000),
)
def test_results_are_located_however_the_journal_is_split(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[int], shards: int, part_bytes: int
) -> None:
    run = opened(tmp_path_factory.mktemp("places"), len(attempts), shards)
    last = write_journals(run, attempts, part_bytes)
    found = []
    for places in find_places(run.plan, run.run, part_bytes=part_bytes, children=0):
        journal = places.journal.read_bytes()
        for offset, size in zip(places.offsets, places.sizes, strict=True):
            found.append(None if offset == MISSING else journal[offset : offset + size])
    assert [line for line in found if line] == list(last.values())
    assert [line is None for line in found] == [number == 0 for number in attempts]


@pytest.mark.parametrize("disorder", [1, 50, 3000])
def test_results_are_read_back_in_any_order(tmp_path: Path, disorder: int) -> None:
    path = tmp_path / "journal"
    names = [f"r{number}" for number in range(3000)]
    with open(path, "wb") as file:
        for name in names:
            body = json.dumps(name * 500).encode()
            key = request_key(name.encode())
            file.write(NewResult(key, name, 200, {}, None, body).to_line())
    for at in range(0, len(names), disorder):
        part = names[at : at + disorder]
        random.Random(at).shuffle(part)
        names[at : at + disorder] = part
    reader = JournalReader(path, scan_journal(path, part_bytes=100_000, children=0))
    for name in names:
        result = reader.get(request_key(name.encode()))
        assert result is not None
        assert json.loads(result.body) == name * 500
    reader.close()
    assert len(list(journal_lines(path))) == 3000
