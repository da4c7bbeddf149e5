"""Models that are pulled, carried and broken, with the real Ollama and a real registry.

The CLI runs here, as whoever runs the tests; no container, no Slurm.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from aiflux.engines.ollama.api import Ollama
from aiflux.engines.ollama.environment import ollama_environment
from aiflux.engines.ollama.staging import staged_folder
from aiflux.engines.ollama.store import missing_parts, model_digest, read_manifest
from aiflux.engines.process import ServerProcess
from aiflux.models.name import parse_model_name
from tests.integration.conftest import REPOSITORY, User, answers, lines, request
from tests.unit.made_models import tree

WEIGHTS = 60_000_000
"""Bytes of the model that is pulled: enough for a pull to be met in the middle."""


@dataclass
class Site:
    """A folder of its own with the CLI, an Ollama and a registry.

    Attributes:
        name: of the model that the registry has.
    """

    folder: Path
    ollama: Path
    name: str = ""
    env: dict[str, str] = field(default_factory=dict)

    @property
    def models(self) -> Path:
        return self.folder / "models"

    def environment(self, models: Path | None = None) -> dict[str, str]:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return {
            "PATH": os.environ["PATH"], "HOME": str(home),
            "AIFLUX_OLLAMA": str(self.ollama), "AIFLUX_MODELS_DIR": str(models or self.models),
            **self.env,
        }  # fmt: skip

    def start(self, *arguments: str | Path, models: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [Path(sys.executable).with_name("aiflux"), *map(str, arguments)],
            cwd=self.folder, env=self.environment(models), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, *arguments: str | Path, code: int = 0, models: Path | None = None) -> str:
        process = self.start(*arguments, models=models)
        told, _ = process.communicate(timeout=180)
        assert process.returncode == code, told
        return told

    def works(self, models: Path | None = None) -> None:
        """The directory holds the model whole, and an engine takes it from there."""
        models = models or self.models
        name = parse_model_name(self.name)
        assert missing_parts(models, name) == []
        self.run("models", "verify", name.served, models=models)
        with serving(self, models) as server:
            assert name.served in server.tags()

    def partial(self) -> int:
        """Bytes of a pull that are on the disk so far."""
        files = self.models.glob(".staging/*/blobs/*-partial*")
        return sum(file.stat().st_blocks * 512 for file in files)


@contextmanager
def serving(site: Site, models: Path) -> Iterator[Ollama]:
    home = site.folder / f"home-{uuid.uuid4().hex[:6]}"
    home.mkdir()
    server = ServerProcess(
        [str(site.ollama), "serve"],
        ollama_environment(os.environ, models, home, {}),
        home / "serve.log",
    )
    server.start()
    try:
        yield Ollama(server.url)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, tiny Llama with so much behind its tensors that a pull takes a moment."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    subprocess.run([sys.executable, REPOSITORY / "tests/tools/make_tiny_gguf.py", path], check=True)
    return path


@pytest.fixture(scope="module")
def pushed(
    stack: dict[str, str], ollama: Path, gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A model in the local registry that takes a moment to pull."""
    site = Site(tmp_path_factory.mktemp("push"), ollama)
    large = site.folder / "large.gguf"
    shutil.copy(gguf, large)
    with open(large, "ab") as file:
        file.write(os.urandom(WEIGHTS))
    name = f"{stack['AIFLUX_STACK_REGISTRY']}/library/models-{uuid.uuid4().hex[:8]}:1"
    site.run("models", "import", "--gguf", large, "--name", name)
    with serving(site, site.models) as server:
        last = list(server._stream("/api/push", "push", {"model": name, "insecure": True}, 120))[-1]
    assert last["status"] == "success"
    return f"http://{name}"


@pytest.fixture
def site(tmp_path: Path, ollama: Path, pushed: str) -> Site:
    return Site(tmp_path, ollama, pushed)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_model_is_pulled_once(site: Site) -> None:
    assert "pulling" in site.run("models", "pull", site.name)
    site.works()
    before = tree(site.models)
    assert "is there" in site.run("models", "pull", site.name)
    assert tree(site.models) == before
    assert not [*(site.models / ".staging").iterdir()]


