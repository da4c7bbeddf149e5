"""A small stand-in for `llama-server`: its command line and the paths that the worker uses.

It listens at once and answers 503 until the model is loaded, which fails where the file is not
GGUF, and takes as long as the file ``loading`` is in its home.
"""

from __future__ import annotations

import argparse
import json
import os
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
parser.add_argument("-t", type=int)
parser.add_argument("-lv", type=int)
parser.add_argument("-ctk", "--cache-type-k")
parser.add_argument("--swa-full", action="store_true")
parser.add_argument("--jinja", action="store_true")
parser.add_argument("--reasoning-format", choices=["none", "deepseek", "auto"])
parser.add_argument("--lora", default="")
for flag in ("--metrics", "--offline", "--no-webui", "--embeddings"):
    parser.add_argument(flag, action="store_true")
options = parser.parse_args()
adapters = options.lora.split(",") if options.lora else []
print("command:", json.dumps(sys.argv[1:]), flush=True)
ready = threading.Event()
LOADING = Path(os.environ["HOME"]) / "loading"


def load() -> None:
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

    def do_GET(self) -> None:
        props = {
            "total_slots": options.np,
            "build_info": "b11669-fake",
            "default_generation_settings": {"n_ctx": options.c // options.np},
        }
        self._send({"/health": {"status": "ok"}, "/props": props}.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        # As llama-server does: without a list, all adapters are applied.
        scales = {each["id"]: each["scale"] for each in body.get("lora", [])}
        applied = [at for at in range(len(adapters)) if scales.get(at, 0 if scales else 1)]
        for at in applied:
            content = f"{Path(adapters[at]).stem}: {content}"
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._send({"model": options.alias, "choices": [choice]})

    def _send(self, content: object) -> None:
        status = 404 if content is None else 200
        if not ready.is_set():
            status, content = 503, {"error": {"message": "Loading model", "code": 503}}
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


if __name__ == "__main__":
    server = ThreadingHTTPServer((options.host, options.port), Handler)
    threading.Thread(target=load, daemon=True).start()
    server.serve_forever()
