"""The snapshots in a models directory: list, check, remove, pack and unpack them.

The manifest of a packed snapshot has the form of Ollama's, so that archives have one reader: every
file is a layer with its SHA-256. In addition, each layer has the file's ``path`` and the name of
its ``blob``, which is the hash that the hub has of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path, PurePosixPath
from typing import Any

from aiflux.engines.base import ListedModel, PackedModel
from aiflux.engines.ollama.staging import making_room
from aiflux.engines.ollama.store import blob_path, parse_manifest
from aiflux.engines.vllm.hub import (
    HUB,
    HubModel,
    absent,
    find_snapshot,
    is_commit,
    model_names,
    parse_hub_model,
    present_snapshot,
    problems,
    same_revision,
    store_name,
    stored_snapshot,
)
from aiflux.errors import ConfigError, ModelError
from aiflux.models.name import HUB_PREFIX
from aiflux.util.files import atomic_write, file_digest, fsync_directory, storage_error

STAGING = ".staging"
_MEDIA_TYPE = "application/vnd.aiflux.hub.file"
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PATH = re.compile(r"[^\x00-\x1f\x7f\\]{1,500}")
_CONFIG = "config.json"
_BLOCK = 1 << 20
_SHA256_DIGITS = 64


@dataclass(frozen=True)
class SnapshotFile:
    """One file of a snapshot.

    Attributes:
        path: below the snapshot, with slashes.
        blob: name of its blob: its SHA-256, or git's id of it if the hub has no SHA-256.
        digest: ``sha256:`` and 64 hexadecimal digits.
    """

    path: str
    blob: str
    digest: str
    size: int


@dataclass(frozen=True)
class Snapshot:
    """A snapshot, as its manifest describes it.

    Attributes:
        ref: branch or tag that names the commit; "" for none.
    """

    repo: str
    commit: str
    ref: str
    files: tuple[SnapshotFile, ...]

    def manifest(self) -> bytes:
        """Return the manifest."""
        layers = [
            {"mediaType": _MEDIA_TYPE, "digest": each.digest, "size": each.size,
             "path": each.path, "blob": each.blob}
            for each in self.files
        ]  # fmt: skip
        config = next(layer for layer in layers if layer["path"] == _CONFIG)
        layers.remove(config)
        content = {"schemaVersion": 2, "repo": self.repo, "commit": self.commit, "ref": self.ref,
                   "config": config, "layers": layers}  # fmt: skip
        return json.dumps(content, indent=1).encode() + b"\n"


def read_snapshot(raw: bytes) -> Snapshot:
    """Read a manifest that may come from anybody.

    Raises:
        ValueError: it is not the manifest of a snapshot, or it names a file outside of it.
    """
    parse_manifest(raw)
    content = json.loads(raw)
    repo, commit, ref = (content.get(name) for name in ("repo", "commit", "ref"))
    try:
        named = parse_hub_model(f"{HUB_PREFIX}{repo}" + (f"@{ref}" if ref else ""))
    except ConfigError as error:
        raise ValueError(error.message) from None
    if not (isinstance(repo, str) and isinstance(ref, str) and named.folder is None):
        raise ValueError("it names no model of Hugging Face")
    if not (isinstance(commit, str) and is_commit(commit)):
        raise ValueError(f"{commit!r} is not a commit")
    files = tuple(_read_file(each) for each in [content["config"], *(content["layers"] or [])])
    _refuse_clash(files)
    return Snapshot(repo, commit, ref, files)


def _read_file(layer: dict[str, Any]) -> SnapshotFile:
    path, blob, digest = layer.get("path"), layer.get("blob"), layer["digest"]
    if not (isinstance(path, str) and _PATH.fullmatch(path)):
        raise ValueError(f"{path!r} is not the path of a file")
    if path.startswith("/") or {"", ".", ".."} & {*path.split("/")}:
        raise ValueError(f"the path {path!r} is not inside of the model")
    if not (isinstance(blob, str) and _BLOB.fullmatch(blob)):
        raise ValueError(f"{blob!r} is not a hash of the hub")
    if len(blob) == _SHA256_DIGITS and digest != f"sha256:{blob}":
        raise ValueError(f"{path} has two different hashes: {blob} and {digest}")
    return SnapshotFile(path, blob, digest, layer["size"])


def _refuse_clash(files: tuple[SnapshotFile, ...]) -> None:
    """Raise ValueError if a path is named twice, or is also a folder of another."""
    paths = [PurePosixPath(each.path) for each in files]
    folders = {folder for path in paths for folder in path.parents}
    for path, times in Counter(paths).items():
        if times > 1 or path in folders:
            raise ValueError(f"it names {str(path)!r} twice")


def pack_snapshot(models_dir: Path, name: str) -> PackedModel:
    """Return a stored snapshot for an archive or a bundle. Files up to 10 MB are read and checked.

    Raises:
        ModelError: it is not stored completely, is damaged, or its files have no hashes.
    """
    model = parse_hub_model(name)
    folder = stored_snapshot(models_dir, model)
    files, blobs = [], {}
    for path in _files(folder):
        file = _packed_file(folder, path, model)
        files.append(file)
        blobs[file.digest] = Path(os.path.realpath(path))
    snapshot = Snapshot(model.repo, folder.name, _ref(models_dir, model, folder), tuple(files))
    place = f"{HUB}/{store_name(model.repo)}"
    return PackedModel(model.text, snapshot.commit, snapshot.manifest(), blobs, place)


def _packed_file(folder: Path, path: Path, model: HubModel) -> SnapshotFile:
    blob = Path(os.path.realpath(path))
    if not (path.is_symlink() and _BLOB.fullmatch(blob.name)):
        raise ModelError(
            f"{path} has no hash to compare with",
            f"pull the model to have its files checked: aiflux models pull --again {model.text}",
        )
    name = path.relative_to(folder).as_posix()
    if not blob.is_file():
        raise _damaged(model, f"{name} is missing")
    if len(blob.name) == _SHA256_DIGITS:  # compared when it is packed
        return SnapshotFile(name, blob.name, f"sha256:{blob.name}", blob.stat().st_size)
    if blob_digest(blob) != blob.name:
        raise _damaged(model, f"{name} is damaged")
    return SnapshotFile(name, blob.name, f"sha256:{file_digest(blob)}", blob.stat().st_size)


def _damaged(model: HubModel, what: str) -> ModelError:
    return ModelError(
        f"the model {model.text} is damaged: {what}",
        f"pull it again: aiflux models pull --again {model.text}",
    )


def _ref(models_dir: Path, model: HubModel, folder: Path) -> str:
    """Return the branch or tag under which a snapshot was found; "" for a commit."""
    if model.revision is None:
        return "main"
    return "" if same_revision(model.revision, folder.name) else model.revision


def arrival_folder(models_dir: Path, snapshot: Snapshot) -> Path:
    """Return where a snapshot from an archive is put together; a pull of the model uses another."""
    return models_dir / HUB / STAGING / store_name(snapshot.repo) / "import"


def place_snapshot(models_dir: Path, snapshot: Snapshot, folder: Path) -> None:
    """Move a snapshot that arrived into the hub cache.

    Args:
        folder: has its files in ``blobs``, by digest.

    Raises:
        ModelError: a file differs from the hub's.
        OSError: the directory cannot be written.
    """
    staged = folder / store_name(snapshot.repo)
    (staged / "blobs").mkdir(parents=True)
    placed: dict[str, Path] = {}
    for file in snapshot.files:
        blob = staged / "blobs" / file.blob
        if not blob.exists():
            if file.digest in placed:  # one content with two names
                shutil.copyfile(placed[file.digest], blob)
            else:
                blob_path(folder, file.digest).rename(blob)
            placed[file.digest] = blob
            if blob_digest(blob) != file.blob:
                raise ModelError(f"{file.path} does not have the hash that the hub has of it")
        link = staged / "snapshots" / snapshot.commit / file.path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(os.path.relpath(blob, link.parent)))
    move_snapshot(staged, models_dir / HUB / staged.name, snapshot.commit, snapshot.ref)


def move_snapshot(staged: Path, store: Path, commit: str, ref: str) -> None:
    """Move a snapshot that is complete into a hub cache: blobs first, its name last.

    Args:
        staged: directory of the model in staging, with the layout of ``store``.
        ref: branch or tag that names the commit from now on; "" for none.
    """
    for folder in ("blobs", "snapshots", "refs"):
        (store / folder).mkdir(parents=True, exist_ok=True)
    for blob in (staged / "blobs").iterdir():
        blob.replace(store / "blobs" / blob.name)
    fsync_directory(store / "blobs")
    target = store / "snapshots" / commit
    if target.is_dir():
        target.rename(staged / "replaced")
    (staged / "snapshots" / commit).rename(target)
    fsync_directory(target.parent)
    if ref:
        noted = store / "refs" / ref
        noted.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(noted) as file:
            file.write(commit.encode())


def blob_digest(path: Path) -> str:
    """Return a blob's hash, of the kind that its name has."""
    return file_digest(path) if len(path.name) == _SHA256_DIGITS else git_digest(path)