def test_two_pulls_at_once(site: Site) -> None:
    first, second = (site.start("models", "pull", site.name) for _ in range(2))
    told = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), told
    assert sorted(text.count("is pulled") for text in told) == [0, 1], told
    site.works()


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGKILL, -signal.SIGKILL, ""), (signal.SIGTERM, 5, "what was done is kept"),
     (signal.SIGINT, 5, "what was done is kept")],
    ids=["killed", "ended", "interrupted"],
)  # fmt: skip
def test_a_pull_that_is_killed_goes_on(
    site: Site, number: signal.Signals, code: int, words: str
) -> None:
    process = site.start("models", "pull", site.name)
    wait_until(lambda: site.partial() > 0, process)
    assert f"a pull goes on: {site.name}" in site.run("models", "list", "--here")
    process.send_signal(number)
    told, _ = process.communicate(timeout=30)
    assert (process.returncode, words in told) == (code, True), told
    assert missing_parts(site.models, parse_model_name(site.name)) == ["manifest"]
    assert not (site.models / "blobs").exists(), "nothing of it is seen by runs"
    listed = site.run("models", "list", "--here")
    assert f"a pull broke off: {site.name}" in listed
    assert f"aiflux models pull {site.name} goes on with it" in listed
    site.run("models", "pull", site.name)
    site.works()
    assert not [*(site.models / ".staging").iterdir()]


def test_the_images_pull_ends_with_the_signal(site: Site) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "aiflux.worker", "--pull", site.name],
        cwd=site.folder, env=site.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    wait_until(lambda: site.partial() > 0, process)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=30)
    assert (process.returncode, "what was done is kept" in told) == (5, True), told
    assert missing_parts(site.models, parse_model_name(site.name)) == ["manifest"]


def test_what_a_broken_pull_left_is_checked(site: Site) -> None:
    """Ollama takes a blob that is there for whole, whoever put it there."""
    site.run("models", "pull", site.name)
    name = parse_model_name(site.name)
    fresh = site.folder / "fresh"
    staged = staged_folder(fresh, name) / "blobs"
    shutil.copytree(site.models / "blobs", staged)
    blob = max(staged.iterdir(), key=lambda path: path.stat().st_size)
    with open(blob, "r+b") as file:
        file.write(b"not what was there")
    site.run("models", "pull", site.name, models=fresh)
    site.works(fresh)


