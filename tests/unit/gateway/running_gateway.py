"""`aiflux gateway` as a real process, and clients for it."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI
from openai.types import Batch, FileObject

from aiflux.gateway.store import BatchFiles, BatchRecord, GatewayStore
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import request_line

ENDED = {"completed", "failed", "expired", "cancelled"}


@dataclass
class RunningGateway:
    """A gateway on a free port; a context manager.

    Attributes:
        folder: its working directory.
        options: its other options.
        file_limit: largest file that it can write, in bytes; None for no limit.
    """

    folder: Path
    options: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    file_limit: int | None = None
    process: subprocess.Popen[str] | None = None
    url: str = ""

    def __enter__(self) -> RunningGateway:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def root(self) -> Path:
        """Its directory."""
        return self.folder / "state"

    @property
    def key(self) -> str:
        return (self.root / "key").read_text(encoding="ascii").strip()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2].removesuffix("/v1"))

    def command(self) -> list[str]:
        words = [sys.executable, "-m", "aiflux.cli", "gateway", "--dir", str(self.root)]
        address = [] if "--socket" in self.options else ["--port", "0"]
        return [*words, *address, *self.options]

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        with open(self.folder / "gateway.log", "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env={**os.environ, **self.environ},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                preexec_fn=self._limit if self.file_limit else None,  # noqa: PLW1509
            )
        assert self.process.stdout is not None
        text = ""
        while "Ctrl-C" not in text:
            line = self.process.stdout.readline()
            assert line, (self.folder / "gateway.log").read_text(encoding="utf-8")
            text += line
        found = re.search(r"OPENAI_BASE_URL=(\S+)", text)
        assert found is not None
        self.url = found[1]

    def _limit(self) -> None:
        assert self.file_limit is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_limit, self.file_limit))

    def _end(self, number: int) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        code = process.wait(30)
        if process.stdout is not None:
            process.stdout.close()
        return code

    def stop(self) -> int:
        """End it with Ctrl-C; return its exit code."""
        return self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kill it."""
        self._end(signal.SIGKILL)

    def memory(self) -> int:
        """Return the most memory that it has had, in bytes."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) << 10

    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=self.key, max_retries=0)

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=self.url, api_key=self.key, max_retries=0)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any]:
        """Send any request with the key; return the status and the JSON of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            given = {"Authorization": f"Bearer {self.key}", **(headers or {})}
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, json.loads(content) if content else None
        finally:
            connection.close()


def lines(*prompts: str, model: str = "m:1", **changes: Any) -> bytes:
    """Return requests with these prompts; top-level fields are changed or (with ...) dropped."""
    text = ""
    for number, prompt in enumerate(prompts):
        body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
        entry = {**json.loads(request_line(f"r{number}", body=body)), **changes}
        text += json.dumps({name: value for name, value in entry.items() if value is not ...})
        text += "\n"
    return text.encode()


def upload(client: OpenAI, content: bytes, name: str = "requests.jsonl") -> FileObject:
    return client.files.create(file=(name, content), purpose="batch")


def create(client: OpenAI, content: bytes, **more: Any) -> Batch:
    """Upload requests and create a batch of them."""
    return client.batches.create(
        input_file_id=upload(client, content).id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        **more,
    )


def wait_until(
    client: OpenAI, id_: str, done: Callable[[Batch], bool], seconds: float = 60
) -> Batch:
    """Poll a batch until a condition holds."""
    deadline = time.monotonic() + seconds
    while not done(batch := client.batches.retrieve(id_)):
        assert time.monotonic() < deadline, batch
        assert batch.status not in ENDED, batch
        time.sleep(0.05)
    return batch


def ended(client: OpenAI, id_: str, seconds: float = 60) -> Batch:
    """Poll a batch until it has ended."""
    return wait_until(client, id_, lambda batch: batch.status in ENDED, seconds)


def downloaded(client: OpenAI, id_: str | None) -> dict[str, Any]:
    """Return the lines of an output by custom_id."""
    assert id_ is not None
    entries = map(json.loads, client.files.content(id_).text.splitlines())
    return {entry["custom_id"]: entry for entry in entries}


@contextmanager
def batch_in_mid_run(
    folder: Path, requests: int, started: list[RunningGateway]
) -> Iterator[tuple[RunningGateway, str, FaultyEngine]]:
    """Yield a gateway that was killed in the middle of a batch, the batch's id, and its engine."""
    with FaultyEngine(delay=0.05) as engine:
        running = RunningGateway(folder, ["--engine-url", engine.url, "--concurrency", "1"])
        started.append(running)
        running.start()
        with running.client() as client:
            batch = create(client, lines(*(f"p{n}" for n in range(requests))))
            wait_until(client, batch.id, lambda b: b.request_counts.completed > 0)  # type: ignore[union-attr]
        running.kill()
        yield running, batch.id, engine


def recorded_batch(
    root: Path, content: bytes, settings: dict[str, Any], workspace: Path
) -> BatchFiles:
    """Leave what a gateway leaves that is killed right after it recorded a batch."""
    store = GatewayStore(root)
    try:
        pending = store.begin_upload()
        pending.write(content)
        stored = pending.publish("a.jsonl", "batch")
        return store.create(
            BatchRecord(
                stored.id, "/v1/chat/completions", "24h", None, int(time.time()), settings,
                False, workspace,
            )
        )  # fmt: skip
    finally:
        store.close()


def begin_upload(gateway: RunningGateway, content: bytes) -> socket.socket:
    """Send the first part of an upload, and leave the connection open."""
    head = (
        b'--xyz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    )
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
    connection.sendall(
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
        + gateway.key.encode()
        + b"\r\nContent-Type: multipart/form-data; boundary=xyz"
        + b"\r\nContent-Length: 100000000\r\n\r\n"
        + head
        + content
    )
    return connection
