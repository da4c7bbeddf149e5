"""The journal: results survive any damage and are found again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.core.batch.request import request_key
from aiflux.core.runs.journal import (
    JournalReader,
    JournalWriter,
    NewResult,
    cut_torn_tail,
    scan_journal,
    split_line,
    valid_line,
)
from aiflux.errors import ExitCode, StorageError

texts = st.text(st.characters(codec="utf-8"))
bodies = st.dictionaries(texts, texts | st.integers() | st.none(), max_size=4)


def result(name: str, body: object = None, error: dict[str, object] | None = None) -> NewResult:
    return NewResult(
        key=request_key(name.encode()),
        custom_id=name,
        status=200,
        metadata={"model": "m:1", "attempts": 1},
        error=error,
        body=json.dumps({"answer": name} if body is None else body).encode(),
    )


@given(name=st.text(min_size=1), body=bodies, message=st.none() | st.text())
def test_a_line_is_read_back_as_written(
    name: str, body: dict[str, object], message: str | None
) -> None:
    error = None if message is None else {"code": "x", "message": message, "status": 400}
    key = request_key(name.encode("utf-8", "surrogatepass"))
    made = NewResult(key, name, None, {"model": name}, error, json.dumps(body).encode())
    line = made.to_line()
    assert valid_line(line)
    assert line.count(b"\n") == 1
    raw = split_line(line)
    assert raw.key == key
    assert json.loads(raw.custom_id) == name
    assert json.loads(raw.metadata) == {"model": name}
    assert json.loads(raw.error) == error
    assert raw.body == json.dumps(body).encode()
    assert raw.failed == (error is not None)
    assert json.loads(line)["body"] == body


def test_a_pretty_printed_answer_stays_on_one_line() -> None:
    pretty = json.dumps({"a": "x\ny", "b": [1, 2]}, indent=2).encode() + b"\r\n"
    made = NewResult(request_key(b"r"), "r", 200, {}, None, pretty)
    assert json.loads(split_line(made.to_line()).body) == {"a": "x\ny", "b": [1, 2]}


def write(path: Path, *results: NewResult) -> None:
    writer = JournalWriter(path)
    for each in results:
        writer.append(each)
    writer.close()


def test_results_are_found_by_their_request(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, *(result(f"r{index}") for index in range(1000)))
    index = scan_journal(path)
    assert (index.done, index.damaged) == (1000, 0)
    reader = JournalReader(path, index)
    for number in range(1000):
        found = reader.get(request_key(f"r{number}".encode()))
        assert found is not None
        assert json.loads(found.body) == {"answer": f"r{number}"}
    assert reader.get(request_key(b"unknown")) is None
    reader.close()


def test_the_last_result_of_a_request_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, result("a", error={"code": "x"}), result("b"), result("a", body={"second": 1}))
    index = scan_journal(path)
    assert index.done == 2
    reader = JournalReader(path, index)
    found = reader.get(request_key(b"a"))
    assert found is not None
    assert not found.failed
    assert json.loads(found.body) == {"second": 1}
    reader.close()


def test_a_missing_journal_is_empty(tmp_path: Path) -> None:
    assert scan_journal(tmp_path / "none").done == 0
    assert cut_torn_tail(tmp_path / "none") == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_writing_continues_wherever_a_journal_was_cut_off(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    names = [f"r{index}" for index in range(5)]
    write(path, *map(result, names))
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    write(path, result("new"))
    index = scan_journal(path)
    assert index.damaged == 0
    assert index.done == whole + 1
    assert index.find(request_key(b"new")) is not None
    assert all(index.find(request_key(name.encode())) for name in names[:whole])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_line_is_not_a_result(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    write(path, result("a"), result("b"), result("c"))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != content[position]))
    content[position] = byte
    path.write_bytes(bytes(content))
    index = scan_journal(path)
    assert index.damaged >= 1
    assert 1 <= index.done <= 2


def test_a_full_disk_stops_the_run_and_names_the_file() -> None:
    failures: list[StorageError] = []
    writer = JournalWriter(Path("/dev/full"), on_failure=failures.append)
    with pytest.raises(StorageError) as caught:
        writer.append(result("a"))
    assert caught.value.exit_code is ExitCode.STOPPED
    assert "/dev/full: No space left on device" in caught.value.message
    assert len(failures) == 1
    with pytest.raises(StorageError):
        writer.append(result("b"))
    with pytest.raises(StorageError):
        writer.close()


def test_a_result_is_written_when_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    writer = JournalWriter(path, save_frequency=1000, interval=1000)
    writer.append(result("a"))
    assert scan_journal(path).done == 1
    writer.close()


def test_only_the_owner_can_read_the_journal(tmp_path: Path) -> None:
    write(tmp_path / "journal", result("a"))
    assert os.stat(tmp_path / "journal").st_mode & 0o077 == 0
