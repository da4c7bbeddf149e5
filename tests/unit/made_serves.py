"""Engines as `aiflux serve` leaves them, served by the worker in the test process."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.open import draft_run
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.serve_directory import ServeDirectory, ServeSettings, ServeState
from aiflux.engines.http import Client
from aiflux.engines.kinds import engine_kind
from aiflux.errors import AifluxError
from aiflux.slurm.serve import make_certificate, write_key
from aiflux.util.files import write_json
from aiflux.util.records import to_json
from aiflux.worker.serve import serve
from aiflux.worker.shard import Context
from aiflux.worker.stop import Stopper
from tests.tools import make_tiny_gguf
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands
from tests.unit.helpers import request_line, write_program
from tests.unit.made_models import put_model
from tests.unit.working import Quiet

FAKE = Path(__file__).parents[1] / "tools" / "fake_llama_server.py"
NODE = "n1"


def until(holds: Callable[[], Any], timeout: float = 60.0) -> Any:
    """Return what a condition returns once it holds."""
    deadline = time.monotonic() + timeout
    while not (found := holds()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
    return found


class MadeServe:
    """The files of a served engine, and its worker."""

    def __init__(
        self,
        folder: Path,
        name: str = "tiny",
        idle: float = 60.0,
        addresses: dict[str, str] | None = None,
        engine: str = "llamacpp",
        model: str = "tiny:latest",
        program: Path | None = None,
        **options: Any,
    ) -> None:
        self.directory = directory = ServeDirectory.named(name, os.environ)
        directory.create()
        put_model(folder / "models", "tiny:latest", make_tiny_gguf.tiny())
        write_json(directory.settings, to_json(ServeSettings(idle, addresses)))
        directory.request.write_text(request_line(body={"messages": [{}]}) + "\n")
        write_key(directory)
        make_certificate(directory, (addresses or {}).values())
        chosen = RunOptions(engine=engine, model=model, **options)
        kind = engine_kind(chosen)
        draft_run(directory.request, directory.output, chosen, folder / "models", kind).open()
        self.model = engine_kind(chosen).served_name(model)
        server = shlex.join([sys.executable, str(FAKE)])
        fake = write_program(folder / "llama-server", f'#!/bin/sh\nexec {server} "$@"\n')
        program = program or fake
        self.environ = {**os.environ, "AIFLUX_ENGINE_PROGRAM": str(program), "TMPDIR": str(folder),
                        "SLURMD_NODENAME": NODE, "SLURM_JOB_ID": "100"}  # fmt: skip
        self.reporter = Quiet()
        self.error: AifluxError | None = None
        self.begin()

    def begin(self, deadline: float | None = None) -> None:
        """Prepare a start of the job."""
        self.stopper = Stopper()
        self.context = Context(self.reporter, self.stopper, deadline, environ=self.environ)
        self.error = None
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        try:
            serve(read_plan(self.directory.run), self.directory, self.context)
        except AifluxError as error:
            self.error = error

    @property
    def state(self) -> ServeState:
        found = self.directory.read_state()
        return found or ServeState("none")

    def start(self, timeout: float = 60.0) -> ServeState:
        """Start the worker; return the state once the engine is ready."""
        self.thread.start()
        until(lambda: self.state.phase == "ready" or not self.thread.is_alive(), timeout)
        return self.state

    def end(self) -> ServeState:
        """Wait until the worker ends."""
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.state

    def __enter__(self) -> MadeServe:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopper.stop("the end of the test")
        if self.thread.ident is not None:
            self.thread.join(20)

    def client(self, key: str | None = "", ca: Path | None = None) -> Client:
        """Return a client of the engine; the key and certificate are its own by default."""
        key = self.directory.read_key() if key == "" else key
        return Client(self.state.url, 10.0, 2, key, str(ca or self.directory.certificate))

    def chat(self, text: str, **more: Any) -> int:
        """Send a chat; return the status of the answer."""
        client = self.client(**more)
        try:
            messages = [{"role": "user", "content": text}]
            body = {"model": self.model, "messages": messages, "max_tokens": 8}
            return client.post("/v1/chat/completions", json.dumps(body).encode()).status
        finally:
            client.close()

    def servers(self) -> list[int]:
        """Return the processes of the engine."""
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                words = (proc / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(FAKE).encode() in words and str(self.directory.key).encode() in words:
                found.append(int(proc.name))
        return found


_SBATCH = """\
folder=$(dirname -- "${@: -1}")
export SLURM_JOB_ID=100 SLURMD_NODENAME=n1
log=$folder/logs/slurm-100.out
setsid PYTHON -m aiflux.worker --run-dir "$folder" --shard 0 >"$log" 2>&1 </dev/null &
echo $! >"$here/pid"
rm -f "$here/requeued"
echo 100
"""
_SQUEUE = """\
state=COMPLETED
[[ ! -e $here/requeued ]] || state=PENDING
grep -qsv ') Z ' "/proc/$(<"$here/pid")/stat" && state=RUNNING
[[ ! -e $here/cancelled || $state == RUNNING ]] || state=CANCELLED
echo "100|N/A|$state|N/A|1:00|n1|None"
"""
_SCANCEL = 'touch "$here/cancelled"; kill "$(<"$here/pid")"'
_SCONTROL = """\
case "$*" in
*config*) echo 'ClusterName = c' ;;
*node*) echo 'NodeName=n1 NodeAddr=127.0.0.1 State=IDLE Partitions=gpu CPUTot=8 RealMemory=16000' ;;
*) exit 1 ;;
esac
"""


class OneJobSlurm(FakeCommands):
    """A Slurm whose only job, 100, runs the worker on this machine, the node n1."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder / "bin")
        self.add("sbatch", _SBATCH.replace("PYTHON", shlex.quote(sys.executable)))
        self.add("squeue", _SQUEUE)
        self.add("scancel", _SCANCEL)
        self.add("scontrol", _SCONTROL)
        self.say("sacct", status=1)
        server = shlex.join([sys.executable, str(FAKE)])
        write_program(folder / "llama-server", f'#!/bin/sh\nexec {server} "$@"\n')
        put_model(folder / "models", "tiny:latest", make_tiny_gguf.tiny())
        make_sif(folder / "aiflux-llamacpp.sif", version="1", cpu_only="yes", engine="llamacpp")
        monkeypatch.setenv("PATH", self.path)
        monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(folder / "llama-server"))
        monkeypatch.chdir(folder)

    @property
    def pid(self) -> int | None:
        """The worker's process, while it runs."""
        try:
            pid = int((self.folder / "pid").read_text())
            os.kill(pid, 0)
        except (OSError, ValueError):
            return None
        return None if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z" else pid

    def requeue(self, script: Path) -> None:
        """End the job and start it again; it is pending in between, as with Slurm."""
        (self.folder / "requeued").touch()
        self.end()
        subprocess.run(["sbatch", str(script)], check=True, capture_output=True)

    def end(self) -> None:
        """End the job, and wait for it."""
        pid = self.pid
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            until(lambda: self.pid is None)
