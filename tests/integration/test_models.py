"""Pulling, moving and repairing models with the real Ollama and a real registry.

The CLI runs as the user who runs the tests, without container and Slurm.
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
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from aiflux.engines.ollama.api import Ollama, ollama_environment
from aiflux.engines.ollama.staging import staged_folder
from aiflux.engines.ollama.store import missing_parts, model_digest, read_manifest
from aiflux.engines.process import ServerProcess
from aiflux.models.name import parse_model_name
from tests.integration.conftest import REPOSITORY, User, answers, lines, request, until
from tests.unit.made_models import tree

WEIGHTS = 60_000_000
"""Size of the pulled model in bytes, large enough to interrupt a pull."""


@dataclass
class Site:
    """A directory with the CLI, an Ollama and a registry.

    Attributes:
        name: name of the model in the registry.
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
        printed, _ = process.communicate(timeout=180)
        assert process.returncode == code, printed
        return printed

    def works(self, models: Path | None = None) -> None:
        """Check that the model is complete and can be loaded by an engine."""
        models = models or self.models
        name = parse_model_name(self.name)
        assert missing_parts(models, name) == []
        self.run("models", "verify", name.served, models=models)
        with serving(self, models) as server:
            assert name.served in server.tags()

    def partial(self) -> int:
        """Bytes of an unfinished pull on disk."""
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
    """A real, tiny Llama, padded so that a pull takes a moment."""
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
    """Wait until a condition holds while a process runs; it may hold for a moment only."""

    def reached() -> bool:
        if condition():
            return True
        assert process.poll() is None, process.communicate()[0]
        return False

    until(reached, f"a step of {process.args}", 60, pause=0.005)


def test_a_model_is_pulled_once(site: Site) -> None:
    assert "pulling" in site.run("models", "pull", site.name)
    site.works()
    before = tree(site.models)
    assert "is already stored in" in site.run("models", "pull", site.name)
    assert tree(site.models) == before
    assert not [*(site.models / ".staging").iterdir()]


def test_two_pulls_at_once(site: Site) -> None:
    first, second = (site.start("models", "pull", site.name) for _ in range(2))
    printed = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), printed
    assert sorted(text.count("has been pulled to") for text in printed) == [0, 1], printed
    site.works()


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGKILL, -signal.SIGKILL, ""), (signal.SIGTERM, 5, "finished results are kept"),
     (signal.SIGINT, 5, "finished results are kept")],
    ids=["killed", "ended", "interrupted"],
)  # fmt: skip
def test_an_interrupted_pull_is_resumed(
    site: Site, number: signal.Signals, code: int, words: str
) -> None:
    process = site.start("models", "pull", site.name)
    wait_until(lambda: site.partial() > 0, process)
    assert f"pull in progress: {site.name}" in site.run("models", "list", "--here")
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert (process.returncode, words in printed) == (code, True), printed
    assert missing_parts(site.models, parse_model_name(site.name)) == ["manifest"]
    assert not (site.models / "blobs").exists(), "runs do not see the unfinished model"
    listed = site.run("models", "list", "--here")
    assert f"pull interrupted: {site.name}" in listed
    assert f"continue it: aiflux models pull {site.name}" in listed
    site.run("models", "pull", site.name)
    site.works()
    assert not [*(site.models / ".staging").iterdir()]


