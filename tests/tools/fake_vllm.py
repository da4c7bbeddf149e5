"""A small stand-in for `vllm serve`: its options, its processes and the API that the worker uses.

It loads a directory with a configuration and weights, in a child as vLLM's EngineCore is, for which
it binds a Unix socket, and binds its port only then. While the file ``loading`` is in its home, it
loads. Chats are answered with an echo; a word counts as a token. It ends when its child is gone.

Over several nodes, rank 0 waits for the others at the master port. It notices the death of one of
them only at the next request, and the others stay when rank 0 is gone, as with vLLM 0.32.0.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VERSION = "0.99.0"
PARSERS, REASONING_PARSERS = ("hermes", "mistral"), ("deepseek_r1", "qwen3")
CORE_LOST = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--generation-config", required=True)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--runner", choices=["auto", "pooling"], default="auto")
    parser.add_argument("--convert", choices=["auto", "embed"], default="auto")
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--dtype", choices=["auto", "half"], default="auto")
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--distributed-executor-backend", choices=["mp", "ray"], default="mp")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master-addr")
    parser.add_argument("--master-port", type=int)
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int, choices=[1, 8, 16, 32, 64], default=16)
    parser.add_argument("--max-loras", type=int, default=1)
    parser.add_argument("--max-cpu-loras", type=int)
    parser.add_argument("--lora-modules", type=json.loads, nargs="+", default=[])
    parser.add_argument("--enable-auto-tool-choice", action="store_true")
    parser.add_argument("--tool-call-parser")
    parser.add_argument("--reasoning-parser")
    options = parser.parse_args(words)
    if options.tensor_parallel_size % options.nnodes or options.node_rank >= options.nnodes:
        parser.error("the ranks do not divide the model")
    for name, known in (("tool call", PARSERS), ("reasoning", REASONING_PARSERS)):
        given = getattr(options, name.replace(" ", "_") + "_parser")
        if given is not None and given not in known:
            raise KeyError(f"invalid {name} parser: {given} (chose from {{ {','.join(known)} }})")
    return options


def load_adapters(options: argparse.Namespace) -> None:
    for module in options.lora_modules if options.enable_lora else []:
        config = json.loads((Path(module["path"]) / "adapter_config.json").read_bytes())
        if config["r"] > options.max_lora_rank:
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank")


def load(model: Path) -> subprocess.Popen[bytes]:
    """Load a model, in a child."""
    json.loads((model / "config.json").read_bytes())
    if not list(model.glob("*.safetensors")):
        raise SystemExit(f"RuntimeError: Cannot find any model weights with `{model}`")
    while (Path(os.environ["HOME"]) / "loading").exists():
        time.sleep(0.02)
    folder = os.environ.get("VLLM_RPC_BASE_PATH", tempfile.gettempdir())
    with socket.socket(socket.AF_UNIX) as channel:
        channel.bind(f"{folder}/{uuid.uuid4()}")
    # It does not outlive this process.
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )


def join_ranks(options: argparse.Namespace) -> list[socket.socket]:
    """Connect with the other ranks; return rank 0's connections to them."""
    if options.node_rank == 0:
        with socket.create_server(("", options.master_port)) as server:
            return [server.accept()[0] for _ in range(options.nnodes - 1)]
    while True:
        try:
            return [socket.create_connection((options.master_addr, options.master_port))]
        except ConnectionRefusedError:
            time.sleep(0.02)


def is_gone(rank: socket.socket) -> bool:
    try:
        return not rank.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: argparse.Namespace
    core: subprocess.Popen[bytes]
    ranks: list[socket.socket]

    def log_message(self, format: str, *args: Any) -> None:
        print(format % args, flush=True)

    def do_GET(self) -> None:
        limit = self.options.max_model_len
        known: dict[str, object] = {
            "/health": None,
            "/version": {"version": VERSION},
            "/v1/models": {
                "object": "list",
                "data": [{"id": name, "max_model_len": limit} for name in self._names()],
            },
        }
        if self.path not in known:
            self._fail(404, "Not Found")
        elif self.core.poll() is not None:
            self._fail(503, CORE_LOST)
        else:
            self._send(200, known[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pooling = self.options.runner == "pooling"
        if any(is_gone(rank) for rank in self.ranks):
            self.core.kill()
            self.core.wait()
        if self.core.poll() is not None:
            self._fail(500, CORE_LOST)
        elif self.path != ("/v1/embeddings" if pooling else "/v1/chat/completions"):
            self._fail(404, "Not Found")
        elif body["model"] not in self._names():
            self._fail(404, f"The model `{body['model']}` does not exist.")
        elif pooling:
            vector = {"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}
            self._send(200, {"object": "list", "model": body["model"], "data": [vector]})
        else:
            self._chat(body)

    def _names(self) -> list[str]:
        adapters = self.options.lora_modules if self.options.enable_lora else []
        return [self.options.served_model_name, *(module["name"] for module in adapters)]

    def _chat(self, body: dict[str, Any]) -> None:
        prompt = " ".join(each["content"] for each in body["messages"]).split()
        if len(prompt) + body.get("max_tokens", 0) > self.options.max_model_len:
            limit = self.options.max_model_len
            self._fail(400, f"This model's maximum context length is {limit} tokens.")
            return
        tools = body.get("tools") if body.get("tool_choice", "auto") != "none" else None
        if tools and not self.options.enable_auto_tool_choice:
            self._fail(400, '"auto" tool choice requires --enable-auto-tool-choice and '
                       "--tool-call-parser to be set")  # fmt: skip
            return
        content = body["messages"][-1]["content"]
        adapted = body["model"] != self.options.served_model_name
        content = f"{body['model']}: {content}" if adapted else content
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if tools:
            function = {"name": tools[0]["function"]["name"], "arguments": "{}"}
            call = {"id": "call-1", "type": "function", "function": function}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        if self.options.reasoning_parser:
            message["reasoning"] = "I repeat it."
        finish = "tool_calls" if tools else "stop"
        choices = [
            {"index": at, "message": message, "finish_reason": finish}
            for at in range(body.get("n", 1))
        ]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 1}
        self._send(200, {"model": body["model"], "choices": choices, "usage": usage})

    def _fail(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "Error", "code": status}})

    def _send(self, status: int, content: object) -> None:
        text = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def main() -> None:
    print("command:", json.dumps(sys.argv[1:]), flush=True)
    Handler.options = parse(sys.argv[1:])
    Handler.ranks = join_ranks(Handler.options) if Handler.options.nnodes > 1 else []
    Handler.core = load(Handler.options.model)
    if Handler.options.headless:
        Handler.core.wait()
        return
    load_adapters(Handler.options)
    server = ThreadingHTTPServer((Handler.options.host, Handler.options.port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.core.wait()
    time.sleep(1)  # requests in flight get their answers


if __name__ == "__main__":
    main()
