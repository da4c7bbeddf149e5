"""Files: upload, list, download and delete, with the official client and with raw requests."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

from tests.unit.gateway.running_gateway import RunningGateway, begin_upload, lines, upload

FORM = {"Content-Type": "multipart/form-data; boundary=xyz"}
PURPOSE = '--xyz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = '--xyz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\n\r\n'


def test_a_file_comes_back_as_it_was(client: OpenAI) -> None:
    content = os.urandom(300_000) + b"\r\n--xyz\r\n" + lines("a")
    before = int(time.time())
    stored = upload(client, content, "straße/my requests.jsonl")
    assert stored.bytes == len(content)
    assert (stored.filename, stored.purpose, stored.object, stored.status) == (
        "my requests.jsonl", "batch", "file", "processed",
    )  # fmt: skip
    assert before <= stored.created_at <= time.time()
    assert client.files.retrieve(stored.id) == stored
    assert client.files.content(stored.id).read() == content
    with client.files.with_streaming_response.content(stored.id) as answer:
        assert "my%20requests.jsonl" in answer.headers["content-disposition"]
        assert b"".join(answer.iter_bytes()) == content


def test_an_empty_file_is_stored(client: OpenAI) -> None:
    stored = upload(client, b"")
    assert stored.bytes == 0
    assert client.files.content(stored.id).read() == b""


def test_a_deleted_file_is_gone(client: OpenAI, gateway: RunningGateway) -> None:
    stored = upload(client, lines("a"))
    assert client.files.delete(stored.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(NotFoundError) as found:
            call(stored.id)
        assert found.value.body == {
            "message": f"No such File object: {stored.id}",
            "type": "invalid_request_error", "param": "id", "code": None,
        }  # fmt: skip
    assert stored.id not in {path.name for path in gateway.root.rglob("*")}


def test_lists_have_pages_in_the_order_of_creation(client: OpenAI) -> None:
    ids = [upload(client, b"x\n").id for _ in range(5)]
    newest = client.files.list(limit=2)
    assert [each.id for each in newest.data] == [ids[4], ids[3]]
    assert newest.has_more
    listed = [each.id for each in client.files.list(limit=2) if each.id in ids]
    assert listed == ids[::-1]
    rising = [each.id for each in client.files.list(limit=3, order="asc") if each.id in ids]
    assert rising == ids
    client.files.delete(ids[2])
    after = client.files.list(after=ids[2], order="asc")
    assert [each.id for each in after.data] == ids[3:]
    assert not after.has_more
    last = client.files.list(after=ids[4], order="asc")
    assert last.data == []


def test_a_list_has_the_wanted_purpose_only(client: OpenAI) -> None:
    stored = upload(client, b"x\n")
    assert stored.id in [each.id for each in client.files.list(purpose="batch")]
    assert client.files.list(purpose="vision").data == []


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=10001", "limit=x", "limit=-1", "limit=٣", "order=up", "after=../key"],
)
def test_a_wrong_query_is_refused(gateway: RunningGateway, query: str) -> None:
    status, body = gateway.ask("GET", f"/v1/files?{quote(query, safe='=')}")
    assert status == 400
    assert body["error"]["param"] == query.partition("=")[0]


@pytest.mark.parametrize(
    "id_",
    [
        "file-0", "..", "%2e%2e", "..%2fkey", "key", ".gateway.lease", "file-" + "0" * 40,
        "file-" + "0" * 40 + "-output", "file-" + "%D9%A0" * 40, "file-" + "0" * 39 + "%2f", "%00",
        "batch_" + "0" * 40, "file-" + "0" * 40 + "%0a",
    ],
)  # fmt: skip
def test_unknown_ids_and_paths_are_not_found(gateway: RunningGateway, id_: str) -> None:
    for method, path in (
        ("GET", f"/v1/files/{id_}"),
        ("DELETE", f"/v1/files/{id_}"),
        ("GET", f"/v1/files/{id_}/content"),
        ("GET", f"/v1/batches/{id_}"),
        ("POST", f"/v1/batches/{id_}/cancel"),
    ):
        status, body = gateway.ask(method, path)
        assert status == 404, (method, path, body)
        assert set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("form", "param"),
    [
        (PURPOSE + "--xyz--\r\n", "file"),
        (FILE + "--xyz--\r\n", "purpose"),
        (PURPOSE.replace("batch", "vision") + FILE + "--xyz--\r\n", "purpose"),
        (PURPOSE.replace("batch", "b" * 2000) + FILE + "--xyz--\r\n", "purpose"),
        (PURPOSE + FILE + FILE + "--xyz--\r\n", "file"),
        (PURPOSE.replace("purpose", "color") + FILE + "--xyz--\r\n", "color"),
        (PURPOSE.replace("purpose", "expires_after[seconds]") + "--xyz--\r\n", "expires_after"),
        (PURPOSE + FILE, None),
        (PURPOSE + FILE + "--xy", None),
        ("", None),
        ("nothing of a form", None),
        (PURPOSE.replace("\r\n\r\n", f"\r\nX: {'x' * 100_000}\r\n\r\n"), None),
        (PURPOSE * 30, None),
    ],
)
def test_a_wrong_form_is_refused(
    gateway: RunningGateway, client: OpenAI, form: str, param: str | None
) -> None:
    before = [each.id for each in client.files.list()]
    status, body = gateway.ask("POST", "/v1/files", form.encode(), FORM)
    assert (status, body["error"]["param"]) == (400, param), body
    assert body["error"]["type"] == "invalid_request_error"
    assert [each.id for each in client.files.list()] == before
    assert list((gateway.root / ".incoming").iterdir()) == []


@pytest.mark.parametrize(
    "kind",
    ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 999],
)
def test_an_upload_that_is_no_form_is_refused(gateway: RunningGateway, kind: str) -> None:
    status, body = gateway.ask("POST", "/v1/files", b"{}", {"Content-Type": kind})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")


def test_the_words_of_the_content_type_can_be_in_capitals(gateway: RunningGateway) -> None:
    kind = {"Content-Type": 'Multipart/Form-Data; Boundary="xyz"'}
    body = f"{PURPOSE}{FILE}--xyz--\r\n".encode()
    assert gateway.ask("POST", "/v1/files", body, kind)[0] == 200


def test_an_upload_that_breaks_off_leaves_nothing(gateway: RunningGateway, client: OpenAI) -> None:
    before = [each.id for each in client.files.list()]
    incoming = gateway.root / ".incoming"
    connection = begin_upload(gateway, b"x" * 100_000)
    deadline = time.monotonic() + 10
    while not list(incoming.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    connection.close()
    while list(incoming.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [each.id for each in client.files.list()] == before


def test_a_killed_gateway_leaves_no_half_of_an_upload(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    running = RunningGateway(tmp_path, ["--engine-url", "http://127.0.0.1:9"])
    start.append(running)
    running.start()
    with running.client() as client:
        stored = upload(client, lines("a"))
    connection = begin_upload(running, b"x" * 500_000)
    incoming = running.root / ".incoming"
    deadline = time.monotonic() + 10
    while not any(path.stat().st_size for path in incoming.glob("*/content")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.kill()
    connection.close()
    assert list(incoming.iterdir())
    running.start()
    with running.client() as client:
        assert [each.id for each in client.files.list()] == [stored.id]
        assert client.files.content(stored.id).read() == lines("a")
    assert list(incoming.iterdir()) == []


def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    running = RunningGateway(tmp_path, ["--engine-url", "http://127.0.0.1:9"], file_limit=200_000)
    start.append(running)
    running.start()
    with running.client() as client:
        with pytest.raises(APIStatusError) as found:
            upload(client, b"x" * 3_000_000)
        assert (found.value.status_code, found.value.code) == (507, "insufficient_storage")
        assert list((running.root / ".incoming").iterdir()) == []
        assert upload(client, b"x" * 100_000).bytes == 100_000
        assert len(client.files.list().data) == 1


def test_only_the_user_can_enter_the_directory(gateway: RunningGateway, client: OpenAI) -> None:
    upload(client, b"x\n")
    for path in (gateway.root, *gateway.root.rglob("*")):
        assert not stat.S_IMODE(path.lstat().st_mode) & 0o077, path


def test_a_wrong_purpose_is_named(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as found:
        client.files.create(file=b"x", purpose="vision")
    assert found.value.param == "purpose"
