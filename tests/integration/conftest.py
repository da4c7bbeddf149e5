"""Fixtures of the real stack (see tests/stack): ordinary user, checkout, image and models."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import random
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.conftest import LEFT_OUT

T = TypeVar("T")
REPOSITORY = Path(__file__).parents[2]
STACK_DIR = Path(os.environ.get("AIFLUX_STACK_DIR", "/var/tmp/aiflux-stack"))  # noqa: S108
MODEL = "smollm2:135m"
TINY = "tiny:latest"
NO_SLURM = """\
ClusterName=none
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=9
MessageTimeout=2
"""
"""A configuration of Slurm whose slurmctld does not answer, for which commands wait ten seconds by
default."""
_ABSENT = "/dev/null"  # Slurm waits a minute for a file that does not exist
_PASSED = ("PIP_", "SSL_", "REQUESTS_CA", "CURL_CA", "CI", "LANG")
_QUERY_PAUSE = 0.2  # seconds between two questions to Slurm
_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


def _uses_slurm(item: pytest.Item) -> bool:
    return "cluster" in getattr(item, "fixturenames", ())


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.stack)


# With several processes (-n), all tests that use the cluster run in one of them, as they look at
# all jobs of the user. The process that distributes the tests knows only their ids, so the others
# tell it which use the cluster. (The groups of xdist 3.8 have no effect with pytest 9.2.)
_OF_SLURM = Path(tempfile.gettempdir(), f"aiflux-tests-{os.getpid()}.json")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["of_slurm"] = str(_OF_SLURM)


@pytest.hookimpl(tryfirst=True)  # before xdist sends the ids
def pytest_collection_finish(session: pytest.Session) -> None:
    target = getattr(session.config, "workerinput", {}).get("of_slurm")
    if target is not None:
        own = Path(f"{target}.{os.getpid()}")
        own.write_text(json.dumps([item.nodeid for item in session.items if _uses_slurm(item)]))
        own.replace(target)


@cache
def _of_slurm() -> frozenset[str]:
    return frozenset(json.loads(_OF_SLURM.read_text()))


class _Groups(LoadScopeScheduling):
    """Gives the tests of the cluster to one process, and the others by file."""

    def _split_scope(self, nodeid: str) -> str:
        return "Slurm" if nodeid in _of_slurm() else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Groups:
    return _Groups(config, log)


def pytest_unconfigure() -> None:
    _OF_SLURM.unlink(missing_ok=True)


def _missing() -> str:
    if not (STACK_DIR / "env").exists():
        return f"the test stack is not running ({STACK_DIR}/env is missing); run make cluster"
    reasons = [
        f"{path.name}: {path.read_text(encoding='utf-8').strip()}"
        for path in sorted((STACK_DIR / "missing").glob("*"))
    ]
    return "; ".join(reasons)


@pytest.fixture(scope="session")
def stack() -> dict[str, str]:
    """The stack's environment file; without it, tests skip, or fail if it is required."""
    missing = _missing()
    if missing and os.environ.get("AIFLUX_REQUIRE_STACK") == "1":
        pytest.fail(missing, pytrace=False)
    if missing:
        pytest.skip(missing)
    lines = (STACK_DIR / "env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines)


@contextmanager
def second_stack(
    folder: Path, script: str, environ: Mapping[str, str]
) -> Iterator[Callable[..., str]]:
    """Start a part of the stack in a directory of its own, and remove both at the end.

    Yields:
        a function that runs a command with its environment, and returns what it prints.
    """
    if os.geteuid() != 0:
        pytest.fail("a second cluster needs root")

    def run(*words: str) -> str:
        done = subprocess.run(
            words, cwd=REPOSITORY, env={**os.environ, **environ, "AIFLUX_STACK_DIR": str(folder)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return done.stdout

    run("bash", "-c", "source tests/stack/lib.sh && make_stack_dirs")
    try:
        run(script, "up")
        yield run
    finally:
        run(script, "down")
        shutil.rmtree(folder)


@dataclass
class User:
    """The ordinary user who runs everything.

    Attributes:
        home: a new directory of the user, removed at the end.
        slurm_conf: Slurm's configuration; with the default, its commands fail.
        env: additional environment variables.
    """

    name: str
    home: Path
    slurm_conf: str = _ABSENT
    env: dict[str, str] = field(default_factory=dict)

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k.startswith(_PASSED)}
        path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        own = {"HOME": str(self.home), "USER": self.name, "SHELL": "/bin/bash", "PATH": path}
        return {**kept, **own, "SLURM_CONF": self.slurm_conf, **self.env, **(more or {})}

    def command(self, command: Sequence[str | Path]) -> list[str]:
        if os.geteuid() != 0:
            return [str(part) for part in command]
        entry = pwd.getpwnam(self.name)
        ids = ["--reuid", str(entry.pw_uid), "--regid", str(entry.pw_gid), "--init-groups"]
        return [shutil.which("setpriv") or "setpriv", *ids, "--", *(str(part) for part in command)]

    def popen(
        self, *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(command),
            cwd=cwd or self.home,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self,
        *command: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        code: int | None = 0,
        timeout: float = 600,
    ) -> str:
        """Run a command; return stdout and stderr together."""
        process = self.popen(*command, cwd=cwd, env=env)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            pytest.fail(f"{command} took longer than {timeout} s:\n{output}")
        if code is not None and process.returncode != code:
            pytest.fail(
                f"{command} exited with {process.returncode}, not {code}:\n{output[-6000:]}"
            )
        return output

    def folder(self, name: str) -> Path:
        """Create a directory owned by the user."""
        path = self.home / name
        self.run("mkdir", "-p", path, cwd=Path("/"))
        return path

    def write(self, path: Path, text: str) -> Path:
        """Write a file owned by the user."""
        path.write_text(text, encoding="utf-8")
        if os.geteuid() == 0:
            shutil.chown(path, self.name)
        return path

    def give(self, folder: Path) -> None:
        """Make the user the owner of a file or directory tree; links are not followed."""
        if os.geteuid() == 0:
            subprocess.run(["chown", "-hR", f"{self.name}:", str(folder)], check=True)

    def processes(self) -> list[str]:
        """Return the processes with a directory of these tests in command line or environment."""
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                command = (proc / "cmdline").read_bytes()
                known = command + (proc / "environ").read_bytes()
            except OSError:
                continue
            if str(self.home).encode() in known and int(proc.name) != os.getpid():
                found.append(proc.name + " " + command.replace(b"\0", b" ").decode())
        return found

    def none_left(self, timeout: float = 20) -> bool:
        """Return whether all started processes end within the timeout."""
        deadline = time.monotonic() + timeout
        while (some := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return not some


@pytest.fixture(scope="session")
def user(stack: dict[str, str]) -> Iterator[User]:
    name = stack["AIFLUX_STACK_USER"] if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    home = Path(stack["AIFLUX_STACK_HOME"]) / f"test-{uuid.uuid4().hex[:8]}"
    user = User(name, home)
    user.run("mkdir", "-p", home, cwd=Path("/"))
    # Downloads are kept between test runs.
    user.env["AIFLUX_CACHE_DIR"] = str(Path(stack["AIFLUX_STACK_HOME"]) / ".cache" / "aiflux")
    yield user
    user.run("chmod", "-R", "u+w", home, cwd=Path("/"), code=None)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def checkout(user: User) -> Path:
    """A new copy of this checkout, with uncommitted changes, installed by the user."""
    target = user.folder("AI Flux, a (clone)")
    listed = subprocess.run(
        ["git", "-C", REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, check=True,
    ).stdout.split(b"\0")  # fmt: skip
    for name in filter(None, (raw.decode() for raw in listed)):
        source = REPOSITORY / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
    user.give(target)
    user.run("git", "init", "-q", cwd=target)
    user.run("make", "install", cwd=target)
    return target


@pytest.fixture(scope="session")
def aiflux(checkout: Path) -> Path:
    """The command that the user installed."""
    return checkout / ".venv" / "bin" / "aiflux"


Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build(
    user: User, checkout: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Build:
    """Return a function that builds an image, or copies the one of another process of this run."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def build(name: str, *words: str) -> Path:
        target, built = checkout / name, shared / name
        with open(shared / f"{name}.lock", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if built.exists():
                shutil.copy(built, target)
                user.give(target)
            else:
                user.run("make", "image", "BASE=debian", *words, cwd=checkout, timeout=900)
                built.unlink(missing_ok=True)
                built.symlink_to(target)
        return target

    return build


@pytest.fixture(scope="session")
def image(build: Build) -> Path:
    """The image, built by the user from the Debian base."""
    return build("aiflux.sif")


@pytest.fixture(scope="session")
def llama_image(build: Build) -> Path:
    """The image with llama.cpp, built by the user from the Debian base."""
    return build("aiflux-llamacpp.sif", "ENGINE=llamacpp")


@pytest.fixture(scope="session")
def ollama(stack: dict[str, str], user: User) -> Path:
    """The CPU Ollama."""
    return STACK_DIR / "ollama-cpu" / "bin" / "ollama"


@pytest.fixture(scope="session")
def llama_server(stack: dict[str, str]) -> Path:
    """The llama-server of the test stack."""
    return STACK_DIR / "user" / "llamacpp" / "bin" / "llama-server"


@pytest.fixture(scope="session")
def vllm(stack: dict[str, str]) -> Path:
    """The CPU build of vLLM."""
    if os.environ.get("AIFLUX_STACK_WITHOUT_VLLM") == "1":
        pytest.skip(f"{LEFT_OUT}AIFLUX_STACK_WITHOUT_VLLM=1")
    return STACK_DIR / "user" / "vllm" / "bin" / "vllm"


@pytest.fixture(scope="session")
def hub_model(vllm: Path) -> Path:
    """The directory of a small model of Hugging Face."""
    return STACK_DIR / "user" / "smollm2"


@pytest.fixture(scope="session")
def models(user: User, checkout: Path, ollama: Path) -> Path:
    """A models directory with the small model."""
    folder = user.folder("models")
    user.run(checkout / "container" / "demo-model.sh", ollama, folder, MODEL)
    create_model(user, folder, ollama, MODEL, f"FROM {MODEL}")
    return folder


@pytest.fixture(scope="session")
def tiny(user: User, models: Path, ollama: Path) -> str:
    """A random model of half a megabyte, for tests in which the words do not matter."""
    return create_tiny(user, models, ollama, TINY)


def create_tiny(user: User, models: Path, ollama: Path, name: str, *kind: str) -> str:
    """Create a model of make_tiny_gguf.py in the models directory; return its name."""
    gguf = user.home / "tiny.gguf"
    user.run("python3", REPOSITORY / "tests/tools/make_tiny_gguf.py", gguf, *kind)
    create_model(user, models, ollama, name, f"FROM {gguf}", "PARAMETER num_predict 16")
    return name


def create_model(user: User, models: Path, ollama: Path, name: str, *modelfile: str) -> None:
    """Create a model that is computed with one thread, for tests only.

    Several engines share the cores here. Ollama has a thread for each core; threads that wait for
    one another spin, so requests would take ten times as long.
    """
    user.write(user.home / "Modelfile", "\n".join([*modelfile, "PARAMETER num_thread 1", ""]))
    script = user.write(
        user.home / "create.sh",
        "#!/bin/bash\n"
        "# Creates a model from a Modelfile with a temporary server.\n"
        "set -euo pipefail\n"
        "export OLLAMA_MODELS=$2 OLLAMA_NOPRUNE=1 OLLAMA_HOST=127.0.0.1:$3\n"
        '"$1" serve > "$HOME/create.log" 2>&1 & server=$!\n'
        "trap 'kill $server; wait $server || true' EXIT\n"
        'for _ in $(seq 100); do "$1" list >/dev/null 2>&1 && break; sleep 0.1; done\n'
        '"$1" create "$4" -f "$HOME/Modelfile"\n',
    )
    port = 20000 + random.randrange(20000)
    user.run("bash", script, ollama, models, str(port), name, timeout=120)


@pytest.fixture
def job_env(models: Path) -> dict[str, str]:
    """The environment of jobs: the models directory, and that the CPU is intended."""
    return {"AIFLUX_MODELS_DIR": str(models), "AIFLUX_ALLOW_CPU": "1"}


@pytest.fixture
def place(user: User) -> Path:
    """A new directory of the user with an awkward name."""
    return user.folder(f"{uuid.uuid4().hex[:6]} b,c:d 'e' \"f\" $(g) `h` #i %j ü\\k")


def request(custom_id: str, prompt: str, **body: Any) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": prompt},
    ]
    content = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 8, **body}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {key: value for key, value in content.items() if value is not None},
    }


def lines(*requests: dict[str, Any]) -> str:
    return "".join(json.dumps(each) + "\n" for each in requests)


FRANCE = request("france", "What is the capital of France?")
PLANETS = request("planets", "Name a planet.")


PROMPTS = [
    "Hi",
    "  Two  spaces, don't WE'RE\n\n\ttabs\r\n",
    "3.14159 1234567 \uff11\uff12\uff13 \u2177",
    "def f(x):\n    return x ** 2  # square\n",
    "日本語のテキスト ไทย हिन्दी العربية e\u0301",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 <|im_end|> <s>",
    "word " * 300,
]
"""Prompts that are hard to split into words."""


def counted(output: Path, count: Callable[[list[Any]], int | None]) -> dict[str, tuple[Any, Any]]:
    """Return the tokens of each prompt of a run: those that the engine reports, and ours."""
    return {
        entry["input"]["custom_id"]: (
            entry["output"]["usage"]["prompt_tokens"],
            count(entry["input"]["body"]["messages"]),
        )
        for entry in json.loads(output.read_text(encoding="utf-8"))
    }


def answers(output: Path) -> dict[str, str]:
    """Return the answers of an output by custom_id."""
    entries = json.loads(output.read_text(encoding="utf-8"))
    return {
        entry["input"]["custom_id"]: entry["output"]["choices"][0]["message"]["content"]
        for entry in entries
    }


def until(
    holds: Callable[[], T],
    awaited: Callable[[], str] | str,
    seconds: float = 120,
    pause: float = 0.02,
) -> T:
    """Return what a condition returns once it holds; else fail with what was awaited."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        if time.monotonic() > deadline:
            text = awaited if isinstance(awaited, str) else awaited()
            pytest.fail(f"after {seconds:g} s, still waiting for {text}")
        time.sleep(pause)
    return found


def recorded(place: Path, output: str = "out.json") -> int:
    """Return the number of results in the journals of a run."""
    journals = (place / f"{output}.aiflux" / "journal").glob("*.jsonl")
    return sum(journal.read_bytes().count(b"\n") for journal in journals)


def shard_status(place: Path) -> dict[str, Any]:
    """Return the status of the first shard of the only run below ``place``."""
    (path,) = place.glob("*.aiflux/status/shard-0000.json")
    status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return status


@dataclass(frozen=True)
class JobEnd:
    """How a job ended, according to Slurm."""

    state: str
    code: int
    fields: dict[str, str]


class Cluster:
    """Slurm's own commands, run by the user."""

    def __init__(self, user: User) -> None:
        self.user = user

    def fields(self, job: str) -> dict[str, str]:
        text = self.user.run("scontrol", "show", "job", "-o", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(self, job: str, *states: str, timeout: float = 180) -> dict[str, str]:
        def reached() -> dict[str, str]:
            fields = self.fields(job)
            return fields if fields["JobState"] in states else {}

        def awaited() -> str:
            shown = self.user.run("scontrol", "show", "job", job)
            path = shown.partition("StdOut=")[2].partition("\n")[0]  # may contain spaces
            log = self.user.run("tail", "-n", "60", path, code=None)
            return f"job {job} to be {' or '.join(states)}:\n{shown}\n{log}"

        return until(reached, awaited, timeout, _QUERY_PAUSE)

    def end(self, job: str, timeout: float = 600) -> JobEnd:
        fields = self.wait_for(job, *_FINAL, timeout=timeout)
        return JobEnd(fields["JobState"], int(fields["ExitCode"].split(":")[0]), fields)

    def log(self, job: str, folder: Path) -> str:
        """Return a job's log, which is in or below ``folder``."""
        logs = list(folder.rglob(f"slurm-{job}.out"))
        assert len(logs) == 1, f"logs of job {job}: {logs}"
        return logs[0].read_text(encoding="utf-8", errors="replace")

    def left(self, job: str, timeout: float = 180) -> None:
        """Wait until a job and its tasks have left the queue."""
        listed = ("squeue", "-h", "-j", job)
        until(
            lambda: not self.user.run(*listed, code=None).strip(),
            f"job {job} to leave the queue",
            timeout,
            _QUERY_PAUSE,
        )


@pytest.fixture
def cluster(stack: dict[str, str], user: User) -> Iterator[Cluster]:
    """Slurm. A test without this fixture can use none, as it may run next to those that do."""
    user.slurm_conf = stack["SLURM_CONF"]
    yield Cluster(user)
    user.run("scancel", "-u", user.name, code=None)
    user.slurm_conf = _ABSENT
