"""Batches with the official client: create, poll, download, cancel, and what can be wrong."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, ConflictError, NotFoundError, OpenAI

from tests.tools.faulty_engine import FaultyEngine
from tests.unit.gateway.running_gateway import (
    RunningGateway,
    create,
    downloaded,
    ended,
    lines,
    upload,
    wait_until,
)

WINDOW: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}


def test_a_batch_is_processed_and_downloaded(client: OpenAI, gateway: RunningGateway) -> None:
    before = int(time.time())
    batch = create(client, lines("one", "two", "403", "three"), metadata={"project": "x"})
    assert batch.status == "validating"
    assert batch.metadata == {"project": "x"}
    assert batch.completion_window == "24h"
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert batch.expires_at == batch.created_at + 86400
    done = ended(client, batch.id)
    assert (done.id, done.status, done.errors, done.model) == (batch.id, "completed", None, "m:1")
    counts = done.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (4, 3, 1)
    moments = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert all(moment is not None and before <= moment <= time.time() for moment in moments)
    assert done.completed_at >= done.finalizing_at >= done.created_at  # type: ignore[operator]
    answers = downloaded(client, done.output_file_id)
    texts = {
        name: entry["response"]["body"]["choices"][0]["message"]["content"]
        for name, entry in answers.items()
    }
    assert texts == {"r0": "echo one", "r1": "echo two", "r3": "echo three"}
    assert {entry["response"]["status_code"] for entry in answers.values()} == {200}
    failed = downloaded(client, done.error_file_id)
    assert list(failed) == ["r2"]
    for id_, name in (
        (done.output_file_id, f"{done.id}_output.jsonl"),
        (done.error_file_id, f"{done.id}_error.jsonl"),
    ):
        assert id_ is not None
        stored = client.files.retrieve(id_)
        assert (stored.filename, stored.purpose) == (name, "batch_output")
        assert stored.id in [each.id for each in client.files.list(purpose="batch_output")]
        assert stored.bytes == len(client.files.content(id_).read())
    run = Path(gateway.ask("GET", f"/v1/batches/{batch.id}")[1]["aiflux"]["run"])
    assert (run / "plan.json").is_file()


@pytest.mark.parametrize(
    ("endpoint", "asked", "answer"),
    [
        ("/v1/responses", {"input": "hi"}, "output"),
        ("/v1/rerank", {"query": "q", "documents": ["a", "b"]}, "results"),
        ("/v1/score", {"text_1": "q", "text_2": "a"}, "data"),
    ],
)
def test_batches_of_other_endpoints(
    client: OpenAI, endpoint: Any, asked: dict[str, Any], answer: str
) -> None:
    request = {"custom_id": "r0", "method": "POST", "url": endpoint, "body": {"model": "m:1"}}
    request["body"] |= asked
    stored = upload(client, json.dumps(request).encode() + b"\n")
    batch = client.batches.create(
        input_file_id=stored.id, endpoint=endpoint, completion_window="24h"
    )
    done = ended(client, batch.id)
    assert (done.status, done.endpoint) == ("completed", endpoint)
    assert downloaded(client, done.output_file_id)["r0"]["response"]["body"][answer]


def test_without_failed_requests_there_is_no_error_file(client: OpenAI) -> None:
    done = ended(client, create(client, lines("a")).id)
    assert done.output_file_id is not None
    assert done.error_file_id is None


def test_a_batch_without_any_answer_failed(client: OpenAI) -> None:
    """As a run: the engine or its model is wrong, and no request is to blame."""
    done = ended(client, create(client, lines("400", "403")).id)
    assert (done.status, done.output_file_id, done.error_file_id) == ("failed", None, None)
    assert done.errors is not None
    (error,) = done.errors.data or []
    assert error.code == "run_ended"
    assert "requested error 40" in (error.message or "")


def test_a_batch_of_wrong_requests_is_completed(client: OpenAI) -> None:
    done = ended(client, create(client, lines("400", "400 too")).id)
    assert (done.status, done.output_file_id) == ("completed", None)
    assert set(downloaded(client, done.error_file_id)) == {"r0", "r1"}


def test_the_async_client_works_unchanged(gateway: RunningGateway) -> None:
    async def work() -> set[str]:
        async with gateway.async_client() as client:
            stored = await client.files.create(file=("a.jsonl", lines("x", "y")), purpose="batch")
            batch = await client.batches.create(input_file_id=stored.id, **WINDOW)
            while batch.status != "completed":
                assert batch.status in ("validating", "in_progress", "finalizing")
                await asyncio.sleep(0.05)
                batch = await client.batches.retrieve(batch.id)
            assert batch.output_file_id is not None
            content = await client.files.content(batch.output_file_id)
            listed = [each.id async for each in client.batches.list(limit=1)]
            assert batch.id in listed
            return {
                entry["custom_id"]: entry for entry in map(json.loads, content.text.splitlines())
            }

    assert set(asyncio.run(work())) == {"r0", "r1"}


def test_two_batches_on_one_file_and_two_clients_at_once(gateway: RunningGateway) -> None:
    with gateway.client() as one, gateway.client() as other:
        stored = upload(one, lines("a", "b"))
        batches = [
            client.batches.create(input_file_id=stored.id, **WINDOW) for client in (one, other)
        ]
        assert batches[0].id != batches[1].id
        for client, batch in zip((other, one), batches, strict=True):
            done = ended(client, batch.id)
            assert done.status == "completed"
            assert set(downloaded(client, done.output_file_id)) == {"r0", "r1"}
        assert one.files.delete(stored.id).deleted


def test_lists_have_pages(client: OpenAI) -> None:
    ids = [create(client, b"").id for _ in range(3)]
    page = client.batches.list(limit=2)
    assert [each.id for each in page.data] == [ids[2], ids[1]]
    assert page.has_more
    assert [each.id for each in client.batches.list(limit=1)][:3] == ids[::-1]
    assert ids[2] not in [each.id for each in client.batches.list(after=ids[2])]
    for id_ in ids:
        ended(client, id_)


def test_a_list_names_its_first_and_last_object(gateway: RunningGateway, client: OpenAI) -> None:
    batch = create(client, b"")
    status, page = gateway.ask("GET", "/v1/batches?limit=1")
    assert (status, page["object"], page["first_id"], page["last_id"]) == (
        200, "list", batch.id, batch.id,
    )  # fmt: skip
    ended(client, batch.id)


def test_bad_lines_end_a_batch_with_their_numbers(client: OpenAI, engine: FaultyEngine) -> None:
    asked = len(engine.bodies)
    batch = create(client, lines("a") + b"no json\n")
    done = ended(client, batch.id)
    assert (done.status, done.output_file_id) == ("failed", None)
    assert done.failed_at is not None
    assert done.errors is not None
    assert done.errors.object == "list"
    (error,) = done.errors.data or []
    assert (error.line, error.code, error.param) == (2, "invalid_json_line", None)
    assert len(engine.bodies) == asked


def test_another_model_than_the_gateways_is_an_error_of_the_line(
    tmp_path: Path, start: list[RunningGateway], engine: FaultyEngine
) -> None:
    running = RunningGateway(tmp_path, ["--engine-url", engine.url, "--model", "m:1"])
    start.append(running)
    running.start()
    with running.client() as client:
        done = ended(client, create(client, lines("a", model="gpt-4o")).id)
        assert done.errors is not None
        (error,) = done.errors.data or []
        assert (error.code, error.param, error.line) == ("model_mismatch", "body.model", 1)
        assert [model.id for model in client.models.list()] == ["m:1"]


def body(**changes: Any) -> dict[str, Any]:
    return {"input_file_id": "file-" + "0" * 40, **WINDOW, **changes}


@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        (body(input_file_id=...), "input_file_id", "missing_required_parameter"),
        (body(endpoint=None), "endpoint", "missing_required_parameter"),
        (body(completion_window=24), "completion_window", "invalid_type"),
        (body(input_file_id=["x"]), "input_file_id", "invalid_type"),
        (body(), "input_file_id", "file_not_found"),
        (body(input_file_id="../../key"), "input_file_id", "file_not_found"),
        (body(endpoint="/v1/videos"), "endpoint", "invalid_value"),
        (body(completion_window="soon"), "completion_window", "invalid_value"),
        (body(completion_window="0h"), "completion_window", "invalid_value"),
        (body(metadata=[]), "metadata", "invalid_type"),
        (body(metadata={"a": 1}), "metadata.a", "invalid_type"),
        (body(metadata={"a": "x" * 513}), "metadata", "string_above_max_length"),
        (body(metadata={str(n): "x" for n in range(17)}), "metadata", "invalid_value"),
        (body(color="red"), "color", "unknown_parameter"),
        (body(output_expires_after={}), "output_expires_after", "unsupported_parameter"),
        (body(aiflux="fast"), "aiflux", "invalid_type"),
        (body(aiflux={"tempo": 1}), "aiflux.tempo", "unknown_parameter"),
        (body(aiflux={"temperature": "hot"}), "aiflux.temperature", "invalid_value"),
        (body(aiflux={"batch_size": 1, "concurrency": 2}), "aiflux", "invalid_value"),
        ([], None, None),
        ("text", None, None),
        (None, None, None),
    ],
)
def test_a_wrong_body_is_refused(
    gateway: RunningGateway, content: Any, param: str | None, code: str | None
) -> None:
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if value is not ...}
    status, answer = gateway.ask("POST", "/v1/batches", json.dumps(content).encode())
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, param, code), error
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b'{"a": NaN}', b"[" * 5000, b'{"input_file_id": "\\ud800"}'],
)
def test_a_body_that_is_not_json_is_refused(gateway: RunningGateway, content: bytes) -> None:
    status, answer = gateway.ask("POST", "/v1/batches", content)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_a_huge_body_is_refused(gateway: RunningGateway) -> None:
    status, answer = gateway.ask("POST", "/v1/batches", b" " * (2 << 20))
    assert (status, answer["error"]["type"]) == (413, "invalid_request_error")


@pytest.mark.parametrize(
    "name",
    [
        "engine_url", "engine_command", "engine_ca", "engine_env", "engine_arg", "image", "setup",
        "modules", "sbatch_arg", "seal", "data_dir", "models_dir", "logs_dir", "containers_dir",
        "models_file", "model_config", "lora",
    ],
)  # fmt: skip
def test_a_request_cannot_decide_where_data_goes_or_what_runs(
    gateway: RunningGateway, client: OpenAI, name: str
) -> None:
    stored = upload(client, lines("a"))
    content = body(input_file_id=stored.id, aiflux={name: "x"})
    status, answer = gateway.ask("POST", "/v1/batches", json.dumps(content).encode())
    assert (status, answer["error"]["param"]) == (400, f"aiflux.{name}")
    assert answer["error"]["code"] == "unsupported_parameter"


def test_settings_of_a_request_reach_the_run(client: OpenAI, engine: FaultyEngine) -> None:
    more = {"aiflux": {"temperature": 0.25, "max_tokens": 7, "batch_size": 2}}
    batch = create(client, lines("with settings"), extra_body=more)
    assert ended(client, batch.id).status == "completed"
    (sent,) = [each for each in engine.bodies if "with settings" in json.dumps(each)]
    assert (sent["temperature"], sent["max_tokens"]) == (0.25, 7)


def test_a_cancelled_batch_keeps_what_it_has(client: OpenAI) -> None:
    more = {"aiflux": {"drain_seconds": 0}}
    batch = create(client, lines("quick", "hang", "also quick"), extra_body=more)
    wait_until(client, batch.id, lambda b: b.request_counts.completed == 2)  # type: ignore[union-attr]
    stored = client.batches.retrieve(batch.id).input_file_id
    with pytest.raises(ConflictError) as found:
        client.files.delete(stored)
    assert found.value.code == "file_in_use"
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert cancelling.cancelling_at is not None
    assert client.batches.cancel(batch.id).id == batch.id
    done = ended(client, batch.id)
    assert done.status == "cancelled"
    assert done.cancelled_at is not None
    assert set(downloaded(client, done.output_file_id)) == {"r0", "r2"}
    assert client.files.delete(stored).deleted


def test_a_new_batch_does_not_wait_for_cancelled_ones(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    with FaultyEngine() as engine:
        running = RunningGateway(tmp_path, ["--engine-url", engine.url, "--drain-seconds", "60"])
        start.append(running)
        running.start()
        with running.client() as client:
            slow = [create(client, lines("hang")) for _ in range(2)]
            for batch in slow:
                wait_until(client, batch.id, lambda _: engine.active == 2)
                for _ in range(9):
                    assert client.batches.cancel(batch.id).status == "cancelling"
            other = create(client, lines("a"))
            assert ended(client, other.id, 15).status == "completed"
            assert [client.batches.retrieve(b.id).status for b in slow] == 2 * ["cancelling"]


def test_a_batch_that_has_ended_cannot_be_cancelled(client: OpenAI) -> None:
    for content, status in ((lines("a"), "completed"), (b"", "failed")):
        batch = create(client, content)
        ended(client, batch.id)
        with pytest.raises(ConflictError) as found:
            client.batches.cancel(batch.id)
        assert f"Cannot cancel a batch with status '{status}'." in found.value.message
        assert client.batches.retrieve(batch.id).status == status


def test_unknown_batches_are_not_found(client: OpenAI) -> None:
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(NotFoundError, match="No batch found with id 'batch_x'"):
            call("batch_x")


def test_a_deleted_file_makes_no_batch(client: OpenAI) -> None:
    stored = upload(client, lines("a"))
    client.files.delete(stored.id)
    with pytest.raises(BadRequestError) as found:
        client.batches.create(input_file_id=stored.id, **WINDOW)
    assert found.value.param == "input_file_id"


def test_a_deleted_output_keeps_its_place_in_a_list(client: OpenAI) -> None:
    done = [ended(client, create(client, lines("a", "400")).id) for _ in range(2)]
    ids = [id_ for each in done for id_ in (each.error_file_id, each.output_file_id)]
    rising = client.files.list(purpose="batch_output", order="asc")
    listed = [each for each in rising if each.id in ids]
    assert {each.id for each in listed[:2]} == set(ids[:2])
    assert {each.id for each in listed[2:]} == set(ids[2:])
    times = [each.created_at for each in listed]
    assert times == sorted(times)
    for at, each in enumerate(listed):
        client.files.delete(each.id)
        for order, rest in (("asc", listed[at + 1 :]), ("desc", [])):
            page = client.files.list(purpose="batch_output", order=order, after=each.id)  # type: ignore[arg-type]
            assert [other.id for other in page if other.id in ids] == [other.id for other in rest]


def test_outputs_can_be_deleted_and_the_batch_stays(client: OpenAI) -> None:
    done = ended(client, create(client, lines("a")).id)
    assert done.output_file_id is not None
    assert client.files.delete(done.output_file_id).deleted
    with pytest.raises(NotFoundError):
        client.files.content(done.output_file_id)
    assert client.batches.retrieve(done.id) == done


def test_models_are_those_of_the_engine(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m:1"]
    assert client.models.retrieve("m:1").object == "model"
    with pytest.raises(NotFoundError):
        client.models.retrieve("org/other")
