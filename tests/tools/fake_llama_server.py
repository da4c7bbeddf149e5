"""A small stand-in for `llama-server`: its command line and the paths that the worker uses.

It listens at once and answers 503 until the model is loaded, which fails where the file is not
GGUF, and takes as long as the file ``loading`` is in its home. With a key, /health is the only path
that needs none. The prompt "wait" is answered once there is no file
``waiting`` in its home. Prompts that begin with "work" take a moment, and a slot; the server gains
nothing from more than eight. With the variable MOST_SLOTS, it does not start with more. With
CRASH_AT, a JSON list, it ends with so many slots, or more, after so many answers.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Refuses a command line in the server's words."""

    def error(self, message: str) -> NoReturn:
        name = message.rpartition(": ")[2].split()[0]
        print(f"error: invalid argument: {name}", flush=True)
        sys.exit(1)


parser = Parser(allow_abbrev=False)
parser.add_argument("-m", required=True)
parser.add_argument("--alias", required=True)
parser.add_argument("--host", required=True)
parser.add_argument("--port", type=int, required=True)
parser.add_argument("-np", type=int, required=True)
parser.add_argument("-c", type=int, required=True)
parser.add_argument("--threads-http", type=int)
parser.add_argument("-t", type=int)
parser.add_argument("-lv", type=int)
parser.add_argument("-ctk", "--cache-type-k")
parser.add_argument("--swa-full", action="store_true")
parser.add_argument("--jinja", action="store_true")
parser.add_argument("--reasoning-format", choices=["none", "deepseek", "auto"])
parser.add_argument("--lora", default="")
for name in ("--api-key-file", "--ssl-key-file", "--ssl-cert-file"):
    parser.add_argument(name, type=Path)
for flag in ("--metrics", "--offline", "--no-webui", "--embeddings"):
    parser.add_argument(flag, action="store_true")
options = parser.parse_args()
adapters = options.lora.split(",") if options.lora else []
print("command:", json.dumps(sys.argv[1:]), flush=True)
ready = threading.Event()
LOADING = Path(os.environ["HOME"]) / "loading"
WAITING = Path(os.environ["HOME"]) / "waiting"
KEY = options.api_key_file.read_text().strip() if options.api_key_file else None
PUBLIC = ("/health",)
slots = threading.Semaphore(min(options.np, 8))
crash_slots, crash_answers = json.loads(os.environ.get("CRASH_AT", "[0, 0]"))
load_now = {"requests_processing": 0, "requests_deferred": 0, "tokens_predicted_total": 0}


def load() -> None:
    if options.np > int(os.environ.get("MOST_SLOTS", options.np)):
        print("llama_init: out of memory", flush=True)
        os._exit(1)
    if any(Path(file).read_bytes()[:4] != b"GGUF" for file in [options.m, *adapters]):
        print("llama_model_load: error loading model: invalid magic characters", flush=True)
        os._exit(1)
    while LOADING.exists():
        time.sleep(0.02)
    ready.set()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        print(format % args, flush=True)

    def _refused(self) -> bool:
        if KEY is None or self.path in PUBLIC or self.headers["Authorization"] == f"Bearer {KEY}":
            return False
        self._send({"error": {"message": "Invalid API Key", "code": 401}}, 401)
        return True

    def do_GET(self) -> None:
        if self._refused():
            return
        props = {
            "total_slots": options.np,
            "build_info": "b11669-fake",
            "default_generation_settings": {"n_ctx": options.c // options.np},
        }
        models = {"object": "list", "data": [{"id": options.alias, "object": "model"}]}
        known = {"/health": {"status": "ok"}, "/props": props, "/v1/models": models}
        lines = "".join(f"llamacpp:{name} {value}\n" for name, value in load_now.items())
        self._send(lines if self.path == "/metrics" else known.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        load_now["requests_processing"] += 1
        if 0 < crash_slots <= options.np and load_now["tokens_predicted_total"] >= crash_answers:
            print("llama_decode: out of memory", flush=True)
            os._exit(1)
        try:
            self._answer(body)
        finally:
            load_now["requests_processing"] -= 1
            load_now["tokens_predicted_total"] += 1

    def _answer(self, body: dict[str, Any]) -> None:
        if body.get("n", 1) > options.np:
            message = f"Field 'n': Value must be between 1 <= value <= {options.np}"
            self._send({"error": {"message": message, "code": 400}}, 400)
            return
        while body["messages"][-1]["content"] == "wait" and WAITING.exists():
            time.sleep(0.02)
        content = body["messages"][-1]["content"]
        if content.startswith("work"):
            with slots:
                time.sleep(0.05)
        # As llama-server does: without a list, all adapters are applied.
        scales = {each["id"]: each["scale"] for each in body.get("lora", [])}
        applied = [at for at in range(len(adapters)) if scales.get(at, 0 if scales else 1)]
        for at in applied:
            content = f"{Path(adapters[at]).stem}: {content}"
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._send({"model": options.alias, "choices": [choice]})

    def _send(self, content: object, status: int = 200) -> None:
        status = 404 if content is None else status
        if not ready.is_set():
            status, content = 503, {"error": {"message": "Loading model", "code": 503}}
        text = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = 128  # connections that are opened at once
    server = ThreadingHTTPServer((options.host, options.port), Handler)
    if options.ssl_cert_file:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.ssl_cert_file, options.ssl_key_file)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=load, daemon=True).start()
    server.serve_forever()
