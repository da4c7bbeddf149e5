"""A server with a context that it reports and keeps, and tokens of equal length.

It reports and counts as vLLM does or as llama-server does (``--form``), or only reports the context
(``hosted``), or nothing (``silent``). Its template writes 10 tokens before each message. It refuses
a prompt that is longer than its context, and answers others with their text. As a program, it
listens on ``--port``.
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VLLM, LLAMA, HOSTED, SILENT = "vllm", "llama", "hosted", "silent"
OF_TEMPLATE = 10


class CountingServer:
    """The server; a context manager.

    Args:
        characters: of a token.
        busy: ``/tokenize`` is answered with 503 after this number of questions; None for never.

    Attributes:
        asked: paths of all calls with a body, in order.
        prompts: texts that were answered or refused.
        wanted: how many answers each of these requests asked for.
    """

    def __init__(
        self,
        form: str,
        context: int,
        port: int = 0,
        busy: int | None = None,
        characters: int = 2,
    ) -> None:
        self.form = form
        self.context = context
        self.busy = busy
        self.characters = characters
        self.asked: list[str] = []
        self.prompts: list[str] = []
        self.wanted: list[int | None] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._server.owner = self  # type: ignore[attr-defined]

    def __enter__(self) -> CountingServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def get(self, path: str) -> dict[str, Any] | None:
        if path == "/v1/models":
            more = {VLLM: {"max_model_len": self.context}, HOSTED: {"context_window": self.context}}
            return {"data": [{"id": "m:1", **more.get(self.form, {})}, {"id": "other"}]}
        if path == "/props" and self.form == LLAMA:
            return {"total_slots": 2, "default_generation_settings": {"n_ctx": self.context}}
        return None

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append(path)
        if path == "/tokenize" and self.busy is not None:
            self.busy -= 1
            if self.busy < 0:
                return 503, {"error": {"message": "busy"}}
        if path != "/v1/chat/completions":
            found = self._tokens(path, body)
            return (404 if found is None else 200), found
        text = body["messages"][-1]["content"]
        self.prompts.append(text)
        self.wanted.append(body.get("n"))
        tokens = self._count(self._template(body["messages"]))
        if tokens >= self.context:
            message = f"This model's maximum context length is {self.context} tokens. However, "
            return 400, {"error": {"message": f"{message}your prompt contains {tokens} tokens."}}
        choices = [
            {"index": index, "message": {"content": text}, "finish_reason": "stop"}
            for index in range(body.get("n") or 1)
        ]
        usage = {"prompt_tokens": tokens, "completion_tokens": self._count(text)}  # of one answer
        return 200, {"model": body["model"], "choices": choices, "usage": usage}

    def _tokens(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        if path == "/tokenize" and self.form == VLLM:
            text = self._template(body["messages"]) if "messages" in body else body["prompt"]
            return {"count": self._count(text), "max_model_len": self.context}
        if path == "/tokenize" and self.form == LLAMA:
            return {"tokens": [0] * self._count(body.get("content", ""))}
        if path == "/apply-template" and self.form == LLAMA:
            return {"prompt": self._template(body["messages"])}
        return None

    def _count(self, text: str) -> int:
        return -(-len(text) // self.characters)

    def _template(self, messages: list[dict[str, Any]]) -> str:
        before = "<" * (self.characters * OF_TEMPLATE)
        return "".join(before + each["content"] for each in messages)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        content = self.server.owner.get(self.path)  # type: ignore[attr-defined]
        self._send(404 if content is None else 200, content)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(*self.server.owner.post(self.path, body))  # type: ignore[attr-defined]

    def _send(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--form", required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    with CountingServer(options.form, options.context, options.port):
        threading.Event().wait()


if __name__ == "__main__":
    main()
