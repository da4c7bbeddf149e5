"""A small stand-in for `ollama serve`: the API that the worker uses, over real manifests.

It reads OLLAMA_HOST and OLLAMA_MODELS, lists the models whose manifests it finds (with the digest
of the manifest, as Ollama does), starts a child process when it loads one, and answers chats with
an echo. While the file ``loading`` is in its home, a model stays on its way into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STORE = Path(os.environ["OLLAMA_MODELS"])
LOADING = Path(os.environ["HOME"]) / "loading"
VERSION = os.environ.get("FAKE_OLLAMA_VERSION", "0.99.0")
SIZE = 1000
loaded: list[str] = []


def tags() -> dict[str, str]:
    """Return the digest of every model of the library, by name."""
    found = (STORE / "manifests" / "registry.ollama.ai" / "library").glob("*/*")
    return {
        f"{path.parent.name}:{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }


def load(model: str) -> None:
    """Load a model, in a child as Ollama's runner is."""
    while LOADING.exists():
        time.sleep(0.02)
    if not loaded:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        loaded.append(model)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        print(format % args, flush=True)

    def do_GET(self) -> None:
        size = {"size": SIZE, "size_vram": 0, "context_length": None}
        self._send(
            {
                "/api/version": {"version": VERSION},
                "/api/tags": {"models": [{"name": n, "digest": d} for n, d in tags().items()]},
                "/api/ps": {"models": [{"name": name, **size} for name in loaded]},
            }.get(self.path)
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/show":
            self._send({"capabilities": ["completion"]})
        elif self.path == "/api/generate":
            load(body["model"])
            self._send({"done": True})
        else:
            message = {"role": "assistant", "content": body["messages"][-1]["content"]}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._send({"model": body["model"], "choices": [choice]})

    def _send(self, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


if __name__ == "__main__":
    host, _, port = os.environ["OLLAMA_HOST"].partition(":")
    ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
