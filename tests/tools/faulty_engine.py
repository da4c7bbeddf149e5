"""An engine on a real socket that behaves as a request's prompt says.

The last message (or the prompt, or the input) is a line of words ``fault`` or ``fault*N``: the
first N requests with that text get the fault, later ones an answer. Faults: ``500 502 503 504 408
425 429 400 403 404 reset hang cut html notjson array empty partial error drip closing endless
headers unfit die``. Other texts are answered with an echo, or with the text after ``answer:``.
``unfit`` answers with a plain word; ``die`` stops the server like a crash, and ``start`` starts it
again.
``body:BODY`` is answered with that body (``body400:BODY`` with status 400), ``fail:TEXT`` with an
error with that message.

``/v1/models`` lists ``models``. ``instead`` can answer any call first.

As a program it takes the command line of `llama-server`, after a fault, a number and a file: its
first start answers that number of requests and then has the fault, ``500`` or ``hang``, in every
request. The process stays alive. Each start adds a line to the file.
"""

from __future__ import annotations

import argparse
import json
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reply = tuple[int, bytes, dict[str, str]]
"""Status, body and headers."""
Instead = Callable[[str, str, Mapping[str, str]], "Reply | None"]
"""Takes method, path and headers of a call and returns its answer; None for the default."""

_STATUSES = {"400", "403", "404", "408", "422", "425", "429", "500", "501", "502", "503", "504"}


