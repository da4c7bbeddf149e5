"""``aiflux models`` with models of Hugging Face."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.main import main
from tests.tools.fake_hub import FakeHub, Repo
from tests.unit.made_models import changed_tar, put_model, tree
from tests.unit.made_snapshots import COMMIT, LLAMA, OTHER_COMMIT, WEIGHTS, put_snapshot

FILES = {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": WEIGHTS}
CHANGED = {**FILES, "config.json": b" " + FILES["config.json"]}
SIZE = sum(map(len, FILES.values()))
Aiflux = Callable[..., tuple[int, str, str]]
Changes = Callable[[list[tuple[str, bytes]]], object]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def aiflux(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Aiflux]:
    files = {COMMIT: dict(FILES), OTHER_COMMIT: dict(CHANGED)}
    hub = FakeHub({"org/name": Repo({"main": COMMIT, "v2": OTHER_COMMIT}, files)})
    hub.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AIFLUX_MODELS_DIR", str(models))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["models", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    hub.stop()


def test_a_model_is_pulled_without_an_image_and_verified(aiflux: Aiflux, models: Path) -> None:
    code, _, err = aiflux("pull", "hf:org/name")
    assert (code, f"hf:org/name is commit {COMMIT}" in err) == (0, True), err
    code, out, _ = aiflux("verify", "hf:org/name")
    assert (code, out.strip()) == (0, f"hf:org/name is complete: 21 KB, commit {COMMIT}")
    (weights,) = models.glob("hub/*/snapshots/*/model.safetensors")
    weights.resolve().write_bytes(WEIGHTS[:-1] + b"\1")
    code, out, err = aiflux("verify", "hf:org/name", "--json")
    assert code == 4
    assert json.loads(out)["problems"] == ["model.safetensors is damaged"]
    assert "hf:org/name in" in err
    assert "model.safetensors is damaged" in err
    assert "aiflux models pull --again hf:org/name" in err
    assert aiflux("pull", "--again", "hf:org/name")[0] == 0
    assert aiflux("verify", "hf:org/name")[0] == 0


def test_snapshots_are_listed_and_shown(aiflux: Aiflux, models: Path) -> None:
    put_model(models, "two", b"weights")
    put_snapshot(models / "hub", "org/name")
    put_snapshot(models, "site/shared", OTHER_COMMIT, "v1")
    (put_snapshot(models / "hub", "org/cut", ref=None) / "model.safetensors").unlink()
    code, out, _ = aiflux("list", "--here")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith("hf:")]
    assert [(row[0], row[-2], row[-1]) for row in rows] == [
        (f"hf:org/cut@{COMMIT}", COMMIT[:12], "damaged"),
        ("hf:org/name", COMMIT[:12], "yes"),
        ("hf:site/shared@v1", OTHER_COMMIT[:12], "yes"),
    ]
    entries = {each["name"]: each for each in json.loads(aiflux("list", "--here", "--json")[1])}
    assert entries["two:latest"]["here"]
    assert entries["hf:org/name"]["size"] == SIZE + len(b"{}")  # the tokenizer
    assert not entries[f"hf:org/cut@{COMMIT}"]["here"]
    code, out, _ = aiflux("show", "hf:org/name")
    assert code == 0
    assert "LlamaForCausalLM: 2 layers, 8 heads (4 of keys and values) of 8, 32 tokens" in out
    assert json.loads(aiflux("show", "hf:org/name", "--json")[1])["digest"] == COMMIT
    code, _, err = aiflux("show", "hf:org/none")
    assert code == 4
    assert "pull it: aiflux models pull hf:org/none" in err


def test_models_of_the_catalog_are_listed_and_shown(aiflux: Aiflux) -> None:
    _, out, _ = aiflux("list")
    (row,) = [line.split() for line in out.splitlines() if line.startswith("hf:Qwen/Qwen3-8B ")]
    assert row[1:] == ["8.2", "B", "BF16", "40960", "22", "GB", "vllm", "qwen3:8b"]
    assert [*aiflux("list")[1].splitlines()[0].split()][-2:] == ["ENGINES", "HERE"]
    listed = {each["name"]: each for each in json.loads(aiflux("list", "--json")[1])}
    assert listed["hf:Qwen/Qwen3-8B"]["ollama"] == "qwen3:8b"
    assert listed["qwen3:8b"]["hub"] == ["hf:Qwen/Qwen3-8B"]
    assert listed["qwen3:8b"]["engines"] == ["ollama", "llamacpp", "vllm"]
    code, out, _ = aiflux("show", "HF:qwen/qwen3-8b", "--slots", "1")
    assert code == 0
    assert out.startswith("hf:Qwen/Qwen3-8B\n")
    for line in (
        "weights       BF16",
        "GPU memory    16 GB of weights; at least 20 GB in vLLM, with 1 slot of 4096 tokens",
        "Ollama        qwen3:8b",
        "here          no (aiflux models pull hf:Qwen/Qwen3-8B)",
        "github.com/ai-dynamo/aiconfigurator",
    ):
        assert line in out
    assert "Hugging Face  hf:Qwen/Qwen3-8B" in aiflux("show", "qwen3:8b")[1]
    assert "engines       ollama, llamacpp, vllm" in aiflux("show", "qwen3:8b")[1]
    code, _, err = aiflux("show", "hf:Qwen/Qwen3_8B")
    assert (code, "or did you mean hf:Qwen/Qwen3-8B?" in err) == (4, True)
    code, _, err = aiflux("pull", "hf:Qwen/Qwen3_8B")
    assert (code, "did you mean hf:Qwen/Qwen3-8B?" in err) == (4, True), err
    _, out, _ = aiflux("list", "--fits", "24GB", "--json")
    fitting = {each["name"] for each in json.loads(out)}
    assert "hf:Qwen/Qwen3-8B" in fitting
    assert "hf:Qwen/Qwen3-32B" not in fitting


def test_a_stored_model_of_the_catalog_has_its_own_figures(aiflux: Aiflux, models: Path) -> None:
    put_snapshot(models / "hub", "Qwen/Qwen3-8B")
    shown = json.loads(aiflux("show", "hf:Qwen/Qwen3-8B", "--json")[1])
    assert (shown["digest"], shown["memory"]["measured"], shown["layers"]) == (COMMIT, True, 2)
    assert shown["licence"] == "Apache-2.0"
    entries = [each["name"] for each in json.loads(aiflux("list", "--json")[1])]
    assert entries.count("hf:Qwen/Qwen3-8B") == 1


def test_removing_a_snapshot_leaves_what_others_use(aiflux: Aiflux, models: Path) -> None:
    for name in ("hf:org/name", "hf:org/name@v2"):
        assert aiflux("pull", name)[0] == 0
    code, out, _ = aiflux("remove", "hf:org/name@v2")
    assert code == 0
    assert out.startswith(f"removed hf:org/name@v2 from {models}, which freed ")
    assert aiflux("verify", "hf:org/name")[0] == 0
    assert aiflux("show", "hf:org/name@v2")[0] == 4
    assert aiflux("remove", "hf:org/name")[0] == 0
    left = tree(models)
    assert not [name for name, content in left.items() if content in FILES.values()]
    code, _, err = aiflux("remove", "hf:org/name")
    assert code == 4
    assert f"hf:org/name is not stored in {models}" in err


def test_what_a_pull_left_can_be_removed(aiflux: Aiflux, models: Path) -> None:
    left = models / "hub" / ".staging" / "models--org--name" / "models--org--name" / "blobs" / "a"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"part")
    assert aiflux("remove", "hf:org/name")[0] == 0
    assert not left.exists()


def test_files_without_hashes_cannot_be_verified(aiflux: Aiflux, models: Path) -> None:
    put_snapshot(models, "org/copied")
    code, _, err = aiflux("verify", "hf:org/copied")
    assert code == 4
    assert "has no hash to compare with" in err


def exported(aiflux: Aiflux, name: str = "hf:org/name") -> None:
    assert aiflux("pull", name)[0] == 0
    code, _, err = aiflux("export", name, "model.tar")
    assert code == 0, err


def links(models: Path) -> dict[str, str]:
    """Return the commits by branch or tag, and the blobs by file of each snapshot."""
    store = models / "hub" / "models--org--name"
    refs = {f"refs/{path.name}": path.read_text() for path in store.glob("refs/*")}
    snapshots = [path for path in store.rglob("snapshots/*/**/*") if path.is_symlink()]
    return {**refs, **{str(path.relative_to(store)): os.readlink(path) for path in snapshots}}


@pytest.mark.parametrize(
    ("name", "commit"),
    [("hf:org/name", COMMIT), ("hf:org/name@v2", OTHER_COMMIT), (f"hf:org/name@{COMMIT}", COMMIT)],
)
def test_a_snapshot_travels_in_one_file(
    aiflux: Aiflux, models: Path, tmp_path: Path, name: str, commit: str
) -> None:
    exported(aiflux, name)
    other = tmp_path / "elsewhere"
    code, out, err = aiflux("import", "model.tar", "--models-dir", other)
    assert (code, out) == (0, f"imported {name} to {other}, commit {commit}\n"), err
    assert aiflux("verify", name, "--models-dir", other)[0] == 0
    here, there = links(models), links(other)
    there.setdefault(f"refs/{COMMIT}", here.get(f"refs/{COMMIT}", ""))
    here.setdefault(f"refs/{COMMIT}", "")
    assert there == here
    assert not [*(other / "hub" / ".staging").glob("*/*")]
    assert aiflux("import", "model.tar", "--models-dir", other)[0] == 0, "again is no harm"
    assert aiflux("verify", name, "--models-dir", other)[0] == 0


def test_an_imported_snapshot_keeps_the_others(aiflux: Aiflux, tmp_path: Path) -> None:
    other = ("--models-dir", tmp_path / "elsewhere")
    for name in ("hf:org/name", "hf:org/name@v2"):
        exported(aiflux, name)
        assert aiflux("import", "model.tar", *other)[0] == 0
        (tmp_path / "model.tar").unlink()
    for name in ("hf:org/name", "hf:org/name@v2"):
        assert aiflux("verify", name, *other)[0] == 0


def test_a_damaged_snapshot_is_not_exported(aiflux: Aiflux, models: Path, tmp_path: Path) -> None:
    assert aiflux("pull", "hf:org/name")[0] == 0
    for path in models.glob("hub/*/snapshots/*/*"):
        blob = path.resolve()
        whole = blob.read_bytes()
        blob.write_bytes(whole[:-1] + b"?")
        code, _, err = aiflux("export", "hf:org/name", "model.tar")
        assert code == 4
        assert "config.json is not JSON" in err or "is missing or damaged" in err
        assert "aiflux models pull --again hf:org/name" in err
        blob.unlink()
        assert aiflux("export", "hf:org/name", "model.tar")[0] == 4
        blob.write_bytes(whole)
    assert not (tmp_path / "model.tar").exists()
    assert aiflux("export", "hf:org/name", "model.tar")[0] == 0


def test_a_snapshot_without_hashes_is_not_exported(aiflux: Aiflux, models: Path) -> None:
    put_snapshot(models, "org/copied")
    code, _, err = aiflux("export", "hf:org/copied", "model.tar")
    assert (code, "has no hash to compare with" in err) == (4, True), err
    assert "aiflux models pull --again hf:org/copied" in err
    code, _, err = aiflux("export", "hf:org/none", "model.tar")
    assert (code, "aiflux models pull hf:org/none" in err) == (4, True), err


def forged(change: Callable[[dict[str, Any]], object], name: str = "hf:org/name") -> Changes:
    """Change the manifest, and give it the digest that it has then."""

    def apply(parts: list[tuple[str, bytes]]) -> None:
        manifest = json.loads(parts[1][1])
        change(manifest)
        raw = json.dumps(manifest).encode()
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        label = {"version": 1, "name": name, "digest": digest}
        parts[:2] = [(parts[0][0], json.dumps(label).encode()), (parts[1][0], raw)]

    return apply


def with_path(path: object) -> Changes:
    return forged(lambda manifest: manifest["layers"][0].update(path=path))


def with_blob(blob: object) -> Changes:
    return forged(lambda manifest: manifest["config"].update(blob=blob))


def damaged_weights(parts: list[tuple[str, bytes]]) -> None:
    at = next(at for at, (_, content) in enumerate(parts) if content == WEIGHTS)
    parts[at] = (parts[at][0], WEIGHTS[:-1] + b"?")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damaged_weights, "was modified or truncated"),
        (lambda parts: parts.pop(), "is missing"),
        (lambda parts: parts.append(("hub/evil", b"x")), "'hub/evil' is unexpected"),
        (with_path("../../../../evil"), "is not inside of the model"),
        (with_path("/evil"), "is not inside of the model"),
        (with_path("a//b"), "is not inside of the model"),
        (with_path("a\nb"), "is not the path of a file"),
        (with_path(""), "is not the path of a file"),
        (with_path(None), "is not the path of a file"),
        (with_path("config.json"), "names 'config.json' twice"),
        (with_path("config.json/more"), "names 'config.json' twice"),
        (with_blob("../evil"), "is not a hash of the hub"),
        (with_blob("a" * 64), "has two different hashes"),
        (with_blob("a" * 40), "config.json does not have the hash that the hub has of it"),
        (forged(lambda manifest: manifest.update(commit="main")), "is not a commit"),
        (forged(lambda manifest: manifest.update(commit="../evil")), "is not a commit"),
        (forged(lambda manifest: manifest.update(ref="../evil")), "is not a model"),
        (forged(lambda manifest: manifest.update(ref=3)), "names no model"),
        (forged(lambda manifest: manifest.update(repo="../evil")), "is not a model"),
        (forged(lambda manifest: manifest.update(repo=None)), "is not a model"),
        (forged(lambda _: None, "hf:org/other"), "its manifest is that of org/name"),
        (forged(lambda _: None, "hf:../evil"), "is not a model of Hugging Face"),
        (forged(lambda manifest: manifest.pop("layers")), "'layers' is missing"),
    ],
)
def test_an_archive_of_a_snapshot_that_was_changed_is_refused(
    aiflux: Aiflux, tmp_path: Path, change: Changes, words: str
) -> None:
    exported(aiflux)
    changed_tar(tmp_path / "model.tar", change)
    other = tmp_path / "elsewhere"
    code, _, err = aiflux("import", "model.tar", "--models-dir", other)
    assert code == 4
    assert words in err
    assert "model.tar is not a complete model archive" in err
    assert "aiflux models export" in err
    assert not [*other.rglob("*.json"), *other.rglob("evil"), *other.glob("hub/models--*")]
    assert not [*tmp_path.parent.glob("evil")]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_archive_of_a_snapshot_is_refused(
    aiflux: Aiflux, tmp_path: Path, share: float
) -> None:
    exported(aiflux)
    path = tmp_path / "model.tar"
    with tarfile.open(path) as tar:
        end = max(member.offset_data + member.size for member in tar)
    os.truncate(path, int(end * share))
    code, _, err = aiflux("import", "model.tar", "--models-dir", tmp_path / "elsewhere")
    assert (code, "is not a complete model archive" in err) == (4, True), err
    assert not [*(tmp_path / "elsewhere").glob("hub/models--*")]


def test_an_import_does_not_end_a_pull_of_the_same_model(
    aiflux: Aiflux, models: Path, tmp_path: Path
) -> None:
    exported(aiflux)
    part = models / "hub" / ".staging" / "models--org--name" / "models--org--name" / "blobs" / "a"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"part")
    assert aiflux("import", "model.tar")[0] == 0
    assert part.exists()
