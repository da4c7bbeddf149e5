"""The load that a server reports."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from bench.engine import answer

from aiflux.engines import server_load
from aiflux.engines.http import Client
from aiflux.engines.server_load import Load, LoadWatch, parse_load, total_slots
from tests.unit.helpers import write_input

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 64.0
vllm:num_requests_running{engine="1",model_name="m"} 60.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m {a} b"} 3.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 3.0
vllm:generation_tokens_total{engine="0",model_name="m"} 1.234e+06
vllm:something{engine="0"} NaN
"""
LLAMA = """\
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 4
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 12
"""


def test_the_loads_of_all_engines_of_a_vllm_are_added():
    assert parse_load(VLLM) == Load(124, 3)


def test_the_load_of_a_llama_server():
    assert parse_load(LLAMA) == Load(4, 12)


@pytest.mark.parametrize("text", ["", "<html>not found</html>", "up 1\n", VLLM[:80]])
def test_metrics_without_a_load(text):
    assert parse_load(text) is None


@pytest.mark.parametrize(
    ("body", "slots"),
    [
        (json.dumps({"total_slots": 64}).encode(), 64),
        (json.dumps({"total_slots": "64"}).encode(), None),
        (json.dumps({"total_slots": 10**30}).encode(), None),
        (json.dumps([1]).encode(), None),
        (b"<html>", None),
        (None, None),
    ],
)
def test_the_slots_of_a_llama_server(body, slots):
    assert total_slots({"/props": body}.get) == slots


class Server(BaseHTTPRequestHandler):
    """Shows its metrics and its slots to clients with the key."""

    def do_GET(self) -> None:
        body = {"/metrics": VLLM.encode(), "/props": b'{"total_slots": 8}'}.get(self.path, b"")
        known = self.headers["Authorization"] == "Bearer key"
        self.send_response(401 if not known else 200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Patient(BaseHTTPRequestHandler):
    """Reports its load like vLLM, and answers only when 64 requests are in flight."""

    protocol_version = "HTTP/1.1"
    all_there = threading.Barrier(64)
    lock = threading.Lock()
    running = 0

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": "m"}]}
        gauge = "vllm:num_requests_{} {}\n"
        metrics = gauge.format("running", self.running) + gauge.format("waiting", 0)
        known = {"/metrics": metrics.encode(), "/v1/models": json.dumps(models).encode()}
        self._answer(known.get(self.path))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            Patient.running += 1
        self.all_there.wait(60)
        self._answer(answer(5))

    def _answer(self, body: bytes | None) -> None:
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    handler = getattr(request, "param", Server)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def client(url: str, key: str | None = "key") -> Iterator[Client]:
    made = Client(url, 10.0, 4, key)
    try:
        yield made
    finally:
        made.close()


def test_the_key_is_sent_with_the_query(url):
    with client(url) as known, client(url, None) as unknown:
        assert total_slots(partial(server_load.get, known)) == 8
        assert total_slots(partial(server_load.get, unknown)) is None
        assert server_load.get(known, "/nothing") is None


def test_a_missing_server_reports_nothing():
    with client("http://127.0.0.1:1") as nobody:
        assert server_load.get(nobody, "/props") is None


def test_the_load_is_noted_until_the_watch_is_closed(url):
    noted = threading.Event()
    loads = []

    def note(running: int, waiting: int) -> None:
        loads.append((running, waiting))
        noted.set()

    with client(url) as known:
        watch = LoadWatch(partial(server_load.get, known), note)
        watch.start()
        assert noted.wait(10)
        watch.close()
    assert loads[0] == (124, 3)


@pytest.mark.parametrize("url", [Patient], indirect=True)
def test_requests_in_flight_rise_by_the_report_alone(url, tmp_path):
    """Answers come only when 64 requests are in flight, and the limit starts far below."""
    source = write_input(
        tmp_path / "in.jsonl",
        64,
        body={"model": "m", "messages": [{"role": "user", "content": "a"}]},
    )
    worker = [sys.executable, "-m", "aiflux.worker", str(source), str(tmp_path / "out.json")]
    done = subprocess.run(
        [*worker, "--engine-url", url], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
