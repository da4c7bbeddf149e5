"""Start and measure an engine: sweep, then bare client and AI-Flux in turn."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from bench.children import run
from bench.gpu.models import word
from bench.gpu.smi import Sampler

_START_LIMIT, _RUN_LIMIT = 600.0, 1800.0
CLIENTS = ("bare client", "aiflux fixed", "aiflux adaptive")


class Server(Protocol):
    """A server to start."""

    @property
    def environ(self) -> Mapping[str, str]:
        """Additional environment variables."""
        ...

    def command(self, port: int) -> list[str]:
        """Return the server's command."""
        ...


class Engine(Server, Protocol):
    """An engine to measure."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def served_name(self) -> str:
        """The model's name in requests."""
        ...

    def own_tool(
        self, levels: Sequence[int], prompt: int, answer: int, seconds: float
    ) -> tuple[list[str], Mapping[int, float]]:
        """Return the engine's own measurement without a server: command, rates by level."""
        ...

    def version(self) -> str:
        """Return its version."""
        ...


@dataclass(frozen=True)
class Mix:
    """Tokens of a prompt, and average tokens of an answer (uniform from 0.5 to 1.5 times that)."""

    prompt: int
    answer: int

    def __str__(self) -> str:
        return f"{self.prompt}:{self.answer}"

    def lengths(self, count: int, rng: random.Random) -> list[int]:
        """Return the answers' lengths."""
        return [rng.randint(self.answer // 2, self.answer + self.answer // 2) for _ in range(count)]


@dataclass(frozen=True)
class Figure:
    """One run of one client."""

    client: str
    mix: str
    in_flight: int
    requests: int
    tokens: int
    wall: float
    cpu: float
    gpu: Mapping[str, float]
    alone: float = 0.0
    """Seconds of the client for a single request of a few tokens."""

    @property
    def steady_rate(self) -> float:
        """Output tokens per second without startup and end, as in a long run."""
        return self.tokens / (self.wall - self.alone)

    @property
    def rate(self) -> float:
        """Output tokens per second, from the process's start to its end."""
        return self.tokens / self.wall


@dataclass
class Report:
    """All measurements of an engine."""

    engine: str
    version: str
    command: list[str]
    model: str
    own_command: list[str] = field(default_factory=list)
    own_tool: dict[str, Mapping[int, float]] = field(default_factory=dict)
    sweep: list[Figure] = field(default_factory=list)
    runs: list[Figure] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON."""
        return asdict(self)


@contextmanager
def serving(engine: Server, log: Path) -> Iterator[str]:
    """Run the engine's server, with its output in ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            engine.command(port),
            env={**os.environ, **engine.environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_ready(process, url, log)
            yield url
        finally:
            _end(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_LIMIT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url + "/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"the engine did not start: {log.read_text(errors='replace')[-1500:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                continue
    process.wait(20)


@dataclass
class Session:
    """Measures clients with a running engine.

    Every run has new prompts, so that no prompt cache helps the second client.

    Attributes:
        python: for the bare client, which needs aiohttp.
    """

    url: str
    model: str
    vocabulary: int
    folder: Path
    sampler: Sampler
    python: str = sys.executable
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def measure(self, client: str, mix: Mix, in_flight: int, count: int) -> Figure:
        """Run one client over ``count`` requests.

        Raises:
            RuntimeError: the client failed, or answers do not have the requested length.
        """
        source, target = self.folder / "in.jsonl", self.folder / "out.jsonl"
        wanted = self.write(source, mix, count)
        usage = run(self._command(client, source, target, in_flight), limit=_RUN_LIMIT)
        answered = output_tokens(target)
        if answered != wanted:
            raise RuntimeError(f"{client}: {answered} tokens instead of {wanted}")
        gpu = self.sampler.mean(usage.began, usage.wall)
        return Figure(client, str(mix), in_flight, count, answered, usage.wall, usage.cpu, gpu)

    def _command(self, client: str, source: Path, target: Path, in_flight: int) -> list[str]:
        if client == CLIENTS[0]:
            arguments = [self.url, str(source), str(target), str(in_flight)]
            return [self.python, "-m", "bench.gpu.client", *arguments]
        files = ["--input", str(source), "--output", str(target), "--force"]
        fixed = ["--concurrency", str(in_flight)] if client == CLIENTS[1] else []
        return [sys.executable, "-m", "aiflux.cli", "run", *files, "--engine-url", self.url, *fixed]

    def write(self, path: Path, mix: Mix, count: int) -> int:
        """Write requests with new prompts; return the tokens of all answers."""
        lengths = mix.lengths(count, self.rng)
        with open(path, "w", encoding="utf-8") as file:
            for number, length in enumerate(lengths):
                chosen = (self.rng.randrange(self.vocabulary) for _ in range(mix.prompt))
                text = "".join(f" {word(one)}" for one in chosen)
                body = {
                    "model": self.model,
                    "messages": [{"role": "user", "content": text}],
                    "max_tokens": length,
                    "temperature": 0,
                }
                line = {"custom_id": f"{number:07d}", "method": "POST"}
                file.write(json.dumps(line | {"url": "/v1/chat/completions", "body": body}) + "\n")
        return sum(lengths)


def output_tokens(path: Path) -> int:
    """Return the answers' tokens in a results file, as the engine counted them."""
    with open(path, "rb") as file:
        bodies = (json.loads(line)["response"]["body"] for line in file)
        return sum(body["usage"]["completion_tokens"] for body in bodies)