def test_a_pull_in_the_image_ends_with_the_signal(site: Site) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "aiflux.worker", "--pull", site.name],
        cwd=site.folder, env=site.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    wait_until(lambda: site.partial() > 0, process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert (process.returncode, "finished results are kept" in printed) == (5, True), printed
    assert missing_parts(site.models, parse_model_name(site.name)) == ["manifest"]


def test_files_of_an_interrupted_pull_are_verified(site: Site) -> None:
    """Ollama itself assumes that an existing blob is complete."""
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


def test_a_corrupted_blob_is_found_and_pulled_again(site: Site) -> None:
    site.run("models", "pull", site.name)
    blob = max((site.models / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    with open(blob, "r+b") as file:
        file.seek(blob.stat().st_size // 2)
        file.write(b"not what was there")
    printed = site.run("models", "verify", site.name, code=4)
    assert f"{blob.name[:18].replace('-', ':')}" in printed
    assert "is corrupted" in printed
    assert "is already stored in" in site.run("models", "pull", site.name), "by size"
    site.run("models", "pull", "--again", site.name)
    site.works()


def test_an_incomplete_model_is_completed(site: Site) -> None:
    site.run("models", "pull", site.name)
    blob = max((site.models / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(blob, 1000)
    assert "damaged" in site.run("models", "list", "--here")
    printed = site.run("models", "verify", site.name, code=4)
    assert "is wrong size" in printed
    site.run("models", "pull", site.name)
    site.works()


def test_a_requested_digest_is_enforced(site: Site) -> None:
    site.run("models", "pull", site.name)
    digest = model_digest(site.models, parse_model_name(site.name))
    assert digest is not None
    site.run("models", "pull", f"{site.name}@sha256:{digest}")
    other = "0" * 64
    printed = site.run("models", "pull", f"{site.name}@sha256:{other}", code=4)
    assert digest in printed
    assert other in printed
    fresh = site.folder / "fresh"
    printed = site.run("models", "pull", f"{site.name}@sha256:{other}", models=fresh, code=4)
    assert digest in printed
    assert not (fresh / "manifests").exists(), "a model with another digest is not stored"
    served = parse_model_name(site.name).served
    (site.folder / "in.jsonl").write_text(lines(request("a", "one", model=None)), encoding="utf-8")
    run = ["run", "--local", "--input", "in.jsonl", "--output", "out.json", "--model"]
    printed = site.run(*run, f"{served}@sha256:{other}", code=4)
    assert digest in printed
    assert other in printed
    insisting = request("a", "one", model=f"{site.name}@sha256:{digest}")
    (site.folder / "own.jsonl").write_text(lines(insisting), encoding="utf-8")
    site.run("run", "--local", "--input", "own.jsonl", "--output", "own.json")
    assert "a" in answers(site.folder / "own.json")
    site.run(*run, f"{served}@sha256:{digest[:12]}", "--force-resume")
    assert "a" in answers(site.folder / "out.json")
    entry = json.loads((site.folder / "out.json").read_text(encoding="utf-8"))[0]
    assert entry["metadata"]["model_digest"] == digest


def test_a_model_created_from_a_file_is_moved_and_runs(site: Site, gguf: Path) -> None:
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
    assert tree(away) == before, "a run does not write to the models directory"


def test_a_run_resumes_when_a_removed_model_is_back(site: Site, gguf: Path) -> None:
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
    printed, _ = process.communicate(timeout=120)
    assert (process.returncode, "does not list lab/tiny:1" in printed) == (4, True), printed
    assert b'"status":404' not in journal.read_bytes(), "no request failed because of it"
    site.run("models", "import", "tiny.tar")
    before = journal.stat().st_size
    process = site.start(*run)
    wait_until(lambda: journal.stat().st_size > before, process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert "are done already" in printed


def test_an_unusable_file_leaves_nothing_behind(site: Site, gguf: Path) -> None:
    content = gguf.read_bytes().replace(b"llama.block_count", b"llama.block_cound")
    (site.folder / "odd.gguf").write_bytes(content)
    site.models.mkdir()
    bad = site.folder / "template.txt"
    bad.write_text("{{ .Prompt", encoding="utf-8")
    printed = site.run(
        "models", "import", "--gguf", gguf, "--name", "bad", "--template", bad, code=4
    )
    assert "Ollama could not create a model from the file" in printed
    assert not [*(site.models / ".staging").iterdir()]
    assert not (site.models / "manifests").exists()


class _Refusing(http.server.BaseHTTPRequestHandler):
    """A registry that only returns errors."""

    status = 500

    def do_GET(self) -> None:
        body = b'{"errors": [{"code": "UNAVAILABLE", "message": "the disk is on fire"}]}'
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.mark.parametrize(
    ("status", "words"), [(500, "could not be pulled"), (503, "could not be pulled"),
                          (404, "has no model"), (401, "requires a login")],
)  # fmt: skip
def test_registry_errors_are_reported(site: Site, status: int, words: str) -> None:
    site.run("models", "pull", site.name)
    before = tree(site.models)
    handler = type("Refusing", (_Refusing,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as registry:
        threading.Thread(target=registry.serve_forever, daemon=True).start()
        name = f"http://127.0.0.1:{registry.server_port}/library/m:1"
        printed = site.run("models", "pull", name, code=4)
        registry.shutdown()
    assert words in printed, printed
    assert f"127.0.0.1:{registry.server_port}" in printed
    assert "->" in printed
    kept = {path: data for path, data in tree(site.models).items() if ".staging" not in path}
    assert kept == before
    site.works()


def test_a_model_missing_from_the_registry_is_reported(site: Site) -> None:
    missing = site.name.replace("models-", "nothing-")
    printed = site.run("models", "pull", missing, code=4)
    assert "has no model" in printed
    assert "check the name" in printed
    assert missing not in site.run("models", "list")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], check=False
    ).returncode == 0  # fmt: skip
    if not mounted:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        for size in (2**20, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def test_a_full_disk_is_reported(site: Site, small_disk: Path, gguf: Path) -> None:
    site.run("models", "import", "--gguf", gguf, "--name", "lab/tiny:1", models=small_disk)
    printed = site.run("models", "pull", site.name, models=small_disk, code=5)
    assert "is full" in printed
    assert "free some space" in printed
    site.run("models", "verify", "lab/tiny:1", models=small_disk)
    site.run("models", "remove", site.name, models=small_disk)
    site.run("models", "pull", site.name)
    site.run("models", "export", parse_model_name(site.name).served, "big.tar")
    printed = site.run("models", "import", "big.tar", models=small_disk, code=5)
    assert "are free" in printed
    printed = site.run("models", "export", parse_model_name(site.name).served, small_disk / "x.tar",
                       code=5)  # fmt: skip
    assert "cannot write" in printed
    assert not [*small_disk.glob("*.tar")]
    site.run("models", "verify", "lab/tiny:1", models=small_disk)
    assert read_manifest(small_disk, parse_model_name("lab/tiny:1")).size < 10**6
    fill(small_disk / "fill")
    printed = site.run("models", "import", "--gguf", gguf, "--name", "lab/tiny:2",
                       models=small_disk, code=5)  # fmt: skip
    assert "No space left on device" in printed
    printed = site.run("models", "remove", "lab/tiny:1", models=small_disk)
    assert "which freed" in printed, "removing models needs no free space"
    subprocess.run(["mount", "-o", "remount,size=300m", small_disk], check=True)
    site.run("models", "pull", site.name, models=small_disk)
    site.works(small_disk)


def test_a_missing_model_in_a_read_only_directory_is_reported(
    user: User, checkout: Path, place: Path, ollama: Path
) -> None:
    user.run("mkdir", "-m", "0555", place / "models")
    user.write(place / "in.jsonl", lines(request("a", "one", model=None)))
    env = {"AIFLUX_OLLAMA": str(ollama), "AIFLUX_MODELS_DIR": str(place / "models")}
    run = ["run", "--local", "--input", "in.jsonl", "--model", "lab/none:1"]
    printed = user.run(checkout / ".venv/bin/aiflux", *run, cwd=place, env=env, code=4)
    assert "lab/none:1 is not (completely) in the models directory" in printed
    assert "read-only for you" in printed


def test_models_are_pulled_and_created_through_the_image(
    user: User, checkout: Path, image: Path, place: Path, pushed: str
) -> None:
    aiflux, tools = checkout / ".venv" / "bin" / "aiflux", checkout / "tests" / "tools"
    user.run("python3", tools / "make_tiny_gguf.py", place / "tiny.gguf")
    user.write(place / "template.txt", "Q: {{ .Prompt }} A:")
    env = {"AIFLUX_IMAGE": str(image), "AIFLUX_MODELS_DIR": str(place / "models")}
    named = ["--gguf", "tiny.gguf", "--name", "lab/tiny:1", "--template", "template.txt"]
    printed = user.run(aiflux, "models", "import", *named, cwd=place, env=env)
    assert "imported lab/tiny:1 to" in printed
    process = user.popen(aiflux, "models", "pull", pushed, cwd=place, env=env)
    wait_until(lambda: any((place / "models").glob(".staging/*/blobs/*-partial")), process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, "finished results are kept" in printed) == (5, True), printed
    user.run(aiflux, "models", "pull", pushed, cwd=place, env=env)
    user.run(aiflux, "models", "pull", "--again", pushed, cwd=place, env=env)
    for name in ("lab/tiny:1", pushed):
        assert "is complete" in user.run(aiflux, "models", "verify", name, cwd=place, env=env)
    assert not [*(place / "models" / ".staging").iterdir()]
