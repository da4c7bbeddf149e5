"""Pulling models of Hugging Face, from a stand-in for the hub."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from aiflux.engines.base import FetchContext
from aiflux.engines.vllm.hub import find_snapshot, parse_hub_model
from aiflux.engines.vllm.kind import KIND
from aiflux.errors import AifluxError, ConfigError, ModelError, StorageError, UsageError
from tests.tools.fake_hub import FakeHub, Repo, git_hash
from tests.unit.made_snapshots import COMMIT, LLAMA, OTHER_COMMIT, WEIGHTS, zeros

TOKEN = "hf_secretsecretsecret"
FILES = {
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "config.json": json.dumps(LLAMA).encode(),
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"b" * 5000,
    "original/consolidated.00.pth": b"p" * 5000,
    "tokenizer/vocab.txt": b"a\nb\n",
}
CHANGED = {**FILES, "config.json": json.dumps({**LLAMA, "vocab_size": 33}).encode()}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    repos = {
        "org/name": Repo({"main": COMMIT, "v2": OTHER_COMMIT},
                         {COMMIT: dict(FILES), OTHER_COMMIT: dict(CHANGED)}),
        "org/private": Repo({"main": COMMIT}, {COMMIT: dict(FILES)}, token=TOKEN),
        "org/gated": Repo({"main": COMMIT}, {COMMIT: dict(FILES)}, token=TOKEN, gated=True),
        "org/gguf": Repo({"main": COMMIT}, {COMMIT: {"m.gguf": b"g" * 5000}}),
    }  # fmt: skip
    made = FakeHub(repos)
    made.start()
    yield made
    made.stop()


class Puller:
    def __init__(self, folder: Path, hub: FakeHub) -> None:
        self.models = folder / "models"
        self.log = folder / "log"
        self.environ = {"HF_ENDPOINT": hub.url}
        self.messages: list[str] = []
        self.steps: list[dict[str, Any]] = []

    def pull(self, model: str = "hf:org/name", *, again: bool = False) -> bool:
        context = FetchContext(
            self.environ, self.log, self.messages.append, self.steps.append, again
        )
        return KIND.fetch_model(self.models, model, context)

    def files(self, model: str = "hf:org/name") -> dict[str, bytes]:
        snapshot = find_snapshot(self.models, parse_hub_model(model))
        assert snapshot is not None
        return {str(path.relative_to(snapshot)): path.read_bytes()
                for path in snapshot.rglob("*") if path.is_file()}  # fmt: skip

    def blobs(self) -> set[str]:
        return {path.name for path in self.models.glob("hub/models--*/blobs/*")}

    def failure(self, model: str = "hf:org/name") -> AifluxError:
        with pytest.raises(AifluxError) as caught:
            self.pull(model)
        assert not KIND.is_stored(self.models, model)
        return caught.value


@pytest.fixture
def puller(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Puller:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return Puller(tmp_path, hub)


WANTED = {name: content for name, content in FILES.items() if "p" not in Path(name).suffix
          and not name.endswith(".bin")}  # fmt: skip


def test_a_model_is_pulled_once_with_its_weights_in_one_format(
    puller: Puller, hub: FakeHub
) -> None:
    assert puller.pull()
    assert puller.files() == WANTED
    assert f"hf:org/name is commit {COMMIT}" in puller.messages
    assert puller.steps[-1]["total"] == len(FILES["tokenizer/vocab.txt"])
    assert not (puller.models / "hub" / ".staging" / "models--org--name").exists()
    before = len(hub.requests)
    assert not puller.pull()
    assert len(hub.requests) == before
    assert puller.pull(again=True)
    assert hub.sent("model.safetensors") == 1


def test_a_pulled_cache_has_the_layout_of_huggingface_hub(puller: Puller) -> None:
    """Other programs of the site can use it."""
    puller.pull()
    path = huggingface_hub.snapshot_download(
        "org/name", cache_dir=puller.models / "hub", local_files_only=True
    )
    assert Path(path) == find_snapshot(puller.models, parse_hub_model("org/name"))


@pytest.mark.parametrize("revision", ["v2", OTHER_COMMIT, OTHER_COMMIT[:8]])
def test_a_revision_is_pinned_and_shares_files(puller: Puller, hub: FakeHub, revision: str) -> None:
    puller.pull()
    model = f"hf:org/name@{revision}"
    assert puller.pull(model)
    assert puller.files(model)["config.json"] == CHANGED["config.json"]
    assert puller.files()["config.json"] == FILES["config.json"]
    assert hub.sent("model.safetensors") == 1
    assert not puller.pull(model)


def test_a_moved_branch_is_followed_on_request(puller: Puller, hub: FakeHub) -> None:
    puller.pull()
    hub.repos["org/name"].refs["main"] = OTHER_COMMIT
    assert not puller.pull()
    assert puller.pull(again=True)
    assert puller.files()["config.json"] == CHANGED["config.json"]


def test_a_broken_download_is_resumed(puller: Puller, hub: FakeHub) -> None:
    """huggingface_hub writes blocks of 10 MiB; anything not written is sent again."""
    block = 10 << 20
    weights = zeros({"a": ("U8", [block + 5000])})
    hub.repos["org/name"].files[COMMIT]["model.safetensors"] = weights
    hub.cut["model.safetensors"] = [block + 3000]
    assert puller.pull()
    assert puller.files()["model.safetensors"] == weights
    sent = [each.range for each in hub.requests if each.method == "GET" and "/cdn/" in each.path]
    assert sent == ["", f"bytes={block}-"]


def test_a_damaged_file_is_refused_and_pulled_again(puller: Puller, hub: FakeHub) -> None:
    hub.damaged.add("model.safetensors")
    error = puller.failure()
    assert isinstance(error, ModelError)
    assert error.message.startswith("model.safetensors of hf:org/name arrived damaged: its hash is")
    hub.damaged = {"tokenizer/vocab.txt"}
    error = puller.failure()
    assert git_hash(FILES["tokenizer/vocab.txt"]) in error.message
    hub.damaged = set()
    assert puller.pull()
    assert puller.files() == WANTED


def test_an_interrupted_pull_keeps_complete_files(puller: Puller, hub: FakeHub) -> None:
    hub.damaged.add("tokenizer/vocab.txt")
    puller.failure()
    assert hub.sent("model.safetensors") == 1
    staged = puller.models / "hub" / ".staging" / "models--org--name" / "models--org--name"
    left = staged / "blobs" / "abc.1.incomplete"
    left.write_bytes(b"x")
    hub.damaged.clear()
    assert puller.pull()
    assert hub.sent("model.safetensors") == 1
    assert left.name not in puller.blobs()
    assert len(puller.blobs()) == len(WANTED)


def test_a_stored_file_that_was_damaged_is_replaced(puller: Puller, hub: FakeHub) -> None:
    puller.pull()
    snapshot = find_snapshot(puller.models, parse_hub_model("org/name"))
    assert snapshot is not None
    (snapshot / "model.safetensors").resolve().write_bytes(WEIGHTS[:-1] + b"\1")
    assert puller.pull(again=True)
    assert puller.files() == WANTED
    (snapshot / "model.safetensors").resolve().unlink()
    assert not KIND.is_stored(puller.models, "org/name")
    assert puller.pull()
    assert puller.files() == WANTED
    assert hub.sent("model.safetensors") == 3


@pytest.mark.parametrize(
    ("model", "token", "message"),
    [
        ("hf:org/none", "", "the hub has no model org/none, or it is private"),
        ("hf:org/none", TOKEN, "the hub has no model org/none, or it is private"),
        ("hf:org/private", "", "the hub has no model org/private, or it is private"),
        ("hf:org/private", "hf_wrong", "the hub has no model org/private, or it is private"),
        ("hf:org/gated", "", "org/gated is gated"),
        ("hf:org/gated", "hf_wrong", "org/gated is gated"),
        ("hf:org/name@v9", "", "org/name has no revision 'v9'"),
        ("hf:org/gguf", "", "org/gguf has no weights in safetensors format"),
    ],
)
def test_refusals_of_the_hub_are_explained(
    puller: Puller, model: str, token: str, message: str
) -> None:
    puller.environ["HF_TOKEN"] = token
    error = puller.failure(model)
    assert isinstance(error, ModelError)
    assert error.message.startswith(message)
    assert token == "" or token not in str(error)


@pytest.mark.parametrize("model", ["hf:org/private", "hf:org/gated"])
def test_a_token_goes_to_the_hub_alone_and_is_stored_nowhere(
    puller: Puller, hub: FakeHub, tmp_path: Path, model: str
) -> None:
    puller.environ["HF_TOKEN"] = TOKEN
    assert puller.pull(model)
    tokens = {(each.host, each.token) for each in hub.requests}
    assert tokens == {("127.0.0.1", TOKEN), ("localhost", "")}
    assert TOKEN not in "".join(puller.messages)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("status", [500, 502, 429, 400, 403])
def test_a_hub_that_fails_is_a_model_error(puller: Puller, hub: FakeHub, status: int) -> None:
    hub.failing = status
    error = puller.failure()
    assert isinstance(error, ModelError)
    assert "hf:org/name could not be pulled: " in error.message
    assert str(status) in error.message


def test_without_network_the_remedy_is_to_copy_the_model(puller: Puller, hub: FakeHub) -> None:
    puller.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the port of discard: no server listens
    error = puller.failure()
    assert error.message == "hf:org/name could not be pulled: [Errno 111] Connection refused"
    assert "copy the model's directory here" in str(error.remedy)


def test_a_model_that_is_stored_needs_no_network(puller: Puller) -> None:
    puller.pull()
    puller.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert not puller.pull()


@pytest.mark.ordinary_user
def test_a_read_only_directory_is_refused(puller: Puller) -> None:
    puller.models.mkdir()
    puller.models.chmod(0o555)
    with pytest.raises(UsageError, match="is read-only for you"):
        puller.pull()


def test_a_model_that_does_not_fit_the_disk_is_refused_before_the_download(
    puller: Puller, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage("/").free

    class Huge(bytes):
        def __len__(self) -> int:
            return free * 2

    hub.repos["org/name"].files[COMMIT]["model-2.safetensors"] = Huge(b"h")
    error = puller.failure()
    assert isinstance(error, StorageError)
    assert " free, and hf:org/name needs " in error.message
    assert not hub.sent("config.json")


def test_a_full_disk_stops_the_pull_and_it_resumes(puller: Puller, hub: FakeHub) -> None:
    """A limit on file sizes simulates a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        error = puller.failure()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert isinstance(error, StorageError)
    assert "File too large" in error.message
    assert puller.pull()
    assert puller.files() == WANTED


def test_missing_certificates_are_reported_before_a_pull(
    puller: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would raise an error that looks like one of the models directory."""
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    puller.environ["SSL_CERT_FILE"] = "/nowhere/ca.pem"
    error = puller.failure()
    assert type(error) is ConfigError
    assert "SSL_CERT_FILE: no certificates can be read from /nowhere/ca.pem" in str(error)
