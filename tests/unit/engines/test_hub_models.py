"""Models of Hugging Face: their names and the location of their snapshots."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from aiflux.engines.vllm.hub import (
    find_snapshot,
    parse_hub_model,
    problems,
    snapshot_digest,
    stored_snapshot,
    weight_files,
)
from aiflux.engines.vllm.kind import KIND
from aiflux.errors import ConfigError, InputError, ModelError
from tests.unit.made_snapshots import (
    COMMIT,
    LLAMA,
    OTHER_COMMIT,
    WEIGHTS,
    put_folder,
    put_snapshot,
    zeros,
)


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("hf:Qwen/Qwen3-8B", "Qwen/Qwen3-8B", None),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", None),
        ("hf:org/name@main", "org/name", "main"),
        ("hf:org/name@refs/pr/12", "org/name", "refs/pr/12"),
        (f"org/name@{COMMIT}", "org/name", COMMIT),
        ("meta-llama/Llama-3.1-8B-Instruct@v1.0", "meta-llama/Llama-3.1-8B-Instruct", "v1.0"),
    ],
)
def test_names_of_the_hub(text: str, repo: str, revision: str | None) -> None:
    model = parse_hub_model(text)
    assert (model.repo, model.revision, model.folder) == (repo, revision, None)
    assert model.served == repo
    assert parse_hub_model(model.text) == model


@pytest.mark.parametrize(
    "text",
    ["", "hf:", "llama3.2:3b", "hf:llama", "a/b/c", "hf:a/b@", "a/b@x y", "a/b@../x", "a/b@/x",
     "a/../b", "ä/b", "a--b/c", "a/b..c", "-a/b", "a/b.", "hf:hf:a/b", "a/b\n", "/", "~nobody7/m"],
)  # fmt: skip
def test_invalid_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_hub_model(text)


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job runs in another directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_hub_model("../my model/").folder == tmp_path / "my model"
    assert parse_hub_model("..").served == tmp_path.name
    assert parse_hub_model("~/m").folder == tmp_path / "m"
    assert KIND.distinct_models(["./m", "/x/n"]) == [str(tmp_path / "work" / "m"), "/x/n"]


def test_a_snapshot_in_a_hub_cache_has_the_name_of_its_model() -> None:
    path = f"/shared/models--org--name/snapshots/{COMMIT}"
    assert parse_hub_model(path).served == "org/name"


@pytest.mark.parametrize("below", ["hub", "."])
def test_the_models_directory_may_have_a_hub_cache_or_be_one(tmp_path: Path, below: str) -> None:
    snapshot = put_snapshot(tmp_path / below, "org/name")
    assert find_snapshot(tmp_path, parse_hub_model("org/name")) == snapshot
    assert KIND.is_stored(tmp_path, "hf:org/name")
    assert not KIND.is_stored(tmp_path, "hf:org/other")
    assert find_snapshot(None, parse_hub_model("org/name")) is None


@pytest.mark.parametrize(
    ("revision", "found"),
    [
        ("", OTHER_COMMIT),
        ("@main", OTHER_COMMIT),
        ("@v1", COMMIT),
        ("@refs/pr/3", COMMIT),
        (f"@{COMMIT}", COMMIT),
        (f"@{COMMIT[:7]}", COMMIT),
        (f"@{COMMIT[:6]}", None),
        ("@v2", None),
        ("@refs", None),
        (f"@{'a' * 40}", None),
    ],
)
def test_revisions_are_branches_tags_or_commits(
    tmp_path: Path, revision: str, found: str | None
) -> None:
    put_snapshot(tmp_path, "org/name", COMMIT, "v1")
    put_snapshot(tmp_path, "org/name", COMMIT, "refs/pr/3")
    put_snapshot(tmp_path, "org/name", OTHER_COMMIT, "main")
    snapshot = find_snapshot(tmp_path, parse_hub_model(f"org/name{revision}"))
    assert (snapshot.name if snapshot else None) == found


def test_without_a_default_branch_the_only_snapshot_is_used(tmp_path: Path) -> None:
    model = parse_hub_model("org/name")
    snapshot = put_snapshot(tmp_path, "org/name", COMMIT, ref=None)
    assert find_snapshot(tmp_path, model) == snapshot
    put_snapshot(tmp_path, "org/name", OTHER_COMMIT, ref=None)
    assert find_snapshot(tmp_path, model) is None


def test_two_commits_with_the_same_beginning_are_ambiguous(tmp_path: Path) -> None:
    put_snapshot(tmp_path, "org/name", COMMIT, ref=None)
    put_snapshot(tmp_path, "org/name", COMMIT[:39] + "0", ref=None)
    assert find_snapshot(tmp_path, parse_hub_model(f"org/name@{COMMIT[:8]}")) is None


@pytest.mark.parametrize("noted", ["", "../../../etc", "main", "\xff", COMMIT + "0"])
def test_a_damaged_ref_is_ignored(tmp_path: Path, noted: str) -> None:
    snapshot = put_snapshot(tmp_path, "org/name")
    (tmp_path / "models--org--name" / "refs" / "main").write_bytes(noted.encode("latin-1"))
    assert find_snapshot(tmp_path, parse_hub_model("org/name")) == snapshot  # the only one


@pytest.mark.ordinary_user
def test_a_read_only_cache_is_used_and_an_unreadable_one_is_an_error(tmp_path: Path) -> None:
    cache = tmp_path / "site"
    snapshot = put_snapshot(cache, "org/name", ref=None)
    folders = [path for path in [cache, *cache.rglob("*")] if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    assert stored_snapshot(cache, parse_hub_model("org/name")) == snapshot
    snapshot.parent.chmod(0)
    with pytest.raises(ModelError, match="snapshots cannot be read: Permission denied"):
        KIND.is_stored(cache, "org/name")
    for path in folders:
        path.chmod(0o755)


def remove_config(snapshot: Path) -> None:
    (snapshot / "config.json").unlink()


def remove_weights(snapshot: Path) -> None:
    (snapshot / "model.safetensors").unlink()


def cut_weights(snapshot: Path) -> None:
    os.truncate(snapshot / "model.safetensors", len(WEIGHTS) - 1)


def config_of(content: bytes) -> Callable[[Path], None]:
    def write(snapshot: Path) -> None:
        (snapshot / "config.json").write_bytes(content)

    return write


def index_of(content: object) -> Callable[[Path], None]:
    def write(snapshot: Path) -> None:
        path = snapshot / "model.safetensors.index.json"
        path.write_text(json.dumps(content), encoding="utf-8")

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, "config.json is missing"),
        (remove_weights, "no .safetensors file is in"),
        (config_of(b'{"dtype'), "config.json is not JSON"),
        (config_of(b"[]"), "config.json is not a JSON object"),
        (config_of(b'{"dtype": "float17"}'), "config.json names the unknown dtype 'float17'"),
        (config_of(b'{"torch_dtype": "fp16"}'), "names the unknown torch_dtype 'fp16'"),
        (config_of(b'{"text_config": {"dtype": "bf16"}}'), "names the unknown dtype 'bf16'"),
        (cut_weights, f"it has {len(WEIGHTS) - 1} bytes of {len(WEIGHTS)}"),
        (index_of({"weight_map": {"a": "model-00002-of-00002.safetensors"}}),
         "model-00002-of-00002.safetensors cannot be read: No such file"),
        (index_of({"weight_map": {"a": 5}}), "(?m)damaged: a value has the wrong type$"),
        (index_of({"weight_map": ["a"]}), "(?m)damaged: a value has the wrong type$"),
        (index_of({"weight_map": {"a": []}}), "(?m)damaged: a value has the wrong type$"),
        (index_of([]), "(?m)index.json is not a JSON object$"),
        (index_of({}), "(?m)damaged: 'weight_map' is missing$"),
        (index_of({"weight_map": {}}), "no .safetensors file is in"),
    ],
)  # fmt: skip
def test_missing_and_damaged_files_are_reported(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    pulled, folder = put_snapshot(tmp_path, "org/name"), put_folder(tmp_path / "m")
    for each in (pulled, folder):
        damage(each)
    assert not KIND.is_stored(tmp_path, "org/name")
    with pytest.raises(ModelError, match=message) as caught:
        KIND.refuse_model(tmp_path, str(folder))
    assert caught.value.remedy == "copy its files again"
    with pytest.raises(ModelError, match=message) as caught:
        stored_snapshot(tmp_path, parse_hub_model("org/name"))
    assert caught.value.remedy == "pull it again: aiflux models pull --again hf:org/name"
    error = KIND.absent_model(tmp_path, "org/name")  # before submission
    assert error is not None
    assert re.search(message, error.message)
    assert error.remedy == "pull it again: aiflux models pull --again hf:org/name"


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.float16", "auto", "float8_e4m3fn", None, 5])
def test_a_dtype_of_pytorch_is_accepted(tmp_path: Path, dtype: object) -> None:
    put_folder(tmp_path / "m", {**LLAMA, "torch_dtype": dtype})
    KIND.refuse_model(tmp_path, str(tmp_path / "m"))


def test_the_files_of_the_index_are_used(tmp_path: Path) -> None:
    """Some repositories contain the weights twice, such as Mistral's consolidated.safetensors."""
    folder = put_folder(tmp_path / "m")
    (folder / "consolidated.safetensors").write_bytes(WEIGHTS)
    index_of({"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}})(folder)
    assert weight_files(folder) == ["model.safetensors"]
    assert not [*problems(folder)]


def test_a_model_that_is_absent_is_named_with_the_remedy(tmp_path: Path) -> None:
    error = KIND.absent_model(tmp_path, "org/name")
    assert error is not None
    assert error.remedy == "pull it: aiflux models pull hf:org/name"
    error = KIND.absent_model(tmp_path, str(tmp_path / "m"))
    assert error is not None
    assert error.message == f"model directory not found: {tmp_path / 'm'}"
    KIND.refuse_model(tmp_path, str(tmp_path / "m"))
    (tmp_path / "m").touch()
    error = KIND.absent_model(tmp_path, str(tmp_path / "m"))
    assert error is not None
    assert error.message == f"the model is not a directory: {tmp_path / 'm'} is a file"


def test_the_digest_is_the_commit_or_covers_the_directory(tmp_path: Path) -> None:
    assert snapshot_digest(put_snapshot(tmp_path, "org/name")) == COMMIT
    folder = put_folder(tmp_path / "m")
    first = snapshot_digest(folder)
    assert first == snapshot_digest(put_folder(tmp_path / "same"))
    (folder / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": 33}), encoding="utf-8")
    second = snapshot_digest(folder)
    put_folder(folder, weights=zeros({"a": ("BF16", [4])}))
    assert len({first, second, snapshot_digest(folder)}) == 3


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("hf:org/name", "org/name", True),
        ("hf:org/name", "Org/Name", True),
        ("hf:org/name@v1", "org/name", True),
        ("hf:org/name@v1", "org/name@v2", False),
        (f"org/name@{COMMIT}", f"org/name@{COMMIT[:9]}", True),
        (f"org/name@{COMMIT}", f"org/name@{COMMIT[:6]}", False),
        ("org/name", "org/other", False),
        ("/a/m", "/a/../a/m", True),
        ("/a/m", "/b/m", False),
        ("/a/m", "a/m", False),
        ("m:1", "m:1", True),
    ],
)
def test_names_of_one_model(one: str, other: str, same: bool) -> None:
    assert KIND.same_model(one, other) is same
    assert KIND.same_model(other, one) is same


@pytest.mark.parametrize(
    ("model", "named", "accepted"),
    [
        ("hf:org/name", "org/name", True),
        ("hf:org/name", "hf:org/name", True),
        ("hf:org/name@v1", "org/name", True),
        ("hf:org/name@v1", "org/name@v1", True),
        ("hf:org/name", "org/name@v1", False),
        ("hf:org/name@v2", "org/name@v1", False),
        (f"org/name@{COMMIT}", f"org/name@{COMMIT[:9]}", True),
        ("/a/my model", "my model", True),
        ("/a/my model", "/a/my model", True),
        ("/a/my model", "/b/my model", False),
        ("/a/name", "org/name", False),
    ],
)
def test_requests_name_the_runs_model(model: str, named: str, accepted: bool) -> None:
    """A revision in a request must be the run's."""
    assert KIND.input_rules.accepts_model(model, named) is accepted
    served = KIND.served_name(model)
    if accepted:
        edits = KIND.adapt_body("/v1/chat/completions", {"model": named}, served)
        assert {"model": named, **edits} == {"model": served}


def test_each_model_keeps_one_name() -> None:
    names = ["org/a", f"org/a@{COMMIT[:8]}", f"hf:Org/A@{COMMIT}", "org/b@v1", "org/b"]
    assert KIND.distinct_models(names) == [f"hf:Org/A@{COMMIT}", "hf:org/b@v1"]


@pytest.mark.parametrize(
    "names", [["org/a@v1", "org/a@v2"], ["/x/m", "/y/m"], ["org/a", "org/a@v1", "org/a@v2"]]
)
def test_names_that_contradict_each_other_are_an_input_error(names: list[str]) -> None:
    with pytest.raises(InputError, match=f"{names[-2]} and {names[-1]}"):
        KIND.distinct_models(names)
