"""Real engines on this machine's CPU: AI-Flux next to a bare aiohttp client and to its peers.

Absolute figures of a CPU say nothing about a GPU. The shares show how much of an engine's
throughput a client uses. Clients run in turn, each with new prompts, on one running server.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.children import ROOT, Usage, run
from bench.gpu.measuring import CLIENTS, Figure, Mix, Session, serving
from bench.gpu.models import SHAPES, make_gguf, make_hf, words
from bench.gpu.smi import Sampler
from bench.peers import Llmflux

SLOTS = 64
LONG_INPUT = 500_000
_SHAPE = SHAPES["135m"]
_MODEL = "random"
_MIX = Mix(prompt=64, answer=48)
_SHORT = Mix(prompt=64, answer=4)
_WATCHED, _LIMIT = 45.0, 1800.0
_STACK = "/var/tmp/aiflux-stack"  # noqa: S108 - as tests/stack/lib.sh has it
_VLLM_ENVIRON = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_VLLM_OPTIONS = (
    *("--served-model-name", _MODEL, "--max-model-len", "256"),
    *("--max-num-seqs", str(SLOTS), "--enforce-eager"),
)


@dataclass(frozen=True)
class Server:
    """A server's command and environment."""

    words: tuple[str, ...]
    environ: Mapping[str, str]

    def command(self, port: int) -> list[str]:
        """Return the command on a port."""
        return [*self.words, "--host", "127.0.0.1", "--port", str(port)]


def _program(name: str, folder: str) -> str:
    """Return a program on the PATH, or that of the test stack.

    Raises:
        RuntimeError: it is in neither.
    """
    stack = Path(os.environ.get("AIFLUX_STACK_DIR", _STACK))
    assembled = stack / "user" / folder / "bin" / name
    found = shutil.which(name) or (str(assembled) if assembled.exists() else None)
    if found is None:
        raise RuntimeError(f"no {name} here; tests/stack/up assembles one")
    return found


def llama_server(folder: Path) -> Server:
    """Return llama-server with a new model."""
    program = _program("llama-server", "llamacpp")
    model = folder / "random.gguf"
    make_gguf(model, _SHAPE)
    options = ("-np", str(SLOTS), "-c", str(SLOTS * 256), "--no-webui", "--cache-ram", "0")
    return Server((program, "-m", str(model), "--alias", _MODEL, *options), {})


def vllm_server(folder: Path) -> Server:
    """Return vLLM with a new model."""
    program = _program("vllm", "vllm")
    model = folder / "random"
    make_hf(model, _SHAPE)
    return Server((program, "serve", str(model), *_VLLM_OPTIONS), _VLLM_ENVIRON)


@dataclass(frozen=True)
class Measured:
    """What the clients of a server reached.

    Attributes:
        start: seconds until the server was ready.
        llmflux: its output tokens per second, or why there are none.
    """

    start: float
    runs: Mapping[str, Sequence[Figure]]
    llmflux: str

    def rate(self, client: str) -> float:
        """Return the median of the output tokens per second, over the whole process."""
        return statistics.median(figure.rate for figure in self.runs[client])

    def share(self, client: str) -> float:
        """Return the median of a client's share of the bare client in the same round."""
        pairs = zip(self.runs[client], self.runs[CLIENTS[0]], strict=True)
        return statistics.median(figure.rate / bare.rate for figure, bare in pairs)

    def wall(self, client: str) -> float:
        """Return the median of the seconds of a run."""
        return statistics.median(figure.wall for figure in self.runs[client])


def measure(
    server: Server, peer: Llmflux, folder: Path, rounds: int, count: int, say: Callable[[str], None]
) -> Measured:
    """Start a server and run its clients in turn over ``count`` requests each.

    Raises:
        RuntimeError: the server or a client failed.
    """
    if peer.problem:
        raise RuntimeError(f"the bare client's environment: {peer.problem}")
    runs: dict[str, list[Figure]] = {client: [] for client in CLIENTS}
    began = time.monotonic()
    with serving(server, folder / "engine.log") as url:
        start = time.monotonic() - began
        session = Session(url, _MODEL, words(_SHAPE), folder, Sampler(), str(peer.python))
        session.measure(CLIENTS[0], _MIX, SLOTS, SLOTS)  # warms up
        for turn in range(rounds):
            for client in (*CLIENTS[turn % 3 :], *CLIENTS[: turn % 3]):
                figure = session.measure(client, _MIX, SLOTS, count)
                say(f"{client}: {figure.rate:.1f} output tokens/s")
                runs[client].append(figure)
        few, answers = folder / "few.jsonl", folder / "few.json"
        tokens = session.write(few, _MIX, max(8, count // 32))
        usage = peer.run_with_vllm(url, few, answers, _MODEL)
    return Measured(start, runs, f"{tokens / usage.wall:.0f} tokens/s")


def run_batch(folder: Path, count: int) -> Usage:
    """Run ``vllm run-batch``, which starts an engine itself, over ``count`` requests."""
    return run(_run_batch(folder, _MIX, count), limit=_LIMIT, environ=_VLLM_ENVIRON)


def _run_batch(folder: Path, mix: Mix, count: int) -> list[str]:
    source = folder / "batch.jsonl"
    Session("", _MODEL, words(_SHAPE), folder, Sampler()).write(source, mix, count)
    files = ["-i", str(source), "-o", str(folder / "batch.out.jsonl")]
    program, model = _program("vllm", "vllm"), str(folder / "random")
    return [program, "run-batch", *files, "--model", model, *_VLLM_OPTIONS]


def memory_of_long_input(server: Server, folder: Path) -> tuple[int, int]:
    """Return the peak memory of AI-Flux and of ``vllm run-batch`` with a long input, in bytes.

    Both are stopped after a while: what they hold of the input is in memory by then. Only the
    process that reads the input counts, not the engine's others.
    """
    theirs = _run_batch(folder, _SHORT, LONG_INPUT)
    source, log = folder / "batch.jsonl", folder / "client.log"
    with serving(server, folder / "engine.log") as url:
        ours = [sys.executable, "-m", "aiflux.worker", str(source), str(folder / "long.json")]
        ours += ["--engine-url", url, "--concurrency", str(SLOTS)]
        with _running(ours, log) as process:
            mine = _peak(process, log, "")
    with _running(theirs, log) as process:
        return mine, _peak(process, log, "Running batch")


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **_VLLM_ENVIRON},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


def _peak(process: subprocess.Popen[bytes], log: Path, working: str) -> int:
    """Return the peak memory some time after the log has the line of its work."""
    deadline = time.monotonic() + _LIMIT
    watched_from = None
    while watched_from is None or time.monotonic() < watched_from + _WATCHED:
        text = log.read_text(errors="replace")
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} ended or did not start to work: {text[-800:]}")
        if watched_from is None and working in text:
            watched_from = time.monotonic()
        time.sleep(0.5)
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