def test_a_corrupted_blob_is_found_and_pulled_anew(site: Site) -> None:
    site.run("models", "pull", site.name)
    blob = max((site.models / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    with open(blob, "r+b") as file:
        file.seek(blob.stat().st_size // 2)
        file.write(b"not what was there")
    told = site.run("models", "verify", site.name, code=4)
    assert f"{blob.name[:18].replace('-', ':')}" in told
    assert "is corrupted" in told
    assert "is there" in site.run("models", "pull", site.name), "sizes alone tell nothing"
    site.run("models", "pull", "--again", site.name)
    site.works()


def test_a_half_pulled_model_is_pulled_whole(site: Site) -> None:
    site.run("models", "pull", site.name)
    blob = max((site.models / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(blob, 1000)
    assert "damaged" in site.run("models", "list", "--here")
    told = site.run("models", "verify", site.name, code=4)
    assert "is wrong size" in told
    site.run("models", "pull", site.name)
    site.works()


def test_a_digest_is_insisted_on(site: Site) -> None:
    site.run("models", "pull", site.name)
    digest = model_digest(site.models, parse_model_name(site.name))
    assert digest is not None
    site.run("models", "pull", f"{site.name}@sha256:{digest}")
    other = "0" * 64
    told = site.run("models", "pull", f"{site.name}@sha256:{other}", code=4)
    assert digest in told
    assert other in told
    fresh = site.folder / "fresh"
    told = site.run("models", "pull", f"{site.name}@sha256:{other}", models=fresh, code=4)
    assert digest in told
    assert not (fresh / "manifests").exists(), "what nobody asked for is not put there"
    served = parse_model_name(site.name).served
    (site.folder / "in.jsonl").write_text(lines(request("a", "one", model=None)), encoding="utf-8")
    run = ["run", "--local", "--input", "in.jsonl", "--output", "out.json", "--model"]
    told = site.run(*run, f"{served}@sha256:{other}", code=4)
    assert digest in told
    assert other in told
    insisting = request("a", "one", model=f"{site.name}@sha256:{digest}")
    (site.folder / "own.jsonl").write_text(lines(insisting), encoding="utf-8")
    site.run("run", "--local", "--input", "own.jsonl", "--output", "own.json")
    assert "a" in answers(site.folder / "own.json")
    site.run(*run, f"{served}@sha256:{digest[:12]}", "--force-resume")
    assert "a" in answers(site.folder / "out.json")
    entry = json.loads((site.folder / "out.json").read_text(encoding="utf-8"))[0]
    assert entry["metadata"]["model_digest"] == digest


def test_a_model_made_of_a_file_travels_and_runs(site: Site, gguf: Path) -> None:
    template = site.folder / "template.txt"
    template.write_text("Q: {{ .Prompt }} A:", encoding="utf-8")
    site.run("models", "import", "--gguf", gguf, "--name", "lab/tiny:1", "--template", template)
    with serving(site, site.models) as server:
        shown = server._post("/api/show", {"model": "lab/tiny:1"}, 30)
    assert shown["template"] == "Q: {{ .Prompt }} A:"
    assert not [*(site.models / ".staging").iterdir()]
    site.run("models", "export", "lab/tiny:1", "tiny.tar")
    away = site.folder / "away"
    site.env["AIFLUX_OLLAMA"] = "/nonexistent/ollama"
    site.run("models", "import", "tiny.tar", models=away)
    del site.env["AIFLUX_OLLAMA"]
    (site.folder / "in.jsonl").write_text(lines(request("a", "one", model=None)), encoding="utf-8")
    run = ["run", "--local", "--input", "in.jsonl", "--output", "out.json", "--slots", "1"]
    before = tree(away)
    site.run(*run, "--model", "lab/tiny:1", models=away)
    assert "a" in answers(site.folder / "out.json")
    assert tree(away) == before, "a run writes nothing into the models directory"


def test_a_run_whose_model_is_removed_goes_on_when_it_is_back(site: Site, gguf: Path) -> None:
    site.run("models", "import", "--gguf", gguf, "--name", "lab/tiny:1")
    site.run("models", "export", "lab/tiny:1", "tiny.tar")
    requests = [request(f"r{n}", f"question {n}", model=None, max_tokens=200) for n in range(60)]
    (site.folder / "in.jsonl").write_text(lines(*requests), encoding="utf-8")
    run = ["run", "--local", "--input", "in.jsonl", "--output", "out.json", "--slots", "1",
           "--save-frequency", "1", "--model", "lab/tiny:1"]  # fmt: skip
    process = site.start(*run)
    journal = site.folder / "out.json.aiflux" / "journal" / "shard-0000.jsonl"
    wait_until(lambda: journal.exists() and journal.stat().st_size > 0, process)
    site.run("models", "remove", "lab/tiny:1")
    told, _ = process.communicate(timeout=120)
    assert (process.returncode, "does not list lab/tiny:1" in told) == (4, True), told
    assert b'"status":404' not in journal.read_bytes(), "it is no request's fault"
    site.run("models", "import", "tiny.tar")
    before = journal.stat().st_size
    process = site.start(*run)
    wait_until(lambda: journal.stat().st_size > before, process)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert "are done already" in told


def test_what_ollama_can_make_no_model_of_leaves_nothing(site: Site, gguf: Path) -> None:
    content = gguf.read_bytes().replace(b"llama.block_count", b"llama.block_cound")
    (site.folder / "odd.gguf").write_bytes(content)
    site.models.mkdir()
    bad = site.folder / "template.txt"
    bad.write_text("{{ .Prompt", encoding="utf-8")
    told = site.run("models", "import", "--gguf", gguf, "--name", "bad", "--template", bad, code=4)
    assert "Ollama could make no model of the file" in told
    assert not [*(site.models / ".staging").iterdir()]
    assert not (site.models / "manifests").exists()


class _Refusing(http.server.BaseHTTPRequestHandler):
    """A registry that answers nothing but errors."""

    status = 500

    def do_GET(self) -> None:
        body = b'{"errors": [{"code": "UNAVAILABLE", "message": "the disk is on fire"}]}'
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.mark.parametrize(
    ("status", "words"), [(500, "could not be pulled"), (503, "could not be pulled"),
                          (404, "has no model"), (401, "asks for a login")],
)  # fmt: skip
def test_a_registry_that_answers_errors(site: Site, status: int, words: str) -> None:
    site.run("models", "pull", site.name)
    before = tree(site.models)
    handler = type("Refusing", (_Refusing,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as registry:
        threading.Thread(target=registry.serve_forever, daemon=True).start()
        name = f"http://127.0.0.1:{registry.server_port}/library/m:1"
        told = site.run("models", "pull", name, code=4)
        registry.shutdown()
    assert words in told, told
    assert f"127.0.0.1:{registry.server_port}" in told
    assert "->" in told
    kept = {path: data for path, data in tree(site.models).items() if ".staging" not in path}
    assert kept == before
    site.works()


def test_a_model_that_the_registry_lacks(site: Site) -> None:
    missing = site.name.replace("models-", "nothing-")
    told = site.run("models", "pull", missing, code=4)
    assert "has no model" in told
    assert "check the name" in told


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], check=False
    ).returncode == 0  # fmt: skip
    if not mounted:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        for size in (2**20, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def test_a_disk_that_is_full(site: Site, small_disk: Path, gguf: Path) -> None:
    site.run("models", "import", "--gguf", gguf, "--name", "lab/tiny:1", models=small_disk)
    told = site.run("models", "pull", site.name, models=small_disk, code=5)
    assert "is full" in told
    assert "make room" in told
    site.run("models", "verify", "lab/tiny:1", models=small_disk)
    site.run("models", "remove", site.name, models=small_disk)
    site.run("models", "pull", site.name)
    site.run("models", "export", parse_model_name(site.name).served, "big.tar")
    told = site.run("models", "import", "big.tar", models=small_disk, code=5)
    assert "are free" in told
    told = site.run("models", "export", parse_model_name(site.name).served, small_disk / "x.tar",
                    code=5)  # fmt: skip
    assert "cannot write" in told
    assert not [*small_disk.glob("*.tar")]
    site.run("models", "verify", "lab/tiny:1", models=small_disk)
    assert read_manifest(small_disk, parse_model_name("lab/tiny:1")).size < 10**6
    fill(small_disk / "fill")
    told = site.run("models", "import", "--gguf", gguf, "--name", "lab/tiny:2", models=small_disk,
                    code=5)  # fmt: skip
    assert "No space left on device" in told
    told = site.run("models", "remove", "lab/tiny:1", models=small_disk)
    assert "are free again" in told, "what makes room needs none"
    subprocess.run(["mount", "-o", "remount,size=300m", small_disk], check=True)
    site.run("models", "pull", site.name, models=small_disk)
    site.works(small_disk)


def test_a_read_only_directory_that_lacks_the_model(
    user: User, checkout: Path, place: Path, ollama: Path
) -> None:
    user.run("mkdir", "-m", "0555", place / "models")
    user.write(place / "in.jsonl", lines(request("a", "one", model=None)))
    env = {"AIFLUX_OLLAMA": str(ollama), "AIFLUX_MODELS_DIR": str(place / "models")}
    run = ["run", "--local", "--input", "in.jsonl", "--model", "lab/none:1"]
    told = user.run(checkout / ".venv/bin/aiflux", *run, cwd=place, env=env, code=4)
    assert "lab/none:1 is not (whole) in the models directory" in told
    assert "you may not write there" in told


def test_pulling_and_making_models_through_the_image(
    user: User, checkout: Path, image: Path, place: Path, pushed: str
) -> None:
    aiflux, tools = checkout / ".venv" / "bin" / "aiflux", checkout / "tests" / "tools"
    user.run("python3", tools / "make_tiny_gguf.py", place / "tiny.gguf")
    user.write(place / "template.txt", "Q: {{ .Prompt }} A:")
    env = {"AIFLUX_IMAGE": str(image), "AIFLUX_MODELS_DIR": str(place / "models")}
    named = ["--gguf", "tiny.gguf", "--name", "lab/tiny:1", "--template", "template.txt"]
    told = user.run(aiflux, "models", "import", *named, cwd=place, env=env)
    assert "lab/tiny:1 is in" in told
    process = user.popen(aiflux, "models", "pull", pushed, cwd=place, env=env)
    wait_until(lambda: any((place / "models").glob(".staging/*/blobs/*-partial")), process)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert (process.returncode, "what was done is kept" in told) == (5, True), told
    user.run(aiflux, "models", "pull", pushed, cwd=place, env=env)
    user.run(aiflux, "models", "pull", "--again", pushed, cwd=place, env=env)
    for name in ("lab/tiny:1", pushed):
        assert "is whole" in user.run(aiflux, "models", "verify", name, cwd=place, env=env)
    assert not [*(place / "models" / ".staging").iterdir()]