def git_digest(path: Path) -> str:
    """Return a file's blob id as git computes it, hex."""
    digest = sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def stored_models(models_dir: Path) -> list[ListedModel]:
    """Return the snapshots in a models directory, each under all names that it has."""
    found = []
    for root in (models_dir / HUB, models_dir):
        for snapshot in sorted(root.glob("models--*/snapshots/*")):
            found += [_describe(name, snapshot) for name in model_names(snapshot)]
    return found


def stored_model(models_dir: Path, name: str) -> ListedModel:
    """Return one of them.

    Raises:
        ModelError: it is not stored.
    """
    model = parse_hub_model(name)
    return _describe(model.text, present_snapshot(models_dir, model))


def _describe(name: str, snapshot: Path) -> ListedModel:
    size = sum(path.stat().st_size for path in _files(snapshot) if path.is_file())
    return ListedModel(name, snapshot.name, size, next(problems(snapshot), ""))


def _files(snapshot: Path) -> Iterator[Path]:
    return (path for path in sorted(snapshot.rglob("*")) if path.is_symlink() or path.is_file())


def damaged_files(models_dir: Path, name: str, on_bytes: Callable[[int], None]) -> list[str]:
    """Read every file of a snapshot, and return what is wrong with which.

    A blob's name is the hash that the hub had of it when it was pulled.

    Raises:
        ModelError: the snapshot is not stored, or its files have no hashes.
    """
    snapshot = present_snapshot(models_dir, parse_hub_model(name))
    wrong = [*problems(snapshot)]
    for path in _files(snapshot):
        blob = Path(os.path.realpath(path))
        if not path.is_symlink():
            raise ModelError(
                f"{path} has no hash to compare with", "pull the model to have its files checked"
            )
        if not blob.exists():
            wrong.append(f"{path.name} is missing")
            continue
        if blob_digest(blob) != blob.name:
            wrong.append(f"{path.name} is damaged")
        on_bytes(blob.stat().st_size)
    return wrong


