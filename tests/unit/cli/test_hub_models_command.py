"""``aiflux models`` with models of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiflux.cli.main import main
from tests.tools.fake_hub import FakeHub, Repo
from tests.unit.made_models import put_model, tree
from tests.unit.made_snapshots import COMMIT, LLAMA, OTHER_COMMIT, WEIGHTS, put_snapshot

FILES = {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": WEIGHTS}
CHANGED = {**FILES, "config.json": b" " + FILES["config.json"]}
SIZE = sum(map(len, FILES.values()))
Aiflux = Callable[..., tuple[int, str, str]]


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
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        (f"hf:org/cut@{COMMIT}", COMMIT[:12], "damaged"),
        ("hf:org/name", COMMIT[:12], "yes"),
        ("hf:site/shared@v1", OTHER_COMMIT[:12], "yes"),
    ]
    entries = {each["name"]: each for each in json.loads(aiflux("list", "--here", "--json")[1])}
    assert entries["two:latest"]["here"]
    assert entries["hf:org/name"]["size"] == SIZE
    assert not entries[f"hf:org/cut@{COMMIT}"]["here"]
    code, out, _ = aiflux("show", "hf:org/name")
    assert code == 0
    assert "LlamaForCausalLM: 2 layers, 8 heads (4 of keys and values) of 8, 32 tokens" in out
    assert json.loads(aiflux("show", "hf:org/name", "--json")[1])["digest"] == COMMIT
    code, _, err = aiflux("show", "hf:org/none")
    assert code == 4
    assert "pull it: aiflux models pull hf:org/none" in err


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