class FaultyEngine:
    """The server; a context manager.

    Args:
        answer: the answer to every request, instead of an echo.
        models: the models that ``/v1/models`` lists.
        answers_as: the model name in answers; None for the requested one.
        choices: the most answers to one request, each its prompt and seed; None for one echo. With
            1 the server ignores ``n``, with 0 it refuses ``n`` above 1.
        tls: certificate and key for HTTPS.
        host: address to listen on.
        path: Unix socket to listen on instead.
        lanes: requests that it processes at once; others wait.

    Attributes:
        seen: number of requests per prompt.
        bodies: all request bodies, in order.
        most: maximum number of concurrent requests.
    """

    def __init__(
        self,
        delay: float = 0.0,
        retry_after: str | None = None,
        answer: str | None = None,
        models: tuple[str, ...] = (),
        answers_as: str | None = None,
        instead: Instead | None = None,
        choices: int | None = None,
        tls: tuple[str, str] | None = None,
        host: str = "127.0.0.1",
        path: str | None = None,
        lanes: int = 4096,
    ) -> None:
        self.host = host
        self.path = path
        self.delay = delay
        self.answer = answer
        self.models = models
        self.answers_as = answers_as
        self.instead = instead
        self.choices = choices
        self.tls = tls
        self.retry_after = retry_after
        self.seen: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.active = 0
        self.most = 0
        self.lock = threading.Lock()
        self.lanes = threading.Semaphore(lanes)
        self.released = threading.Event()
        self.deaf = False
        self.once: Path | None = None
        self.died = threading.Event()
        self.port = 0
        self._sockets: set[socket.socket] = set()
        self._server: _Server | None = None

    def __enter__(self) -> FaultyEngine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.stop()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        self.died.clear()
        if self.path is None:
            self._server = _Server((self.host, self.port), _Handler)
        else:
            self._server = _SocketServer(self.path, _SocketHandler)  # type: ignore[arg-type]
        self._server.engine = self
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.tls)
            # The thread of each connection does the handshake.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        if self.path is None:
            self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self, only: _Server | None = None) -> None:
        """Close the listener and all connections, as the kernel does for a dead process.

        Args:
            only: do nothing if this server is stopped already, and perhaps another one runs.
        """
        with self.lock:
            if only is not None and only is not self._server:
                return
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        with self.lock:
            sockets = list(self._sockets)
        for each in sockets:
            _reset(each)
        self.died.set()

    def note(self, connection: socket.socket, opened: bool) -> None:
        with self.lock:
            (self._sockets.add if opened else self._sockets.discard)(connection)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    allow_reuse_address = True
    engine: FaultyEngine

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore broken connections, which are intended."""


class _SocketServer(_Server):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "localhost", 0


def _reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()
    except OSError:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def setup(self) -> None:
        super().setup()
        self.server.engine.note(self.connection, True)

    def finish(self) -> None:
        self.server.engine.note(self.connection, False)
        super().finish()

    def do_GET(self) -> None:
        if self._instead("GET"):
            return
        listed = [{"id": name, "object": "model"} for name in self.server.engine.models]
        self._send(200, json.dumps({"object": "list", "data": listed}).encode())

    def do_POST(self) -> None:
        engine = self.server.engine
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if engine.answers_as is not None:
            body["model"] = engine.answers_as
        if self._instead("POST"):
            return
        text = _text(body)
        with engine.lock:
            engine.seen[text] += 1
            time_now = time.monotonic()
            engine.times.setdefault(text, []).append(time_now)
            engine.bodies.append(body)
            engine.headers.append(dict(self.headers.items()))
            count = engine.seen[text]
            engine.active += 1
            engine.most = max(engine.most, engine.active)
        try:
            if engine.delay:
                with engine.lanes:
                    time.sleep(engine.delay)
            self._act(self._new(_fault(text, count)), body, text)
        finally:
            with engine.lock:
                engine.active -= 1

    def _new(self, fault: str) -> str:
        """Return a fault, unless an earlier process of the same folder had it."""
        once = self.server.engine.once
        if once is None or fault not in ("die", "deaf"):
            return fault
        try:
            (once / fault).touch(exist_ok=False)
        except FileExistsError:
            return ""
        return fault

    def _instead(self, method: str) -> bool:
        """Answer with ``instead``, if it handles this call."""
        instead = self.server.engine.instead
        reply = instead(method, self.path, self.headers) if instead else None
        if reply is None:
            return False
        status, content, headers = reply
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        return True

    def _act(self, fault: str, body: dict[str, Any], text: str) -> None:
        most = self.server.engine.choices
        if not fault and most is not None and self.path.endswith("completions"):
            self._several(body, text, most)
            return
        start, _, rest = text.partition(":")
        if start in ("body", "body400"):
            # A lone surrogate from U+DC80 on represents a byte that is not UTF-8.
            content = rest.encode("utf-8", "surrogateescape")
            self._send(200 if start == "body" else 400, content)
        elif start == "fail":
            self._send(400, json.dumps({"error": {"message": rest}}).encode())
        elif fault in _STATUSES:
            error = {"error": {"message": f"requested error {fault}", "type": "test"}}
            self._send(int(fault), json.dumps(error).encode())
        elif fault:
            getattr(self, f"_{fault}")(body, text)
        else:
            fixed = self.server.engine.answer
            reply = text if fixed is None else f"answer:{fixed}"
            self._send(200, _answer(self.path, body, reply))

    def _several(self, body: dict[str, Any], text: str, most: int) -> None:
        """Answer a request that asks for several answers."""
        wanted = body.get("n", 1)
        if wanted > 1 and most == 0:
            self._send(400, b'{"error": {"message": "only one choice is allowed"}}')
            return
        answer = json.loads(_answer(self.path, body, text))
        (choice,) = answer["choices"]
        prompts = body["prompt"] if isinstance(body.get("prompt"), list) else [text]
        texts = [
            f"{prompt} {body.get('seed', 0) + at}"
            for prompt in prompts
            for at in range(min(wanted, max(most, 1)))
        ]
        answer["choices"] = [
            {**choice, "index": at, **_content(choice, each)} for at, each in enumerate(texts)
        ]
        answer["usage"]["completion_tokens"] = 5 * len(texts)
        self._send(200, json.dumps(answer).encode())

    def _reset(self, body: dict[str, Any], text: str) -> None:
        _reset(self.connection)

    def _hang(self, body: dict[str, Any], text: str) -> None:
        self.server.engine.released.wait()

    def _cut(self, body: dict[str, Any], text: str) -> None:
        answer = _answer(self.path, body, text)
        self._head(200, len(answer))
        self.wfile.write(answer[: len(answer) // 2])
        self.close_connection = True

    def _html(self, body: dict[str, Any], text: str) -> None:
        self._send(200, b"<html><body>Bad Gateway</body></html>", "text/html")

    def _notjson(self, body: dict[str, Any], text: str) -> None:
        self._send(200, b'{"choices": [')

    def _array(self, body: dict[str, Any], text: str) -> None:
        self._send(200, b"[]")

    def _empty(self, body: dict[str, Any], text: str) -> None:
        message = {"role": "assistant", "content": ""}
        choice = {"index": 0, "message": message, "finish_reason": None}
        self._send(200, json.dumps({"choices": [choice]}).encode())

    def _partial(self, body: dict[str, Any], text: str) -> None:
        """Answer as vLLM answers requests in flight when it is ended."""
        answer = json.loads(_answer(self.path, body, text))
        answer["choices"][-1]["finish_reason"] = "abort"
        self._send(200, json.dumps(answer).encode())

    def _unfit(self, body: dict[str, Any], text: str) -> None:
        self._send(200, _answer(self.path, body, "answer:unfit"))

    def _error(self, body: dict[str, Any], text: str) -> None:
        self._send(200, json.dumps({"error": {"message": "generation failed"}}).encode())

    def _drip(self, body: dict[str, Any], text: str) -> None:
        answer = _answer(self.path, body, text)
        self._head(200, len(answer))
        for byte in answer:
            if self.server.engine.released.wait(0.2):
                return
            self.wfile.write(bytes([byte]))
            self.wfile.flush()

    def _closing(self, body: dict[str, Any], text: str) -> None:
        """Answer byte by byte, without a length: the end of the connection ends the answer."""
        self._until_closed(0.2, b" ")

    def _endless(self, body: dict[str, Any], text: str) -> None:
        self._until_closed(0, bytes(1 << 16))

    def _until_closed(self, pause: float, block: bytes) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        while not self.server.engine.released.wait(pause):
            self.wfile.write(block)
            self.wfile.flush()

    def _headers(self, body: dict[str, Any], text: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(1000):
            if self.server.engine.released.wait(0.2):
                return
            self.wfile.write(b"X-Slow: 1\r\n")
            self.wfile.flush()

    def _deaf(self, body: dict[str, Any], text: str) -> None:
        self.server.engine.deaf = True
        self._die(body, text)

    def _die(self, body: dict[str, Any], text: str) -> None:
        # One of several requests that arrive together ends the server; the others end with it.
        stop = self.server.engine.stop
        threading.Thread(target=stop, args=(self.server,), daemon=True).start()
        self.server.engine.died.wait()

    def _head(self, status: int, size: int, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        retry_after = self.server.engine.retry_after
        if retry_after is not None and status in (429, 503):
            self.send_header("Retry-After", retry_after)
        self.end_headers()

    def _send(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self._head(status, len(content), kind)
        self.wfile.write(content)


class _SocketHandler(_Handler):
    disable_nagle_algorithm = False


def _text(body: dict[str, Any]) -> str:
    given = body.get("messages", body.get("input"))
    if isinstance(given, list) and given and isinstance(given[-1], dict):
        return str(given[-1]["content"])
    named = (body.get(name) for name in ("prompt", "query", "text_1"))
    return str(next((each for each in named if each is not None), given))


def _fault(text: str, count: int) -> str:
    """Return the fault for the ``count``-th request with this text."""
    for word in text.split():
        name, star, times = word.partition("*")
        if name in _STATUSES or hasattr(_Handler, f"_{name}"):
            limit = int(times) if star and times.isdigit() else 1_000_000
            if count <= limit:
                return name
            count -= limit
    return ""


def _content(choice: dict[str, Any], text: str) -> dict[str, Any]:
    if "message" in choice:
        return {"message": {**choice["message"], "content": text}}
    return {"text": text}


def _answer(path: str, body: dict[str, Any], text: str) -> bytes:
    content = f"echo {text}" if "answer:" not in text else text.partition("answer:")[2]
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    answer: dict[str, Any] = {"id": "x", "created": 1, "model": body.get("model"), "usage": usage}
    if path == "/v1/embeddings":
        vector = {"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}
        answer |= {"object": "list", "data": [vector]}
    elif path == "/v1/rerank":
        scores = [{"index": at, "relevance_score": -at} for at, _ in enumerate(body["documents"])]
        answer |= {"object": "list", "results": scores}
    elif path == "/v1/score":
        second = body["text_2"] if isinstance(body["text_2"], list) else [body["text_2"]]
        data = [{"index": at, "object": "score", "score": 0.5**at} for at, _ in enumerate(second)]
        answer |= {"object": "list", "data": data}
    elif path == "/v1/responses":
        part = {"type": "output_text", "text": content, "annotations": []}
        message = {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
        tokens = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
        answer |= {"object": "response", "status": "completed", "error": None, "output": [message],
                   "incomplete_details": None, "usage": tokens}  # fmt: skip
    elif path == "/v1/completions":
        choice = {"index": 0, "text": content, "finish_reason": "stop", "logprobs": None}
        answer |= {"object": "text_completion", "choices": [choice]}
    else:
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        answer |= {"object": "chat.completion", "choices": [choice]}
    return json.dumps(answer).encode()


def main() -> None:
    """Run in the place of `llama-server`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("fault", choices=["500", "hang"])
    parser.add_argument("answers", type=int)
    parser.add_argument("starts", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("-np", type=int, required=True)
    options, _ = parser.parse_known_args()
    first = not options.starts.exists()
    with open(options.starts, "a", encoding="utf-8") as file:
        file.write("started\n")
    engine = FaultyEngine()
    engine.port = options.port
    left = options.answers

    def instead(method: str, path: str, _: Mapping[str, str]) -> Reply | None:
        nonlocal left
        left -= method == "POST"
        if first and left < 0 and options.fault == "hang":
            engine.released.wait()
        if first and left < 0 and method == "POST":
            return 500, b'{"error": {"message": "CUDA error"}}', {}
        if path == "/props":
            return 200, json.dumps({"total_slots": options.np}).encode(), {}
        return None

    engine.instead = instead
    with engine:
        engine.died.wait()


if __name__ == "__main__":
    main()