def remove_model(models_dir: Path, name: str, say: Callable[[str], None]) -> int:
    """Remove a snapshot, and what a pull of it left; return the bytes that are free now.

    Files that other snapshots of the model use stay.

    Raises:
        ModelError: it is not stored.
        StorageError: the directory cannot be written.
    """
    model = parse_hub_model(name)
    snapshot = find_snapshot(models_dir, model)
    with making_room(models_dir, f"removing {model.text}", say):
        staged = [*(models_dir / HUB / STAGING).glob(store_name(model.repo))]
        if snapshot is None and not staged:
            raise absent(models_dir, model)
        try:
            freed = sum(_tree_size(folder) for folder in staged)
            for folder in staged:
                shutil.rmtree(folder)
            return freed + (0 if snapshot is None else _remove(snapshot))
        except OSError as error:
            raise storage_error(error, models_dir) from error


def _remove(snapshot: Path) -> int:
    store = snapshot.parents[1]
    before = _tree_size(store)
    for ref in (path for path in store.glob("refs/**/*") if path.is_file()):
        if ref.read_text(encoding="ascii", errors="replace").strip() == snapshot.name:
            ref.unlink()
    shutil.rmtree(snapshot)
    others = [*store.glob("snapshots/*")]
    if not others:
        shutil.rmtree(store)
        return before
    used = {os.path.realpath(path) for other in others for path in _files(other)}
    for blob in store.glob("blobs/*"):
        if os.path.realpath(blob) not in used:
            blob.unlink()
    return before - _tree_size(store)


def _tree_size(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)
