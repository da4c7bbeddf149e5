"""The process of a batch, called directly: what is wrong with an input, in OpenAI's codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiflux.gateway.objects import REQUESTABLE
from aiflux.gateway.store import BatchFailure, BatchFiles
from aiflux.gateway.submission import advance
from tests.unit.fake_commands import waiting_slurm
from tests.unit.gateway.running_gateway import lines, recorded_batch
from tests.unit.helpers import request_line

Recorded = Callable[..., BatchFiles]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    """Return a function that records a batch of some content."""

    def record(content: bytes, **settings: Any) -> BatchFiles:
        settings = {"engine_url": "http://127.0.0.1:9", **settings}
        return recorded_batch(tmp_path / "state", content, settings, tmp_path)

    return record


def failure(batch: BatchFiles) -> BatchFailure:
    advance(batch)
    found = batch.failure()
    assert found is not None
    return found


EMBEDDINGS: dict[str, Any] = {"url": "/v1/embeddings", "body": {"model": "m:1", "input": "x"}}
BAD = [
    (b"", None, "empty_file", None),
    (b"\n \n", None, "empty_file", None),
    (b"no json\n", 1, "invalid_json_line", None),
    (lines("a") + b"[]\n", 2, "invalid_json_line", None),
    (lines("a") + b"\xff\xfe\n", 2, "invalid_json_line", None),
    (lines("a") + lines("b"), 2, "duplicate_custom_id", "custom_id"),
    (lines("a", custom_id=...), 1, "missing_required_parameter", "custom_id"),
    (lines("a", custom_id=7), 1, "invalid_value", "custom_id"),
    (lines("a", method="GET"), 1, "invalid_method", "method"),
    (lines("a", url="/v1/unknown"), 1, "invalid_url", "url"),
    (lines("a", metadata=[]), 1, "invalid_value", "metadata"),
    (lines("a", url="/v1/embeddings"), 1, "missing_required_parameter", "body.input"),
    (lines("a") + request_line("e", **EMBEDDINGS).encode(), 2, "url_mismatch", "url"),
    (
        request_line("x", body={"messages": [{}]}).encode(),
        1, "missing_required_parameter", "body.model",
    ),
    (request_line("x", body=[]).encode(), 1, "invalid_value", "body"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "line", "code", "param"), BAD)
def test_a_wrong_input_has_the_code_of_its_kind(
    recorded: Recorded, content: bytes, line: int | None, code: str, param: str | None
) -> None:
    error, *_ = failure(recorded(content)).errors
    assert (error.line, error.code, error.param) == (line, code, param), error
    assert error.message
    assert "/files/" not in error.message, "clients know the file by its id"


def test_many_bad_lines_are_listed_in_order_and_counted(recorded: Recorded) -> None:
    errors = failure(recorded(lines(*("x" * 150), custom_id=...))).errors
    assert [each.line for each in errors] == [*range(1, 21), None]
    assert errors[-1].message == "130 more lines are wrong"


def test_another_problem_than_the_input_is_an_error_of_the_batch(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm").mkdir()
    slurm = waiting_slurm(tmp_path / "slurm", monkeypatch)
    batch = recorded(lines("a"), engine_url=None)
    (error,) = failure(batch).errors
    assert (error.line, error.code) == (None, "run_not_started")
    assert "image" in error.message
    assert not slurm.calls("sbatch")
    assert not batch.submitted_file.exists()


def test_what_was_decided_stays(recorded: Recorded) -> None:
    batch = recorded(b"")
    first = failure(batch)
    batch.input(batch.record()).write_bytes(lines("a"))
    assert failure(batch) == first


def test_a_batch_that_is_cancelled_before_its_start_never_starts(recorded: Recorded) -> None:
    batch = recorded(lines("a"))
    batch.note(batch.cancelling_file)
    advance(batch)
    assert batch.cancelled_file.exists()
    assert not batch.run.path.exists()


def test_requests_set_what_a_run_does_and_not_where_it_runs() -> None:
    assert {"model", "temperature", "time", "shards", "partition", "account"} <= {*REQUESTABLE}
    assert not {"engine_url", "setup", "image", "lora", "logs_dir", "seal"} & {*REQUESTABLE}
